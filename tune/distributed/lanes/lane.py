"""A lane: one Ray Train run whose workers keep a base model resident and train order after order."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.actor import ActorHandle
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig

from macdrop.errors import MacDropError
from tune.config.run_spec import RaySpec, TrainSpec
from tune.distributed.cluster.placement_groups import Trainer
from tune.distributed.lanes.dispatcher import DispatcherLost, answer, ask, call
from tune.errors import ResourceError, TrainingDiverged
from tune.scheduling.failures import Failure, classify
from tune.scheduling.queue import TrainTask
from tune.storage.states import TaskState
from tune.training.observer import Word
from tune.training.watchdog import Watchdog, stack_file, stacks

#: How often an idle lane asks for an order, and for how long before it lets the other ranks know that it still lives.
ASK_EVERY_S = 0.1
TELL_RANKS_EVERY_S = 5.0
#: Times that Ray Train replaces a lane's worker group within one run; a new run follows (`lane_pool`).
RESTARTS = 3
#: Ranks that wait for each other in vain give up within this of one another.
STACKS_S = 2.0


def run_lane(name: str, dispatcher: ActorHandle, spec: RaySpec, gpus_per_worker: float, storage: Path) -> None:
    """Start a lane and wait for its end; `TaskQueue.close` ends it. A `Reaper` must be at work beside it.

    Raises:
        ray.train.TrainingFailedError: workers died more often than `RESTARTS`.
        ray.exceptions.RayActorError: the run's controller died.
    """
    told = {"lane": name, "dispatcher": dispatcher, "step_timeout_s": spec.step_timeout_s}
    trainer(
        _work,
        {**told, "threads": spec.threads_per_worker},
        spec,
        gpus_per_worker,
        RunConfig(
            name=name,
            storage_path=str(storage),
            # A lane that waits for resources has not failed.
            failure_config=FailureConfig(max_failures=RESTARTS, controller_failure_limit=-1),
            callbacks=[_TellLoss(**told)],
        ),
    ).fit()


def trainer(
    work: Callable[[dict[str, Any]], None], config: dict[str, Any], spec: RaySpec, gpus: float, run: RunConfig
) -> Trainer:
    """A Train run of `spec.num_workers` workers with `gpus` each."""
    resources = {"CPU": spec.cpus_per_worker} | ({"GPU": gpus} if gpus else {})
    return Trainer(
        work,
        train_loop_config=config,
        # Where ranks wait in vain, the watchdog speaks first: it knows where.
        torch_config=TorchConfig(timeout_s=int(collective_timeout_s(spec.step_timeout_s))),
        scaling_config=ScalingConfig(num_workers=spec.num_workers, use_gpu=bool(gpus), resources_per_worker=resources),
        run_config=run,
    )


def collective_timeout_s(step_timeout_s: float) -> float:
    """How long ranks wait for one another: half an hour is torch's own, for a rank that tokenises or loads a model."""
    return max(1800.0, 2 * step_timeout_s)


class _TellLoss(UserCallback):
    """Runs in the lane's controller: tells the dispatcher why workers died, so that another lane can take the order."""

    def __init__(self, dispatcher: ActorHandle, lane: str, step_timeout_s: float) -> None:
        self.dispatcher, self.lane, self.step_timeout_s = dispatcher, lane, step_timeout_s

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        held = call(self.dispatcher, "held", self.lane)
        folder = Path(held[0].folder) if held else None
        tell_loss(self.dispatcher, self.lane, why(worker_exceptions, folder, self.step_timeout_s))


def why(errors: dict[int, Exception], folder: Path | None, step_timeout_s: float) -> Failure:
    """What failed, with the stacks that the ranks left in the trial's folder, if they hung."""
    if folder is None or not stacks(folder):
        return classify(errors)
    time.sleep(STACKS_S)
    named = [str(file.relative_to(folder.parent.parent)) for file in stacks(folder)]
    return classify(errors, stacks=named, step_timeout_s=step_timeout_s)


def tell_loss(dispatcher: ActorHandle, lane: str, failure: Failure) -> bool:
    """A lane is lost: its order is queued again, or fails if that is its fault. Returns whether it had one."""
    held = call(dispatcher, "held", lane)
    if held:
        task, step = held
        call(dispatcher, "lost", task.id, failure.reason, failure.attempts, step, failure.kind)
    call(dispatcher, "lane_down", lane, failure.reason)
    return held is not None


def _work(config: dict[str, Any]) -> None:
    """What every worker of a lane runs: take orders until the lane is closed."""
    import torch
    import torch.distributed as dist
    from ray.train.torch import get_device

    from tune.training.process_group import prepare_process

    if torch.cuda.is_available():
        # Ray shows a worker the GPUs it may use; DeepSpeed takes the one that LOCAL_RANK numbers.
        os.environ["LOCAL_RANK"] = str(get_device().index or 0)
    prepare_process(config["threads"])
    _silence()
    dispatcher, lane = config["dispatcher"], config["lane"]
    # Orders travel between ranks over gloo also where gradients travel over NCCL: they are Python objects.
    control = dist.new_group(backend="gloo", timeout=timedelta(seconds=collective_timeout_s(config["step_timeout_s"])))
    nodes: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(nodes, ray.get_runtime_context().get_node_id(), group=control)
    if dist.get_rank() == 0:
        host = ray.util.get_node_ip_address()
        call(dispatcher, "lane_up", lane, dist.get_world_size(), host, nodes)
    engine = None
    while True:
        message = [_ask(dispatcher, lane, engine) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(message, src=0, group=control)
        if message[0] == "closed":
            return
        if message[0] != "idle":
            file = stack_file(Path(message[0].folder), dist.get_rank())
            with Watchdog(file, config["step_timeout_s"]) as watchdog:
                engine = _train(dispatcher, lane, message[0], engine, watchdog)


def _ask(dispatcher: ActorHandle, lane: str, engine: Any) -> TrainTask | str:
    """Rank 0: the next order, `idle` when there is none for a while, `closed` when there will be none."""
    deadline = time.monotonic() + TELL_RANKS_EVERY_S
    while time.monotonic() < deadline:
        task = call(dispatcher, "take", lane, engine.key if engine else None)
        if task is not None:
            return task
        if call(dispatcher, "closing", lane):
            return "closed"
        time.sleep(ASK_EVERY_S)
    return "idle"


def _train(dispatcher: ActorHandle, lane: str, task: TrainTask, engine: Any, watchdog: Watchdog) -> Any:
    """Train one order and tell the dispatcher; returns the engine to go on with."""
    from dataclasses import asdict

    import torch.distributed as dist

    from macdrop import MassiveWeights
    from tune.data import dataset as data
    from tune.storage.atomic import ensure_folder
    from tune.training.collectives import all_do, rank0_does
    from tune.training.engine import Engine
    from tune.training.finetune import finetune
    from tune.training.reproduce import write_script

    first = dist.get_rank() == 0
    try:
        spec = TrainSpec.model_validate(task.spec)
        if engine is None or engine.key != task.engine_key:
            del engine  # Two bases at once may not fit.
            engine = None
            engine = Engine(spec)
        prepared = all_do(lambda: data.load(data.prepare(spec, engine.tokenizer, task.data)))
        weights = all_do(lambda: MassiveWeights.load(task.weights)) if task.weights else None
        folder = Path(task.folder)
        # Of a run that is there: a folder that is gone is not made anew, but waited for.
        rank0_does(lambda: ensure_folder(folder, folder.parents[1]))
        scan, world = Path(task.weights or ""), dist.get_world_size()
        rank0_does(lambda: write_script(folder, prepared, weights, scan, world))
        outcome = finetune(
            engine,
            spec,
            prepared,
            folder,
            weights=weights,
            observe=_Relay(dispatcher, lane, task) if first else None,
            beat=watchdog.beat,
        )
    except DispatcherLost:
        raise  # Nobody is there to be told.
    except MacDropError as error:
        # Raised on every rank alike: the lane goes on with the next order, and with the engine if no step was cut.
        if first:
            state = TaskState.DIVERGED if isinstance(error, TrainingDiverged) else TaskState.FAILED
            call(dispatcher, "failed", task.id, state, str(error), lane)
        return engine if isinstance(error, (TrainingDiverged, ResourceError, ValueError)) else None
    # Any other error is on some ranks only, or in the middle of a step: the worker group is made anew.
    if first:
        call(dispatcher, "trained", task.id, asdict(outcome), lane)
    return engine


class _Relay:
    """Rank 0's observer: writes each step's metrics into the trial's folder and passes them on without waiting."""

    def __init__(self, dispatcher: ActorHandle, lane: str, task: TrainTask) -> None:
        from tune.storage.run_folder import TrialRecord

        self.dispatcher, self.lane, self.task = dispatcher, lane, task
        self.record = TrialRecord(Path(task.folder), within=Path(task.folder))
        self.answer: ray.ObjectRef | None = None

    def __call__(self, metrics: dict[str, Any]) -> Word:
        self.record.log([metrics])
        # The answer to the last report has arrived by now, so that no step waits for the dispatcher.
        word = Word.GO_ON if self.answer is None else answer(self.answer)
        self.answer = ask(self.dispatcher, "progress", self.task.id, metrics, self.lane)
        return word


def _silence() -> None:
    import warnings

    warnings.filterwarnings("ignore")
    for name in ("DeepSpeed", "transformers", "peft", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)

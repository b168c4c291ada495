"""A lane: one Ray Train run whose workers keep a base model resident and train task after task."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from enum import Enum, auto
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.actor import ActorHandle
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, get_device

from macdrop import MassiveWeights
from macdrop.errors import MacDropError
from tune.config.run_spec import RaySpec, TrainSpec
from tune.data import dataset
from tune.distributed.cluster.placement_groups import Trainer
from tune.distributed.lanes.dispatcher import LANES, DispatcherLost, answer, ask, call, wait_for
from tune.errors import ResourceError, TrainingDiverged
from tune.scheduling.allocation import LaneKind
from tune.scheduling.failures import Failure, classify
from tune.scheduling.tasks import TrainTask
from tune.storage.atomic import ensure_folder
from tune.storage.states import TaskState
from tune.storage.trial_folder import TrialFolder
from tune.training.collectives import all_do, rank0_does
from tune.training.engine import Engine
from tune.training.finetune import finetune
from tune.training.observer import Word
from tune.training.process_group import prepare_process
from tune.training.quiet import quiet_worker
from tune.training.trial_setup import record_setup
from tune.training.watchdog import Watchdog, stack_file, stacks

#: How long an idle lane waits for a task before it gives the other ranks a sign of life, and asks again. Short, as a
#: lane that died in the meantime would still be given one, which then counts as an attempt.
HEARTBEAT_S = 1.0
#: How often Ray Train replaces a lane's worker group within one run; a new run follows (`lane_pool`).
RESTARTS = 3
#: Ranks that wait for each other in vain give up within this many seconds of one another.
STACKS_S = 2.0


class Idle(Enum):
    """The message of rank 0 to the other ranks when it has no task."""

    NOTHING_YET = auto()
    CLOSED = auto()


def run_lane(name: str, dispatcher: ActorHandle, spec: RaySpec, kind: LaneKind, storage: Path) -> None:
    """Start a lane and wait for its end; `TaskQueue.close` ends it. Needs a running `Reaper`.

    Raises:
        ray.train.TrainingFailedError: workers died more often than `RESTARTS`.
        ray.exceptions.RayActorError: the run's controller died.
    """
    config = {
        "lane": name,
        "pool": str(kind),
        "dispatcher": dispatcher,
        "step_timeout_s": spec.step_timeout_s,
        "threads": spec.threads_per_worker,
    }
    # A lane that waits for resources has not failed.
    run = run_config(name, storage, RESTARTS, -1, _ReportLoss(dispatcher, name, spec.step_timeout_s))
    trainer(_work, config, spec, kind.each.gpus, run, named=True).fit()


def run_config(name: str, storage: Path, failures: int, controller_failures: int, callback: UserCallback) -> RunConfig:
    """Return a Train V2 run's configuration; -1 failures are any number of them."""
    # Type checkers see the names of Train V1, which takes neither of these arguments.
    limits = FailureConfig(max_failures=failures, controller_failure_limit=controller_failures)  # type: ignore[call-arg]
    callbacks: list[Any] = [callback]
    return RunConfig(name=name, storage_path=str(storage), failure_config=limits, callbacks=callbacks)


def trainer(
    work: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    spec: RaySpec,
    gpus: float,
    run: RunConfig,
    *,
    named: bool = False,
) -> Trainer:
    """Return a Train run of `spec.num_workers` workers with `gpus` each; named: see `Trainer`."""
    resources = {"CPU": spec.cpus_per_worker} | ({"GPU": gpus} if gpus else {})
    return Trainer(
        work,
        train_loop_config=config,
        # Longer than the watchdog's timeout: it reports where a rank hangs.
        torch_config=TorchConfig(timeout_s=int(collective_timeout_s(spec.step_timeout_s))),
        scaling_config=ScalingConfig(num_workers=spec.num_workers, use_gpu=bool(gpus), resources_per_worker=resources),
        run_config=run,
        named=named,
    )


def collective_timeout_s(step_timeout_s: float) -> float:
    """Return how long ranks wait for one another: torch's half an hour, while one tokenises or loads a model."""
    return max(1800.0, 2 * step_timeout_s)


class _ReportLoss(UserCallback):
    """Runs in the lane's controller; reports why workers died, so that another lane can take the task."""

    def __init__(self, dispatcher: ActorHandle, lane: str, step_timeout_s: float) -> None:
        self.dispatcher, self.lane, self.step_timeout_s = dispatcher, lane, step_timeout_s

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        held = call(self.dispatcher, "held", self.lane)
        folder = Path(held[0].folder) if held else None
        report_loss(self.dispatcher, self.lane, why(worker_exceptions, folder, self.step_timeout_s))


def why(errors: dict[int, Exception], folder: Path | None, step_timeout_s: float) -> Failure:
    """Classify a failure, with the stacks that hanging ranks left in the trial's folder."""
    if folder is None or not stacks(folder):
        return classify(errors)
    time.sleep(STACKS_S)
    named = [str(file.relative_to(folder.parent.parent)) for file in stacks(folder)]
    return classify(errors, stacks=named, step_timeout_s=step_timeout_s)


def report_loss(dispatcher: ActorHandle, lane: str, failure: Failure) -> bool:
    """Report a lost lane: its task is queued again, or fails after its attempts. Return whether it had a task."""
    held = call(dispatcher, "held", lane)
    if held:
        task, step = held
        call(dispatcher, "lost", task.id, failure.reason, failure.attempts, step, failure.kind)
    call(dispatcher, "lane_down", lane, failure.reason)
    return held is not None


def _work(config: dict[str, Any]) -> None:
    """Take and train tasks until the lane is closed; runs in every worker of a lane."""
    if torch.cuda.is_available():
        # Before DeepSpeed is imported: Ray shows a worker its own GPUs, of which DeepSpeed takes number LOCAL_RANK.
        os.environ["LOCAL_RANK"] = str(get_device().index or 0)
    prepare_process(config["threads"])
    quiet_worker()
    dispatcher, lane = config["dispatcher"], config["lane"]
    # Tasks travel between ranks over gloo even where gradients use NCCL: they are Python objects.
    control = dist.new_group(backend="gloo", timeout=timedelta(seconds=collective_timeout_s(config["step_timeout_s"])))
    nodes: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(nodes, ray.get_runtime_context().get_node_id(), group=control)
    if dist.get_rank() == 0:
        host = ray.util.get_node_ip_address()
        call(dispatcher, "lane_up", lane, config["pool"], host, nodes)
    engine: Engine | None = None
    while True:
        message: list[TrainTask | Idle] = [Idle.NOTHING_YET]
        if dist.get_rank() == 0:
            message = [_next(dispatcher, lane, engine)]
        dist.broadcast_object_list(message, src=0, group=control)
        (task,) = message
        if task is Idle.CLOSED:
            return
        if isinstance(task, TrainTask):
            file = stack_file(Path(task.folder), dist.get_rank())
            with Watchdog(file, config["step_timeout_s"]) as watchdog:
                engine = _train(dispatcher, lane, task, engine, watchdog)


def _next(dispatcher: ActorHandle, lane: str, engine: Engine | None) -> TrainTask | Idle:
    """Return the next task, on rank 0; wait for one for a while."""
    key = engine.key if engine else None
    task = answer(wait_for(dispatcher, HEARTBEAT_S, LANES, "next_task", lane, key))
    if task is None:
        return Idle.NOTHING_YET
    return Idle.CLOSED if task is Word.LEAVE else task


def _train(
    dispatcher: ActorHandle, lane: str, task: TrainTask, engine: Engine | None, watchdog: Watchdog
) -> Engine | None:
    """Train one task and report its end; return the engine for the next one, None if it cannot be reused."""
    first = dist.get_rank() == 0
    try:
        spec = TrainSpec.model_validate(task.spec)
        if engine is None or engine.key != task.engine_key:
            del engine  # Two bases at once may not fit.
            engine = None
            engine = Engine(spec)
        tokenizer, file = engine.tokenizer, task.weights
        prepared = all_do(lambda: dataset.load(dataset.prepare(spec, tokenizer, task.data)))
        weights = all_do(lambda: MassiveWeights.load(file)) if file else None
        folder = Path(task.folder)
        # The run folder must exist: if its storage is away, it is waited for, not created.
        rank0_does(lambda: ensure_folder(folder, folder.parents[1]))
        scan, world, begun = Path(task.weights or ""), dist.get_world_size(), task.workers_at_start
        outcome = finetune(
            engine,
            spec,
            prepared,
            folder,
            weights=weights,
            observe=_Relay(dispatcher, lane, task) if first else None,
            begin=lambda: record_setup(folder, prepared, weights, scan, world, begun, spec.slimadam_rules),
            beat=watchdog.beat,
            workers=begun,
        )
    except DispatcherLost:
        raise  # There is nobody to report to.
    except MacDropError as error:
        # Raised on every rank alike: the lane takes the next task, and keeps the engine if no step was interrupted.
        if first:
            state = TaskState.DIVERGED if isinstance(error, TrainingDiverged) else TaskState.FAILED
            call(dispatcher, "failed", task.id, state, str(error), lane)
        return engine if isinstance(error, (TrainingDiverged, ResourceError, ValueError)) else None
    # Any other error is on some ranks only, or within a step: Ray Train replaces the worker group.
    if first:
        call(dispatcher, "trained", task.id, asdict(outcome), lane)
    return engine


class _Relay:
    """Rank 0's observer: writes each step's metrics into the trial's folder and forwards them without waiting."""

    def __init__(self, dispatcher: ActorHandle, lane: str, task: TrainTask) -> None:
        self.dispatcher, self.lane, self.task = dispatcher, lane, task
        self.record = TrialFolder(Path(task.folder), within=Path(task.folder))
        self.answer: ray.ObjectRef | None = None

    def __call__(self, metrics: dict[str, Any]) -> Word:
        self.record.log([metrics])
        # The answer to the previous report has arrived by now, so no step waits for the dispatcher.
        word: Word = Word.GO_ON if self.answer is None else answer(self.answer)
        self.answer = ask(self.dispatcher, "progress", self.task.id, metrics, self.lane)
        return word

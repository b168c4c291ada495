"""A lane: one Ray Train run whose workers keep a base model resident and train order after order."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.actor import ActorHandle
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from macdrop.errors import MacDropError, TrainingDiverged
from tune.dispatch import DispatcherLost, answer, ask, call
from tune.orders import GO_ON, Order
from tune.spec import RaySpec, TrainSpec

#: How often an idle lane asks for an order, and for how long before it lets the other ranks know that it still lives.
ASK_EVERY_S = 0.1
TELL_RANKS_EVERY_S = 5.0
#: Times that Ray Train replaces a lane's worker group after the death of a worker.
RESTARTS = 5


def run_lane(name: str, dispatcher: ActorHandle, spec: RaySpec, gpus_per_worker: float, storage: Path) -> None:
    """Start a lane and wait for its end; `OrderBook.close` ends it.

    Raises:
        ray.train.TrainingFailedError: workers died more often than `RESTARTS`.
    """
    resources = {"CPU": spec.cpus_per_worker}
    if gpus_per_worker:
        resources["GPU"] = gpus_per_worker
    TorchTrainer(
        _work,
        train_loop_config={"lane": name, "dispatcher": dispatcher, "threads": spec.threads_per_worker},
        scaling_config=ScalingConfig(
            num_workers=spec.num_workers,
            use_gpu=bool(gpus_per_worker),
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=RESTARTS, controller_failure_limit=RESTARTS),
        ),
    ).fit()


def _work(config: dict[str, Any]) -> None:
    """What every worker of a lane runs: take orders until the lane is closed."""
    import torch
    import torch.distributed as dist
    from ray.train.torch import get_device

    from tune.process import prepare_process

    if torch.cuda.is_available():
        # Ray shows a worker the GPUs it may use; DeepSpeed takes the one that LOCAL_RANK numbers.
        os.environ["LOCAL_RANK"] = str(get_device().index or 0)
    prepare_process(config["threads"])
    _silence()
    dispatcher, lane = config["dispatcher"], config["lane"]
    # Orders travel between ranks over gloo also where gradients travel over NCCL: they are Python objects.
    control = dist.new_group(backend="gloo")
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
            engine = _train(dispatcher, lane, message[0], engine)


def _ask(dispatcher: ActorHandle, lane: str, engine: Any) -> Order | str:
    """Rank 0: the next order, `idle` when there is none for a while, `closed` when there will be none."""
    deadline = time.monotonic() + TELL_RANKS_EVERY_S
    while time.monotonic() < deadline:
        order = call(dispatcher, "take", lane, engine.key if engine else None)
        if order is not None:
            return order
        if call(dispatcher, "closing", lane):
            return "closed"
        time.sleep(ASK_EVERY_S)
    return "idle"


def _train(dispatcher: ActorHandle, lane: str, order: Order, engine: Any) -> Any:
    """Train one order and tell the dispatcher; returns the engine to go on with."""
    from dataclasses import asdict

    import torch.distributed as dist

    from macdrop import MassiveWeights
    from tune import data
    from tune.engine import Engine
    from tune.files import ensure_folder
    from tune.finetune import finetune
    from tune.ranks import rank0_does
    from tune.reproduce import write_script

    first = dist.get_rank() == 0
    try:
        spec = TrainSpec.model_validate(order.spec)
        if engine is None or engine.key != order.engine_key:
            del engine  # Two bases at once may not fit.
            engine = None
            engine = Engine(spec)
        prepared = data.load(data.prepare(spec, engine.tokenizer, order.data))
        weights = MassiveWeights.load(order.weights) if order.weights else None
        folder = Path(order.folder)
        # Of a run that is there: a folder that is gone is not made anew, but waited for.
        rank0_does(lambda: ensure_folder(folder, folder.parents[1]))
        scan, world = Path(order.weights or ""), dist.get_world_size()
        rank0_does(lambda: write_script(folder, prepared, weights, scan, world))
        outcome = finetune(
            engine,
            spec,
            prepared,
            folder,
            weights=weights,
            observe=_Relay(dispatcher, lane, order) if first else None,
        )
    except DispatcherLost:
        raise  # Nobody is there to be told.
    except MacDropError as error:
        # Raised on every rank alike: the lane goes on with the next order, and with the engine if no step was cut.
        if first:
            state = "diverged" if isinstance(error, TrainingDiverged) else "failed"
            call(dispatcher, "failed", order.id, state, str(error), lane)
        return engine if isinstance(error, (TrainingDiverged, ValueError)) else None
    except Exception as error:
        # On some ranks only, or in the middle of a step: the worker group must be made anew.
        call(dispatcher, "lost", order.id, f"{type(error).__name__}: {error}")
        raise
    if first:
        call(dispatcher, "trained", order.id, asdict(outcome), lane)
    return engine


class _Relay:
    """Rank 0's observer: writes each step's metrics into the trial's folder and passes them on without waiting."""

    def __init__(self, dispatcher: ActorHandle, lane: str, order: Order) -> None:
        from tune.journal import TrialRecord

        self.dispatcher, self.lane, self.order = dispatcher, lane, order
        self.record = TrialRecord(Path(order.folder), within=Path(order.folder))
        self.answer: ray.ObjectRef | None = None

    def __call__(self, metrics: dict[str, Any]) -> str:
        self.record.log([metrics])
        # The answer to the last report has arrived by now, so that no step waits for the dispatcher.
        word = GO_ON if self.answer is None else answer(self.answer)
        self.answer = ask(self.dispatcher, "progress", self.order.id, metrics, self.lane)
        return word


def _silence() -> None:
    import warnings

    warnings.filterwarnings("ignore")
    for name in ("DeepSpeed", "transformers", "peft", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)

"""One fine-tuning on Ray Train workers, for `macdrop train` with ray.num_workers above one."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
import torch.distributed as dist
from ray.exceptions import RayActorError
from ray.train import UserCallback

from macdrop import errors as method_errors
from macdrop.errors import MacDropError
from tune import errors as sweep_errors
from tune.config.run_spec import RaySpec, TrainSpec, dump
from tune.distributed.cluster.placement_groups import Reaper, Trainer, end_runs
from tune.distributed.cluster.ray_cluster import check_cluster, connect
from tune.distributed.lanes.lane import run_config, trainer, why
from tune.scheduling.failures import of_run
from tune.scheduling.resources import check_local, gpu_shares, one_lane
from tune.storage.atomic import atomic_write_json
from tune.storage.json_lines import read_jsonl
from tune.training.finetune import Outcome
from tune.training.observer import Observer
from tune.training.single import train_here
from tune.training.watchdog import Watchdog, stack_file

#: How often a run is started whose controller gets killed.
RUNS = 3
#: How long to wait for the end of a run that was killed.
CLOSE_S = 5.0
#: How often new metrics are looked for.
FOLLOW_EVERY_S = 0.3


class _Limit(UserCallback):
    """Runs in the controller; ends a run after as many failures as its kind of failure allows."""

    def __init__(self, folder: Path, step_timeout_s: float) -> None:
        self.folder, self.step_timeout_s, self.failures = folder, step_timeout_s, 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        failure = why(worker_exceptions, self.folder, self.step_timeout_s)
        self.failures += 1
        if self.failures >= failure.attempts:
            # An exception in a callback ends the run; Train's own limits do not distinguish kinds of failure.
            raise MacDropError(failure.reason)


def train_on_workers(spec: RaySpec, train_spec: TrainSpec, folder: Path, *, observe: Observer) -> Outcome:
    """Train on Ray Train workers; `observe` receives the metrics that rank 0 writes, as they appear.

    Raises:
        MacDropError: as the workers raised it, or a short form of any other error.
    """
    file = folder / "metrics.jsonl"
    seen = len(read_jsonl(file)) if file.is_file() else 0
    with Workers(spec, train_spec, folder) as workers:
        while True:
            finished = workers.wait(FOLLOW_EVERY_S)
            rows = read_jsonl(file) if file.is_file() else []
            for metrics in rows[seen:]:
                observe(metrics)
            seen = len(rows)
            if finished:
                return workers.outcome()


class Workers:
    """A Ray Train run in a thread; leaving the `with` block shuts down Ray if it was started here."""

    def __init__(self, spec: RaySpec, train_spec: TrainSpec, folder: Path) -> None:
        self._folder = folder.absolute()
        self._error: BaseException | None = None
        spec = one_lane(spec)
        check_local(spec)
        self._joined = connect(spec)[1]
        gpus = gpu_shares(spec, check_cluster(spec, lambda text: print(text, file=sys.stderr))).per_worker
        run = trainer(
            _work,
            {
                "spec": dump(train_spec),
                "folder": str(self._folder),
                "threads": spec.threads_per_worker,
                "step_timeout_s": spec.step_timeout_s,
            },
            spec,
            gpus,
            # `_Limit` decides how often workers may fail; the controller fails once per minute without resources.
            run_config(
                f"train-{int(time.time())}",
                self._folder / "ray",
                failures=-1,
                controller_failures=math.ceil(spec.patience_s / 60),
                callback=_Limit(self._folder, spec.step_timeout_s),
            ),
        )
        self._reaper = Reaper()
        self._thread = threading.Thread(target=self._fit, args=(run,), name="workers", daemon=True)
        self._thread.start()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._thread.is_alive():
            end_runs()
            self._thread.join(timeout=CLOSE_S)
        self._reaper.close()
        if self._joined:
            ray.shutdown()

    def wait(self, seconds: float) -> bool:
        """Wait up to `seconds`; return True once the run has ended."""
        self._thread.join(timeout=seconds)
        return not self._thread.is_alive()

    def outcome(self) -> Outcome:
        """Return how the run ended.

        Raises:
            MacDropError: our own error as a worker raised it, or a short form of any other.
        """
        failure = self._folder / "error.json"
        if failure.is_file():
            raised = json.loads(failure.read_text())
            failure.unlink()
            raise _error(raised["type"], raised["message"])
        if self._error is not None:
            raise MacDropError(f"The workers failed. {of_run(self._error).reason}") from None
        record = json.loads((self._folder / "trial.json").read_text())
        return Outcome(**{name: record[name] for name in Outcome.__dataclass_fields__})

    def _fit(self, run: Trainer) -> None:
        for _ in range(RUNS):
            try:
                self._error = None
                run.fit()
                return
            except RayActorError as error:
                # The controller was killed, and its workers with it: continue from the newest checkpoint.
                self._error = error
            except Exception as error:
                self._error = error
                return


def _error(name: str, message: str) -> MacDropError:
    """Rebuild one of our errors from the name of its class."""
    known = {**vars(method_errors), **vars(sweep_errors)}
    kind: type[MacDropError] = known.get(name, MacDropError)
    return kind(message)


def _work(config: dict[str, Any]) -> None:
    """Train, in every worker."""
    folder = Path(config["folder"])
    try:
        with Watchdog(stack_file(folder, dist.get_rank()), config["step_timeout_s"]) as watchdog:
            spec = TrainSpec.model_validate(config["spec"])
            train_here(spec, folder, observe=None, threads=config["threads"], beat=watchdog.beat)
    except MacDropError as error:
        # Raised on every rank alike; re-raised, it would only make Ray Train retry.
        if dist.get_rank() == 0:
            atomic_write_json(folder / "error.json", {"type": type(error).__name__, "message": str(error)})

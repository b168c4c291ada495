"""One fine-tuning on Ray Train workers: what `macdrop train` does with ray.num_workers above one."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, UserCallback

from macdrop.errors import MacDropError
from tune.config.run_spec import RaySpec, TrainSpec, dump
from tune.distributed.cluster.placement_groups import Reaper, Trainer, end_runs
from tune.distributed.cluster.ray_cluster import check_cluster, connect
from tune.distributed.lanes.lane import trainer, why
from tune.scheduling.failures import of_run
from tune.scheduling.resources import gpu_shares, one_lane
from tune.training.finetune import Outcome
from tune.training.watchdog import Watchdog, stack_file

#: Times that a run is started whose controller was killed.
RUNS = 3
#: How long a run that was killed is waited for.
CLOSE_S = 5.0


class _Limit(UserCallback):
    """Runs in the controller: ends a run that fails as often as that kind of failure may happen to it."""

    def __init__(self, folder: Path, step_timeout_s: float) -> None:
        self.folder, self.step_timeout_s, self.failures = folder, step_timeout_s, 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        failure = why(worker_exceptions, self.folder, self.step_timeout_s)
        self.failures += 1
        if self.failures >= failure.attempts:
            # What a callback raises ends the run, which Train's own limits cannot do by the kind of failure.
            raise MacDropError(failure.reason)


class Workers:
    """A Ray Train run in a thread; leaving the `with` block shuts Ray down if it was started here."""

    def __init__(self, spec: RaySpec, train_spec: TrainSpec, folder: Path) -> None:
        self._folder = folder.absolute()
        self._error: BaseException | None = None
        spec = one_lane(spec)
        self._joined = connect(spec)[1]
        gpus = gpu_shares(spec, check_cluster(spec, lambda text: print(text, file=sys.stderr)))[0]
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
            RunConfig(
                name=f"train-{int(time.time())}",
                storage_path=str(self._folder / "ray"),
                # How often workers may fail is `_Limit`'s to say; resources are waited for by the minute.
                failure_config=FailureConfig(
                    max_failures=-1, controller_failure_limit=math.ceil(spec.patience_s / 60)
                ),
                callbacks=[_Limit(self._folder, spec.step_timeout_s)],
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
        """Wait up to `seconds`; True once the run has ended."""
        self._thread.join(timeout=seconds)
        return not self._thread.is_alive()

    def outcome(self) -> Outcome:
        """How the run ended.

        Raises:
            MacDropError: our own error as a worker raised it, or a short form of any other.
        """
        failure = self._folder / "error.json"
        if failure.is_file():
            from macdrop import errors

            told = json.loads(failure.read_text())
            failure.unlink()
            raise getattr(errors, told["type"], MacDropError)(told["message"])
        if self._error is not None:
            raise MacDropError(f"The workers failed. {of_run(self._error).reason}") from None
        told = json.loads((self._folder / "trial.json").read_text())
        return Outcome(**{name: told[name] for name in Outcome.__dataclass_fields__})

    def _fit(self, run: Trainer) -> None:
        for _ in range(RUNS):
            try:
                self._error = None
                run.fit()
                return
            except RayActorError as error:
                # The controller was killed, and its workers with it; the newest checkpoint counts.
                self._error = error
            except Exception as error:
                self._error = error
                return


def _work(config: dict[str, Any]) -> None:
    import torch.distributed as dist

    from tune.storage.atomic import atomic_write_json
    from tune.training.single import train_here

    folder = Path(config["folder"])
    try:
        with Watchdog(stack_file(folder, dist.get_rank()), config["step_timeout_s"]) as watchdog:
            spec = TrainSpec.model_validate(config["spec"])
            train_here(spec, folder, observe=None, threads=config["threads"], beat=watchdog.beat)
    except MacDropError as error:
        # Raised on every rank alike; raising it on would only make Ray Train try again.
        if dist.get_rank() == 0:
            atomic_write_json(folder / "error.json", {"type": type(error).__name__, "message": str(error)})

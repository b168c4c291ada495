"""One fine-tuning on Ray Train workers: what `macdrop train` does with ray.num_workers above one."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from macdrop.errors import MacDropError
from tune.cluster_state import check_cluster, connect
from tune.finetune import Outcome
from tune.plan import gpu_shares, one_lane
from tune.spec import RaySpec, TrainSpec, dump

#: A killed worker costs the steps since the last checkpoint; after this many the run ends.
RESTARTS = 3


class Workers:
    """A Ray Train run in a thread; leaving the `with` block shuts Ray down if it was started here."""

    def __init__(self, spec: RaySpec, train_spec: TrainSpec, folder: Path) -> None:
        self._folder = folder.absolute()
        self._error: BaseException | None = None
        spec = one_lane(spec)
        self._joined = connect(spec)[1]
        gpus = gpu_shares(spec, check_cluster(spec))[0]
        resources = {"CPU": spec.cpus_per_worker} | ({"GPU": gpus} if gpus else {})
        trainer = TorchTrainer(
            _work,
            train_loop_config={
                "spec": dump(train_spec),
                "folder": str(self._folder),
                "threads": spec.threads_per_worker,
            },
            scaling_config=ScalingConfig(
                num_workers=spec.num_workers, use_gpu=bool(gpus), resources_per_worker=resources
            ),
            run_config=RunConfig(
                name=f"train-{int(time.time())}",
                storage_path=str(self._folder / "ray"),
                failure_config=FailureConfig(max_failures=RESTARTS, controller_failure_limit=RESTARTS),
            ),
        )
        self._thread = threading.Thread(target=self._fit, args=(trainer,), name="workers", daemon=True)
        self._thread.start()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: Any) -> None:
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
            raise MacDropError(f"The workers failed: {self._error}") from None
        told = json.loads((self._folder / "trial.json").read_text())
        return Outcome(**{name: told[name] for name in Outcome.__dataclass_fields__})

    def _fit(self, trainer: TorchTrainer) -> None:
        try:
            trainer.fit()
        except TrainingFailedError as error:
            self._error = error


def _work(config: dict[str, Any]) -> None:
    import torch.distributed as dist

    from tune.files import atomic_write_json
    from tune.train import train_here

    folder = Path(config["folder"])
    try:
        train_here(TrainSpec.model_validate(config["spec"]), folder, observe=None, threads=config["threads"])
    except MacDropError as error:
        # Raised on every rank alike; raising it on would only make Ray Train try again.
        if dist.get_rank() == 0:
            atomic_write_json(folder / "error.json", {"type": type(error).__name__, "message": str(error)})

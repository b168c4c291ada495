"""Trackers of a trial's metrics: TensorBoard, Weights & Biases, MLflow; `trackers.sync` feeds them.

Each class opens one run per trial, named after the trial, with its setting as the group and its seed as the job type.
The packages are imported when a run is opened; `check` reports before anything starts what is missing.

Why not accelerate: `accelerate.tracking` (1.15) serves one run of the process that trains, while one thread here feeds
all trials of a sweep in turn. `MLflowTracker` works on the process's active run, so a second trial raises "already
active"; `WandBTracker` stores settings in wandb's global run, which fails for runs that live side by side; `finish` has
no status, so a failed or killed trial would end as finished; TensorBoard's hyperparameters go without scores into a new
sub-run at every start; and the methods of two of the three create a `PartialState`, which starts a process group in a
process that has LOCAL_RANK set. What is left, a `log` of three lines, is no less code than ours.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from macdrop.errors import ConfigError


@dataclass(frozen=True)
class RunInfo:
    """Facts about a trial with which a tracker opens its run. `config` has dotted keys and never holds a secret.

    alone: it is the only trial of its process, so that an id of the environment is meant for it.
    """

    name: str
    group: str
    job: str
    config: dict[str, Any]
    alone: bool = False


class TrackerRun(Protocol):
    """One trial in one tracker. `id` identifies the run after a restart."""

    id: str

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of one step."""

    def close(self, status: str, summary: dict[str, float]) -> None:
        """End the run as `finished`, `failed` or `killed`, with the final scores."""


class Tracker(Protocol):
    """A tracker of one run folder."""

    package: str
    install: str

    def __init__(self, run_dir: Path) -> None: ...

    def check(self) -> None:
        """Raise ConfigError if the package is installed but cannot be used."""

    def open(self, info: RunInfo, run: str | None) -> TrackerRun:
        """Open a new run for the trial, or the one with the id that an earlier process has recorded."""


# --- TensorBoard ---


class TensorBoard:
    """Event files in RUN/tensorboard/TRIAL; the settings and scores are hyperparameters (tab HPARAMS)."""

    package, install = "tensorboardX", "tensorboardX"

    def __init__(self, run_dir: Path) -> None:
        self._root = run_dir / "tensorboard"

    def check(self) -> None:
        """Accept: there is nothing beyond the package to check."""

    def open(self, info: RunInfo, run: str | None) -> TrackerRun:
        """Open another event file of the trial."""
        return _TensorBoardRun(self._root / info.name, info)


class _TensorBoardRun:
    def __init__(self, folder: Path, info: RunInfo) -> None:
        from tensorboardX import SummaryWriter  # type: ignore[import-untyped]

        self.id = folder.name
        self._info, self._step = info, 0
        # Files are named by the second: that of an earlier process must not be overwritten.
        self._writer = SummaryWriter(str(folder), filename_suffix=f".{uuid.uuid4().hex[:8]}")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._step = step
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, status: str, summary: dict[str, float]) -> None:
        from tensorboardX.summary import hparams  # type: ignore[import-untyped]

        plain = (bool, int, float, str)
        settings = {key: value if isinstance(value, plain) else str(value) for key, value in self._info.config.items()}
        settings |= {"group": self._info.group, "job_type": self._info.job, "status": status}
        for event in hparams(settings, summary):
            self._writer.file_writer.add_summary(event)
        for name, value in summary.items():
            self._writer.add_scalar(name, value, self._step)
        self._writer.close()


# --- Weights & Biases ---


class Wandb:
    """Project WANDB_PROJECT, else the run folder's name; files in RUN/wandb. WANDB_MODE=offline is respected.

    The run of `macdrop train` has the id WANDB_RUN_ID, which an agent of a W&B sweep sets and waits for.
    """

    package, install = "wandb", "macdrop[wandb]"

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    def check(self) -> None:
        """Refuse online mode without a key: wandb would ask for it in the terminal, in the middle of a run."""
        if os.environ.get("WANDB_MODE", "online") not in ("online", "shared") or os.environ.get("WANDB_API_KEY"):
            return
        from requests.utils import get_netrc_auth

        if get_netrc_auth(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")) is None:
            raise ConfigError(
                "report_to has wandb, but this machine is not logged in to Weights & Biases.\n"
                "Run `wandb login`, set WANDB_API_KEY, or keep the runs on disk with WANDB_MODE=offline."
            )

    def open(self, info: RunInfo, run: str | None) -> TrackerRun:
        """Open a new run, or resume the one with the id `run`."""
        given = os.environ.get("WANDB_RUN_ID") if info.alone else None
        return _WandbRun(self._run_dir, info, run or given or uuid.uuid4().hex[:16])


class _WandbRun:
    def __init__(self, run_dir: Path, info: RunInfo, run: str) -> None:
        import wandb

        self.id = run
        # Nothing about the process itself: its command line and git remote may hold secrets.
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or run_dir.name,
            dir=str(run_dir),
            id=run,
            name=info.name,
            group=info.group,
            job_type=info.job,
            config=info.config,
            resume="allow",
            reinit="create_new",
            settings=settings,
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def close(self, status: str, summary: dict[str, float]) -> None:
        self._run.summary.update({**summary, "status": status})
        self._run.finish(exit_code={"finished": 0, "failed": 1, "killed": 255}[status])


# --- MLflow ---

#: What MLflow does not accept in a metric's name on every file system.
_MLFLOW_NAME = re.compile(r"[^\w./ -]")
_MLFLOW_BATCH = {"params": 100, "metrics": 1000}


class MLflow:
    """Server or store MLFLOW_TRACKING_URI, else RUN/mlruns/mlflow.db, the local store that MLflow 3 supports.

    A folder as the store (`file:...`) is in maintenance mode there, and works if it is requested. The experiment is
    MLFLOW_EXPERIMENT_NAME, else the run folder's name.
    """

    package, install = "mlflow", "macdrop[mlflow]"

    def __init__(self, run_dir: Path) -> None:
        self._root = run_dir / "mlruns"
        self._name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or run_dir.name
        self._uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self._root / 'mlflow.db'}"
        self._client: Any = None
        self._experiment = ""

    def check(self) -> None:
        """Accept: there is nothing beyond the package to check."""

    def open(self, info: RunInfo, run: str | None) -> TrackerRun:
        """Open a new run, or resume the one with the id `run`."""
        if self._client is None:
            self._client, self._experiment = self._connect()
        return _MLflowRun(self._client, self._experiment, info, run)

    def _connect(self) -> tuple[Any, str]:
        local = urlsplit(self._uri).scheme in ("", "file")
        # By default MLflow retries a dead server for minutes. Set before the import, which reads these variables.
        wanted = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
        for name, value in (wanted | ({"MLFLOW_ALLOW_FILE_STORE": "true"} if local else {})).items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        artifacts = None
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            self._root.mkdir(parents=True, exist_ok=True)
            artifacts = (self._root / "artifacts").as_uri()
        client = MlflowClient(tracking_uri=self._uri)
        known = client.get_experiment_by_name(self._name)
        return client, known.experiment_id if known else client.create_experiment(self._name, artifacts)


class _MLflowRun:
    def __init__(self, client: Any, experiment: str, info: RunInfo, run: str | None) -> None:
        self._client, self._step = client, 0
        if run is not None:
            client.update_run(run, status="RUNNING")
            self.id = run
            return
        from mlflow.entities import Param

        tags = {"group": info.group, "job_type": info.job, "seed": info.job.removeprefix("seed-")}
        self.id = client.create_run(experiment, run_name=info.name, tags=tags).info.run_id
        self._send("params", [Param(_mlflow_name(key), str(value)) for key, value in info.config.items()])

    def log(self, step: int, metrics: dict[str, float]) -> None:
        from mlflow.entities import Metric

        self._step, moment = step, int(time.time() * 1000)
        self._send("metrics", [Metric(_mlflow_name(name), value, moment, step) for name, value in metrics.items()])

    def close(self, status: str, summary: dict[str, float]) -> None:
        self.log(self._step, summary)
        self._client.set_terminated(self.id, status.upper())

    def _send(self, kind: str, entities: list[Any]) -> None:
        size = _MLFLOW_BATCH[kind]
        for start in range(0, len(entities), size):
            self._client.log_batch(self.id, **{kind: entities[start : start + size]})


def _mlflow_name(name: str) -> str:
    return _MLFLOW_NAME.sub("-", name)


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "mlflow": MLflow}


def check(names: Sequence[str], run_dir: Path) -> None:
    """Refuse a tracker that cannot work here.

    Raises:
        ConfigError: its package is missing, or this machine is not logged in to it.
    """
    for name in names:
        kind = TRACKERS[name]
        if importlib.util.find_spec(kind.package) is None:
            raise ConfigError(
                f"report_to has {name}, but its package {kind.package} is not installed.\n"
                f"Run: pip install '{kind.install}', or leave {name} out."
            )
        kind(run_dir).check()

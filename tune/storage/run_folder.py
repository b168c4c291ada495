"""The run folder: everything a run leaves behind, readable without Ray, and by pandas in one line.

    run.json             name, created, status, command, macdrop version
    config.yaml          the effective spec
    environment.json     versions, host, CPUs, GPUs; `resumed`: the same of later environments
    scores.jsonl         one line per score, long form (`SCORE_COLUMNS`); of base models the trial is "base"
    models/<slug>/       massive_weights.json, proof.json, layers.json (a proof of every layer, if made), snr.json (for
                         slimadam_rules: auto), draws.jsonl (of Optuna), search_time.json, finalists.json, failure.json
                         (why the model was given up)
    trials/<trial_id>/   config.yaml (effective), trial.json (model, arm, seed, stage, setting, cell, status, reason,
                         times, summary), metrics.jsonl (one line per logged step), adapter/, answers/*.jsonl

    pandas.read_json("runs/x/scores.jsonl", lines=True)

Files are written whole or not at all (`tune.storage.atomic`). A trial's files have one writer; scores may have many.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from macdrop.errors import ConfigError
from tune.config.eval_spec import TEST, EvalJob
from tune.config.messages import believable
from tune.config.parse import undot
from tune.config.resume import own_command, resume_command
from tune.config.run_spec import RunSpec, slug
from tune.config.sections import BASE
from tune.storage.atomic import Stamp, atomic_write_json, atomic_write_yaml, now, plain, read_mapping, stamp_of
from tune.storage.environment import environments, version
from tune.storage.json_lines import append_jsonl, read_jsonl
from tune.storage.known_scores import GivenScores, KnownScores
from tune.storage.records import (
    FINALISTS_FILE,
    SCORE_COLUMNS,
    SCORE_KEY,
    SCORES_FILE,
    SNR_FILE,
    TIME_KEYS,
    TIMES_FILE,
    TrialRecord,
    check_name,
    read_trial,
)
from tune.storage.run_lock import NAMES
from tune.storage.states import RunStatus
from tune.storage.trial_folder import TrialFolder

if TYPE_CHECKING:
    import pandas

LAYOUT = 1


class RunFolder:
    """A run folder. Cheap to make and to pickle; holds no open file.

    Use `create` for a new run and `open` for an existing one. `problems` lists damaged files once; None: they raise.
    """

    def __init__(self, run_dir: str | os.PathLike, problems: list[str] | None = None) -> None:
        self.run_dir = Path(run_dir)
        self.problems = problems
        self.archive: Path | None = None
        #: Kept, and read on where it grew: asked once per benchmark and trial.
        self._scores: KnownScores | GivenScores = self._known_scores()
        self._config: tuple[Stamp | None, dict[str, Any]] | None = None
        self._times: tuple[Stamp | None, list[dict[str, Any]]] | None = None

    @classmethod
    def create(cls, run_dir: str | os.PathLike, spec: Mapping[str, Any], *, command: str | None = None) -> RunFolder:
        """Start a run folder with the effective spec in it.

        Raises:
            ConfigError: the folder exists and is not empty; nothing is touched.
            ResourceError: it cannot be written.
        """
        path = Path(run_dir)
        check_new(path)
        run_folder = cls(path)
        atomic_write_yaml(path / "config.yaml", spec)
        run_folder._write_run(
            name=path.resolve().name,
            created=now(),
            status=RunStatus.RUNNING,
            command=own_command() if command is None else command,
            macdrop=version("macdrop"),
            layout=LAYOUT,
            spec=plain(spec),  # the copy from which config.yaml is repaired
        )
        return run_folder

    @classmethod
    def open(cls, run_dir: str | os.PathLike, *, lenient: bool = False, archive: Path | None = None) -> RunFolder:
        """Open an existing run folder.

        Args:
            lenient: leave out damaged trials and lines and note them in `problems`, for read-only callers.
            archive: the file that the folder was unpacked from for a while (`run_archive.unpacked`).

        Raises:
            ConfigError: not a run folder, or its run.json or config.yaml is damaged.
        """
        run_folder = cls(run_dir, [] if lenient else None)
        run_folder.archive = archive
        refusal = f"{str(run_folder.run_dir)!r} is not a run folder:"
        if not run_folder.run_dir.is_dir():
            raise ConfigError(f"{refusal} no such folder.")
        if not (run_folder.run_dir / "run.json").is_file():
            raise ConfigError(f"{refusal} it has no run.json.\nGive the output_dir of a sweep.")
        try:
            run_folder.run(), run_folder.config()
        except ValueError as error:
            raise ConfigError(f"{str(run_folder.run_dir)!r} is a damaged run folder: {error}") from error
        return run_folder

    # --- the run ---

    @property
    def shown(self) -> Path:
        """The folder as commands show it; RUN is wherever a user unpacks an archive."""
        return Path("RUN") if self.archive else self.run_dir

    def run(self) -> dict[str, Any]:
        """Read run.json: name, created, status, command, macdrop, layout; finished once it is."""
        return read_mapping(self.run_dir / "run.json", within=self.run_dir)

    def config(self) -> dict[str, Any]:
        """The effective spec; opened leniently, without invalid values."""
        file = self.run_dir / "config.yaml"
        stamp = stamp_of(file, self.run_dir)
        if self._config is None or self._config[0] != stamp:
            content = read_mapping(file, within=self.run_dir)
            kept = content if self.problems is None else believable(RunSpec, content, "config.yaml", self.problems)
            self._config = stamp, kept
        return copy.deepcopy(self._config[1])

    def workers_at_start(self, model: str) -> int:
        """Return the workers per lane that a model's trials began with, which decide the batches of all of them."""
        config = self.config()
        ray = dict(config.get("ray") or {})
        for entry in (config.get("sweep") or {}).get("models") or ():
            if isinstance(entry, dict) and entry.get("model_name_or_path") == model:
                ray |= undot(entry).get("ray") or {}
        return int(ray.get("num_workers") or 1)

    def environments(self) -> list[dict[str, Any]]:
        """Return the environments in which the run was started and resumed, oldest first."""
        return environments(self.run_dir, self.problems)

    def set_status(self, status: RunStatus, *, finished: str | None = None) -> None:
        """Set the run's status. `finished`: when it ended, if not now."""
        kept = {key: value for key, value in self.run().items() if key != "finished"}
        ended = {} if status == RunStatus.RUNNING else {"finished": finished or now()}
        self._write_run(**{**kept, "status": status, **ended})

    # --- models ---

    def model_dir(self, model: str) -> Path:
        """The folder of a model's own findings; takes the full name or the slug of it (`tune.config.run_spec.slug`)."""
        return self.run_dir / "models" / slug(model)

    def massive_weights_file(self, model: str) -> Path:
        return self.model_dir(model) / "massive_weights.json"

    def snr_file(self, model: str) -> Path:
        return self.model_dir(model) / SNR_FILE

    def finding(self, file: Path) -> dict[str, Any] | None:
        """Return the content of one of a model's files; None if missing (or damaged, in a lenient run folder)."""
        return read_mapping(file, self.problems) if file.is_file() else None

    def draws_file(self, model: str) -> Path:
        return self.model_dir(model) / "draws.jsonl"

    def search_time_file(self, model: str) -> Path:
        return self.model_dir(model) / "search_time.json"

    def failure_file(self, model: str) -> Path:
        """The file that says why a run has given a model up: with its `reason`, until it is opened again."""
        return self.model_dir(model) / "failure.json"

    def finalists_file(self, model: str) -> Path:
        return self.model_dir(model) / FINALISTS_FILE

    # --- trials ---

    def trial(self, trial_id: str) -> TrialFolder:
        """Return the folder of a trial; nothing is written before its `start`."""
        return TrialFolder(self.run_dir / "trials" / check_name(trial_id), self.problems, within=self.run_dir)

    def trials(self, model: str | None = None, *, config: bool = True) -> list[TrialRecord]:
        """Return the records of all trials, or of a model's, by start; without `config` their config.yaml is not read.

        Those of other models are not read: the names of a model's trials begin with the slug of its name.
        """
        files = (self.run_dir / "trials").glob("*/trial.json" if model is None else f"{slug(model)}-*/trial.json")
        read = filter(None, (read_trial(file.parent, self.problems, config=config) for file in files))
        records = (record for record in read if model in (None, record.model))
        return sorted(records, key=lambda record: (record.started or "", record.trial))

    def answers_dir(self, model: str, trial: str) -> Path:
        """Return the folder of a trial's generated answers; those of the base model are in the model's folder."""
        return (self.model_dir(model) if trial == BASE else self.trial(trial).folder) / "answers"

    def answers_file(self, model: str, trial: str, job: EvalJob) -> Path:
        """The file with a trial's answers to one benchmark under one attack."""
        return self.answers_dir(model, trial) / job.file_name

    def holds_answers_of(self, file: Path, row: Mapping[str, Any]) -> bool:
        """Return whether an answers file holds the answers behind a score: the inverse of `answers_file`."""
        entry = row.get("entry", row["task"])
        job = EvalJob(row["benchmark"], entry, row["attack"], row["attack_on"], row.get("split", TEST))
        # Not by `trial`: the row may be damaged and name what cannot be a trial.
        owner = self.model_dir(row["model"]) if row["trial"] == BASE else self.run_dir / "trials" / row["trial"]
        return file == owner / "answers" / job.file_name

    # --- scores ---

    @property
    def scores_file(self) -> Path:
        return self.run_dir / SCORES_FILE

    def add_scores(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """Append scores, all of them or none; safe from several processes at once. Returns their number.

        Each row needs at least `SCORE_KEY`, arm and value; other keys are kept. `attack` is "none" without one;
        without `split` a row is of the test benchmarks.
        """
        rows = [{"split": TEST, **row} for row in rows]
        for row in rows:
            missing = [key for key in (*SCORE_KEY, "arm", "value") if key not in row]
            assert not missing, f"score without {missing}: {row}"
        rows = [{**dict.fromkeys(SCORE_COLUMNS), **row} for row in rows]
        return append_jsonl(self.scores_file, rows, within=self.run_dir)

    def add_times(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """Append times at which lanes and actors were held or worked (`TimeWatch`); return their number."""
        return append_jsonl(self.run_dir / TIMES_FILE, rows, within=self.run_dir)

    def times(self) -> list[dict[str, Any]]:
        """Return these rows; none of a run that kept none."""
        file = self.run_dir / TIMES_FILE
        stamp = stamp_of(file, self.run_dir)
        if self._times is None or self._times[0] != stamp:
            self._times = stamp, read_jsonl(file, self.problems, TIME_KEYS, within=self.run_dir)
        return self._times[1]

    def score_rows(self) -> list[dict[str, Any]]:
        """All scores, one for each `SCORE_KEY` (the last), trial by trial in the order they first came."""
        return self._scores.rows()

    def trial_scores(self, trial: str) -> list[dict[str, Any]]:
        """`score_rows` of one trial; those of `BASE` are of all models."""
        return self._scores.rows(trial)

    def has_scores(self) -> bool:
        """Return whether there is a score at all."""
        return self._scores.has_rows()

    def model_scores(self, model: str) -> list[dict[str, Any]]:
        """`score_rows` of one model; takes the full name or the slug of it (`tune.config.run_spec.slug`)."""
        return self._scores.of_model(slug(model))

    def with_scores_of(self, model: str) -> RunFolder:
        """Return a copy that has the scores of one model, as they are, and may be sent to another process."""
        other = copy.copy(self)
        other._scores = GivenScores(slug(model), self.model_scores(model))
        other.problems = None if self.problems is None else []
        return other

    def _known_scores(self) -> KnownScores:
        return KnownScores(self.scores_file, self.problems, within=self.run_dir)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_scores": self._scores if isinstance(self._scores, GivenScores) else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._scores = state["_scores"] or self._known_scores()

    def scores(self) -> pandas.DataFrame:
        """`score_rows` as a table that has all of `SCORE_COLUMNS`, also when it is empty."""
        import pandas

        rows = self.score_rows()
        extra = dict.fromkeys(key for row in rows for key in row if key not in SCORE_COLUMNS)
        return pandas.DataFrame(rows, columns=[*SCORE_COLUMNS, *extra])

    def _write_run(self, **content: Any) -> None:
        atomic_write_json(self.run_dir / "run.json", content, within=self.run_dir)


def check_new(path: Path, remedy: str | None = None) -> None:
    """Refuse a folder that holds anything but a sweep's lock; its content is not touched.

    remedy: the command that resumes the run there, if there is one.
    """
    if not path.exists() or (path.is_dir() and not {each.name for each in path.iterdir()} - NAMES):
        return
    if any((path / name).exists() for name in ("run.json", "config.yaml", "trials")):
        resume = f"To resume it:\n  {remedy or resume_command(path)}\nor choose another output_dir."
        raise ConfigError(f"output_dir {str(path)!r} exists and is not empty: it holds a run. {resume}")
    raise ConfigError(f"output_dir {str(path)!r} exists and is not empty: choose another output_dir.")

"""The run folder: everything a run leaves behind, readable without Ray, and by pandas in one line.

    run.json             name, created, status, command, macdrop version
    config.yaml          the effective spec
    environment.json     versions, host, CPUs, GPUs; `resumed`: the same of later environments
    scores.jsonl         one line per score, long form (`SCORE_COLUMNS`); of base models the trial is "base"
    models/<slug>/       massive_weights.json, proof.json, layers.json (a proof of every layer, if made), draws.jsonl
                         (of Optuna), search_time.json, finalists.json
    trials/<trial_id>/   config.yaml (effective), trial.json (model, arm, seed, stage, setting, cell, status, reason,
                         times, summary), metrics.jsonl (one line per logged step), adapter/, answers/*.jsonl

    pandas.read_json("runs/x/scores.jsonl", lines=True)

Files are written whole or not at all (`tune.storage.atomic`). A trial's files have one writer; scores may have many.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from macdrop.errors import ConfigError
from tune.config.eval_spec import TEST, EvalJob
from tune.config.messages import believable
from tune.config.resume import own_command, resume_command
from tune.config.run_spec import RunSpec, slug
from tune.config.sections import BASE
from tune.storage.atomic import (
    append_jsonl,
    atomic_write_json,
    atomic_write_text,
    atomic_write_yaml,
    now,
    plain,
    read_jsonl,
    read_mapping,
    stat,
)
from tune.storage.environment import environments, version
from tune.storage.records import (
    FINALISTS_FILE,
    SCORE_COLUMNS,
    SCORE_KEY,
    SCORES_FILE,
    TrialRecord,
    check_name,
    check_score,
    read_record,
    read_trial,
)
from tune.storage.run_lock import NAMES
from tune.storage.states import RunStatus, Stage, TaskState

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
        self._read: tuple[tuple[int, int], list[dict[str, Any]]] | None = None

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
        content = read_mapping(self.run_dir / "config.yaml", within=self.run_dir)
        return content if self.problems is None else believable(RunSpec, content, "config.yaml", self.problems)

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

    def finding(self, file: Path) -> dict[str, Any] | None:
        """Return the content of one of a model's files; None if missing (or damaged, in a lenient run folder)."""
        return read_mapping(file, self.problems) if file.is_file() else None

    def draws_file(self, model: str) -> Path:
        return self.model_dir(model) / "draws.jsonl"

    def search_time_file(self, model: str) -> Path:
        return self.model_dir(model) / "search_time.json"

    def finalists_file(self, model: str) -> Path:
        return self.model_dir(model) / FINALISTS_FILE

    # --- trials ---

    def trial(self, trial_id: str) -> TrialFolder:
        """Return the folder of a trial; nothing is written before its `start`."""
        return TrialFolder(self.run_dir / "trials" / check_name(trial_id), self.problems, within=self.run_dir)

    def trials(self) -> list[TrialRecord]:
        """Return the records of all trials, by start."""
        files = (self.run_dir / "trials").glob("*/trial.json")
        records = filter(None, (read_trial(file.parent, self.problems) for file in files))
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

    def score_rows(self) -> list[dict[str, Any]]:
        """All scores, one for each `SCORE_KEY` (the last), in the order they first came."""
        state = stat(self.scores_file, within=self.run_dir)
        if state is None:
            return []
        stamp = (state.st_size, state.st_mtime_ns)
        if self._read is None or self._read[0] != stamp:  # asked once per benchmark and trial, changed more rarely
            kept = read_jsonl(self.scores_file, self.problems, within=self.run_dir, check=check_score)
            rows = [{"split": TEST, **row} for row in kept]
            latest = {tuple(row.get(key) for key in SCORE_KEY): row for row in rows}
            self._read = (stamp, list(latest.values()))
        return [dict(row) for row in self._read[1]]

    def scores(self) -> pandas.DataFrame:
        """`score_rows` as a table that has all of `SCORE_COLUMNS`, also when it is empty."""
        import pandas

        rows = self.score_rows()
        extra = dict.fromkeys(key for row in rows for key in row if key not in SCORE_COLUMNS)
        return pandas.DataFrame(rows, columns=[*SCORE_COLUMNS, *extra])

    def _write_run(self, **content: Any) -> None:
        atomic_write_json(self.run_dir / "run.json", content, within=self.run_dir)


class TrialFolder:
    """The folder of one trial, written by one process at a time. `within`: an existing folder above it."""

    def __init__(self, folder: Path, problems: list[str] | None = None, within: Path | None = None) -> None:
        self.folder, self.problems, self._within = folder, problems, within
        self._last_step: int | None = None

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def adapter_dir(self) -> Path:
        return self.folder / "adapter"

    def record(self) -> TrialRecord | None:
        """Read trial.json; None before `start`."""
        file = self.folder / "trial.json"
        return None if stat(file, self._within) is None else read_record(file, TrialRecord, within=self._within)

    def _content(self) -> dict[str, Any]:
        file = self.folder / "trial.json"
        return {} if stat(file, self._within) is None else read_mapping(file, within=self._within)

    def start(
        self,
        config: Mapping[str, Any],
        *,
        model: str,
        arm: str,
        seed: int,
        stage: Stage = Stage.FINAL,
        setting: str | None = None,
        cell: Mapping[str, Any] | None = None,
        drawn: Mapping[str, Any] | None = None,
    ) -> None:
        """Record that the trial runs. Called again after a restart, it counts the attempt and keeps the first start.

        setting: `TrainSpec.setting_id`, equal for trials that differ in their seed alone.
        cell: the searched kind of adapter (`tune.scheduling.selection`), within which plain and MacDrop are compared.
        drawn: the searched values behind the trial; None for one that no search asked for.
        """
        before = self._content()
        atomic_write_yaml(self.folder / "config.yaml", config, within=self._within)
        self._write(
            trial=self.id,
            model=model,
            arm=arm,
            seed=seed,
            stage=stage,
            setting=setting,
            cell=dict(cell or {}),
            drawn=drawn,
            status=TaskState.RUNNING,
            reason=None,
            started=before.get("started") or now(),
            attempts=before.get("attempts", 0) + 1,
        )

    def log(self, step_metrics: Iterable[Mapping[str, Any]]) -> None:
        """Append metrics of logged steps, each with its `step`, ascending.

        A resumed trial repeats the steps after its last checkpoint: their earlier lines are replaced.
        """
        rows = [dict(row) for row in step_metrics]
        if not rows:
            return
        file = self.folder / "metrics.jsonl"
        first = rows[0]["step"]
        if self._last_step is None:
            self._last_step = max((row["step"] for row in read_jsonl(file, within=self._within)), default=-1)
        if first <= self._last_step:
            rows = [row for row in read_jsonl(file, within=self._within) if row["step"] < first] + rows
            atomic_write_text(file, "".join(json.dumps(plain(row)) + "\n" for row in rows), within=self._within)
        else:
            append_jsonl(file, rows, within=self._within)
        self._last_step = rows[-1]["step"]

    def metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl, by step."""
        return read_jsonl(self.folder / "metrics.jsonl", self.problems, within=self._within)

    def note(self, **content: Any) -> None:
        """Add to what is recorded, whatever the status."""
        self._write(**{**self._content(), **content})

    def finish(self, status: TaskState, reason: str | None = None, **summary: Any) -> None:
        """Record how the trial ended (a final state) and anything to keep of it: eval_loss, steps, seconds ..."""
        assert status.is_final, status
        self._write(**{**self._content(), "status": status, "reason": reason, "finished": now(), **summary})

    def _write(self, **content: Any) -> None:
        atomic_write_json(self.folder / "trial.json", content, within=self._within)


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

"""The earlier run of a folder that is resumed: what must be as it was, and the trials that enter the queue as ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any

from tune.config.eval_spec import EvalJob
from tune.config.resume import check_same
from tune.config.run_spec import RunSpec, TrainSpec, dump
from tune.config.syntax.yaml_core import parse_blocks
from tune.scheduling.history import resume_state
from tune.scheduling.tasks import TrainTask
from tune.storage.atomic import read_mapping
from tune.storage.records import TrialRecord
from tune.storage.run_folder import RunFolder
from tune.storage.segments import check_run_shared
from tune.storage.states import TaskState
from tune.training.finetune import Outcome

#: The fields of an `EvalJob`.
_JOB = itemgetter("benchmark", "entry", "attack", "attack_on", "split")


@dataclass(frozen=True)
class RecordedTask:
    """A task that will not be trained (again), as `TaskQueue.record` takes it."""

    task: TrainTask
    state: TaskState
    outcome: dict[str, Any]
    scores: dict[str, float]
    reason: str | None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments of `TaskQueue.record`."""
        return self.task, self.state, self.outcome, self.scores, self.reason


@dataclass(frozen=True)
class Resumed:
    """The states of recorded tasks by trial, and the tasks among them that lack scores."""

    states: dict[str, TaskState] = field(default_factory=dict)
    unscored: list[RecordedTask] = field(default_factory=list)


def check_earlier_run(run_dir: Path, spec: RunSpec) -> tuple[dict[str, int], list[str]]:
    """Refuse to resume a run with the spec of another one.

    Returns:
        The workers that each model's trials began with, and a note on each number of them that is another one now.

    Raises:
        ConfigError: settings that results depend on have changed, or workers cannot share the batches.
    """
    started = RunSpec.model_validate(RunFolder.open(run_dir).config())
    check_same(run_dir, dump(started), dump(spec))
    check_run_shared(started, [ray.num_workers for ray in spec.rays()])
    models = [study.model_name_or_path for study in started.studies()]
    begun = dict(zip(models, (ray.num_workers for ray in started.rays()), strict=True))
    changed: dict[tuple[int, int], list[str]] = {}
    for model, ray in zip(models, spec.rays(), strict=True):
        if ray.num_workers != begun[model]:
            changed.setdefault((ray.num_workers, begun[model]), []).append(model)
    notes = [
        f"ray.num_workers is {workers} and was {before} when the run began{'' if of == models else _of(of)}: batches "
        "and masks stay the same, and bits may differ from here on (the report says for which trials, and from which "
        "step)"
        for (workers, before), of in changed.items()
    ]
    return begun, notes


def _of(models: list[str]) -> str:
    return f" (for {', '.join(models)})"


def recorded_tasks(
    run_folder: RunFolder,
    model: str,
    study: str,
    jobs: Mapping[str, list[EvalJob]],
    named: Callable[[list[dict[str, Any]]], dict[str, float]],
    *,
    retry_failed: bool,
) -> Iterator[RecordedTask]:
    """Yield the tasks of a model that will not be trained (again).

    Those that are trained but not fully scored come as trained: they will get their missing scores.

    Args:
        jobs: what the trials of each stage are scored on.
        named: the validation scores among a trial's rows, by their names in `sweep.metric`.
        retry_failed: leave out trials that failed or diverged.
    """
    for record in run_folder.trials(model, config=False):
        trial, rows = run_folder.trial(record.trial), run_folder.trial_scores(record.trial)
        scored = not missing_jobs(model, rows, jobs[record.stage])
        adapter = trial.adapter_dir.is_dir()
        state = resume_state(record, adapter=adapter, scored=scored, retry_failed=retry_failed)
        if state is not None:
            outcome = record.model_dump(include=set(Outcome.__dataclass_fields__) - {"status"}, exclude_unset=True)
            task = _task(record, study, trial.folder, state)
            yield RecordedTask(task, state, outcome, named(rows), record.reason)


def missing_jobs(model: str, rows: Iterable[dict[str, Any]], jobs: list[EvalJob]) -> list[EvalJob]:
    """Return the benchmarks among `jobs` without a score among the rows of a trial, or of base models."""
    found = {_JOB(row) for row in rows if row["model"] == model}  # fewer than rows, which have a metric each
    known = {EvalJob(*each) for each in found}
    return [job for job in jobs if job not in known]


def _task(record: TrialRecord, study: str, folder: Path, state: TaskState) -> TrainTask:
    """Return the task of a trial; where nothing is left to be done, without what it would take to do it."""
    spec = None
    if state == TaskState.TRAINED:
        spec = TrainSpec.model_validate(read_mapping(folder / "config.yaml", parse=parse_blocks))
    return TrainTask(
        id=record.trial,
        study=study,
        spec=dump(spec) if spec else {},
        folder=str(folder),
        data="",
        weights=None,
        engine_key=spec.engine_key() if spec else "",
        pool="",
        stage=record.stage,
        cell=record.cell or {},
        drawn=record.drawn,
    )

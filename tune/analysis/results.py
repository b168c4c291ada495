"""Results of a run folder as values: the trials of each stage and their scores.

A *line* is the base model or one trial. A *group* is one setting with all its seeds. For columns see
`tune.evaluation.score_names`. Unfinished or damaged runs yield what can be read.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tune.analysis.display_names import arm_name, setting_label
from tune.analysis.settings import setting_text, varied
from tune.config.parse import flatten
from tune.config.recorded import asked_for, block_of, models_of
from tune.config.run_spec import CELL_KEYS, slug
from tune.config.sections import Arm
from tune.config.train.data_keys import weights_of
from tune.evaluation.score_names import (
    EVAL_LOSS,
    Cell,
    Column,
    KnownCells,
    add_means,
    place,
    primary_columns,
    scoring_seconds,
)
from tune.storage.records import TrialRecord
from tune.storage.run_folder import BASE, RunFolder
from tune.storage.states import Stage, TaskState
from tune.zoo.catalog import is_planted

ARM_ORDER = (BASE, "plain", "macdrop")
"""Order of arms in tables; placebos follow."""


@dataclass
class Line:
    """The base model, or one trial; `settings` are the effective spec with dotted keys, `group` the setting's id.

    `scoring_s` are the seconds that its benchmarks took.
    """

    label: str
    trial: str
    arm: str
    status: TaskState
    reason: str | None = None
    seed: int | None = None
    stage: Stage = Stage.FINAL
    group: str = ""
    cell: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    scores: dict[Column, Cell] = field(default_factory=dict)
    scoring_s: float = 0.0

    def setting(self, key: str) -> Any:
        """A setting's value; None for MacDrop's keys in the base and plain arms."""
        return None if key.startswith("macdrop.") and self.arm in (BASE, Arm.PLAIN) else self.settings.get(key)


@dataclass(frozen=True)
class Spread:
    """A score over the seeds of a setting: mean, SD between seeds (None: one seed), SE over items of one seed.

    `stderr` is the root mean square over seeds. It excludes the spread between seeds, as `sd` excludes that of items.
    """

    value: float
    sd: float | None
    stderr: float | None
    seeds: int


@dataclass
class Group:
    """One setting of the final stage with all its trials, or the base model."""

    label: str
    arm: str
    id: str
    cell: dict[str, Any]
    lines: list[Line]

    def spread(self, column: Column) -> Spread | None:
        """The column over the seeds that have it; None if none has."""
        cells = [line.scores[column] for line in self.lines if column in line.scores]
        if not cells:
            return None
        values, errors = [cell.value for cell in cells], [cell.stderr for cell in cells if cell.stderr is not None]
        rms = math.sqrt(math.fsum(error**2 for error in errors) / len(errors)) if len(errors) == len(cells) else None
        return Spread(
            math.fsum(values) / len(values), statistics.stdev(values) if len(values) > 1 else None, rms, len(values)
        )


@dataclass
class ModelResults:
    """The results of one model.

    `lines` come in the order base, plain, MacDrop (best first), placebos; `groups` are those of the final stage. Of all
    `columns` those in `shown` belong in tables; `keys` are the settings that vary; `layers` is layers.json, a
    proof of every layer, if one was made; `objectives` are (name, goal); `finalists` is finalists.json, empty if
    missing; `best` is the best MacDrop line by the objective; `trouble` says which damage prevents statistics, and
    `failure` why the sweep gave the model up.
    """

    name: str
    display: str
    planted: bool
    weights: dict[str, Any] | None
    proof: dict[str, Any] | None
    layers: dict[str, Any] | None
    finalists: dict[str, Any]
    lines: list[Line]
    groups: list[Group]
    columns: list[Column]
    shown: list[Column]
    keys: list[str]
    objectives: list[tuple[str, str]]
    best: Line | None
    trouble: str | None = None
    failure: str | None = None

    def trials(self, *arms: str, stage: str | None = None) -> list[Line]:
        """The trials of the given arms (default: all) in a stage (default: any)."""
        wanted = [line for line in self.lines if line.arm != BASE and (not arms or line.arm in arms)]
        return [line for line in wanted if stage in (None, line.stage)]

    @property
    def searched(self) -> list[Line]:
        """The trials from which settings were selected; in runs without stages, all trials."""
        found = self.trials(stage=Stage.SEARCH)
        return found or self.trials("plain", "macdrop")

    @property
    def tried(self) -> int:
        """The number of MacDrop settings searched."""
        if isinstance(self.finalists.get("tried"), int):
            return self.finalists["tried"]
        return len({line.group for line in self.searched if line.arm == Arm.MACDROP})

    @property
    def seeds(self) -> int:
        """The largest number of seeds of any MacDrop setting of the final stage."""
        return max((len({line.seed for line in g.lines}) for g in self.groups if g.arm == Arm.MACDROP), default=0)


def collect(run_folder: RunFolder, trials: list[TrialRecord] | None = None) -> list[ModelResults]:
    """The results of each model of a run, finished or not, in the order of its spec.

    trials: those of the run folder, where they have been read.
    """
    config, rows = run_folder.config(), run_folder.score_rows()
    trials = run_folder.trials() if trials is None else trials
    recorded = [*(trial.model for trial in trials), *(row["model"] for row in rows)]
    slugs = {model: slug(model) for model in {*recorded, *models_of(config)}}
    display = {slugs[model]: model for model in (*recorded, *models_of(config))}
    of_model: dict[str, tuple[list[TrialRecord], list[dict[str, Any]]]] = {
        slugs[model]: ([], []) for model in (*models_of(config), *recorded)
    }
    for trial in trials:
        of_model[slugs[trial.model]][0].append(trial)
    for row in rows:
        of_model[slugs[row["model"]]][1].append(row)
    return [_model(run_folder, name, display[name], *found, config) for name, found in of_model.items()]


def value_of(line: Line, objective: str) -> float | None:
    """The line's value of a search metric (see `Column.name`), or None; validation before test."""
    return _value(line, [column for column in line.scores if column.name == objective])


def _value(line: Line, columns: Iterable[Column]) -> float | None:
    """The line's value in the first of its columns among these: an attack on base rows comes before one on merged."""
    found = [column for column in columns if column in line.scores]
    first = min(found, key=lambda column: (column.split != "validation", column.attack_on or ""), default=None)
    return None if first is None else line.scores[first].value


def _model(
    run_folder: RunFolder,
    name: str,
    display: str,
    trials: list[TrialRecord],
    rows: list[dict[str, Any]],
    config: Mapping[str, Any],
) -> ModelResults:
    base = [Line(BASE, BASE, BASE, TaskState.DONE, group=BASE)] if any(row["trial"] == BASE for row in rows) else []
    lines = base + [_line(trial) for trial in trials]
    by_trial = {line.trial: line for line in lines}
    columns: dict[Column, None] = {}
    cells = KnownCells()
    for row in rows:
        column = Column.of(row)
        columns[column] = None
        if row["trial"] in by_trial and row["value"] is not None:
            by_trial[row["trial"]].scores[column] = cells.cell(row)
    for trial, seconds in scoring_seconds(rows).items():
        if trial in by_trial:
            by_trial[trial].scoring_s = seconds
    asked = asked_for(config)
    means = add_means([line.scores for line in lines], primary_columns(columns, asked))
    tested = [column for column in primary_columns(columns, asked) if column.split == "test"]
    eval_loss = [EVAL_LOSS] if any(EVAL_LOSS in line.scores for line in lines) else []
    weights, proof, layers, finalists, failure = (
        run_folder.finding(run_folder.model_dir(name) / f"{file}.json")
        for file in ("massive_weights", "proof", "layers", "finalists", "failure")
    )
    objectives = _objectives(config)
    best = _order(lines, objectives, [*columns, *means, EVAL_LOSS])
    return ModelResults(
        name=name,
        display=display,
        planted=is_planted(display) or (Path(display) / "zoo.json").is_file(),
        weights=weights,
        proof=proof,
        layers=layers,
        finalists=finalists or {},
        lines=lines,
        groups=_groups(lines, finalists or {}),
        columns=eval_loss + sorted([*columns, *means], key=place),
        shown=eval_loss + sorted([*tested, *(mean for mean in means if mean.split == "test")], key=place),
        keys=varied(
            [line.settings for line in lines if line.arm != BASE], block_of(block_of(config, "sweep"), "parameters")
        ),
        objectives=objectives,
        best=best,
        failure=str(failure["reason"]) if failure and "reason" in failure else None,
    )


def _line(trial: TrialRecord) -> Line:
    settings = flatten(trial.config) | weights_of(trial.config.get("dataset"))
    line = Line(
        label="",
        trial=trial.trial,
        arm=trial.arm,
        status=trial.status,
        reason=trial.reason,
        seed=trial.seed,
        stage=trial.stage,
        group=trial.setting or setting_text(settings, trial.arm),
        cell=trial.cell or {key: settings[key] for key in CELL_KEYS if settings.get(key)},
        settings=settings,
        info=trial.model_dump(exclude_unset=True),
    )
    if trial.eval_loss is not None:
        line.scores[EVAL_LOSS] = Cell(trial.eval_loss)
    return line


def _order(lines: list[Line], objectives: list[tuple[str, str]], columns: Iterable[Column]) -> Line | None:
    """Sort in place (base, plain, MacDrop, placebos; best first), label, return the best finished MacDrop line.

    Searched trials are numbered, M1 being the best; final trials are named after their groups. With several objectives
    the first one decides the order.
    """
    name, goal = objectives[0]
    sign = 1 if goal == "minimize" else -1
    deciding = [column for column in columns if column.name == name]

    def key(line: Line) -> tuple:
        value = _value(line, deciding)
        arm = ARM_ORDER.index(line.arm) if line.arm in ARM_ORDER else len(ARM_ORDER)
        if value is None or line.status != TaskState.DONE:
            return arm, line.arm, True, 0.0
        return arm, line.arm, False, sign * value

    lines.sort(key=key)
    counts: dict[str, int] = {}
    staged, plain = _staged(lines), Counter(line.stage for line in lines if line.arm == Arm.PLAIN)
    for line in (line for line in lines if line.stage == Stage.SEARCH or not staged):
        counts[line.arm] = number = counts.get(line.arm, 0) + 1
        if line.arm == Arm.PLAIN:
            line.label = f"plain{number}" if plain[line.stage] > 1 else "plain"
        elif line.arm != BASE:
            line.label = f"{'M' if line.arm == Arm.MACDROP else arm_name(line.arm)}{number}"
    return next((line for line in lines if line.arm == Arm.MACDROP and not key(line)[2]), None)


def _groups(lines: list[Line], finalists: Mapping[str, Any]) -> list[Group]:
    """The settings of the final stage (or of the only stage), by arm, type of adapter and rank."""
    trials = [line for line in lines if line.arm != BASE]
    final = [line for line in trials if line.stage != Stage.SEARCH]
    final = final or [line for line in trials if _tested(line)] or trials
    by_id: dict[tuple[str, str], list[Line]] = {}
    for line in [line for line in lines if line.arm == BASE] + final:
        by_id.setdefault((line.arm, line.group), []).append(line)
    made = []
    kinds = {arm: number for number, arm in enumerate(dict.fromkeys(arm for arm, _ in by_id))}
    cells = finalists.get("cells")
    rows = cells if isinstance(cells, list) else []
    ranked = [setting for row in rows if isinstance(row, Mapping) for setting in row.get("macdrop") or ()]
    ranks = {setting: number for number, setting in reversed(list(enumerate(ranked)))}

    def place(item: tuple[tuple[str, str], list[Line]]) -> tuple:
        (arm, group), members = item
        return kinds[arm], [str(value) for value in members[0].cell.values()], ranks.get(group, len(ranked))

    for (arm, setting), members in sorted(by_id.items(), key=place):
        members = sorted(members, key=lambda line: (line.seed is None, line.seed))
        made.append(Group(setting_label(members[0].arm, members[0].settings), arm, setting, members[0].cell, members))
    shared = Counter(group.label for group in made)
    for group in made:
        if shared[group.label] > 1:
            group.label += f" ({group.lines[0].label or group.lines[0].trial})"
        for line in group.lines:
            line.label = line.label or f"{group.label}, seed {line.seed}"
    return made


def _staged(lines: list[Line]) -> bool:
    """Return whether the run has a search stage before the final stage."""
    return any(line.stage == Stage.SEARCH for line in lines)


def _tested(line: Line) -> bool:
    return any(column.split == "test" and column != EVAL_LOSS for column in line.scores)


def _objectives(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    metric = block_of(config, "sweep").get("metric") or {}
    several = metric if isinstance(metric, list) else [metric]
    return [(one.get("name", EVAL_LOSS.metric), one.get("goal", "minimize")) for one in several]

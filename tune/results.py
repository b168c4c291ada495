"""Journal -> what a report says, as values: who was trained, how they scored, how they differ.

A *line* is one scored thing: the base model, a plain adapter, a MacDrop adapter. For columns see `tune.columns`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tune.benchmarks.spec import SECTIONS
from tune.columns import EVAL_LOSS, Cell, Column, Difference, difference, place, primary_columns
from tune.journal import BASE, Journal
from tune.spec import slug

MACDROP_KEYS = ("k", "p0", "schedule", "alpha")
NOT_SETTINGS = ("logging_steps", "save_steps", "eval_steps", "output_dir")
"""Keys that do not change what is trained, so that trials that differ in them only are compared."""


@dataclass
class Line:
    """The base model, or one trial; `settings` are the effective spec with dotted keys."""

    label: str
    trial: str
    arm: str
    status: str
    reason: str | None = None
    seed: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    scores: dict[Column, Cell] = field(default_factory=dict)

    def setting(self, key: str) -> Any:
        """A setting; MacDrop's own mean nothing to other arms."""
        return None if key.startswith("macdrop.") and self.arm != "macdrop" else self.settings.get(key)


@dataclass
class ModelResults:
    """Everything a report says about one model.

    `lines` come in the order base, plain, MacDrop (best first); of all `columns` those in `shown` are worth a table;
    `keys` are the settings that vary.
    """

    name: str
    display: str
    planted: bool
    weights: dict[str, Any] | None
    proof: dict[str, Any] | None
    lines: list[Line]
    columns: list[Column]
    shown: list[Column]
    keys: list[str]
    objective: str
    best: Line | None

    def macdrop(self) -> list[Line]:
        return [line for line in self.lines if line.arm == "macdrop"]

    def plain_for(self, line: Line) -> Line | None:
        """The plain adapter with the same settings but for MacDrop's, the seed among them; None if there is none."""
        wanted = _other_settings(line)
        found = [other for other in self.lines if other.arm == "plain" and _other_settings(other) == wanted]
        return found[0] if found else None

    def differences(self, line: Line, columns: Iterable[Column]) -> list[Difference]:
        """`line` against its plain adapter on the columns that both have."""
        plain = self.plain_for(line)
        shared = [] if plain is None else [c for c in columns if c in line.scores and c in plain.scores]
        return [difference(column, plain.scores[column], line.scores[column]) for column in shared]

    def rivals(self) -> list[Line]:
        """The best MacDrop trial of each setting of the other keys (LoRA and DoRA, say), best first."""
        best: dict[str, Line] = {}
        for line in self.macdrop():
            if line.status == "done" and value_of(line, self.objective) is not None:
                best.setdefault(json.dumps(_other_settings(line), sort_keys=True, default=str), line)
        return list(best.values())

    def seeds(self) -> int:
        """The largest number of seeds with which one MacDrop setting was trained."""
        groups: dict[str, set] = {}
        for line in self.macdrop():
            settings = {key: value for key, value in line.settings.items() if key not in ("seed", *NOT_SETTINGS)}
            groups.setdefault(json.dumps(settings, sort_keys=True, default=str), set()).add(line.seed)
        return max(map(len, groups.values()), default=0)


def collect(journal: Journal) -> list[ModelResults]:
    """The results of each model of a run, in the order of its spec; works on a run that is still going."""
    config, trials, rows = journal.config(), journal.trials(), journal.score_rows()
    names = [slug(name) for name in _models(config)]
    names += [slug(item["model"]) for item in (*trials, *rows)]
    display = {slug(name): name for name in (*(item["model"] for item in (*trials, *rows)), *_models(config))}
    metric = (config.get("sweep") or {}).get("metric") or {}
    objective, goal = metric.get("name", EVAL_LOSS.metric), metric.get("goal", "minimize")
    searched = list((config.get("sweep") or {}).get("parameters") or {})
    return [
        _model(
            journal,
            name,
            display[name],
            [trial for trial in trials if slug(trial["model"]) == name],
            [row for row in rows if slug(row["model"]) == name],
            searched,
            (objective, goal),
            _asked(config),
        )
        for name in dict.fromkeys(names)
    ]


def value_of(line: Line, objective: str) -> float | None:
    """The line's value of a search metric (see `Column.name`), None while it has none."""
    named = [(column.attack_on or "", cell.value) for column, cell in line.scores.items() if column.name == objective]
    return min(named)[1] if named else None  # an attack on base rows comes before one on merged rows


def _model(
    journal: Journal,
    name: str,
    display: str,
    trials: list[dict[str, Any]],
    rows: list[dict[str, Any]],
    searched: list[str],
    objective: tuple[str, str],
    asked: list[str],
) -> ModelResults:
    base = [Line(BASE, BASE, BASE, "done")] if any(row["trial"] == BASE for row in rows) else []
    lines = base + [_line(trial) for trial in trials]
    by_trial = {line.trial: line for line in lines}
    columns: dict[Column, None] = {}
    for row in rows:
        column = Column(*(row.get(key) for key in Column.__dataclass_fields__))
        columns[column] = None
        if row["trial"] in by_trial and row["value"] is not None:
            by_trial[row["trial"]].scores[column] = Cell(row["value"], row.get("stderr"), row.get("n"))
    means = _add_means(lines, primary_columns(columns, asked))
    ordered = sorted([*columns, *means], key=place)
    eval_loss = [EVAL_LOSS] if any(EVAL_LOSS in line.scores for line in lines) else []
    best = _order(lines, objective)
    weights, proof = (_read(file) for file in (journal.massive_weights_file(name), journal.proof_file(name)))
    return ModelResults(
        name=name,
        display=display,
        planted=display.startswith("zoo:") or (Path(display) / "zoo.json").is_file(),
        weights=weights,
        proof=proof,
        lines=lines,
        columns=eval_loss + ordered,
        shown=eval_loss + sorted([*primary_columns(columns, asked), *means], key=place),
        keys=_varied(lines, searched),
        objective=objective[0],
        best=best,
    )


def _line(trial: Mapping[str, Any]) -> Line:
    line = Line(
        label="",
        trial=trial["trial"],
        arm=trial.get("arm", "macdrop"),
        status=trial["status"],
        reason=trial.get("reason"),
        seed=trial.get("seed"),
        settings=flatten(trial["config"]),
        info=dict(trial),
    )
    if trial.get("eval_loss") is not None:
        line.scores[EVAL_LOSS] = Cell(trial["eval_loss"])
    return line


def _order(lines: list[Line], objective: tuple[str, str]) -> Line | None:
    """Sort in place (base, plain, MacDrop; best first), give labels, return the best finished MacDrop line."""
    name, goal = objective
    sign = 1 if goal == "minimize" else -1

    def key(line: Line) -> tuple:
        value = value_of(line, name)
        usable = value is not None and line.status == "done"
        arms = {BASE: 0, "plain": 1}
        return arms.get(line.arm, 2), not usable, sign * value if usable else 0.0

    lines.sort(key=key)
    counts: dict[str, int] = {}
    plain = sum(line.arm == "plain" for line in lines)
    for line in lines:
        counts[line.arm] = number = counts.get(line.arm, 0) + 1
        if line.arm == "plain":
            line.label = "plain" if plain == 1 else f"plain{number}"
        elif line.arm != BASE:
            line.label = f"{'M' if line.arm == 'macdrop' else line.arm}{number}"
    ranked = [line for line in lines if line.arm == "macdrop" and not key(line)[1]]
    return ranked[0] if ranked else None


def _add_means(lines: list[Line], columns: list[Column]) -> list[Column]:
    """Mean over zero-shot tasks that share a metric (as the paper's tables have it), for lines that have them all."""
    groups: dict[tuple, list[Column]] = {}
    for column in columns:
        if column.benchmark == "zero_shot":
            groups.setdefault((column.metric, column.attack, column.attack_on), []).append(column)
    means, several = [], len({metric for metric, _, _ in groups}) > 1
    for (metric, attack, attack_on), members in groups.items():
        if len(members) < 2:
            continue
        better = members[0].higher_is_better
        title = f"mean {metric} of {len(members)}" if several else f"mean of {len(members)}"
        means.append(mean := Column("zero_shot", title, metric, attack, attack_on, better))
        for line in lines:
            cells = [line.scores[column] for column in members if column in line.scores]
            if len(cells) == len(members):
                known = all(cell.stderr is not None for cell in cells)
                stderr = math.hypot(*(cell.stderr for cell in cells)) / len(cells) if known else None
                value = math.fsum(cell.value for cell in cells) / len(cells)
                line.scores[mean] = Cell(value, stderr, sum(cell.n or 0 for cell in cells) or None)
    return means


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _varied(lines: list[Line], searched: list[str]) -> list[str]:
    """Settings worth a table column: MacDrop's, the searched ones, and all that differ between trials."""
    own = [f"macdrop.{key}" for key in MACDROP_KEYS]
    trials = [line for line in lines if line.arm != BASE]
    every = dict.fromkeys(key for line in trials for key in line.settings)
    differing = [
        key
        for key in every
        if not key.startswith("macdrop.")
        and key not in NOT_SETTINGS
        and len({json.dumps(line.settings.get(key), default=str) for line in trials}) > 1
    ]
    return list(dict.fromkeys([*own, *searched, *differing]))


def _other_settings(line: Line) -> dict[str, Any]:
    skip = (*NOT_SETTINGS, "macdrop")
    return {key: value for key, value in line.settings.items() if key.partition(".")[0] not in skip}


def _models(config: Mapping[str, Any]) -> list[str]:
    entries = (config.get("sweep") or {}).get("models") or [config.get("model_name_or_path")]
    names = [entry.get("model_name_or_path") if isinstance(entry, Mapping) else entry for entry in entries]
    return [name for name in names if name]


def _asked(config: Mapping[str, Any]) -> list[str]:
    """Names of the run's benchmarks, and of lm-eval's tasks behind them."""
    names = []
    for section in SECTIONS:
        for name, entry in ((config.get("eval") or {}).get(section) or {}).items():
            names += [name, (entry or {}).get("task") or name]
    return names


def _read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

"""Selection and labels for figures: settings of a cell, order of arms, units of a column."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from macdrop.attack import Attack
from tune.analysis.display_names import adapter_name, arm_name
from tune.analysis.results import Group, Line, ModelResults
from tune.config.eval_spec import NO_ATTACK
from tune.config.run_spec import CELL_KEYS
from tune.config.sections import Arm
from tune.evaluation.score_names import Column
from tune.storage.run_folder import BASE

ARMS = (BASE, "plain", "macdrop", "random_rows", "all_rows", "activations")
"""Arms in the order they are drawn; each is also the name of a colour."""
MARKERS = dict(zip(ARMS, "sDo^vX", strict=True))
DASHES = dict(zip(ARMS, ("-", "-", "-", (0, (5, 2)), (0, (2, 1.5)), (0, (6, 2, 1, 2))), strict=True))
SHARES = ("acc", "acc_norm", "exact_match", "f1", "judge_unparsed", "repeated_4grams", "rouge_l")
"""Metrics between 0 and 1, shown in percent, with differences in points."""


@dataclass(frozen=True)
class Cell:
    """One type of adapter; `words` is empty if there is only one."""

    key: dict[str, Any]
    words: str

    def holds(self, item: Line | Group) -> bool:
        return item.arm == BASE or item.cell == self.key

    @property
    def after(self) -> str:
        """The suffix of a title, such as ", DoRA"."""
        return f", {self.words}" if self.words else ""


def cells(model: ModelResults) -> list[Cell]:
    """The cells of the model's trials, in order of appearance."""
    found: list[dict[str, Any]] = []
    for line in model.lines:
        if line.arm != BASE and line.cell not in found:
            found.append(line.cell)
    found = found or [{}]
    return [Cell(key, cell_words(key) if len(found) > 1 else "") for key in found]


def cell_words(key: dict[str, Any]) -> str:
    """Name a cell: {"use_dora": True} -> "DoRA"."""
    others = [f"{name} {value}" for name, value in key.items() if name not in CELL_KEYS]
    return " ".join([adapter_name(key), *others])


def final_groups(model: ModelResults, cell: Cell) -> list[Group]:
    """Base model and final settings of a cell, in the order of arms."""
    return sorted((group for group in model.groups if cell.holds(group)), key=lambda group: _rank(group.arm))


def best_groups(model: ModelResults, cell: Cell) -> list[Group]:
    """`final_groups` with one setting per arm: the search's first finalist for MacDrop, else the first."""
    ranked = [
        name
        for one in model.finalists.get("cells") or []
        if one.get("cell") == cell.key
        for name in one.get("macdrop") or []
    ]
    first: dict[str, Group] = {}
    groups = final_groups(model, cell)
    for group in sorted(groups, key=lambda group: ranked.index(group.id) if group.id in ranked else len(ranked)):
        first.setdefault(group.arm, group)
    return sorted(first.values(), key=lambda group: _rank(group.arm))


def values(group: Group, column: Column) -> list[float]:
    """The column's value of each seed that has it; proportions in percent."""
    return [scaled(column, line.scores[column].value) for line in group.lines if column in line.scores]


def short_names(groups: Iterable[Group]) -> list[tuple[str, Group]]:
    """Short names such as "MacDrop" or "plain LoRA", numbered if an arm has several settings."""
    groups = list(groups)
    count = Counter(group.arm for group in groups)
    seen: Counter[str] = Counter()
    named = []
    for group in groups:
        seen[group.arm] += 1
        number = f" {seen[group.arm]}" if count[group.arm] > 1 else ""
        words = group.label if group.arm in (BASE, Arm.PLAIN) else arm_name(group.arm)
        named.append((f"{words}{number}", group))
    return named


def settings_words(groups: Iterable[Group]) -> str:
    """The setting behind MacDrop's short name, for captions; placebos use the same values."""
    described = [
        f"{name}: {group.label.removeprefix('MacDrop').strip()}"
        for name, group in short_names(groups)
        if group.arm == Arm.MACDROP
    ]
    return ("; ".join(described) + ".") if described else ""


def tint(arm: str) -> str:
    """The name of an arm's colour."""
    return arm if arm in ARMS else "ink"


def front(arm: str) -> float:
    """The z-order of an arm's lines: MacDrop on top, all above the grid."""
    return 4 if arm == Arm.MACDROP else 3


def is_share(metric: str) -> bool:
    return metric.partition(",")[0] in SHARES


def scaled(column: Column, value: float) -> float:
    return 100 * value if is_share(column.metric) else value


def unit(column: Column) -> str:
    """The axis label of a column, such as "accuracy (%)"."""
    metric = column.metric.partition(",")[0]
    words = {
        "acc": "accuracy",
        "acc_norm": "accuracy (norm.)",
        "eval_loss": "validation loss (nats/token)",
        "judge_score": "judge's score (1 to 5)",
    }.get(metric, metric.replace("_", " "))
    return f"{words} (%)" if is_share(metric) else words


def difference_unit(column: Column) -> str:
    """The unit of differences: "points", or the metric's own unit."""
    return "points" if is_share(column.metric) else unit(column)


def better(column: Column) -> str:
    """The direction of a column: "higher is better", "lower is better" or empty."""
    if column.higher_is_better is None:
        return ""
    return ("higher" if column.higher_is_better else "lower") + " is better"


def attack_words(column: Column) -> str:
    """Describe an attack, as in "top-3 zeroing of merged rows"; empty without attack."""
    if column.attack == NO_ATTACK:
        return ""
    attack = Attack.parse(column.attack)
    return f"top-{attack.k} {attack.kind}" + (f" of {column.attack_on} rows" if column.attack_on else "")


def seeds_words(groups: Iterable[Group]) -> str:
    """The seeds of the trained groups, as in "1 to 3 seeds each"."""
    counts = sorted({len(group.lines) for group in groups if group.arm != BASE})
    if not counts:
        return "no trained adapter yet"
    if len(counts) > 1:
        return f"{counts[0]} to {counts[-1]} seeds each"
    return "one seed each" if counts[0] == 1 else f"{counts[0]} seeds each"


def _rank(arm: str) -> int:
    return ARMS.index(arm) if arm in ARMS else len(ARMS)

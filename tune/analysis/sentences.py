"""From comparisons to sentences: what a verdict says."""

from __future__ import annotations

from collections.abc import Sequence

from tune.analysis.comparison import CANNOT_TELL, HELPS, Comparison
from tune.analysis.stats import sign_test
from tune.evaluation.item_values import RATIOS

METRICS = {"acc": "accuracy", "acc_norm": "accuracy (acc_norm)"}


def sentence(model: str, label: str, against: str, main: Comparison | None) -> str:
    """helps / hurts / cannot be told from plain, with number, interval, seeds, items, and what could have been seen."""
    apart = f"{label} cannot be told from {against} on {model}"
    if main is None:
        return f"{apart}: no score that both have says how good they are."
    if not main.per_seed:
        return f"{apart}: {named(main)}, {_reason(main)}."
    what = f"{named(main)} {main.amount}, {_basis(main)}"
    if main.verdict == CANNOT_TELL:
        return f"{apart}: {what}; {_limits(main)}."
    return f"{label} {main.verdict} on {model}: {what}, against {against}."


def statement(found: Comparison) -> str:
    """Under zeroing@3: helps, mean zero-shot accuracy +34.5 points [+30.1, +38.9], 3 seeds, 160 items."""
    under = "Without attack" if found.column.attack == "none" else f"Under {found.column.attack}"
    under += " of the merged rows" if found.column.attack_on == "merged" else ""
    if not found.per_seed:
        return f"{under}: cannot tell, {named(found)}, {_reason(found)}."
    limits = f"; {_limits(found)}" if found.verdict == CANNOT_TELL else ""
    return f"{under}: {found.verdict}, {named(found)} {found.amount}, {_basis(found)}{limits}."


def of_perplexity(rows: Sequence[Comparison], main: Comparison | None) -> list[str]:
    """A statement for each text whose perplexity without attack is told apart."""
    told = [row for row in rows if row.column.attack == "none" and row.column.metric in RATIOS]
    return [statement(row) for row in told if row.verdict != CANNOT_TELL and row.column != (main and main.column)]


def of_seeds(main: Comparison | None) -> list[str]:
    """In how many of several seeds the setting was above and below plain, with the sign test."""
    if main is None or len(main.per_seed) < 2:
        return []
    above, below, p = sign_test(main.per_seed)
    return [f"Seed by seed: above plain in {above} of {len(main.per_seed)}, below in {below} (sign test, p = {p:.2g})."]


def of_placebo(label: str, mine: Comparison | None, theirs: Comparison | None) -> list[str]:
    """That a placebo helps where MacDrop does."""
    if mine is None or theirs is None or {mine.verdict, theirs.verdict} != {HELPS}:
        return []
    return [f"The placebo {label} helps as well: {statement(theirs)}"]


def provenance(main: Comparison | None, tried: int, seeds: int, fresh: bool) -> list[str]:
    """How the setting was chosen, which may flatter it, and whether seeds are missing.

    Args:
        tried: MacDrop settings of the search. seeds: how many the final stage has. fresh: they are not the search's.
    """
    lines = []
    if main is not None and seeds > len(main.seeds):
        lines.append(f"So far {len(main.seeds)} of {seeds} seeds have scores of both arms.")
    if tried > 1 and fresh:
        lines.append(f"Chosen among {tried} MacDrop settings, then trained again on fresh seeds: "
                     "the choice does not flatter it.")  # fmt: skip
    elif tried > 1:
        lines.append(f"Chosen among {tried} MacDrop settings and not trained again on fresh seeds (sweep.seeds is 0): "
                     "the choice favours it over the plain adapter.")  # fmt: skip
    return lines


def named(found: Comparison) -> str:
    """What was compared: "mean zero-shot accuracy", "text perplexity"."""
    column = found.column
    metric = METRICS.get(column.metric, column.metric.replace("_", " "))
    if column.is_mean:
        metric = "score" if column.task.startswith("mean LongBench") else metric
        return f"mean {column.benchmark.replace('zero_shot', 'zero-shot')} {metric}"
    return f"{column.task} {metric}"


def _basis(found: Comparison) -> str:
    seeds = "1 seed" if len(found.seeds) == 1 else f"{len(found.seeds)} seeds"
    return f"{seeds}, {found.items} items" if found.items else f"{seeds}, items not kept"


def _reason(found: Comparison) -> str:
    return found.words.removeprefix(f"{CANNOT_TELL}: ").removesuffix(".")


def _limits(found: Comparison) -> str:
    """What a comparison that cannot tell could have seen."""
    if len(found.seeds) < 2:
        return "one seed says nothing of other seeds: the interval is for these two adapters only (set sweep.seeds: 3)"
    return f"{found.seen} in 80 % of cases"

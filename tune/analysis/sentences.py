"""Verdict sentences, written from comparisons."""

from __future__ import annotations

from collections.abc import Sequence

from tune.analysis.comparison import CANNOT_TELL, HELPS, Comparison
from tune.analysis.stats import sign_test
from tune.config.eval_spec import NO_ATTACK
from tune.evaluation.item_values import RATIOS

METRICS = {"acc": "accuracy", "acc_norm": "accuracy (acc_norm)"}


def sentence(model: str, label: str, against: str, main: Comparison | None) -> str:
    """The verdict in one sentence: difference, interval, seeds, items, and the detectable difference."""
    apart = f"{label} is indistinguishable from {against} on {model}"
    if main is None:
        return f"{apart}: they share no score that measures quality."
    if not main.per_seed:
        return f"{apart}: {named(main)}, {_reason(main)}."
    what = f"{named(main)} {main.amount}, {_basis(main)}"
    if main.verdict == CANNOT_TELL:
        return f"{apart}: {what}; {_limits(main)}."
    return f"{label} {main.verdict} on {model}: {what}, against {against}."


def statement(found: Comparison) -> str:
    """One comparison, as in "Under zeroing@3: helps, mean zero-shot accuracy +34.5 points [+30.1, +38.9], 3 seeds"."""
    under = "Without attack" if found.column.attack == NO_ATTACK else f"Under {found.column.attack}"
    under += " of the merged rows" if found.column.attack_on == "merged" else ""
    if not found.per_seed:
        return f"{under}: cannot tell, {named(found)}, {_reason(found)}."
    limits = f"; {_limits(found)}" if found.verdict == CANNOT_TELL else ""
    return f"{under}: {found.verdict}, {named(found)} {found.amount}, {_basis(found)}{limits}."


def of_perplexity(rows: Sequence[Comparison], main: Comparison | None) -> list[str]:
    """Statements on texts whose perplexity without attack differs significantly."""
    clean = [row for row in rows if row.column.attack == NO_ATTACK and row.column.metric in RATIOS]
    return [statement(row) for row in clean if row.verdict != CANNOT_TELL and row.column != (main and main.column)]


def of_seeds(main: Comparison | None) -> list[str]:
    """Numbers of seeds above and below plain, with the sign test; nothing for a single seed."""
    if main is None or len(main.per_seed) < 2:
        return []
    above, below, p = sign_test(main.per_seed)
    return [f"Seed by seed: above plain in {above} of {len(main.per_seed)}, below in {below} (sign test, p = {p:.2g})."]


def of_placebo(label: str, mine: Comparison | None, theirs: Comparison | None) -> list[str]:
    """A warning that a placebo helps where MacDrop does."""
    if mine is None or theirs is None or {mine.verdict, theirs.verdict} != {HELPS}:
        return []
    return [f"The placebo {label} helps as well: {statement(theirs)}"]


def provenance(main: Comparison | None, tried: int, seeds: int, fresh: bool) -> list[str]:
    """Sentences on the selection of the setting, the bias that it may cause, and missing seeds.

    Args:
        tried: number of MacDrop settings searched. seeds: number of seeds of the final stage. fresh: the search did
            not use these seeds.
    """
    lines = []
    if main is not None and seeds > len(main.seeds):
        lines.append(f"So far {len(main.seeds)} of {seeds} seeds are scored for both arms.")
    if tried > 1 and fresh:
        lines.append(
            f"Selected from {tried} MacDrop settings, then retrained on fresh seeds: "
            "the comparison is free of selection bias."
        )
    elif tried > 1:
        lines.append(
            f"Selected from {tried} MacDrop settings without retraining on fresh seeds (sweep.seeds is 0): "
            "selection bias favours it over the plain adapter."
        )
    return lines


def named(found: Comparison) -> str:
    """The name of a comparison, such as "mean zero-shot accuracy" or "text perplexity"."""
    column = found.column
    metric = METRICS.get(column.metric, column.metric.replace("_", " "))
    if column.is_mean:
        metric = "score" if column.task.startswith("mean LongBench") else metric
        words = dict.fromkeys((column.benchmark.replace("zero_shot", "zero-shot"), metric))  # "perplexity" is both
        return " ".join(["mean", *words])
    return f"{column.task} {metric}"


def _basis(found: Comparison) -> str:
    seeds = "1 seed" if len(found.seeds) == 1 else f"{len(found.seeds)} seeds"
    return f"{seeds}, {found.items} items" if found.items else f"{seeds}, items not recorded"


def _reason(found: Comparison) -> str:
    return found.words.removeprefix(f"{CANNOT_TELL}: ").removesuffix(".")


def _limits(found: Comparison) -> str:
    """The sensitivity of an inconclusive comparison."""
    if len(found.seeds) < 2:
        return (
            "one seed says nothing about other seeds: the interval covers these two adapters only (set sweep.seeds: 3)"
        )
    return found.sensitivity

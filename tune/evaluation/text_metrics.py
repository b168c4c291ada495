"""Metrics of one answer against its references, and means over answers with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any


def mean_and_stderr(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and its standard error with Bessel's correction; None for one item."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)


def text_metric(metric: str, answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Score every answer against its best-matching reference.

    exact_match: 1 where answer and reference agree up to white space (at the ends ignored, inside counted once).
    chrf: sentence-level chrF2 by sacrebleu, 0 to 100. rouge_l: ROUGE-L F-measure with stemming by rouge_score, 0 to 1.
    """
    scorer = {"exact_match": _exact, "chrf": _chrf, "rouge_l": _rouge_l}[metric]
    return [scorer(answer, list(wanted)) for answer, wanted in zip(answers, references, strict=True)]


def _exact(answer: str, references: list[str]) -> float:
    return float(" ".join(answer.split()) in {" ".join(reference.split()) for reference in references})


@cache
def _chrf_scorer() -> Any:
    from sacrebleu.metrics import CHRF

    return CHRF()


def _chrf(answer: str, references: list[str]) -> float:
    return float(_chrf_scorer().sentence_score(answer, references).score)


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]

    return RougeScorer(["rougeL"], use_stemmer=True)


def _rouge_l(answer: str, references: list[str]) -> float:
    return max(float(_rouge_scorer().score(reference, answer)["rougeL"].fmeasure) for reference in references)


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Share of n-grams of tokens that occurred before in the answer: 0 none, 1 nothing new; 0 for short answers."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0

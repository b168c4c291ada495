"""Scoring of a loaded task by lm-eval's evaluator; its prompts are built at the first scoring and kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import lm_eval.api.task
import lm_eval.utils
from lm_eval.evaluator import evaluate

from macdrop.errors import MacDropError
from tune.errors import BenchmarkError
from tune.evaluation.check import check_metric
from tune.evaluation.zero_shot.harness import Harness
from tune.evaluation.zero_shot.zero_shot_rows import ResidentTask, items_of, rows_of

FEWSHOT_SEED = 1234  # lm-eval's default


def score(
    task: ResidentTask, harness: Harness, limit: int | None, metric: str | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Score a task with the model that `harness` uses.

    metric: the metric that must be among those computed; None requires none.

    Returns:
        rows, and per item its metrics and answers.

    Raises:
        BenchmarkError: lm-eval could not score the task. ConfigError: it has no such metric.
    """
    for each in task.loaded["tasks"].values():
        each.set_fewshot_seed(seed=FEWSHOT_SEED)  # or the examples would differ from scoring to scoring
    try:
        with templates_compiled_once():
            result = evaluate(harness, task.loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    except MacDropError:
        raise
    except Exception as error:
        why = str(error).strip() or "no reason given"
        raise BenchmarkError(f"lm-eval could not score {task.name!r}: {type(error).__name__}: {why}") from error
    rows = rows_of(task, result, {name: len(documents) for name, documents in harness.cut.items()}, harness.middle)
    check_metric(task.name, metric, list(dict.fromkeys(row["metric"].partition(",")[0] for row in rows)))
    words = " contexts=apart" if harness.apart else ""
    rows = [{**row, "max_length": harness.max_length, "settings": row["settings"] + words} for row in rows]
    return rows, items_of(result["samples"])


def build_requests_once(task: Any) -> None:
    """Keep the requests of a task: building the prompts takes longer than a tiny model takes to answer them."""
    build = task.build_all_requests
    built: dict[int | None, list[Any]] = {}

    def resident(*, limit: int | None = None, **settings: Any) -> None:
        if limit in built:
            task._instances = built[limit]
            for instance in built[limit]:
                instance.resps, instance.filtered_resps = [], {}
            return
        with _without_bar():
            build(limit=limit, **settings)
        built[limit] = task.instances

    task.build_all_requests = resident


@contextmanager
def _without_bar() -> Iterator[None]:
    """Hide the progress bar of lm-eval's request building, which has no switch."""
    shown = lm_eval.api.task.tqdm
    lm_eval.api.task.tqdm = partial(shown, disable=True)
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = shown


_compiled = lru_cache(maxsize=256)(lm_eval.utils.env.from_string)


@contextmanager
def templates_compiled_once() -> Iterator[None]:
    """Compile each prompt template once, not once per document: that is half of the time of scoring a tiny model."""
    lm_eval.utils.env.from_string = _compiled
    try:
        yield
    finally:
        del lm_eval.utils.env.from_string

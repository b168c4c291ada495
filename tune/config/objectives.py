"""Checks of objectives: a search may optimise the validation loss, or scores of the block `validation:`."""

from __future__ import annotations

from collections.abc import Sequence

from macdrop.errors import nearest
from tune.config.eval_entries import MEAN, NO_ATTACK
from tune.config.eval_spec import EvalSpec, jobs
from tune.config.parse import SECTIONS
from tune.config.sections import EVAL_LOSS
from tune.config.sweep_spec import SweepSpec

#: What a benchmark reads: a source, and the configuration name and split of Hub data.
Rows = tuple[str, str | None, str | None]
#: Sections whose benchmarks have a mean.
AVERAGED = ("zero_shot", "perplexity")


def score_name(benchmark: str, task: str, metric: str, attack: str) -> str:
    """Return the name of a score in `sweep.metric`: benchmark/task/metric, with @attack for a score under attack."""
    return f"{benchmark}/{task}/{metric}" + ("" if attack == NO_ATTACK else f"@{attack}")


def check_metrics(sweep: SweepSpec, test: EvalSpec, validation: EvalSpec) -> None:
    """Refuse an objective that is not a validation score.

    Raises:
        ValueError: the metric belongs to a test benchmark, or nothing of that name is scored.
    """
    selectable, tested = _forms(validation), _forms(test)
    for name in (metric.name for metric in sweep.metric if metric.name != EVAL_LOSS):
        form = _form(name)
        if form in selectable:
            continue
        if form in tested:
            section, task = name.split("/")[:2]
            raise ValueError(
                f"sweep.metric.name is {name!r}, a score of the block eval: a setting chosen by a test benchmark "
                f"looks better on it than it is.\nGive the search its own data under validation (validation.{section}."
                f"{task}, other rows than the test's), or optimise {EVAL_LOSS}."
            )
        allowed = ", ".join((EVAL_LOSS, *selectable))
        more = "" if selectable else "; or list benchmarks under validation, which has the shape of eval"
        raise ValueError(
            f"sweep.metric.name is {name!r}, but no benchmark of the validation block gives such a score."
            f"{nearest(name, [EVAL_LOSS, *selectable])}\nAllowed: {allowed}{more}."
        )


def check_apart(test: EvalSpec, validation: EvalSpec) -> None:
    """Refuse rows that are used for selection and reported as well, and a judge in the search.

    Raises:
        ValueError: a validation benchmark reads the same rows as a test benchmark, or validation has a judge.
    """
    if validation.judge is not None:
        raise ValueError("validation.judge: a judge scores the answers of the final stage. Write it under eval.")
    tested = {rows: where for where, found in _rows(test) for rows in found}
    for where, found in _rows(validation):
        for rows in found & set(tested):
            raise ValueError(
                f"validation.{where} and eval.{tested[rows]} score the same rows ({rows[0]}): what is selected by them "
                "looks better on them than it is.\nGive validation other data, or another split of them."
            )


def _rows(block: EvalSpec) -> list[tuple[str, set[Rows]]]:
    """List each benchmark's key in the block and what it reads: files, Hub data or an lm-eval task, with a split."""
    found: list[tuple[str, set[Rows]]] = []
    for section in SECTIONS:
        for name, entry in block.entries(section).items():
            sources = getattr(entry, "data", None) or [getattr(entry, "task", None) or name]
            about = (getattr(entry, "name", None), getattr(entry, "split", None))
            found.append((f"{section}.{name}", {(source, *about) for source in sources}))
    return found


def check_early_stops(sweep: SweepSpec, eval_steps: Sequence[int | None]) -> None:
    """Refuse a scheduler without validations to cut at; `eval_steps` are those of the models.

    Raises:
        ValueError: a model has no eval_steps.
    """
    if sweep.scheduler != "none" and None in eval_steps:
        raise ValueError(
            f"sweep.scheduler {sweep.scheduler} compares eval_loss while trials train, and eval_steps is not set.\n"
            "Set eval_steps (optimizer steps between two validations), or sweep.scheduler to none."
        )


def _forms(block: EvalSpec) -> list[str]:
    """List the scores of a block and their means, with METRIC in place of the metric, which only the task knows."""
    listed = jobs(block)
    forms = [score_name(job.benchmark, job.task, "METRIC", job.attack) for job in listed]
    for section in AVERAGED:
        if len({job.task for job in listed if job.benchmark == section}) > 1:
            attacks = dict.fromkeys(job.attack for job in listed if job.benchmark == section)
            forms += [score_name(section, MEAN, "METRIC", attack) for attack in attacks]
    return list(dict.fromkeys(forms))


def _form(name: str) -> str:
    score, _, attack = name.partition("@")
    parts = score.split("/")
    return score_name(parts[0], parts[1], "METRIC", attack or NO_ATTACK) if len(parts) == 3 else name

"""The segments of a fine-tuning: on how many workers it was trained, from which step on.

A resumed fine-tuning may have another number of workers. Its batches and masks stay those that it began with, as each
worker takes more or fewer of a step's micro-batches; sums are made in another order, and dropout draws other numbers.
A checkpoint keeps the segments up to its step, `trial.json` those of the adapter. All functions are pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, TypedDict

from macdrop.errors import ConfigError
from tune.config.run_spec import RunSpec, TrainSpec, values_of
from tune.config.sections import Arm


class Segment(TypedDict):
    """A part of a fine-tuning: after `step` optimizer steps and `seconds`, on `workers`.

    masks: False where a checkpoint of several workers does not say that each micro-batch had a mask of its own.
    """

    step: int
    seconds: float
    workers: int
    masks: bool


#: The key of a checkpoint's meta, and of an outcome.
SEGMENTS = "segments"


def workers_at_start(spec: TrainSpec, meta: Mapping[str, Any]) -> int | None:
    """Return the workers that a checkpoint's fine-tuning began with; None if this spec cannot have made it."""
    micro_batch = spec.per_device_train_batch_size * spec.gradient_accumulation_steps
    workers, rest = divmod(int(meta.get("global_batch", 0)), micro_batch)
    return workers if workers and not rest else None


def check_shared(spec: TrainSpec, begun: int, workers: int, accumulations: Sequence[int] = ()) -> None:
    """Refuse workers that cannot share the micro-batches of an optimizer step evenly.

    begun: the workers that the run began with: there are `gradient_accumulation_steps` micro-batches for each.
    accumulations: the values of this key that the run may have, by default the spec's own.

    Raises:
        ConfigError: with the arithmetic, and the numbers that can.
    """
    accumulations = accumulations or [spec.gradient_accumulation_steps]
    uneven = next((each for each in accumulations if each * begun % workers), None)
    if uneven is None:
        return
    size, number = spec.per_device_train_batch_size, begun * uneven
    common = begun * math.gcd(*accumulations)
    able = ", ".join(str(count) for count in range(1, common + 1) if common % count == 0)
    raise ConfigError(
        f"ray.num_workers is {workers}, but an optimizer step has {number} micro-batches, which {workers} workers "
        f"cannot share evenly. It stays what it was when the run began: per_device_train_batch_size {size} x "
        f"gradient_accumulation_steps {uneven} x ray.num_workers {begun} = {size * number} examples.\n"
        f"Set ray.num_workers to one of {able}, and leave the other two keys as they are."
    )


def check_run_shared(started: RunSpec, workers: Sequence[int]) -> None:
    """Refuse workers, given for each model, that cannot share every optimizer step that the trials of a run may have.

    Raises:
        ConfigError: as `check_shared`.
    """
    key = "gradient_accumulation_steps"
    for study, ray, now in zip(started.studies(), started.rays(), workers, strict=True):
        values = values_of(study, started.sweep.parameters, key)
        if key in started.sweep.parameters and started.sweep.parameters[key].values is None:
            values = list(range(values[0], values[-1] + 1))
        check_shared(study, ray.num_workers, now, [*values, study.gradient_accumulation_steps])


def shared(spec: TrainSpec, begun: int | None, workers: int) -> TrainSpec:
    """Return a spec with the micro-batches of each of `workers`, for a run that began with `begun` (None: them).

    Raises:
        ConfigError: they cannot be shared evenly.
    """
    if begun is None or begun == workers:
        return spec
    check_shared(spec, begun, workers)
    return spec.model_copy(update={"gradient_accumulation_steps": spec.gradient_accumulation_steps * begun // workers})


def continued(
    spec: TrainSpec, meta: Mapping[str, Any], *, step: int, seconds: float, begun: int, workers: int
) -> list[Segment]:
    """Return the segments of a fine-tuning that continues on `workers` after `step` steps.

    meta: the checkpoint's, empty at step 0. begun: the workers that the fine-tuning began with.
    """
    known: list[Segment] = list(meta.get(SEGMENTS, ()))
    if step and not known:
        known = [Segment(step=0, seconds=0.0, workers=begun, masks=begun == 1 or spec.arm == Arm.PLAIN)]
    known = [each for each in known if each["step"] < step]
    if known and known[-1]["workers"] == workers and known[-1]["masks"]:
        return known
    return [*known, Segment(step=step, seconds=seconds, workers=workers, masks=True)]


def recorded(info: Mapping[str, Any]) -> list[Segment]:
    """Return the segments of a trial's record; none where it has none, or they are damaged."""
    found = info.get(SEGMENTS)
    rows = [row for row in found if isinstance(row, dict)] if isinstance(found, list | tuple) else []
    if not all(isinstance(row.get(key), int | float) for row in rows for key in ("step", "seconds", "workers")):
        return []
    return [
        Segment(step=row["step"], seconds=row["seconds"], workers=row["workers"], masks=row.get("masks") is not False)
        for row in rows
    ]


def describe(segments: Sequence[Segment], begun: int | None = None) -> str | None:
    """Return a sentence on a fine-tuning that other workers trained than those of its run; None for all others.

    begun: the workers that its run began with; None if unknown.
    """
    changes = [each for before, each in pairwise(segments) if before["workers"] != each["workers"]]
    said = []
    if changes:
        counts = [segments[0]["workers"], *(each["workers"] for each in changes)]
        parts = [f"{_workers(count)} up to step {each['step']}" for count, each in zip(counts, changes, strict=False)]
        said.append(
            f"{', '.join(parts)}, {_workers(counts[-1])} from there: bits may differ from step {changes[0]['step']} "
            "(sums have another order, and dropout other draws; batches and masks are those of the run)"
        )
    elif segments and begun is not None and segments[0]["workers"] != begun:
        said.append(
            f"{_workers(segments[0]['workers'])} in a run that began with {begun}: bits may differ from those that it "
            "would have had (sums have another order, and dropout other draws; batches and masks are those of the run)"
        )
    said += [
        f"the checkpoint of step {each['step']} does not say how masks were drawn up to there: the micro-batches of "
        f"{_workers(before['workers'])} may have shared one"
        for before, each in pairwise(segments)
        if not before["masks"]
    ]
    return "; ".join(said) or None


def worker_seconds(segments: Sequence[Segment], seconds: float) -> float:
    """Return the seconds of a fine-tuning of `seconds` times the workers that each of them was spent on."""
    ends = [*(each["seconds"] for each in segments[1:]), seconds]
    return sum((end - each["seconds"]) * each["workers"] for each, end in zip(segments, ends, strict=True))


def _workers(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"

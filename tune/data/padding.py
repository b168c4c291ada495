"""Padding of a fine-tuning's micro-batches, and what packing makes of it: pure functions of lengths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tune.config.train_spec import TrainSpec
from tune.data.batching import Batches
from tune.data.packing import plan_rows, token_budget

#: Optimizer steps that are looked at, from the first.
LOOKED_AT = 200


@dataclass(frozen=True)
class Padding:
    """Tokens of a fine-tuning's optimizer steps.

    share: padding over all tokens where micro-batches are padded, 0 to 1.
    micro_batches: packed micro-batches per worker and step, on average.
    largest: tokens of the largest packed micro-batch.
    """

    share: float
    micro_batches: float
    largest: int


def padding_of(lengths: np.ndarray, spec: TrainSpec, workers: int) -> Padding:
    """Compute the padding of the first epoch, of at most `LOOKED_AT` steps.

    lengths: tokens of each training example, int64 (n,).
    """
    steps = [lengths[picked] for picked in _steps(len(lengths), spec, workers)]  # each (accumulation, workers, B)
    real = sum(int(each.sum()) for each in steps)
    padded = sum(int(each.max(axis=-1).sum()) * each.shape[-1] for each in steps)
    budget = max(token_budget(spec), int(lengths.max()))  # smaller ones are refused elsewhere
    slices = [each.reshape(-1, each.shape[-1]) for each in steps]
    plans = [plan_rows(each, workers, budget) for each in slices]
    largest = max(
        sum(int(each[spot]) for spot in row)
        for each, plan in zip(slices, plans, strict=True)
        for rows in plan
        for row in rows
    )
    return Padding(1 - real / padded, float(np.mean([len(plan) for plan in plans])), largest)


def describe_padding(lengths: np.ndarray, spec: TrainSpec, workers: int) -> str:
    """Return what packing does to the micro-batches of a fine-tuning, or what its absence costs."""
    found = padding_of(lengths, spec, workers)
    if spec.packing == "off":
        return f"off; {found.share:.0%} of the tokens in padded micro-batches are padding"
    number = f"{found.micro_batches:.2g} micro-batch{'' if found.micro_batches == 1 else 'es'}"
    saved = f"{found.share:.0%} of the padded tokens saved"
    when = "" if spec.packing == "on" else ", where the model passes the check at the start"
    return f"{number} of at most {token_budget(spec)} tokens per worker and step; {saved}{when}"


def _steps(examples: int, spec: TrainSpec, workers: int) -> Iterator[np.ndarray]:
    batches = Batches(
        examples,
        seed=spec.seed,
        per_device=spec.per_device_train_batch_size,
        accumulation=spec.gradient_accumulation_steps,
        world=workers,
    )
    for step in range(1, min(batches.steps_per_epoch, LOOKED_AT, spec.max_steps or LOOKED_AT) + 1):
        yield batches.step(step)

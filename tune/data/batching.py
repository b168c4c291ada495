"""The examples of an epoch and of every optimizer step, in slices, and the learning rate: pure functions of seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy as np

from macdrop.errors import DataError
from tune.config.run_spec import TrainSpec

#: The key of info.json, and of a trial's record, with what weights make of the data sets.
MIXTURE = "mixture"


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """Divide `total` in proportion to `weights`, by largest remainders: each part is within 1 of its exact share."""
    exact = [total * weight / math.fsum(weights) for weight in weights]
    parts = [math.floor(each) for each in exact]
    by_remainder = sorted(range(len(parts)), key=lambda at: (parts[at] - exact[at], at))
    for at in by_remainder[: total - sum(parts)]:
        parts[at] += 1
    return parts


def mix(train: np.ndarray, ends: Sequence[int], weights: Sequence[float], seed: int) -> np.ndarray:
    """Return the examples of an epoch in which each data set has its weight's share, as many as there are in all.

    Of a data set whose share is smaller than it is some examples are drawn; of one whose share is larger each is there
    several times, and some once more. Which these are depends on `seed` and the data set's place alone, so a larger
    weight only adds.

    Args:
        train: examples to choose from, ascending, int64 (n,).
        ends: the first example behind each data set; S of them.
        weights: S numbers above 0.

    Returns:
        int64 (n,), ascending, with repetitions.

    Raises:
        DataError: a data set has no example in `train`, or its weight is too small for a single one.
    """
    starts = [0, *ends[:-1]]
    chosen: list[np.ndarray] = []
    for at, count in enumerate(shares(len(train), weights)):
        own = train[(train >= starts[at]) & (train < ends[at])]
        if not len(own):
            raise DataError(f"dataset.{at} has a weight, but none of its examples is left to train on.")
        if not count:
            raise DataError(
                f"dataset.{at}.weight {weights[at]:g} of {math.fsum(weights):g} is not one example of {len(train)}. "
                "Raise it, or leave the data set out."
            )
        whole, rest = divmod(count, len(own))
        drawn = np.random.default_rng([seed, at]).permutation(own)[:rest]
        chosen += [np.tile(own, whole), drawn]
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def describe_mixture(info: Mapping[str, Any], *, folders: bool = True) -> list[str]:
    """Return a sentence on each weighted data set: its share of an epoch, and how often an example is in it.

    info: a prepared data set's, or a trial's record. folders: name the folders of the files, which are a machine's.
    """
    parts = _parts(info.get(MIXTURE))
    total = sum(part["examples"] for part in parts)
    sentences = []
    for part in parts:
        name = part["path"] if folders else PurePath(part["path"]).name
        share = f"{part['examples']} of {total} examples of an epoch ({part['examples'] / total:.1%}"
        times = f"each of its {part['available']} {part['examples'] / part['available']:.3g} times on average"
        sentences.append(f"{name}: {share}, weight {part['weight']:g}), {times}")
    return sentences


def _parts(found: Any) -> list[dict[str, Any]]:
    """Return what a record says of a mixture; nothing where it is damaged."""
    parts = [part for part in found if isinstance(part, dict)] if isinstance(found, list) else []
    numbers = [part.get(key) for part in parts for key in ("weight", "available", "examples")]
    whole = all(isinstance(number, int | float) and number > 0 for number in numbers)
    return parts if whole and all(isinstance(part.get("path"), str) for part in parts) else []


def steps_per_epoch(examples: int, global_batch: int) -> int:
    """Return the optimizer steps of an epoch; its last batch is filled up from the epoch's start."""
    return math.ceil(examples / global_batch)


def total_steps(spec: TrainSpec, examples: int, global_batch: int) -> int:
    """Return the optimizer steps of the whole fine-tuning (`max_steps` overrides the epochs)."""
    if spec.max_steps is not None:
        return spec.max_steps
    return max(1, round(spec.num_train_epochs * steps_per_epoch(examples, global_batch)))


def save_interval(spec: TrainSpec, steps: int) -> int:
    """Return the optimizer steps between checkpoints; 0 for none. `save_steps: null` is a tenth, rounded up."""
    return math.ceil(steps / 10) if spec.save_steps is None else spec.save_steps


def epoch_order(examples: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order (examples,) in which epoch `epoch`, counted from 0, visits the examples."""
    return np.random.default_rng([seed, epoch]).permutation(examples)


class Batches:
    """The example numbers of every optimizer step of one fine-tuning.

    One optimizer step takes `world * accumulation * per_device` consecutive examples of the epoch's order, in slices of
    `per_device`. Masks belong to slices; neither they nor the content of a step depend on how it is spread over ranks
    and micro-steps. Padded micro-step m of rank r is slice m * world + r.
    """

    def __init__(self, examples: int, *, seed: int, per_device: int, accumulation: int, world: int) -> None:
        self.examples = examples
        self.seed = seed
        self.per_device = per_device
        self.accumulation = accumulation
        self.world = world
        self.slices = accumulation * world
        self.global_batch = per_device * accumulation * world
        self.steps_per_epoch = steps_per_epoch(examples, self.global_batch)
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def step(self, step: int) -> np.ndarray:
        """Return the example numbers (slices, per_device) of optimizer step `step`, counted from 1."""
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, epoch_order(self.examples, self.seed, epoch))
        order = self._epoch[1]
        places = np.arange(position * self.global_batch, (position + 1) * self.global_batch) % self.examples
        return order[places].reshape(self.slices, self.per_device)

    def epoch(self, step: int) -> int:
        """Return the epoch of optimizer step `step`, both counted from 1."""
        return (step - 1) // self.steps_per_epoch + 1


def learning_rates(spec: TrainSpec, steps: int) -> Callable[[int], float]:
    """Return the learning rate at optimizer step t (from 1) of `steps`, by Hugging Face's schedule of that name."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=spec.learning_rate)
    scheduler = get_scheduler(
        spec.lr_scheduler_type,
        optimizer,
        num_warmup_steps=math.ceil(spec.warmup_ratio * steps),
        num_training_steps=steps,
    )
    factor = scheduler.lr_lambdas[0]
    return lambda step: spec.learning_rate * factor(step - 1)

"""The examples of every optimizer step, in slices, and the learning rate: pure functions of seed and step."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tune.config.run_spec import TrainSpec


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

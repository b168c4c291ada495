"""The examples of every micro-batch, padded, and the learning rate: pure functions of seed, step and rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tune.config.run_spec import TrainSpec
from tune.data.templates import IGNORE


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
    """The example numbers of every micro-batch of one fine-tuning.

    One optimizer step takes `world * accumulation * per_device` consecutive examples of the epoch's order. Micro-step m
    of rank r takes the slice number `m * world + r`, so the content of a step does not depend on how it is spread over
    ranks and micro-steps.
    """

    def __init__(self, examples: int, *, seed: int, per_device: int, accumulation: int, world: int) -> None:
        self.examples = examples
        self.seed = seed
        self.per_device = per_device
        self.accumulation = accumulation
        self.world = world
        self.global_batch = per_device * accumulation * world
        self.steps_per_epoch = steps_per_epoch(examples, self.global_batch)
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def step(self, step: int) -> np.ndarray:
        """Return the example numbers (accumulation, world, per_device) of optimizer step `step`, counted from 1."""
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, epoch_order(self.examples, self.seed, epoch))
        order = self._epoch[1]
        places = np.arange(position * self.global_batch, (position + 1) * self.global_batch) % self.examples
        return order[places].reshape(self.accumulation, self.world, self.per_device)

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


def collate(
    examples: Sequence[tuple[np.ndarray, np.ndarray]], pad_token_id: int, pad_to: int | None = None
) -> dict[str, Any]:
    """Pad a batch on the right, to its longest example or to exactly `pad_to` tokens.

    Returns:
        torch tensors input_ids, attention_mask and labels, int64 (B, T); labels are -100 on the padding.
    """
    import torch

    longest = max(len(ids) for ids, _ in examples)
    width = longest if pad_to is None else pad_to
    if width < longest:
        raise ValueError(f"pad_to={pad_to} is shorter than the longest example of the batch ({longest} tokens)")
    shape = (len(examples), width)  # (B, T)
    batch = {
        "input_ids": torch.full(shape, pad_token_id, dtype=torch.int64),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, IGNORE, dtype=torch.int64),
    }
    for row, (ids, labels) in enumerate(examples):
        batch["input_ids"][row, : len(ids)] = torch.from_numpy(ids)
        batch["attention_mask"][row, : len(ids)] = 1
        batch["labels"][row, : len(ids)] = torch.from_numpy(labels)
    return batch

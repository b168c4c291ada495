"""Pre-train a planted model on the synthetic world, with a hinge that makes it depend on its massive rows.

Massive rows alone do no harm when they are zeroed (perplexity x 1.01): training learns to do without them. So the loss
has a second term, relu(target - cross-entropy with the rows zeroed), which is what makes these models break under top-k
zeroing. That is a property we put in. It says nothing about language models.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from zoo.plant import Plant

Progress = Callable[[int, int, dict[str, float]], None]
"""Called with step (from 1), number of steps, and the losses of that step."""

HINGE_ROWS = (3, 5)
HINGE_BATCH = 8
ADAM_BETAS = (0.9, 0.98)
CLIP_NORM = 1.0


@dataclass(frozen=True)
class Schedule:
    """Length of the training and strength of the hinge; `hinge_weight` 0 turns the hinge off."""

    steps: int
    hinge_weight: float = 0.05
    hinge_target: float = 3.0
    hinge_from: int = 150
    hinge_every: int = 1
    learning_rate: float = 4e-3
    warmup: int = 50
    batch_size: int = 32

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate: linear warm-up times a cosine that ends at 5 %; `step` counts from 0."""
        cosine = 0.95 * 0.5 * (1 + math.cos(math.pi * step / self.steps)) + 0.05
        return self.learning_rate * min(1.0, (step + 1) / self.warmup) * cosine


def token_loss(model: nn.Module, blocks: torch.Tensor) -> torch.Tensor:
    """Return the mean next-token cross-entropy in nats over `blocks` (n, length)."""
    logits = model(input_ids=blocks, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), blocks[:, 1:].reshape(-1))


@contextmanager
def rows_silenced(model: nn.Module, plant: Plant, count: int) -> Iterator[None]:
    """Differentiably zero the intermediate state of the first `count` planted rows: the same as zeroing the rows."""
    keep = torch.ones(model.config.intermediate_size)
    keep[list(plant.rows[:count])] = 0.0
    down = model.model.layers[plant.layer].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda module, inputs: (inputs[0] * keep,))
    try:
        yield
    finally:
        handle.remove()


def pretrain(
    model: nn.Module,
    plant: Plant,
    blocks: torch.Tensor,
    schedule: Schedule,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Train `model` in place on `blocks` (n, length) and return the means of the last 50 losses.

    Keys: ``loss``, and ``zeroed_loss`` (with planted rows zeroed) when the hinge is on. Draws come from `seed` alone.
    """
    batches = torch.Generator().manual_seed(seed)
    counts = random.Random(seed + 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=schedule.learning_rate, betas=ADAM_BETAS, weight_decay=0.0)
    losses: list[float] = []
    zeroed_losses: list[float] = []
    model.train()
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate_at(step)
        batch = blocks[torch.randint(len(blocks), (schedule.batch_size,), generator=batches)]
        loss = token_loss(model, batch)
        losses.append(loss.item())
        if schedule.hinge_weight and step >= schedule.hinge_from and step % schedule.hinge_every == 0:
            with rows_silenced(model, plant, counts.choice(HINGE_ROWS)):
                zeroed_loss = token_loss(model, batch[:HINGE_BATCH])
            zeroed_losses.append(zeroed_loss.item())
            loss = loss + schedule.hinge_weight * torch.relu(schedule.hinge_target - zeroed_loss)
        optimizer.zero_grad()
        loss.backward()
        plant.mask_gradients()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        if progress is not None:
            progress(step + 1, schedule.steps, _last("loss", losses, 1) | _last("zeroed_loss", zeroed_losses, 1))
    model.eval()
    return _last("loss", losses, 50) | _last("zeroed_loss", zeroed_losses, 50)


def _last(name: str, values: list[float], count: int) -> dict[str, float]:
    recent = values[-count:]
    return {name: sum(recent) / len(recent)} if recent else {}

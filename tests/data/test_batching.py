"""tune.data.batching: the examples and the learning rate of a step depend on seed and step only."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from tune.config.run_spec import TrainSpec
from tune.data.batching import Batches, epoch_order, steps_per_epoch, total_steps


def batches(
    examples: int = 10, *, seed: int = 0, per_device: int = 1, accumulation: int = 1, world: int = 1
) -> Batches:
    return Batches(examples, seed=seed, per_device=per_device, accumulation=accumulation, world=world)


@pytest.mark.parametrize(
    ("examples", "shape"),
    [
        (12, (2, 2, 3)),
        (10, (4, 1, 1)),
        (10, (1, 4, 1)),
        (7, (1, 1, 7)),
        (1, (1, 1, 1)),
        (3, (2, 2, 2)),
        (100, (8, 2, 2)),
    ],
)
def test_epoch_visits_every_example_once_plus_the_fill(examples, shape):
    per_device, accumulation, world = shape
    made = batches(examples, per_device=per_device, accumulation=accumulation, world=world)
    size = per_device * accumulation * world
    steps = math.ceil(examples / size)
    assert made.steps_per_epoch == steps_per_epoch(examples, size) == steps
    for epoch in range(3):
        shown = np.concatenate([made.step(epoch * steps + 1 + i).ravel() for i in range(steps)])
        order = epoch_order(examples, 0, epoch)
        assert sorted(order) == list(range(examples))
        assert list(shown[:examples]) == list(order)
        # The last batch is filled from the epoch's start.
        assert list(shown[examples:]) == [order[i % examples] for i in range(steps * size - examples)]
        counts = Counter(shown.tolist())
        assert set(counts) == set(range(examples)) and sum(counts.values()) == steps * size


def test_steps_and_epochs_count_from_1():
    made = batches(10, per_device=4)
    assert [made.epoch(step) for step in range(1, 8)] == [1, 1, 1, 2, 2, 2, 3]


def test_step_depends_on_seed_and_step_only():
    first, second = batches(50, per_device=8), batches(50, per_device=8)
    forward = {step: first.step(step).copy() for step in range(1, 20)}
    for step in reversed(range(1, 20)):  # as a resumed run, which has seen no step before
        assert (second.step(step) == forward[step]).all()
    other = batches(50, seed=1, per_device=8)
    assert any((other.step(step) != forward[step]).any() for step in forward)
    assert (epoch_order(50, 0, 0) != epoch_order(50, 0, 1)).any(), "every epoch has an order of its own"


def test_step_content_does_not_depend_on_ranks_and_accumulation():
    spreads = [(8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 1, 8), (1, 8, 1)]
    made = [batches(30, per_device=p, accumulation=a, world=w) for p, a, w in spreads]
    for step in range(1, 9):
        contents = [one.step(step) for one in made]
        assert [content.shape for content in contents] == [(a * w, p) for p, a, w in spreads]
        assert len({tuple(content.ravel()) for content in contents}) == 1


@pytest.mark.parametrize(
    ("examples", "batch", "epochs", "max_steps", "steps"),
    [
        (100, 10, 3.0, None, 30),
        (101, 10, 3.0, None, 33),
        (100, 10, 0.5, None, 5),
        (5, 10, 0.01, None, 1),
        (9, 2, 1.0, 7, 7),
    ],
)
def test_total_steps(examples, batch, epochs, max_steps, steps):
    spec = TrainSpec(model_name_or_path="m", num_train_epochs=epochs, max_steps=max_steps)
    assert total_steps(spec, examples, batch) == steps


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"])
@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_learning_rates_equal_hugging_faces_scheduler(name, warmup):
    import torch
    from transformers import get_scheduler

    from tune.data.batching import learning_rates

    steps, peak = 20, 3e-4
    spec = TrainSpec(model_name_or_path="m", learning_rate=peak, lr_scheduler_type=name, warmup_ratio=warmup)
    rate = learning_rates(spec, steps)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    warm = math.ceil(warmup * steps)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warm, num_training_steps=steps)
    slow = []
    for _ in range(steps):
        slow.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert [rate(step) for step in range(1, steps + 1)] == pytest.approx(slow, rel=1e-12)
    assert rate(7) == rate(7), "asking twice, or out of order, changes nothing"

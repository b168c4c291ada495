"""Padding of a fine-tuning's steps, against a count by hand, and the words for it."""

from __future__ import annotations

import numpy as np
import pytest

from tune.config.run_spec import TrainSpec
from tune.data.batching import Batches
from tune.data.packing import token_budget
from tune.data.padding import describe_padding, padding_of

LENGTHS = np.array([3, 10, 5, 2, 8, 8, 1, 4, 6, 9, 7, 3])


def spec(**keys) -> TrainSpec:
    return TrainSpec(
        model_name_or_path="m", **{"per_device_train_batch_size": 2, "cutoff_len": 10, "val_size": 0, **keys}
    )


@pytest.mark.parametrize(("workers", "accumulation"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_the_share_of_padding_is_that_of_every_micro_batch_of_an_epoch(workers, accumulation):
    found = padding_of(LENGTHS, spec(gradient_accumulation_steps=accumulation), workers)
    batches = Batches(len(LENGTHS), seed=0, per_device=2, accumulation=accumulation, world=workers)
    real = padded = 0
    for step in range(1, batches.steps_per_epoch + 1):
        rows = batches.step(step).reshape(-1, 2)
        real += sum(int(LENGTHS[row].sum()) for row in rows)
        padded += sum(2 * LENGTHS[row].max() for row in rows)
    assert found.share == pytest.approx(1 - real / padded)


def test_the_largest_micro_batch_is_that_of_the_packed_rows():
    def largest(budget: int, workers: int) -> int:
        """A step takes all examples."""
        keys = {"max_tokens_per_micro_batch": budget, "gradient_accumulation_steps": 6 // workers}
        return padding_of(LENGTHS, spec(**keys), workers).largest

    tokens = int(LENGTHS.sum())
    assert largest(1000, 1) == tokens and largest(1000, 2) == tokens // 2
    assert largest(tokens - 1, 1) == tokens // 2 and largest(10, 1) == 10


def test_only_the_steps_of_a_fine_tuning_count():
    one = padding_of(LENGTHS, spec(max_steps=1), 1)
    first = Batches(len(LENGTHS), seed=0, per_device=2, accumulation=1, world=1).step(1)[0]
    assert one.largest == LENGTHS[first].sum()


def test_the_budget_is_that_of_the_key_or_of_the_padded_batch():
    assert token_budget(spec()) == 20 and token_budget(spec(max_tokens_per_micro_batch=64)) == 64


def test_the_words_name_micro_batches_budget_and_padding():
    share = f"{padding_of(LENGTHS, spec(), 1).share:.0%}"
    on = describe_padding(LENGTHS, spec(packing="on", max_tokens_per_micro_batch=64), 1)
    assert on == f"1 micro-batch of at most 64 tokens per worker and step; {share} of the padded tokens saved"
    assert describe_padding(LENGTHS, spec(), 1).endswith("saved, where the model passes the check at the start")
    off = describe_padding(LENGTHS, spec(packing="off"), 1)
    assert off == f"off; {share} of the tokens in padded micro-batches are padding"

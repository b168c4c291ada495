"""tune.data.packing and micro_batches: every example once, within the budget, for all ranks alike; exact rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from macdrop.errors import ConfigError
from tune.data.dataset import Examples
from tune.data.micro_batches import packed_row, padded_batch
from tune.data.packing import check_budget, plan_rows
from tune.data.templates import IGNORE


def make(*lengths: int, unlabelled: int = 1) -> Examples:
    """Examples of these lengths, token ids counted up from 10 over all of them; the first tokens carry no loss."""
    tokens = np.arange(10, 10 + sum(lengths), dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    labels = tokens.copy()
    for start, stop in zip(offsets, offsets[1:], strict=False):
        labels[start : min(start + unlabelled, stop)] = IGNORE
    return Examples(tokens, labels, offsets, np.arange(len(lengths)))


@st.composite
def steps(draw):
    slices, size = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    budget = draw(st.integers(2, 60))
    lengths = draw(st.lists(st.integers(1, budget), min_size=slices * size, max_size=slices * size))
    return np.array(lengths).reshape(slices, size), draw(st.integers(1, 5)), budget, draw(st.booleans())


@settings(max_examples=300, deadline=None, derandomize=True)
@given(steps())
def test_a_plan_holds_every_example_once_within_the_budget(step):
    lengths, world, budget, apart = step
    plan = plan_rows(lengths, world, budget, apart=apart)
    assert all(len(micro) == world for micro in plan), "equally many micro-batches on every rank"
    rows = [row for micro in plan for row in micro]
    spots = sorted(spot for row in rows for spot in row)
    assert spots == [(s, i) for s in range(lengths.shape[0]) for i in range(lengths.shape[1])]
    for row in rows:
        assert sum(lengths[spot] for spot in row) <= budget
        assert list(row) == sorted(row), "the examples of a slice are neighbours"
        assert not apart or len({number for number, _ in row}) <= 1
    assert plan == plan_rows(lengths.copy(), world, budget, apart=apart), "deterministic"
    if not apart:
        # First fit fills all bins but one to more than half; so does the last try of a plan.
        assert len(plan) <= math.ceil((2 * lengths.sum() / budget + 1) / world)
    assert any(plan[-1]), "no micro-step without any example"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(steps())
def test_rows_of_a_plan_are_balanced_where_the_budget_leaves_room(step):
    lengths, world, _, _ = step
    (micro,) = plan_rows(lengths, world, int(lengths.sum()))
    loads = [sum(lengths[spot] for spot in row) for row in micro]
    assert max(loads) - min(loads) <= lengths.max()


def test_ranks_are_balanced_over_micro_steps():
    lengths = np.array([[100, 90, 20, 10], [80, 70, 40, 30]])
    plan = plan_rows(lengths, 2, 120)
    loads = [sum(int(lengths[spot]) for micro in plan for spot in micro[rank]) for rank in range(2)]
    assert len(plan) == 2 and loads == [220, 220]


def test_as_few_micro_batches_as_the_budget_allows():
    # Given to the emptier row each, 5 + 4 and 5 + 3 tokens leave no room for the last 3; 5 + 5 and 4 + 3 + 3 do.
    assert len(plan_rows(np.array([[5, 5, 4, 3, 3]]), 1, 10)) == 2
    assert len(plan_rows(np.array([[4, 4, 4]]), 1, 8)) == 2


def test_an_example_may_fill_a_micro_batch_alone():
    plan = plan_rows(np.array([[10, 4, 3]]), 1, 10)
    assert sorted(row for (row,) in plan) == [((0, 0),), ((0, 1), (0, 2))]


def test_a_rank_may_get_nothing():
    ((first, second, third),) = plan_rows(np.array([[5], [7]]), 3, 10)
    assert (first, second, third) == (((1, 0),), ((0, 0),), ())


def test_an_example_longer_than_the_budget_is_refused_with_the_budget_that_would_do():
    check_budget(9, 9)
    with pytest.raises(ConfigError, match=r"is 8, but the longest example has 9 tokens.*(?s:.)Set it to 9 or more"):
        check_budget(9, 8)


def test_a_packed_row_restarts_positions_and_predicts_no_first_token():
    batch = packed_row(make(3, 2, 4), np.array([[2, 0], [1, 1]]), ((0, 0), (0, 1), (1, 0)))
    assert batch.input_ids.tolist() == [[15, 16, 17, 18, 10, 11, 12, 13, 14]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1]]
    assert batch.positions.tolist() == [0, 1, 2, 4, 5, 7]
    assert batch.targets.tolist() == [16, 17, 18, 11, 12, 14]
    assert batch.segments == (4, 3, 2) and batch.attention_mask is None and batch.counts
    placed = [(each.row, each.start, each.stop, each.slice, each.place) for each in batch.examples]
    assert placed == [(0, 0, 4, 0, 0), (0, 4, 7, 0, 1), (0, 7, 9, 1, 0)]


def test_a_label_on_the_first_token_of_an_example_is_never_a_target():
    batch = packed_row(make(3, 2, unlabelled=0), np.array([[0, 1]]), ((0, 0), (0, 1)))
    assert batch.targets.tolist() == [11, 12, 14]


def test_a_padded_batch_has_the_targets_of_a_packed_row():
    examples, picked = make(3, 2, 4, unlabelled=2), np.array([[2, 0, 1]])
    padded = padded_batch(examples, picked[0], 0, pad=9)
    packed = packed_row(examples, picked, ((0, 0), (0, 1), (0, 2)))
    assert padded.input_ids.tolist() == [[15, 16, 17, 18], [10, 11, 12, 9], [13, 14, 9, 9]]
    assert padded.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]
    assert padded.positions.tolist() == [1, 2, 5]
    assert padded.targets.tolist() == packed.targets.tolist() == [17, 18, 12]
    assert padded.segments is None
    assert [each.stop for each in padded.examples] == [4, 3, 2]


@pytest.mark.parametrize("batch", [packed_row(make(3), np.array([[0]]), ()), padded_batch(make(3), [], 0, pad=9)])
def test_what_a_rank_without_examples_runs_does_not_count(batch):
    assert batch.input_ids.tolist() == [[10, 11]]
    assert len(batch.positions) == len(batch.targets) == 1 and not batch.counts


def test_a_micro_batch_without_answer_tokens_does_not_count():
    batch = packed_row(make(3, unlabelled=3), np.array([[0]]), ((0, 0),))
    assert not batch.counts and len(batch.positions) == 1

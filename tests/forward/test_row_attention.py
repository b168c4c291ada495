"""tune.forward.row_attention: tokens of a packed batch compute what they compute in rows of the whole model."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny
from helpers.zoo_of_families import build_family

from macdrop.errors import MacDropError
from tune.forward.row_attention import Rows, in_rows, runs_in_rows

FIRST, SECOND = [5, 6, 7, 8, 9], [5, 6, 20]
#: Both of them, with the beginning that they have in common once: the tokens of each place, and their depths.
PACKED, DEPTHS = [5, 6, 7, 8, 9, 20], [0, 1, 2, 3, 4, 2]
TOKENS = [[0, 1, 2, 3, 4], [0, 1, 5, 0, 0]]


def rows() -> Rows:
    hidden = torch.full((5, 5), torch.finfo(torch.float32).min).triu(1)
    return Rows(torch.tensor(TOKENS), hidden.expand(2, 1, 5, 5))


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_token_that_rows_have_in_common_is_computed_once(attention):
    model = tiny.build()
    model.set_attn_implementation(attention)
    with in_rows(model, rows()):
        packed = model(input_ids=torch.tensor([PACKED]), position_ids=torch.tensor([DEPTHS])).logits[0]
    assert len(packed) == len(PACKED)
    for ids, places in ((FIRST, [0, 1, 2, 3, 4]), (SECOND, [0, 1, 5])):
        alone = model(input_ids=torch.tensor([ids])).logits[0]
        assert torch.allclose(packed[places], alone, atol=1e-5)
    assert model.config._attn_implementation == attention


def test_outputs_are_those_of_the_first_place_of_each_token():
    assert rows().places.tolist() == [0, 1, 2, 3, 4, 7]


def test_attention_that_cannot_be_replaced_is_refused():
    assert runs_in_rows(tiny.build())
    model = build_family("falcon")
    assert not runs_in_rows(model)
    with pytest.raises(MacDropError, match="cannot be replaced"), in_rows(model, rows()):
        pass

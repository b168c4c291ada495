"""Rows that other first tokens than bos call."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from helpers.zoo_of_families import build_family

from macdrop.errors import ConfigError
from macdrop.load import load_model
from macdrop.scan import FirstToken, common_rows, find_massive_weights, first_token_rows

PLANTED = Path(__file__).parents[2] / "tune" / "zoo" / "models" / "planted-llama"


def scan(model):
    return find_massive_weights(model, source="test", fingerprint="f", bos_token_id=1)


def test_rows_of_a_token_are_those_of_a_scan_that_takes_it_for_bos():
    model = build_family("llama")
    weights = scan(model)
    found = first_token_rows(model, weights, [1, 7], k=4)
    assert found[0].rows == weights.top(4) and found[0].sizes == weights.magnitudes[:4]
    assert found[0].layer == weights.layer and found[0].shared(weights, 4) == 4
    again = find_massive_weights(model, source="test", fingerprint="f", bos_token_id=7)
    assert found[1].layer == again.layer == weights.layer and again.top(4) != weights.top(4)
    assert found[1].rows == again.top(4) and found[1].sizes == again.magnitudes[:4]
    assert first_token_rows(model, weights, [1, 7], k=4) == found


def test_only_bos_calls_the_planted_rows():
    model = load_model(PLANTED)
    weights = scan(model)
    bos, other = first_token_rows(model, weights, [1, 20], k=3)
    assert bos.shared(weights, 3) == 3 and other.shared(weights, 3) == 0 and bos.hidden > 20 * other.hidden
    assert common_rows(weights, [bos], 3) == 3


def test_common_rows_are_the_longest_common_beginning_in_any_order():
    weights = scan(build_family("llama"))
    first, second, third, fourth = weights.top(4)
    same = FirstToken(3, weights.layer, (second, first, fourth, third), (4.0, 3.0, 2.0, 1.0), 9.0)
    half = dataclasses.replace(same, rows=(second, first, *weights.indices[10:12]))
    assert common_rows(weights, [same], 4) == 4 and common_rows(weights, [same, half], 4) == 2
    assert common_rows(weights, [dataclasses.replace(same, layer=99)], 4) == 0


@pytest.mark.parametrize("token", [-1, 10**6, True, 2.0])
def test_a_token_outside_the_vocabulary_is_refused(token):
    model = build_family("llama")
    with pytest.raises(ConfigError, match="outside the model's vocabulary"):
        first_token_rows(model, scan(model), [token], k=2)


def test_the_model_is_left_as_it_was():
    model = build_family("llama").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first_token_rows(model, scan(model), [5], k=2)
    assert model.training and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

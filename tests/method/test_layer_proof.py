"""The proof of every layer: numbers against edited copies, the finding, and the file that it is kept in."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.zoo_of_families import build_family

from macdrop.errors import ConfigError, DataError
from macdrop.families import find_ffns
from macdrop.proof import Factor, LayerProof, block_losses, layer_seconds, prove_layers
from macdrop.proof.layers import LayerRow, _finding
from macdrop.scan import find_massive_weights, layer_weights


def blocks(n: int = 6, length: int = 9) -> torch.Tensor:
    return tiny.batch(0, n, length)["input_ids"]


def scan(model):
    return find_massive_weights(model, source="test", fingerprint="f", bos_token_id=1)


def states_at_bos(model) -> dict[int, torch.Tensor]:
    """|Intermediate state| by layer, by hooks of the test's own."""
    seen: dict[int, torch.Tensor] = {}
    for ffn in find_ffns(model):
        ffn.down.register_forward_pre_hook(
            lambda _, args, at=ffn.layer: seen.__setitem__(at, args[0].detach()[0, 0].abs())
        )
    with torch.no_grad():
        model(input_ids=torch.tensor([[1]]))
    return seen


def edited(model, layer: int, rows: list[int], *, retain: bool):
    """A copy whose gate and up projections of one layer are without these rows, or have only these."""
    model = copy.deepcopy(model)
    mask = torch.zeros(find_ffns(model)[layer].intermediate_size, 1)
    mask[rows] = 1
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            getattr(model.model.layers[layer].mlp, name).weight.mul_(mask if retain else 1 - mask)
    return model


def test_every_number_equals_that_of_an_edited_copy():
    model, ids = build_family("llama"), blocks()
    weights = scan(model)
    found = prove_layers(model, ids, layer_weights(model, weights), weights.layer, k=2, batch_size=4)
    states, untouched = states_at_bos(copy.deepcopy(model)), block_losses(model, ids)
    assert [row.layer for row in found.rows] == sorted(states) and found.untouched == math.exp(untouched.mean())
    for row in found.rows:
        rows = states[row.layer].argsort(descending=True)[:2].tolist()
        assert list(row.rows) == rows
        for factor, retain in ((row.zeroed, False), (row.retained, True)):
            losses = block_losses(edited(model, row.layer, rows, retain=retain), ids)
            assert factor.value == pytest.approx(math.exp((losses - untouched).mean()), rel=1e-5)
            assert factor.low <= factor.value <= factor.high
    assert found.best == max(found.rows, key=lambda row: row.zeroed.value).layer


def test_a_layer_proof_is_repeatable_leaves_the_model_and_is_kept_as_json():
    model, ids = build_family("mixtral"), blocks()
    weights, before = scan(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scans = layer_weights(model, weights)
    steps: list[tuple[int, int]] = []
    first = prove_layers(model, ids, scans, weights.layer, k=2, progress=lambda *step: steps.append(step))
    assert prove_layers(model, ids, scans, weights.layer, k=2) == first
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert steps[-1] == (1 + 2 * len(scans),) * 2
    assert LayerProof.from_dict(json.loads(json.dumps(first.to_dict()))) == first
    named = prove_layers(model, ids, scans, weights.layer, k=2, measured_on="a story").to_dict()
    assert named == {**first.to_dict(), "measured_on": "a story"}
    named.pop("measured_on")
    assert LayerProof.from_dict(named) == first, "files of earlier versions do not name their text"
    with pytest.raises(ValueError, match="format 9"):
        LayerProof.from_dict({**first.to_dict(), "format": 9})
    assert layer_seconds(model, ids, len(scans)) > 0


def row(layer: int, low: float, value: float, high: float) -> LayerRow:
    return LayerRow(layer, None, (1, 2), 9.0, Factor(value, low, high), Factor(1.0, 1.0, 1.0))


ABOVE, BELOW = np.full(6, 2.0), np.full(6, 1.0)
NOISY = np.array([0.0, 4.0] * 3)


@pytest.mark.parametrize(
    ("factors", "losses", "own", "finding"),
    [
        ([(3, 4, 5), (1, 1.1, 1.2)], [ABOVE, BELOW], 0, "the rule's layer"),
        ([(3, 4, 5), (1, 1.1, 1.2)], [ABOVE, BELOW], 1, "another layer"),
        ([(3, 4, 5), (1, 3.9, 5)], [ABOVE, NOISY], 0, "cannot tell"),
        ([(3, 4, 5), (1, 3.9, 5)], [ABOVE, NOISY], 1, "cannot tell"),
        ([(1.2, 1.4, 1.9), (1, 1.1, 1.2)], [ABOVE, BELOW], 0, "no layer"),
        ([(0.9, 1.4, 2.1), (1, 1.1, 1.2)], [ABOVE, BELOW], 0, "cannot tell"),
        ([(0.9, 1.4, 2.1), (1, 1.1, 1.2)], [ABOVE, BELOW], 1, "cannot tell"),
        ([(math.inf,) * 3, (3, 4, 5)], [ABOVE * math.inf, BELOW], 0, "the rule's layer"),
        ([(math.inf,) * 3, (math.inf,) * 3], [ABOVE * math.inf] * 2, 0, "cannot tell"),
    ],
)
def test_the_finding(factors, losses, own, finding):
    rows = [row(layer, *factor) for layer, factor in enumerate(factors)]
    assert _finding(rows, [0, 1], own, losses, seed=0) == finding


def test_bad_input_is_refused_before_any_pass():
    model = build_family("llama")
    weights = scan(model)
    scans = layer_weights(model, weights)
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ConfigError, match="k must be"):
        prove_layers(model, blocks(), scans, weights.layer, k=0)
    with pytest.raises(ConfigError, match="k = 999"):
        prove_layers(model, blocks(), scans, weights.layer, k=999)
    with pytest.raises(DataError, match="at least 5"):
        prove_layers(model, blocks(2), scans, weights.layer)


def test_other_layers_keep_the_scan_of_the_massive_one():
    model = build_family("llama")
    weights = scan(model)
    scans = layer_weights(model, weights)
    assert scans[weights.layer] is weights
    others = [each for each in scans if each is not weights]
    assert len({each.path for each in scans}) == len(scans) == 1 + len(others)
    for each in others:
        sizes = states_at_bos(copy.deepcopy(model))[each.layer]
        assert list(each.magnitudes) == sizes.sort(descending=True).values.tolist()
        assert sizes[list(each.indices)].tolist() == list(each.magnitudes)
        assert sorted(each.indices) == list(range(each.intermediate_size)) and each.bos_token_id == 1

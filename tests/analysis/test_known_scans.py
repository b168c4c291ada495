"""analysis.known_scans: what others have published stands beside a scan of the same model only."""

from __future__ import annotations

import pytest
from helpers import tiny

from macdrop.weights import LayerStats
from tune.analysis.known_scans import agreements, published

LLAMA = "meta-llama/Meta-Llama-3-8B"


def scan(model: str = LLAMA, rows=(2427, 198, 591), layer: int = 1, shape=(32, 4096, 14336)) -> dict:
    layers, hidden, size = shape
    content = tiny.massive_weights(model=model, layer=layer).to_dict()
    rest = [row for row in range(size) if row not in rows]
    stats = [vars(LayerStats(i, 0.0, 0.0, 0.0, 0.0)) for i in range(layers)]
    return {**content, "hidden_size": hidden, "intermediate_size": size, "layers": stats, "indices": [*rows, *rest]}


def test_every_entry_has_sources_shapes_and_possible_rows():
    for entry in published()["models"]:
        layers, _, size = entry["shape"]
        named = [*entry.get("rows", {}), *entry.get("sensitive", {}), *entry.get("none", [])]
        assert entry["ids"] and named and set(named) <= set(published()["sources"])
        assert {*entry.get("expert", {})} <= {*entry.get("rows", {})}
        assert not {*entry.get("none", [])} & {*entry.get("sensitive", {})}
        for found in entry.get("rows", {}).values():
            assert all(0 <= int(layer) < layers for layer in found)
            assert all(0 <= row < size for rows in found.values() for row in rows)
        for found in entry.get("sensitive", {}).values():
            before, after = found.get("perplexity", (1, 10 if found["verdict"] else 1))
            assert (after / before >= 2) is found["verdict"]


def test_a_scan_that_finds_the_published_rows_agrees_with_each_source():
    found = agreements(scan(), "sensitive")
    assert [each.agrees for each in found] == [True] * 3
    assert "2 of 5" not in found[0].text and "3 of 5 are the first ones here" in found[0].text
    assert "2427" in found[1].text and "mengxiayu" in found[1].text
    assert "5.75 to 104.57" in found[2].text
    assert len(agreements(scan())) == 2, "without a proof there is no verdict to compare"


@pytest.mark.parametrize("model", ["models/Meta-Llama-3-8B", "models/meta-llama-3-8b/", "a/b/Meta-Llama-3-8B"])
def test_a_folder_of_that_name_is_that_model(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / model).mkdir(parents=True)
    assert [each.agrees for each in agreements(scan(model))] == [True, True]


def test_a_model_of_another_owner_is_another_one():
    assert agreements(scan("someone/Meta-Llama-3-8B"), "sensitive") == []
    assert agreements(scan("Meta-Llama/meta-llama-3-8b")), "a hub id counts in any case of letters"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer": 5}, "not layer 5"),
        ({"rows": (3, 4)}, "without row 3"),
        ({"shape": (16, 4096, 14336)}, "another model of that name"),
    ],
)
def test_a_scan_that_finds_something_else_differs(change, words):
    found = agreements(scan(**change))
    assert found and all(each.agrees is False and words in each.text for each in found)


def test_a_borderline_verdict_settles_nothing_and_an_opposite_one_differs():
    assert [each.agrees for each in agreements(scan(), "borderline")][-1] is None
    assert [each.agrees for each in agreements(scan(), "not sensitive")][-1] is False


def test_the_expert_of_a_source_is_shown_and_not_compared():
    mixtral = scan("mistralai/Mixtral-8x7B-v0.1", (7310, 7530, 11981, 7492, 3178))
    (found,) = agreements({**mixtral, "expert": 3})
    assert found.agrees and "7492, 3178, of its expert 4; 5 of 5" in found.text


def test_a_source_that_found_no_massive_activations_settles_nothing():
    (found,) = agreements(scan("allenai/OLMo-2-1124-7B", shape=(32, 4096, 11008)), "not sensitive")
    assert found.agrees is None and "no massive activations found (source: refine" in found.text


def test_nothing_is_said_of_a_model_that_nobody_has_published():
    assert agreements(scan("someone/else")) == []

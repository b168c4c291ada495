"""A kept scan serves one checkpoint, one first token and one rule; a run keeps to the scan that it began with."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from macdrop.errors import ConfigError
from tune.config.run_spec import TrainSpec
from tune.training import massive_weights as kept
from tune.training.loading import open_base
from tune.training.massive_weights import recorded_weights, scanned
from tune.zoo.catalog import resolve


@pytest.fixture
def base(tmp_path, monkeypatch) -> TrainSpec:
    """A copy of a planted model, under one name whatever is done to it."""
    monkeypatch.setenv("MACDROP_CACHE", str(tmp_path / "cache"))
    shutil.copytree(resolve("zoo:planted-llama"), tmp_path / "model")
    return TrainSpec(model_name_or_path=str(tmp_path / "model"))


def silence_top_rows(spec: TrainSpec, k: int = 5) -> tuple[int, ...]:
    """Set the top rows to zero in the file, as an attack that was saved would; the rows."""
    file, found = Path(spec.model_name_or_path) / "model.safetensors", scanned(spec)
    tensors = load_file(file)
    for name in ("gate_proj", "up_proj"):
        tensors[f"{found.path}.{name}.weight"][list(found.top(k))] = 0
    save_file(tensors, file, {"format": "pt"})
    return found.top(k)


def name_another_bos(spec: TrainSpec) -> None:
    file = Path(spec.model_name_or_path) / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    settings["bos_token"] = settings["eos_token"]
    file.write_text(json.dumps(settings))


def test_edited_rows_are_scanned_again(base):
    first = scanned(base)
    rows = silence_top_rows(base)
    assert rows == first.top(5)
    again = scanned(base)
    assert again.fingerprint != first.fingerprint
    assert (again.layer, again.top(5)) != (first.layer, first.top(5))
    assert again == kept.massive_weights(base, *open_base(base), fresh=True)


def test_another_first_token_is_scanned_again(base):
    first = scanned(base)
    name_another_bos(base)
    again = scanned(base)
    assert again.fingerprint == first.fingerprint and again.bos_token_id != first.bos_token_id
    assert again.magnitudes != first.magnitudes
    given = kept.massive_weights(base, *open_base(base), bos_token_id=first.bos_token_id)
    assert given == dataclasses.replace(first, bos_rule="given")  # the scan is the same, the reason for its token not


def test_another_rule_is_scanned_again(base, monkeypatch):
    calls = []
    find = kept.find_massive_weights
    monkeypatch.setattr(kept, "find_massive_weights", lambda *args, **kwargs: calls.append(1) or find(*args, **kwargs))
    scanned(base), scanned(base)
    monkeypatch.setattr(kept, "RULE", kept.RULE + 1)
    scanned(base), scanned(base)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, ""),
        (silence_top_rows, "are not those that this run began with"),
        (name_another_bos, "The first token of"),
    ],
    ids=["nothing", "rows", "bos"],
)
def test_a_resumed_run_keeps_its_scan_or_is_refused(base, tmp_path, change, message):
    file = tmp_path / "run" / "massive_weights.json"
    first = recorded_weights(base, *open_base(base), file)
    recorded = file.read_bytes()
    if change is None:
        assert recorded_weights(base, *open_base(base), file) == first
    else:
        change(base)
        with pytest.raises(ConfigError, match=message):
            recorded_weights(base, *open_base(base), file)
    assert file.read_bytes() == recorded


def test_a_run_whose_fingerprint_was_sampled_is_resumed(base, tmp_path):
    """Unless its massive layer is another one, which samples of the files did not see."""
    from macdrop.fingerprint import _model_files, _sampled

    folder, file = Path(base.model_name_or_path), tmp_path / "massive_weights.json"
    older = dataclasses.replace(scanned(base), fingerprint=_sampled(folder, _model_files(folder)))
    older.save(file)
    assert recorded_weights(base, *open_base(base), file) == older
    dataclasses.replace(older, path="model.layers.0.mlp").save(file)
    with pytest.raises(ConfigError, match="The massive layer of"):
        recorded_weights(base, *open_base(base), file)

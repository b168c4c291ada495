"""Massive weights as a value and a file."""

import dataclasses
import json
import pickle

import pytest
from helpers.zoo_of_families import build_family

from macdrop.errors import ConfigError, NoMassiveWeights
from macdrop.scan import MassiveWeights, find_massive_weights


@pytest.fixture(scope="module")
def weights() -> MassiveWeights:
    return find_massive_weights(build_family("mixtral"), source="test", fingerprint="a" * 64, bos_token_id=1)


def test_json_and_pickle_give_back_the_same(weights, tmp_path):
    path = weights.save(tmp_path / "deep" / "massive.json")
    assert MassiveWeights.load(path) == weights
    assert pickle.loads(pickle.dumps(weights)) == weights
    assert MassiveWeights.from_dict(weights.to_dict()) == weights
    assert isinstance(MassiveWeights.load(path).indices, tuple) and isinstance(weights.layers[0].hidden_max, float)
    assert json.loads(path.read_text())["expert"] == weights.expert


def test_saving_is_atomic(weights, tmp_path, monkeypatch):
    path = weights.save(tmp_path / "massive.json")
    good = path.read_bytes()
    broken = dataclasses.replace(weights, model=object())
    with pytest.raises(TypeError):
        broken.save(path)
    assert path.read_bytes() == good and [p.name for p in tmp_path.iterdir()] == ["massive.json"]
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        weights.save(path)
    assert path.read_bytes() == good and [p.name for p in tmp_path.iterdir()] == ["massive.json"]


def test_top(weights):
    assert weights.top(0) == () and weights.top(3) == weights.indices[:3]
    assert weights.top(weights.intermediate_size) == weights.indices
    for k in (-1, weights.intermediate_size + 1, 2.0, True):
        with pytest.raises(ConfigError, match=f"from 0 to {weights.intermediate_size}"):
            weights.top(k)


def test_another_checkpoint_is_refused(weights):
    weights.check("a" * 64)
    with pytest.raises(NoMassiveWeights, match=r"(?s)a{14} in the scan, b{14} now.*macdrop scan"):
        weights.check("b" * 64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "not a scan by macdrop"),
        ("{}", "KeyError"),
        ('{"format": 99}', "format 99"),
        ('{"format": 1, "model": "x"}', "not a scan by macdrop"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(NoMassiveWeights, match=message) as error:
        MassiveWeights.load(path)
    assert str(path) in str(error.value)


def test_damaged_contents_and_missing_files_are_refused(weights, tmp_path):
    data = weights.to_dict()
    for key, value in {"indices": data["indices"][:-1], "magnitudes": [1.0], "surprise": 1, "layers": [{}]}.items():
        with pytest.raises(NoMassiveWeights):
            MassiveWeights.from_dict({**data, key: value})
    with pytest.raises(NoMassiveWeights, match="no scan at"):
        MassiveWeights.load(tmp_path / "none.json")

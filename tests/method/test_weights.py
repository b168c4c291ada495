"""Massive weights as a value and a file, and the fingerprint that ties them to a checkpoint."""

import dataclasses
import json
import pickle
import shutil

import pytest
from helpers.zoo_of_families import build_family

from macdrop.errors import ConfigError, NoMassiveWeights
from macdrop.fingerprint import checkpoint_folder
from macdrop.scan import MassiveWeights, checkpoint_fingerprint, find_massive_weights


@pytest.fixture(scope="module")
def weights() -> MassiveWeights:
    return find_massive_weights(build_family("mixtral"), source="test", fingerprint="a" * 64, bos_token_id=1)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    build_family("llama").save_pretrained(path)
    return path


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
    with pytest.raises(NoMassiveWeights, match=r"(?s)aaaaaaaaaaaa in the scan, bbbbbbbbbbbb now.*macdrop scan"):
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


def test_fingerprint_depends_on_contents_not_location(folder, tmp_path):
    first = checkpoint_fingerprint(folder)
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").write_text("other files do not count")
    assert checkpoint_fingerprint(copy) == checkpoint_fingerprint(str(folder)) == first and len(first) == 64


def test_fingerprint_covers_weights_config_and_names(folder):
    seen = {checkpoint_fingerprint(folder)}
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    seen.add(checkpoint_fingerprint(folder))
    file.write_bytes(data + b"\0")
    seen.add(checkpoint_fingerprint(folder))
    file.rename(folder / "other.safetensors")
    seen.add(checkpoint_fingerprint(folder))
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    seen.add(checkpoint_fingerprint(folder))
    assert len(seen) == 5


def test_fingerprint_of_shards(tmp_path):
    model = build_family("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    first = checkpoint_fingerprint(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not in the index")
    assert checkpoint_fingerprint(tmp_path) == first
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(ConfigError, match="incomplete"):
        checkpoint_fingerprint(tmp_path)


def test_fingerprint_of_a_cached_hub_id_equals_that_of_its_files(folder, tmp_path, monkeypatch):
    import huggingface_hub.constants

    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / ("c" * 40)
    shutil.copytree(folder, snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("c" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert checkpoint_fingerprint("org/tiny") == checkpoint_fingerprint(folder)
    assert checkpoint_folder("org/tiny", "c" * 40) == snapshot
    with pytest.raises(ConfigError, match="at revision 'v2'"):
        checkpoint_fingerprint("org/tiny", "v2")


def test_fingerprint_refuses_folders_without_a_model(tmp_path):
    with pytest.raises(ConfigError, match="neither a folder here nor in the Hugging Face cache"):
        checkpoint_fingerprint("no/such-model")
    with pytest.raises(ConfigError, match="neither a folder here nor in the Hugging Face cache"):
        checkpoint_fingerprint("/no/such/folder/here")
    with pytest.raises(ConfigError, match="no config.json"):
        checkpoint_fingerprint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="no weight file"):
        checkpoint_fingerprint(tmp_path)

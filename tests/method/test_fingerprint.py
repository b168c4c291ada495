"""The fingerprint that ties a scan to a checkpoint: every byte counts, and a file is read once."""

import hashlib
import json
import os
import random
import shutil

import pytest
import torch
from helpers.zoo_of_families import build_family
from safetensors.torch import save_file

from macdrop import fingerprint
from macdrop.errors import ConfigError
from macdrop.fingerprint import SCHEME, checkpoint_fingerprint, checkpoint_folder, is_checkpoint
from tune.zoo.catalog import resolve

#: The fingerprint of zoo:planted-llama that runs recorded while 16 places of a weight file were read.
SAMPLED = "6828cc7da9075709dca1a3b6299e4dec519502bc712757cc0c12720a8d11d37d"


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    build_family("llama").save_pretrained(path)
    return path


@pytest.fixture
def reads(monkeypatch):
    """The files that are read whole, by name; files count as settled at once."""
    seen = []

    def counting(data, name):
        seen.append(os.path.basename(data.name))
        return hashlib.new(name, data.read())

    monkeypatch.setattr(fingerprint.hashlib, "file_digest", counting)
    monkeypatch.setattr(fingerprint, "_SETTLED_NS", -(10**15))
    monkeypatch.setattr(fingerprint, "_digests", {})
    return seen


def test_contents_count_and_not_the_location(folder, tmp_path):
    first = checkpoint_fingerprint(folder)
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").write_text("other files do not count")
    assert checkpoint_fingerprint(copy) == checkpoint_fingerprint(str(folder)) == first
    assert len(first) == len(SCHEME) + 64


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


# --- every byte ---


def test_every_byte_of_every_weight_counts(tmp_path):
    """Sixteen samples of a file miss a row that an edit has set to zero."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    torch.manual_seed(0)
    weights = {"rows": torch.randn(2000, 100)}
    save_file(weights, model / "model.safetensors")
    draw = random.Random(0)
    first = checkpoint_fingerprint(model)
    for row in draw.sample(range(2000), 12):
        edited = {"rows": weights["rows"].clone()}
        edited["rows"][row] = 0
        save_file(edited, model / "model.safetensors")
        assert checkpoint_fingerprint(model) != first, row
    save_file(weights, model / "model.safetensors")
    assert checkpoint_fingerprint(model) == first


def test_code_of_the_checkpoint_counts(folder):
    seen = {checkpoint_fingerprint(folder)}
    for text in ("x = 1\n", "x = 2\n"):
        (folder / "modeling_own.py").write_text(text)
        seen.add(checkpoint_fingerprint(folder))
    assert len(seen) == 3


def test_an_edit_through_the_link_of_the_hub_s_cache_is_seen(folder):
    """The name of a blob is the hash of what was downloaded, not of what is there."""
    file = folder / "model.safetensors"
    blob = folder.parent / hashlib.sha256(file.read_bytes()).hexdigest()
    file.rename(blob)
    file.symlink_to(blob)
    first = checkpoint_fingerprint(folder)
    file.write_bytes(bytes(reversed(file.read_bytes())))
    assert file.is_symlink() and checkpoint_fingerprint(folder) != first


# --- read once ---


def test_a_file_is_read_once_also_by_the_next_process(folder, tmp_path, reads):
    memory = tmp_path / "deep" / "memory"
    first = checkpoint_fingerprint(folder, memory=memory)
    assert checkpoint_fingerprint(folder, memory=memory) == first
    fingerprint._digests.clear()
    assert checkpoint_fingerprint(folder, memory=memory) == first
    assert reads == ["model.safetensors"]
    assert checkpoint_fingerprint(folder) == first and len(list(memory.iterdir())) == 1


def test_a_changed_file_is_read_again_whatever_its_times_say(folder, tmp_path, reads):
    file, memory = folder / "model.safetensors", tmp_path / "memory"
    data, old = file.read_bytes(), os.stat(file)
    first = checkpoint_fingerprint(folder, memory=memory)
    changed = data[:-1] + bytes([data[-1] ^ 1])
    file.write_bytes(changed)  # in place, of the same size, and with the time that it had
    os.utime(file, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert checkpoint_fingerprint(folder, memory=memory) != first
    (folder / "new").write_bytes(data)  # another file under its name
    os.utime(folder / "new", ns=(old.st_atime_ns, old.st_mtime_ns))
    (folder / "new").replace(file)
    assert checkpoint_fingerprint(folder, memory=memory) == first
    assert len(reads) == 3


def test_a_file_that_has_just_changed_is_not_remembered(folder, tmp_path):
    checkpoint_fingerprint(folder, memory=tmp_path / "memory")
    assert not (tmp_path / "memory").exists()


def test_a_file_that_changes_while_it_is_read_is_refused(folder, monkeypatch):
    def slow(data, name):
        with open(data.name, "ab") as file:
            file.write(b"more")
        return hashlib.new(name, data.read())

    monkeypatch.setattr(fingerprint.hashlib, "file_digest", slow)
    with pytest.raises(ConfigError, match="changes while it is read"):
        checkpoint_fingerprint(folder)


def test_a_memory_that_cannot_be_written_is_no_error(folder, tmp_path, reads):
    (tmp_path / "file").write_text("")
    first = checkpoint_fingerprint(folder, memory=tmp_path / "file" / "memory")
    assert first == checkpoint_fingerprint(folder)


@pytest.mark.parametrize("note", ["", "{", "[]", "{}", '{"file": 3, "sha256": "a"}', "other", "short"])
def test_damaged_and_foreign_notes_are_not_believed(folder, tmp_path, reads, note):
    memory = tmp_path / "memory"
    first = checkpoint_fingerprint(folder, memory=memory)
    fingerprint._digests.clear()
    (kept,) = memory.iterdir()
    written = json.loads(kept.read_text())
    if note == "other":
        written["file"][4] += 1  # the inode, as on another machine that shares the cache
    elif note == "short":
        written["sha256"] = "00"
    kept.write_text(json.dumps(written) if note in ("other", "short") else note)
    assert checkpoint_fingerprint(folder, memory=memory) == first
    assert len(reads) == 2


def test_a_long_read_is_announced(folder, monkeypatch, caplog):
    monkeypatch.setattr(fingerprint, "_ANNOUNCED_BYTES", 0)
    checkpoint_fingerprint(folder)
    assert "Reading the 0 GB of weights" in caplog.text


# --- what older runs recorded ---


def test_a_recorded_fingerprint_is_compared_by_its_own_scheme(tmp_path):
    model = shutil.copytree(resolve("zoo:planted-llama"), tmp_path / "model")
    for recorded in (SAMPLED, checkpoint_fingerprint(model)):
        assert is_checkpoint(recorded, model)
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    assert not is_checkpoint(SAMPLED, model)

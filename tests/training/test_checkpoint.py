"""Checkpoints: they round-trip, damaged ones are reported and skipped, and nothing is a pickle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tune.errors import CheckpointError
from tune.storage.sealed_folder import (
    ASIDE,
    MANIFEST,
    STAGING,
    commit,
    folder_name,
    newest,
    prune,
    sha256,
    tidy,
    verify,
    write_folder,
)
from tune.training.checkpoint import AdapterState

NAMES = ("model.layers.0.q_proj.lora_A.default.weight", "model.layers.0.q_proj.lora_B.default.weight", "bare")


def state(step: int = 3, seed: int = 0) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    weights, one, other = ({name: torch.randn(2, 3, generator=generator) for name in NAMES} for _ in range(3))
    return AdapterState(
        weights, {"exp_avg": one, "exp_avg_sq": other}, step=step, meta={"trial": "t", "seed": seed, "total_steps": 9}
    )


def write(root: Path, step: int = 3, seed: int = 0) -> Path:
    folder = root / folder_name(step)
    staging = root / f".tmp-{folder.name}"
    staging.mkdir(parents=True)
    state(step, seed).save(staging)
    (staging / "adapter_config.json").write_text("{}")
    commit(staging, folder)
    return folder


def equal(one: AdapterState, other: AdapterState) -> bool:
    def same(here: dict, there: dict) -> bool:
        return set(here) == set(there) and all(torch.equal(here[name], there[name]) for name in here)

    parts = set(one.optimizer) == set(other.optimizer)
    return parts and all(
        same(*pair)
        for pair in ((one.weights, other.weights), *((one.optimizer[p], other.optimizer[p]) for p in one.optimizer))
    )


def test_round_trip_is_exact(tmp_path):
    folder = write(tmp_path)
    found = AdapterState.load(folder)
    assert equal(found, state()) and (found.step, found.meta) == (3, state().meta)
    assert all(tensor.dtype == torch.float32 for tensor in found.weights.values())
    assert not list(tmp_path.glob(".*")), "neither the staging folder nor an older one stays"


def test_non_contiguous_tensors_round_trip(tmp_path):
    turned = state()
    turned.weights = {name: tensor.T for name, tensor in turned.weights.items()}
    turned.save(tmp_path)
    commit_in_place(tmp_path)
    assert equal(AdapterState.load(tmp_path / "x"), turned)


def commit_in_place(root: Path) -> None:
    staging = root / "staging"
    staging.mkdir()
    for path in root.glob("*.*"):
        path.rename(staging / path.name)
    commit(staging, root / "x")


def test_nothing_is_a_pickle(tmp_path):
    for path in write(tmp_path).iterdir():
        assert path.suffix in (".safetensors", ".json")
        assert not path.read_bytes().startswith((b"\x80", b"PK"))


def test_the_manifest_names_every_file(tmp_path):
    folder = write(tmp_path)
    listed = json.loads((folder / MANIFEST).read_text())
    assert set(listed) == {path.name for path in folder.iterdir()} - {MANIFEST}
    assert all(len(digest) == 64 for digest in listed.values())
    verify(folder)


def flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / "resume.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "resume.safetensors").write_bytes(content)


DAMAGE = {
    "a flipped byte": (flip_a_byte, "is damaged: its checksum differs"),
    "a truncated file": (lambda folder: (folder / "state.json").write_text(""), "is damaged"),
    "a missing file": (lambda folder: (folder / "state.json").unlink(), "lacks state.json"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), f"has no {MANIFEST}"),
    "half a manifest": (lambda folder: (folder / MANIFEST).write_text('{"state.js'), "is damaged"),
    "an empty manifest": (lambda folder: (folder / MANIFEST).write_text("{}"), "is damaged"),
    "a manifest of another kind": (lambda folder: (folder / MANIFEST).write_text("[1]"), "is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_reported_and_skipped(damage, tmp_path):
    whole, damaged = write(tmp_path, 3), write(tmp_path, 6)
    assert newest(tmp_path) == damaged
    inflict, message = DAMAGE[damage]
    inflict(damaged)
    with pytest.raises(CheckpointError, match=".") as caught:
        AdapterState.load(damaged)
    assert message in str(caught.value)
    assert newest(tmp_path) == whole


def test_missing_folder_is_not_a_checkpoint(tmp_path):
    assert newest(tmp_path / "none") is None
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        verify(tmp_path / "none")


def test_adapter_folder_is_sealed_but_cannot_be_resumed(tmp_path):
    staging = tmp_path / "staging"
    staging.mkdir()
    (staging / "adapter_model.safetensors").write_bytes(b"x")
    commit(staging, tmp_path / "adapter")
    verify(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="without resume.safetensors"):
        AdapterState.load(tmp_path / "adapter")


def test_commit_replaces_an_older_folder_whole(tmp_path):
    folder = write(tmp_path, 3, seed=0)
    (folder / "left over").write_text("")
    write(tmp_path, 3, seed=1)
    assert equal(AdapterState.load(folder), state(3, seed=1)) and not (folder / "left over").exists()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_checkpoint_holds_the_adapter_once(tmp_path):
    """Weights, two moments, and a few hundred bytes of names per tensor."""
    weights, one, other = ({name: torch.randn(64, 512) for name in NAMES} for _ in range(3))
    big = AdapterState(weights, {"exp_avg": one, "exp_avg_sq": other})
    staging = tmp_path / "staging"
    staging.mkdir()
    big.save(staging)
    commit(staging, tmp_path / "x")
    adapter = sum(tensor.numel() * 4 for tensor in big.weights.values())
    assert sum(path.stat().st_size for path in (tmp_path / "x").iterdir()) < 3.02 * adapter


def test_checkpoint_is_an_adapter_under_the_given_names(tmp_path):
    from safetensors.torch import load_file

    staging = tmp_path / "staging"
    staging.mkdir()
    state().save(staging, {name: f"peft.{name}" for name in NAMES})
    commit(staging, tmp_path / "x")
    assert set(load_file(tmp_path / "x" / "adapter_model.safetensors")) == {f"peft.{name}" for name in NAMES}
    assert equal(AdapterState.load(tmp_path / "x"), state())


def test_upload_killed_at_any_byte_is_skipped(tmp_path):
    """Files arrive in any order, the last of them in part: each one cut at many bytes, with those after it missing."""
    whole, torn = write(tmp_path, 3), write(tmp_path, 6)
    contents = {path.name: path.read_bytes() for path in torn.iterdir()}
    tried = 0
    for name, content in contents.items():
        for size in {0, 1, len(content) - 1, *range(7, len(content), max(1, len(content) // 40))}:
            (torn / name).write_bytes(content[:size])
            assert newest(tmp_path) == whole, (name, size)
            tried += 1
        (torn / name).unlink()
        assert newest(tmp_path) == whole, name
        (torn / name).write_bytes(content)
    assert tried > 100 and newest(tmp_path) == torn
    for name in contents:
        (torn / name).unlink()
        assert newest(tmp_path) == whole


def test_remains_of_a_killed_writer_are_removed_and_the_only_whole_copy_kept(tmp_path):
    folder = write(tmp_path, 3)
    aside = folder.with_name(f"{ASIDE}{folder.name}")
    folder.rename(aside)  # killed between the two renames of `commit`
    (tmp_path / f"{STAGING}{folder.name}").mkdir()
    assert newest(tmp_path) == aside and equal(AdapterState.load(aside), state())
    tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name] and newest(tmp_path) == folder
    write(tmp_path / "other", 3, seed=1).rename(aside)  # killed before the older one was deleted
    tidy(tmp_path / "none")
    tidy(tmp_path)
    assert not aside.exists() and equal(AdapterState.load(folder), state())


def test_manifest_may_only_name_files_of_its_own_folder(tmp_path):
    folder = write(tmp_path, 3)
    outside = tmp_path / "outside"
    outside.write_text("x")
    (folder / MANIFEST).write_text(json.dumps({"../outside": sha256(outside)}))
    with pytest.raises(CheckpointError, match="damaged"):
        verify(folder)


def test_sealed_folder_of_another_kind_is_refused(tmp_path):
    for part in ("names", "step"):
        folder = write(tmp_path / part, 3)
        state_json = json.loads((folder / "state.json").read_text())
        del state_json[part]
        (folder / "state.json").write_text(json.dumps(state_json))
        (folder / MANIFEST).unlink()
        folder.rename(tmp_path / part / "staging")
        commit(tmp_path / part / "staging", folder)
        with pytest.raises(CheckpointError, match="not a complete checkpoint"):
            AdapterState.load(folder)


def test_failed_writer_leaves_only_the_older_folder(tmp_path):
    folder = write(tmp_path, 3)

    def fail(staging: Path) -> None:
        (staging / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(folder, fail, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert equal(AdapterState.load(folder), state())


def test_commit_recovers_from_a_killed_commit(tmp_path):
    """Killed between moving the older folder aside and moving the new one in."""
    folder = write(tmp_path, 3)
    folder.rename(folder.with_name(f".old-{folder.name}"))
    write(tmp_path, 3, seed=1)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_folders_sort_by_step():
    steps = [0, 9, 10, 99, 100, 12_345]
    assert sorted(map(folder_name, reversed(steps))) == [folder_name(step) for step in steps]


def test_prune_keeps_the_newest(tmp_path):
    for step in (1, 5, 20, 100):
        write(tmp_path, step)
    prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder_name(20), folder_name(100)]
    prune(tmp_path, keep=5)
    assert newest(tmp_path) == tmp_path / folder_name(100)

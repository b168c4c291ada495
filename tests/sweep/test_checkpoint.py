"""Checkpoints: what is written comes back, what is damaged is told and passed over, nothing is a pickle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from macdrop.errors import CheckpointError
from tune.checkpoint import MANIFEST, MOMENTS, AdapterState, commit, folder_name, newest, prune, verify

NAMES = ("model.layers.0.q_proj.lora_A.default.weight", "model.layers.0.q_proj.lora_B.default.weight", "bare")


def state(step: int = 3, seed: int = 0) -> AdapterState:
    generator = torch.Generator().manual_seed(seed)
    parts = [{name: torch.randn(2, 3, generator=generator) for name in NAMES} for _ in range(3)]
    return AdapterState(*parts, step=step, meta={"trial": "t", "seed": seed, "total_steps": 9})


def write(root: Path, step: int = 3, seed: int = 0) -> Path:
    folder = root / folder_name(step)
    staging = root / f".tmp-{folder.name}"
    staging.mkdir(parents=True)
    state(step, seed).save(staging)
    (staging / "adapter_config.json").write_text("{}")
    commit(staging, folder)
    return folder


def equal(one: AdapterState, other: AdapterState) -> bool:
    parts = ("weights", *MOMENTS)
    return all(
        set(getattr(one, part)) == set(getattr(other, part))
        and all(torch.equal(getattr(one, part)[name], getattr(other, part)[name]) for name in getattr(one, part))
        for part in parts
    )


def test_round_trip_is_exact(tmp_path):
    folder = write(tmp_path)
    found = AdapterState.load(folder)
    assert equal(found, state()) and (found.step, found.meta) == (3, state().meta)
    assert all(tensor.dtype == torch.float32 for tensor in found.weights.values())
    assert not list(tmp_path.glob(".*")), "neither the staging folder nor an older one stays"


def test_tensors_that_are_no_contiguous_block_come_back(tmp_path):
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
def test_damage_is_told_and_passed_over(damage, tmp_path):
    whole, damaged = write(tmp_path, 3), write(tmp_path, 6)
    assert newest(tmp_path) == damaged
    do, told = DAMAGE[damage]
    do(damaged)
    with pytest.raises(CheckpointError, match=".") as caught:
        AdapterState.load(damaged)
    assert told in str(caught.value)
    assert newest(tmp_path) == whole


def test_no_folder_is_no_checkpoint(tmp_path):
    assert newest(tmp_path / "none") is None
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        verify(tmp_path / "none")


def test_an_adapter_folder_is_sealed_too_but_nothing_to_resume_from(tmp_path):
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


def test_commit_goes_on_after_one_that_was_killed(tmp_path):
    """Killed between moving the older folder aside and moving the new one in."""
    folder = write(tmp_path, 3)
    folder.rename(folder.with_name(f".old-{folder.name}"))
    write(tmp_path, 3, seed=1)
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]


def test_folders_sort_as_steps_do():
    steps = [0, 9, 10, 99, 100, 12_345]
    assert sorted(map(folder_name, reversed(steps))) == [folder_name(step) for step in steps]


def test_prune_keeps_the_newest(tmp_path):
    for step in (1, 5, 20, 100):
        write(tmp_path, step)
    prune(tmp_path, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [folder_name(20), folder_name(100)]
    prune(tmp_path, keep=5)
    assert newest(tmp_path) == tmp_path / folder_name(100)

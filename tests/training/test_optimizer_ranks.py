"""Optimizers on two ranks over gloo against one rank, with the same examples in every step."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.optimizer_worker import CASES, WORLD, spec
from helpers.ranks import run_ranks
from safetensors.torch import load_file

from tune.storage.records import SNR_FILE
from tune.training.optimizers.snr_record import read_snr

pytestmark = pytest.mark.zero


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """The folder of what two ranks trained."""
    out = tmp_path_factory.mktemp("two")
    run_ranks("optimizer_worker", WORLD, out, out, timeout=500, MACDROP_CACHE=str(out / "cache"))
    return out


def one_rank(case: str, folder: Path) -> Path:
    from tune.training.single import train_here

    train_here(spec(case, 1), folder, observe=None, threads=1)
    return folder


def weights(folder: Path) -> dict:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_what_one_rank_does(case, two, tmp_path, monkeypatch):
    monkeypatch.setenv("MACDROP_CACHE", str(two / "cache"))
    alone, together = one_rank(case, tmp_path / "one"), two / case
    ours, theirs = weights(alone), weights(together)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.any()
        # Lion's steps are signs, which sums in another order turn where a momentum is nearly 0.
        apart = float((tensor - theirs[name]).norm() / tensor.norm())
        assert apart < (0.05 if case.startswith("lion") else 1e-3), name
    if case == "slimadam measured":
        (here,), (there,) = (read_snr(folder / SNR_FILE).adapters for folder in (alone, together))
        assert here.rules == there.rules and set(here.rules.values()) != {"none"}
        for kind, values in here.kinds.items():
            assert values.both == pytest.approx(there.kinds[kind].both, rel=1e-3)

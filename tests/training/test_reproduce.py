"""reproduce.py of a trial's folder: the same bytes from one process, also after a move; everything else is said.

Two workers, against a lane: `test_sweep.py`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.small import SMALL
from safetensors.torch import load_file, save_file

from tune.config.run_spec import TrainSpec
from tune.training.reproduce import reproduce

pytestmark = pytest.mark.zero

SETTINGS = {**SMALL, "max_steps": 4, "logging_steps": 2, "zero_stage": 0, "dataset": "train.jsonl"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A trial that was stopped early (told so at step 2 of 4), on data named relative to the folder of the time."""
    from tune.training.single import train_here
    from tune.zoo.catalog import resolve

    root = tmp_path_factory.mktemp("trained")
    shutil.copy(resolve("zoo:train"), root / "train.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MACDROP_CACHE", str(root / "cache"))
        patch.chdir(root)
        spec = TrainSpec(**SETTINGS)

        def stop_at_2(metrics: dict) -> str:
            return "go_on" if metrics["step"] < 2 else "stop"

        outcome = train_here(spec, root / "trial", observe=stop_at_2, threads=1)
        assert (outcome.status, outcome.step, outcome.total_steps) == ("stopped", 3, 4)
        assert outcome.entries_dropped > 0
        yield root / "trial"


@pytest.fixture
def trial(trained, tmp_path) -> Path:
    """Its copy, which may be changed."""
    return Path(shutil.copytree(trained, tmp_path / "moved" / "trial"))


def test_the_script_makes_the_same_bytes_from_anywhere(trial, tmp_path, alone):
    told = alone(str(trial / "reproduce.py"), cwd=tmp_path)
    assert "equal        the recorded adapter has the same bytes" in told
    assert "trained      3 of 4 steps" in told and "differs" not in told
    made, recorded = (folder / "adapter/adapter_model.safetensors" for folder in (trial / "reproduced", trial))
    assert made.read_bytes() == recorded.read_bytes()


def test_another_adapter_is_told_apart_by_how_much(trial, capsys):
    file = trial / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 0.5
    save_file(tensors, file, {"format": "pt"})
    frozen = json.loads((trial / "reproduce.json").read_text())
    frozen["versions"]["torch"] = "1.0"
    (trial / "reproduce.json").write_text(json.dumps(frozen))
    assert reproduce(trial) == 1
    told = capsys.readouterr().out
    assert "different    the recorded adapter has sha256" in told and "difference of an entry is 0.5" in told
    assert "differs      torch: 1.0 then" in told


@pytest.mark.parametrize("how", ["workers", "data", "files"])
def test_what_cannot_give_the_same_is_refused(trial, capsys, monkeypatch, how):
    overrides = []
    if how == "workers":
        monkeypatch.setenv("WORLD_SIZE", "2")
    elif how == "data":
        lines = Path("train.jsonl").read_text().splitlines(keepends=True)
        (trial / "other.jsonl").write_text("".join(lines[:-1]))
        overrides = [f"dataset={trial / 'other.jsonl'}"]
    else:
        (trial / "reproduce.json").unlink()
    assert reproduce(trial, overrides) == 2
    told = {
        "workers": "trained on 1 worker(s), and this is a run on 2: other batches. Run: python reproduce.py",
        "data": "The data are not those of the trial: it had 180 examples",
        "files": "lacks reproduce.json",
    }
    assert told[how] in capsys.readouterr().err
    assert not (trial / "reproduced").exists()


def test_a_scan_that_did_not_come_along_is_made_anew(trial):
    (trial / "massive_weights.json").unlink()
    assert reproduce(trial) == 0

"""`macdrop reproduce`: the same bytes from one process, also after a move; all that differs is reported.

Two workers, against a lane: `tests/distributed/test_sweep.py`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.small import SMALL
from safetensors.torch import load_file, save_file

from tune.config.run_spec import TrainSpec
from tune.training.observer import Word
from tune.training.trial_setup import reproduce_command
from tune.zoo.catalog import resolve

pytestmark = pytest.mark.zero

SETTINGS = {**SMALL, "max_steps": 4, "logging_steps": 2, "zero_stage": 0, "dataset": "train.jsonl"}
#: The command where any import of Ray raises.
WITHOUT_RAY = "import sys; sys.modules['ray'] = None; from tune.cli.main import main; main()"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A trial that was stopped at step 2 of 4, on data named relative to the working directory."""
    from tune.training.single import train_here

    root = tmp_path_factory.mktemp("trained")
    shutil.copy(resolve("zoo:train"), root / "train.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MACDROP_CACHE", str(root / "cache"))
        patch.chdir(root)
        spec = TrainSpec(**SETTINGS)

        def stop_at_2(metrics: dict) -> Word:
            return Word.GO_ON if metrics["step"] < 2 else Word.STOP

        outcome = train_here(spec, root / "trial", observe=stop_at_2, threads=1)
        assert (outcome.status, outcome.step, outcome.total_steps) == ("stopped", 3, 4)
        assert outcome.entries_dropped > 0
        yield root / "trial"


@pytest.fixture
def trial(trained, tmp_path) -> Path:
    """A copy of the trial that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "moved" / "trial"))


def test_reproduce_makes_the_same_bytes_from_any_folder_without_ray(trial, tmp_path, alone):
    assert not (trial / "reproduce.py").exists()
    printed = alone("-c", WITHOUT_RAY, "reproduce", str(trial), cwd=tmp_path)
    assert "equal         the recorded adapter has the same bytes" in printed
    assert "trained       3 of 4 steps" in printed and "differs" not in printed
    made, recorded = (folder / "adapter/adapter_model.safetensors" for folder in (trial / "reproduced", trial))
    assert made.read_bytes() == recorded.read_bytes()


def test_a_different_adapter_is_reported_with_its_distance(trial, shell):
    file = trial / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 0.5
    save_file(tensors, file, {"format": "pt"})
    setup = json.loads((trial / "reproduce.json").read_text())
    setup["versions"]["torch"] = "1.0"
    setup["command"] = "python reproduce.py"  # as older runs have it
    (trial / "reproduce.json").write_text(json.dumps(setup))
    ended = shell("reproduce", str(trial))
    assert ended.code == 1
    assert "different     the recorded adapter has sha256" in ended.out and "difference of an entry is 0.5" in ended.out
    assert "differs       torch: 1.0 then" in ended.out


REFUSED = {
    "workers": "trained on 1 worker(s); this run has 2, so its batches would differ. Run: macdrop reproduce ",
    "data": "The data are not those of the trial: it had 180 examples",
    "files": "lacks reproduce.json",
    "damaged": "reproduce.json is damaged",
    "segments": "same bits: 2 workers up to step 2, 1 worker from there: bits may differ from step 2",
    "base": "are not those that this run began with",
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_trial_that_cannot_be_reproduced_is_refused(trial, shell, monkeypatch, case):
    overrides = []
    if case == "workers":
        monkeypatch.setenv("WORLD_SIZE", "2")
    elif case == "data":
        lines = Path(resolve("zoo:train")).read_text().splitlines(keepends=True)
        (trial / "other.jsonl").write_text("".join(lines[:-1]))
        overrides = [f"dataset={trial / 'other.jsonl'}"]
    elif case == "base":
        shutil.copytree(resolve("zoo:planted-llama"), trial / "base")
        (trial / "base" / "config.json").write_text((trial / "base" / "config.json").read_text() + "\n")
        overrides = [f"model_name_or_path={trial / 'base'}"]
    elif case == "segments":
        info = json.loads((trial / "trial.json").read_text())
        (whole,) = info["segments"]
        info["segments"] = [whole | {"workers": 2}, whole | {"step": 2}]
        (trial / "trial.json").write_text(json.dumps(info))
    elif case == "files":
        (trial / "reproduce.json").unlink()
    else:
        (trial / "reproduce.json").write_text("{")
    ended = shell("reproduce", str(trial), *overrides)
    assert ended.code == 2 and REFUSED[case] in ended.err
    assert not (trial / "reproduced").exists()


def test_only_the_first_worker_prints(trial, shell, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    ended = shell("reproduce", str(trial))
    assert (ended.code, ended.out, ended.err) == (2, "", "")


def test_a_missing_scan_is_made_again(trial, shell):
    (trial / "massive_weights.json").unlink()
    assert shell("reproduce", str(trial)).code == 0


def test_the_command_names_the_workers():
    assert reproduce_command(Path("runs/a b"), 1) == "macdrop reproduce 'runs/a b'"
    assert reproduce_command(Path("t"), 2) == "torchrun --nproc_per_node 2 -m tune.cli reproduce t"

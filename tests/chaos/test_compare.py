"""Tests of the comparison of two run folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from chaos.checks import ADAPTER, SCORE_KEY
from chaos.compare import compare


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    first, second = tmp_path / "first", tmp_path / "second"
    trial = first / "trials" / "t1"
    adapter = trial / ADAPTER
    adapter.parent.mkdir(parents=True)
    adapter.write_bytes(b"weights")
    (first / "run.json").write_text('{"status": "done"}')
    (trial / "trial.json").write_text('{"status": "done"}')
    (trial / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    (first / "scores.jsonl").write_text(json.dumps({**dict.fromkeys(SCORE_KEY), "trial": "t1", "value": 0.5}) + "\n")
    shutil.copytree(first, second)
    return first, second


def test_equal_runs_compare_as_equal(runs):
    equal, lines = compare(*runs)
    assert equal and all(line.endswith("equal") for line in lines)


@pytest.mark.parametrize(
    ("file", "old", "new", "content"),
    [
        ("trials/t1/trial.json", "done", "stopped", "statuses"),
        ("trials/t1/metrics.jsonl", "0.5", "0.50001", "losses"),
        (f"trials/t1/{ADAPTER}", "weights", "weightz", "adapters"),
        ("scores.jsonl", '"value": 0.5', '"value": 0.25', "scores"),
    ],
)
def test_each_kind_of_difference_is_named(runs, file, old, new, content):
    path = runs[1] / file
    path.write_text(path.read_text().replace(old, new))
    equal, lines = compare(*runs)
    assert not equal
    assert [line.split()[0] for line in lines if "different: " in line] == [content]


def test_folders_without_trials_do_not_compare_as_equal(tmp_path):
    assert not compare(tmp_path, tmp_path)[0]

"""The benchmarks that start a Ray: lanes and evaluators give the results of plain processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("lanes", ["--trials", "2", "--steps", "2", "--runs", "1"], "equal adapters: 1 of 1 by SHA-256 (2 of"),
        ("scale_trials", ["--trials", "12", "--finished", "9", "--kill"], "24 of 24 trials done, 0 failures"),
        ("scoring", ["--adapters", "1", "--attacks", "zeroing@3", "--limit", "8"], "same scores: yes"),
    ],
)
def test_both_ways_give_the_same_result(script, arguments, expected):
    line = [sys.executable, str(BENCHMARKS / f"{script}.py"), *arguments]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout

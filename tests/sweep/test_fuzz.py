"""A few hundred damaged inputs of each kind; `python tests/fuzz.py` tries as many as one has time for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import fuzz  # noqa: E402

INPUTS = {"recipes": 60, "data": 60, "runs": 40, "adapters": 20, "launches": 60}


@pytest.mark.parametrize("target", INPUTS)
def test_damaged_input_works_or_is_refused_in_words(target, tmp_path):
    findings = fuzz.fuzz(target, INPUTS[target], 0, tmp_path)
    assert not findings, "\n".join(findings)
    assert sum(fuzz.TARGETS[target].outcomes.values()) >= INPUTS[target] // 2

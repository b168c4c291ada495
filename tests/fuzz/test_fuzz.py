"""A few hundred damaged inputs of each kind; `python tests/fuzz/run.py` tries as many as one has time for."""

from __future__ import annotations

import pytest

from fuzz import run

INPUTS = {"recipes": 60, "data": 60, "runs": 40, "adapters": 20, "launches": 60, "conversations": 300}
INPUTS |= {"benchmarks": 60, "names": 60}
INPUTS |= {"benchmark files": 150, "data set entries": 100}


@pytest.mark.parametrize("target", INPUTS)
def test_damaged_input_works_or_is_refused_in_words(target, tmp_path):
    findings = run.fuzz(target, INPUTS[target], 0, tmp_path)
    assert not findings, "\n".join(findings)
    assert sum(run.TARGETS[target].outcomes.values()) >= INPUTS[target] // 2

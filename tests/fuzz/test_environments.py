"""The table of environments: doctor in a few of them, and no surprise passes unseen."""

from __future__ import annotations

import json
import os
from collections import Counter

import pytest

from fuzz import environments
from fuzz.environments import TABLE, Ended, Environment, surprises_of_doctor, surprises_of_sweep

BY_NAME = {environment.name: environment for environment in TABLE}


def test_the_table_is_whole():
    assert len(TABLE) >= 40 and max(Counter(environment.name for environment in TABLE).values()) == 1
    assert all('"$@"' in environment.shell for environment in TABLE)


@pytest.mark.long
@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", ["RAY_TMPDIR with é", "current folder deleted", "stdout closed"])
def test_doctor_in_an_environment(name):
    environment = BY_NAME[name]
    assert environments.try_one(environment, ("doctor",), None) == []


@pytest.mark.long
@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", ["HOME and cache read-only", "64 open files", "RAY_TMPDIR of 85 bytes"])
def test_a_sweep_that_cannot_start_is_refused(name):
    environment = BY_NAME[name]
    if environment.root and os.getuid():
        pytest.skip("needs root")
    assert environments.try_one(environment, ("sweep",), None) == []


def test_surprises_are_seen(tmp_path):
    works, refused = Environment("a"), Environment("b", refused="Set HOME", ill="Set HOME")
    trace = "Traceback (most recent call last):\n"
    assert list(surprises_of_doctor(works, Ended(0, "fine", 1))) == []
    assert list(surprises_of_doctor(works, Ended(None, trace, 200))) == [
        "does not end within 200 s",
        "shows a traceback",
        "ends with None",
    ]
    assert list(surprises_of_doctor(refused, Ended(0, "fine", 1))) == ["does not say 'Set HOME'", "ends with 0"]
    assert list(surprises_of_sweep(refused, Ended(3, "Set HOME", 1), tmp_path)) == []
    assert len(list(surprises_of_sweep(refused, Ended(1, "", 1), tmp_path))) == 2
    assert len(list(surprises_of_sweep(works, Ended(0, "", 1), tmp_path))) == 2
    (tmp_path / "run.json").write_text(json.dumps({"status": "done"}))
    (tmp_path / "report.html").write_text("")
    for name in ("one", "two"):
        (tmp_path / "trials" / name).mkdir(parents=True)
        (tmp_path / "trials" / name / "trial.json").write_text(json.dumps({"status": "done"}))
    assert list(surprises_of_sweep(works, Ended(0, "", 1), tmp_path)) == []

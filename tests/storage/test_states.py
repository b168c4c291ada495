"""Tests of the states: their text is what run folders hold."""

from __future__ import annotations

from tune.storage.atomic import plain
from tune.storage.states import RunStatus, Stage, TaskState
from tune.training.observer import Ending, Word


def test_states_are_written_as_they_always_were():
    assert [*RunStatus] == ["running", "done", "failed", "interrupted"]
    assert [*Stage] == ["search", "final"]
    assert [*TaskState] == ["queued", "running", "trained", "done", "stopped", "failed", "diverged"]
    assert [*Word] == ["go_on", "stop", "leave"] and [*Ending] == ["done", "stopped", "left"]
    assert type(plain({"status": TaskState.DONE})["status"]) is str, "YAML has no subclass of str"


def test_final_states_are_those_that_end_a_trial():
    assert [state for state in TaskState if state.is_final] == ["done", "stopped", "failed", "diverged"]

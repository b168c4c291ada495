"""The state of trials and draws of an earlier run, as a resumed search takes them over."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from macdrop.errors import ConfigError
from tune.scheduling import history as past
from tune.scheduling.history import COMPLETE, FAILED, OPEN, PRUNED, PastTrial
from tune.storage import search_state
from tune.storage.records import TrialRecord


def record(**content: Any) -> TrialRecord:
    about = {"trial": "t", "model": "m", "arm": "macdrop", "seed": 0, "status": "running"}
    return TrialRecord(**{**about, **content})


# --- what is taken over ---


@pytest.mark.parametrize(
    ("content", "found", "state"),
    [
        ({"status": "done"}, {}, "done"),
        ({"status": "done"}, {"scored": False}, "trained"),
        ({"status": "running"}, {}, None),
        ({"status": "running", "trained": "2026"}, {"scored": False}, "trained"),
        ({"status": "running", "trained": "2026"}, {"adapter": False}, None),
        ({"status": "stopped", "step": 5}, {}, "stopped"),
        ({"status": "stopped"}, {}, None),
        ({"status": "diverged"}, {}, "diverged"),
        ({"status": "diverged"}, {"retry_failed": True}, None),
        ({"status": "failed"}, {}, "failed"),
        ({"status": "failed", "kind": "bug"}, {}, "failed"),
        ({"status": "failed", "kind": "bug"}, {"retry_failed": True}, None),
        ({"status": "failed", "kind": "node_lost"}, {}, None),
        ({"status": "failed", "kind": "storage"}, {}, None),
    ],
)
def test_how_a_trial_stands_in_a_resumed_run(content, found, state):
    assert past.resume_state(record(**content), **{"adapter": True, "scored": True, **found}) == state


def test_what_the_searcher_is_told_of_a_draw():
    reports = [(4, 2.0), (8, 1.0)]
    drawn = {"macdrop.p0": 0.5}
    assert past.past(drawn, None, record(), (), ()) == PastTrial(drawn, OPEN)
    assert past.past(drawn, "trained", record(), (1.0,), reports) == PastTrial(drawn, OPEN)
    assert past.past(drawn, "done", record(), (1.0,), reports) == PastTrial(drawn, COMPLETE, (1.0,))
    assert past.past(drawn, "done", record(), (None,), reports) == PastTrial(drawn, PRUNED, None, tuple(reports))
    assert past.past(drawn, "stopped", record(judged=8), (), reports) == PastTrial(drawn, PRUNED, None, ((4, 2.0),))
    assert past.past(drawn, "failed", record(), (), reports) == PastTrial(drawn, FAILED)


def test_validations_after_the_word_to_stop_were_told_nobody():
    rows = [
        {"step": 2, "loss": 1.0},
        *({"step": s, "eval_loss": 1.0 * s} for s in (4, 8)),
        {"step": 9, "eval_loss": None},
    ]
    assert past.judged(record(), rows) == [(4, 4.0), (8, 8.0)] and past.judged(record(judged=4), rows) == [(4, 4.0)]


def test_time_spent_searching_adds_up_over_runs_and_deaths(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=50.0)
    monkeypatch.setattr(search_state, "time", SimpleNamespace(monotonic=lambda: clock.now))
    file = tmp_path / "models" / "m" / "search_time.json"

    def kept() -> float:
        return search_state.SearchTime(file, tmp_path).seconds

    assert kept() == 0 and not file.exists()
    with search_state.SearchTime(file, tmp_path) as searched:
        clock.now += 7
        searched.keep()
        assert kept() == 7 and searched.seconds == 7
        clock.now += search_state.KEEP_EVERY_S - 1
        searched.keep()
        assert kept() == 7, "it is not written at each tick"
    assert kept() == searched.seconds == 7 + search_state.KEEP_EVERY_S - 1
    clock.now += 1000  # nobody searches
    killed = search_state.SearchTime(file, tmp_path).__enter__()
    clock.now += 2
    killed.keep()
    assert kept() == killed.seconds == 7 + search_state.KEEP_EVERY_S + 1


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", '{"seconds": "1"}', '{"seconds": NaN}', '{"seconds": -1}'])
def test_a_damaged_search_time_is_refused(content, tmp_path):
    file = tmp_path / "search_time.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match="search_time.json"):
        search_state.SearchTime(file, tmp_path)


def test_draws_are_kept_in_their_order(tmp_path):
    file = tmp_path / "draws.jsonl"
    records = [record(drawn={"a": 9}), record(drawn=None), record()]
    assert search_state.draws(file, records) == [{"a": 9}], "runs of versions that kept no draws"
    for number in (0, 1, 3, 1):
        search_state.remember(file, number, {"a": number})
    assert search_state.draws(file, records) == [{"a": 0}, {"a": 1}], "behind a gap the numbers would be wrong"

"""The order in which a sweep closes what it has opened; no Ray is started."""

from __future__ import annotations

import pickle
from collections import Counter
from types import SimpleNamespace

import pytest
from helpers.run_folders import make_run
from helpers.small import SMALL

from tune.config.run_spec import RunSpec
from tune.config.sections import BASE
from tune.distributed.sweep.run_end import Finished, record_end
from tune.distributed.sweep.runtime import SweepRuntime
from tune.errors import ResourceError
from tune.storage.known_scores import KnownScores
from tune.storage.states import RunStatus, TaskState


class Recorded(SweepRuntime):
    """Opens what it is given in place of a run, and records what is closed, and on which exception."""

    def __init__(self, folder, members, refuses=None, breaks=None):
        super().__init__(RunSpec(**SMALL, output_dir=str(folder)), progress=None)
        self.members, self.refuses, self.breaks = members, refuses, breaks
        self.closed = []

    def open(self):
        for member in self.members:
            if member == self.refuses:
                raise ResourceError(f"no {member}")
            self._exits[member] = lambda kind, error, trace, member=member: self._leave(member, kind)

    def _leave(self, member, kind):
        self.closed.append((member, kind))
        if member == self.breaks:
            raise OSError(member)


def test_members_close_in_the_stated_order_whatever_the_order_of_opening(tmp_path):
    order = SweepRuntime.CLOSE_ORDER
    for members in (order, tuple(reversed(order)), order[2:6]):
        with Recorded(tmp_path, members) as runtime:
            assert runtime.closed == []
        assert runtime.closed == [(member, None) for member in order if member in members]


def test_every_member_is_named_once_and_its_dependencies_close_later():
    order = SweepRuntime.CLOSE_ORDER
    assert len(set(order)) == len(order)
    for user, used in (
        ("controller", "scoring"),
        ("controller", "lanes"),
        ("controller", "studies"),  # which end with it
        ("scoring", "studies"),  # one of which may wait for a model to be loaded
        ("controller", "trackers"),  # which copy the controller's last changes
        ("lanes", "dispatcher"),
        ("dispatcher", "ray"),
        ("status", "lock"),
        ("status", "remote"),  # which copies it
        ("remote", "lock"),
    ):
        assert order.index(user) < order.index(used), f"{user} needs {used} until it is closed"


def test_members_opened_before_a_refusal_are_closed_with_it(tmp_path):
    runtime = Recorded(tmp_path, ("lock", "ray", "status", "dispatcher"), refuses="status")
    with pytest.raises(ResourceError, match="no status"), runtime:
        raise AssertionError("not reached")
    assert runtime.closed == [("ray", ResourceError), ("lock", ResourceError)]


def test_a_member_that_fails_to_close_keeps_no_other_open(tmp_path):
    runtime = Recorded(tmp_path, ("lanes", "scoring", "dispatcher", "lock"), breaks="lanes")
    with pytest.raises(OSError, match="lanes"), runtime:
        pass
    assert [member for member, _ in runtime.closed] == ["scoring", "lanes", "dispatcher", "lock"]
    assert [kind for _, kind in runtime.closed] == [None, None, OSError, OSError], "the status must not say done"
    runtime.__exit__(None, None, None)
    assert len(runtime.closed) == 4, "closing twice does nothing"


def test_an_exception_of_the_body_reaches_every_member_and_the_caller(tmp_path):
    runtime = Recorded(tmp_path, ("controller", "status"))
    with pytest.raises(KeyboardInterrupt), runtime:
        raise KeyboardInterrupt
    assert runtime.closed == [("controller", KeyboardInterrupt), ("status", KeyboardInterrupt)]


@pytest.mark.parametrize(
    "work",
    ["nothing", "the same scores", "a score", "a base score", "a trial", "a trial again", "interrupted"],
)
def test_a_finished_run_keeps_its_end_if_a_resume_finds_nothing_to_do(work, tmp_path):
    run_folder = make_run(tmp_path / "run", seeds=(1,), tried=1, items=2, attacks=("none",))
    run_folder.set_status(RunStatus.DONE, finished="2026-01-01T00:00:00")
    before = Finished(run_folder)
    run_folder.set_status(RunStatus.RUNNING)
    assert "finished" not in run_folder.run()
    rows = run_folder.score_rows()
    if work == "the same scores":  # those of the judge come again
        run_folder.add_scores(rows)
    elif work == "a score":
        run_folder.add_scores([{**next(row for row in rows if row["trial"] != BASE), "value": 0.25}])
    elif work == "a base score":
        run_folder.add_scores([{**next(row for row in rows if row["trial"] == BASE), "task": "another"}])
    elif work == "a trial":
        run_folder.trial("new").start({}, model="m", arm="plain", seed=1)
        run_folder.trial("new").finish(TaskState.FAILED)
    elif work == "a trial again":
        run_folder.trial(run_folder.trials()[0].trial).finish(TaskState.DONE)
    record_end(run_folder, None, before, KeyboardInterrupt if work == "interrupted" else None, None, None)
    assert (run_folder.run()["finished"] == "2026-01-01T00:00:00") == (work in ("nothing", "the same scores"))


def test_the_end_of_a_finished_run_keeps_no_scores_and_makes_those_of_one_trial_at_a_time(tmp_path, monkeypatch):
    run_folder = make_run(tmp_path / "run", seeds=(1, 2), tried=1, items=2, attacks=("none",))
    run_folder.set_status(RunStatus.DONE, finished="2026-01-01T00:00:00")
    most = max(Counter(row["trial"] for row in run_folder.score_rows()).values())
    made, plain = [], KnownScores._made
    monkeypatch.setattr(KnownScores, "_made", lambda *given: (rows := plain(*given), made.append(len(rows)))[0])
    before = Finished(run_folder)
    assert before.unless_changed(run_folder) == "2026-01-01T00:00:00"
    assert max(made) == most < sum(made) / 2
    assert len(pickle.dumps(before)) < 500


def test_a_full_disk_costs_the_timeline_alone(tmp_path):
    runtime, asked = Recorded(tmp_path, ()), []

    def full(rows):
        asked.append(rows)
        raise ResourceError("no space left")

    runtime.run_folder = SimpleNamespace(add_times=full)
    runtime._record_times([{}])
    assert asked == [[{}]]

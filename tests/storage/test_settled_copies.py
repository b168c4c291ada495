"""What a pass of the copies looks through, by counting: what has changed, and some of the rest in turn."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tune.storage.remote import background, copied_units
from tune.storage.remote.background import RemoteSync
from tune.storage.remote.copied_units import REPORT, Units
from tune.storage.remote.copier import Copier
from tune.storage.remote.object_store import ObjectStore
from tune.storage.remote.restore import restore
from tune.storage.run_folder import RunFolder
from tune.storage.states import TaskState

TRIALS, LOOKS = 12, 2
MODEL = "org/model"
SCORE = {"model": MODEL, "arm": "plain", "benchmark": "b", "task": "t", "metric": "acc", "attack": "none"}


@pytest.fixture
def run_folder(tmp_path) -> RunFolder:
    made = RunFolder.create(tmp_path / "run", {"any": "thing"}, command="macdrop sweep")
    for number in range(TRIALS):
        begin(made, number)
        end(made, number)
    return made


def begin(run_folder: RunFolder, number: int) -> None:
    run_folder.trial(f"t-{number:02}").start({"seed": number}, model=MODEL, arm="plain", seed=number)


def end(run_folder: RunFolder, number: int, value: float = 0.5) -> None:
    trial = run_folder.trial(f"t-{number:02}")
    write(trial.folder / "answers" / "a.jsonl", f"{value}\n")
    run_folder.add_scores([{**SCORE, "trial": trial.id, "attack_on": None, "value": value}])
    trial.finish(TaskState.DONE)


def write(file: Path, text: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)


@pytest.fixture
def looked(monkeypatch) -> Counter[str]:
    """Counts by the names of trials whose folder was looked through."""
    counts: Counter[str] = Counter()
    monkeypatch.setattr(copied_units, "LOOKS", LOOKS)
    below = Units._below

    def counted(units, folder):
        if folder.parent.name == "trials":
            counts[folder.name] += 1
        return below(units, folder)

    monkeypatch.setattr(Units, "_below", counted)
    return counts


@pytest.fixture
def copier(run_folder, looked, tmp_path) -> Copier:
    """A copier that has copied all."""
    made = Copier(run_folder.run_dir, ObjectStore((tmp_path / "copy").as_uri()))
    made.copy()
    assert looked == {f"t-{number:02}": 1 for number in range(TRIALS)}
    looked.clear()
    return made


def in_copy(tmp_path: Path, trial: str, name: str) -> str | None:
    file = tmp_path / "copy" / "trials" / trial / name
    return file.read_text() if file.exists() else None


def contents(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name not in ("sync.json", ".in_use.lock"))
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def test_a_pass_over_settled_trials_looks_through_a_few_and_reads_no_record(copier, looked, monkeypatch):
    monkeypatch.setattr(copied_units, "read_mapping", pytest.fail)
    for number in range(1, 2 * TRIALS // LOOKS + 1):
        copier.copy()
        assert looked.total() == LOOKS * number
        assert max(looked.values()) - min(looked[f"t-{each:02}"] for each in range(TRIALS)) <= 1, "they take turns"


def test_a_trial_is_looked_through_as_soon_as_its_record_changes(run_folder, copier, looked, tmp_path):
    trial = run_folder.trial("t-07")
    write(trial.folder / "answers" / "b.jsonl", "{}\n")
    trial.note(judged=3)
    copier.copy()
    assert looked["t-07"] == 1 and looked.total() == LOOKS + 1
    assert in_copy(tmp_path, "t-07", "answers/b.jsonl") == "{}\n"


def test_a_trial_is_looked_through_as_soon_as_scores_of_it_come(run_folder, copier, looked, tmp_path):
    """A promoted trial is scored on while its record says that it has ended: its answers come before the scores."""
    trial = run_folder.trial("t-09")
    write(trial.folder / "answers" / "b.jsonl", "{}\n")
    run_folder.add_scores([{**SCORE, "task": "u", "trial": trial.id, "attack_on": None, "value": 1.0}])
    copier.copy()
    assert looked["t-09"] == 1 and looked.total() == LOOKS + 1
    assert in_copy(tmp_path, "t-09", "answers/b.jsonl") == "{}\n"
    assert '"u"' in (tmp_path / "copy" / "scores.jsonl").read_text()


def test_what_is_written_without_a_sign_is_copied_in_turn_or_at_the_end(run_folder, copier, looked, tmp_path):
    write(run_folder.trial("t-11").folder / "judgements" / "a.jsonl", "{}\n")
    passes = 0
    while in_copy(tmp_path, "t-11", "judgements/a.jsonl") is None:
        copier.copy()
        passes += 1
    assert passes == TRIALS // LOOKS
    write(run_folder.trial("t-09").folder / "judgements" / "a.jsonl", "{}\n")
    looked.clear()
    assert copier.pending() == ["trials/t-09"], "what is missing is said of all"
    looked.clear()
    copier.copy(last=True)
    assert looked.total() == TRIALS and in_copy(tmp_path, "t-09", "judgements/a.jsonl") == "{}\n"
    assert copier.pending() == []


def test_a_trial_that_is_trained_again_waits_and_is_copied_again(run_folder, copier, looked, tmp_path):
    begin(run_folder, 5)
    (run_folder.trial("t-05").folder / "answers" / "a.jsonl").unlink()
    for _ in range(TRIALS // LOOKS + 1):
        copier.copy()
    assert looked["t-05"] == 0, "it has not ended"
    assert in_copy(tmp_path, "t-05", "answers/a.jsonl") == "0.5\n", "the copy keeps what it had"
    end(run_folder, 5, value=0.75)
    looked.clear()
    copier.copy()
    assert looked["t-05"] == 1
    assert in_copy(tmp_path, "t-05", "answers/a.jsonl") == "0.75\n"
    restore(copier.store.url, tmp_path / "new")
    assert contents(tmp_path / "new") == contents(run_folder.run_dir)


@pytest.mark.parametrize("method", ["upload", "write"])
def test_a_trial_whose_copy_failed_is_not_settled(method, run_folder, copier, looked, tmp_path, monkeypatch):
    trial = run_folder.trial("t-08")
    write(trial.folder / "answers" / "a.jsonl", "newer\n")
    trial.note(judged=3)
    with monkeypatch.context() as broken:
        broken.setattr(copier.store, method, lambda *_: (_ for _ in ()).throw(ConnectionError("reset")))
        for _ in range(3):
            with pytest.raises(ConnectionError):
                copier.copy()
    assert looked["t-08"] == 3 and copier.pending() == ["trials/t-08"]
    copier.copy()
    assert in_copy(tmp_path, "t-08", "answers/a.jsonl") == "newer\n" and copier.pending() == []


def test_a_run_that_is_closed_has_been_looked_through(run_folder, looked, tmp_path, monkeypatch):
    monkeypatch.setattr(background, "EVERY_S", 1000.0)
    sync = RemoteSync((tmp_path / "copy").as_uri(), run_folder.run_dir, pytest.fail)
    for number in range(TRIALS):
        write(run_folder.trial(f"t-{number:02}").folder / "trackers.json", json.dumps({"number": number}))
    assert sync.close() == []
    found = [in_copy(tmp_path, f"t-{number:02}", "trackers.json") for number in range(TRIALS)]
    assert found == [json.dumps({"number": number}) for number in range(TRIALS)]


def test_the_report_alone_needs_no_trial_looked_through(run_folder, looked, monkeypatch):
    (run_folder.run_dir / "report.html").write_text("newest")
    monkeypatch.setattr(copied_units.GrowingFile, "read", pytest.fail)
    units = Units(run_folder.run_dir, frozenset({REPORT}))
    assert [unit.name for unit in units] == [REPORT] == [unit.name for unit in units.unsettled()]
    assert not looked

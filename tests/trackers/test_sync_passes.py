"""What a pass of the tracker sync reads, by counting: only what has changed, however many trials have ended."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tune.config.run_spec import TrainSpec, dump
from tune.storage import trial_folder
from tune.storage.known_scores import KnownScores
from tune.storage.run_folder import RunFolder
from tune.storage.states import TaskState
from tune.storage.trial_folder import TrialFiles, TrialFolder
from tune.trackers import backends, sync
from tune.trackers.sync import TrackerSync, trials_of_run

SPEC = TrainSpec(model_name_or_path="zoo:planted-llama", learning_rate=2e-4).canonical()
SCORE = {"model": SPEC.model_name_or_path, "arm": "macdrop", "benchmark": "zero_shot", "task": "qa", "metric": "acc"}
TRIALS = 12


class Recorder:
    """A tracker that keeps what it gets."""

    def __init__(self, run_dir: Path) -> None:
        self.sent: list[tuple] = []

    def open(self, info, run):
        return RecordedRun(info.name, self.sent)


class RecordedRun:
    def __init__(self, name: str, sent: list[tuple]) -> None:
        self.id, self._sent = name, sent

    def log(self, step, metrics):
        self._sent.append((self.id, step))

    def close(self, status, summary):
        self._sent.append((self.id, status, summary))


@pytest.fixture
def run_folder(tmp_path) -> RunFolder:
    """A run with ended trials, and one that trains."""
    made = RunFolder.create(tmp_path / "demo", {"any": "thing"}, command="macdrop sweep")
    for seed in range(TRIALS):
        begin(made, seed)
    for seed in range(TRIALS - 1):
        end(made, seed)
    return made


def trial(run_folder: RunFolder, seed: int) -> TrialFolder:
    return run_folder.trial(SPEC.model_copy(update={"seed": seed}).trial_id())


def begin(run_folder: RunFolder, seed: int) -> None:
    spec = SPEC.model_copy(update={"seed": seed})
    trial(run_folder, seed).start(dump(spec), model=spec.model_name_or_path, arm=spec.arm, seed=seed)
    trial(run_folder, seed).log([{"step": 1, "loss": 1.0}])


def end(run_folder: RunFolder, seed: int) -> None:
    name = trial(run_folder, seed).id
    run_folder.add_scores([{**SCORE, "trial": name, "attack": "none", "attack_on": None, "value": seed / 100}])
    trial(run_folder, seed).finish(TaskState.DONE, step=1)


@pytest.fixture
def read(monkeypatch) -> Counter[str]:
    """Counts of what is parsed: records, tracker files, and rows of scores that are made into mappings."""
    counts: Counter[str] = Counter()

    def counted(owner, name, key, number=lambda found: 1):
        plain = getattr(owner, name)

        def call(*arguments, **options):
            found = plain(*arguments, **options)
            counts[key] += number(found)
            return found

        monkeypatch.setattr(owner, name, call)

    counted(trial_folder, "read_record", "records")
    counted(sync, "_records", "tracker files")
    counted(KnownScores, "_made", "score rows", len)
    return counts


@pytest.fixture
def made(run_folder, monkeypatch):
    """A sync whose passes are made by hand."""
    monkeypatch.setattr(sync, "EVERY_S", 1000.0)
    monkeypatch.setitem(backends.TRACKERS, "recorder", Recorder)
    made = TrackerSync(["recorder"], run_folder.run_dir, trials_of_run(run_folder), pytest.fail)
    yield made
    made.close()


def test_a_pass_reads_only_what_has_changed(run_folder, made, read):
    made._sync(last=False)
    assert read["records"] == TRIALS
    sent = made._trackers["recorder"].sent
    assert len(sent) == 2 * TRIALS - 1
    read.clear()
    for _ in range(3):
        made._sync(last=False)
    assert not +read and len(sent) == 2 * TRIALS - 1
    trial(run_folder, TRIALS - 1).log([{"step": 2, "loss": 0.5}])
    made._sync(last=False)
    assert (read["records"], sent[-1][1]) == (0, 2)
    end(run_folder, TRIALS - 1)
    made._sync(last=False)
    assert read["records"] == 1
    assert sent[-1] == (trial(run_folder, TRIALS - 1).id, "finished", {"zero_shot/qa/acc": 0.11})


def test_a_trial_that_ends_makes_its_own_score_rows_alone(run_folder, made, read):
    made._sync(last=False)
    assert read["score rows"] == TRIALS - 1
    end(run_folder, TRIALS - 1)
    made._sync(last=False)
    assert read["score rows"] == TRIALS


def test_an_ended_trial_that_is_trained_again_is_followed_again(run_folder, made, read):
    made._sync(last=False)
    read.clear()
    begin(run_folder, 3)
    trial(run_folder, 3).log([{"step": 2, "loss": 0.5}])
    made._sync(last=False)
    assert read["records"] == 1
    end(run_folder, 3)
    made._sync(last=False)
    name, sent = trial(run_folder, 3).id, made._trackers["recorder"].sent
    assert [each[1] for each in sent if each[0] == name] == [1, "finished", 2, "finished"]


def test_trial_files_are_read_again_where_they_changed_and_come_and_go(tmp_path):
    parsed: list[str] = []
    files = TrialFiles(tmp_path, lambda file: (parsed.append(file.parent.name), file.read_text())[1])
    assert list(files) == []
    for name in ("b", "a"):
        (tmp_path / "trials" / name).mkdir(parents=True)
        (tmp_path / "trials" / name / "trial.json").write_text(name)
    (tmp_path / "trials" / "c").mkdir()
    (tmp_path / "trials" / "note.txt").touch()
    for _ in range(2):
        assert [(name, content) for name, _, content in files] == [("a", "a"), ("b", "b")]
    assert parsed == ["a", "b"]
    (tmp_path / "trials" / "a" / "trial.json").unlink()
    (tmp_path / "trials" / "b" / "trial.json").write_text("changed")
    assert [(name, content) for name, _, content in files] == [("b", "changed")]
    assert parsed == ["a", "b", "b"]

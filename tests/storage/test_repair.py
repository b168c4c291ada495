"""Damaged run folders: every file, cut off or garbage. Mended, made again or refused, never a traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from helpers.run_folders import make_resumable_run, repair_run

from macdrop.errors import ConfigError
from tune.config.run_spec import RunSpec
from tune.scheduling.history import resume_state
from tune.scheduling.selection import final_specs
from tune.storage import records
from tune.storage.records import config_seal
from tune.storage.repair import check_run
from tune.storage.run_folder import RunFolder
from tune.storage.sealed_folder import newest

DAMAGE = {
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2 - 3],
    "garbage": lambda data: bytes((7 * i + 131) % 256 for i in range(len(data))),
    "another's": lambda data: b'{"some": ["other", "file"]}\n',
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A finished run of one model, its trials named by their content, with adapters, checkpoints and draws."""
    folder = make_resumable_run(tmp_path_factory.mktemp("runs") / "made")
    assert repair_run(folder) == [], "nothing is damaged"
    return folder


def first(folder: Path, stage: str, pattern: str) -> Path:
    found = [
        file
        for file in sorted(folder.glob(f"trials/*/{pattern}"))
        if json.loads(
            (folder / "trials" / file.relative_to(folder / "trials").parts[0] / "trial.json").read_text()
        ).items()
        >= {"stage": stage, "status": "done"}.items()
    ]
    return found[0]


#: name -> the file, and what is said of it.
FILES = {
    "run.json": (lambda folder: folder / "run.json", "rewritten from config.yaml"),
    "config.yaml": (lambda folder: folder / "config.yaml", "as the run was started"),
    "environment.json": (lambda folder: folder / "environment.json", ""),
    "scores.jsonl": (lambda folder: folder / "scores.jsonl", "scored again"),
    "finalists.json": (lambda folder: next(folder.glob("models/*/finalists.json")), "selected again"),
    "massive_weights.json": (lambda folder: next(folder.glob("models/*/massive_weights.json")), "found again"),
    "proof.json": (lambda folder: next(folder.glob("models/*/proof.json")), "made again"),
    "search_time.json": (lambda folder: next(folder.glob("models/*/search_time.json")), "counted from zero"),
    "draws.jsonl": (lambda folder: next(folder.glob("models/*/draws.jsonl")), "drawn again"),
    "trial.json": (lambda folder: first(folder, "final", "trial.json"), "trained again"),
    "trial's config.yaml": (lambda folder: first(folder, "final", "config.yaml"), "trained again"),
    "metrics.jsonl": (lambda folder: first(folder, "final", "metrics.jsonl"), "gap"),
    "answers": (lambda folder: first(folder, "final", "answers/zero_shot-qa-none.jsonl"), "made again"),
    "adapter": (lambda folder: first(folder, "final", "adapter/adapter_model.safetensors"), "trained again"),
    "manifest": (lambda folder: first(folder, "search", "adapter/MANIFEST.json"), "trained again"),
    "checkpoint": (lambda folder: first(folder, "final", "checkpoints/*/adapter_model.safetensors"), ""),
}
#: What is appended line by line loses what was torn without a word.
APPENDED = ("scores.jsonl", "draws.jsonl", "metrics.jsonl")


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_repaired_or_made_again(folder, name, damage):
    find, told = FILES[name]
    file = find(folder)
    run_folder = RunFolder(folder)
    before = {record.trial: record for record in run_folder.trials()}
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    notes = repair_run(folder)
    torn = (name in APPENDED and damage in ("empty", "half")) or (name, damage) == ("answers", "another's")
    if told and not torn:
        assert any(told in note and file.parents[0].name in note for note in notes), notes
        assert list(folder.rglob("*.damaged")), "the damaged file is kept"
    assert repair_run(folder) == [], "all of it is repaired at once"
    run_folder = RunFolder.open(folder)
    if name == "answers":
        scored = {row["trial"] for row in run_folder.score_rows() if row["task"] == "qa"}
        assert (file.parents[1].name in scored) == torn, "scores go with their answers"
    after = {record.trial: record for record in run_folder.trials()}
    assert run_folder.run()["status"] and run_folder.score_rows() is not None
    assert RunSpec.model_validate(run_folder.config()) and flat_equal(run_folder, before, after, name)
    for trial in after:
        run_folder.trial(trial).metrics()
    found = run_folder.finding(run_folder.finalists_file("zoo:planted-llama"))
    assert found is None or final_specs(found)


def flat_equal(run_folder: RunFolder, before: dict, after: dict, name: str) -> bool:
    """Only the trial that was hit is open again; of all others nothing has changed."""
    hit = {trial for trial, record in before.items() if after.get(trial) != record}
    if name in ("trial.json", "trial's config.yaml", "adapter", "manifest"):
        (trial,) = hit
        again = after.get(trial)
        return again is None or resume_state(again, adapter=False, scored=True) is None
    return not hit


def test_a_checkpoint_that_is_damaged_is_passed_over(folder):
    file = FILES["checkpoint"][0](folder)
    root = file.parents[1]
    assert newest(root) == file.parent
    file.write_bytes(b"")
    assert repair_run(folder) == [] and newest(root) is None


def test_a_run_file_cut_off_is_another_run_and_not_taken_for_it(folder):
    """At every line end: what is left may be a valid run file."""
    text = (folder / "config.yaml").read_text()
    whole = yaml.safe_load(text)
    lines = text.splitlines(keepends=True)
    for end in range(0, len(lines), 20):
        (folder / "config.yaml").write_text("".join(lines[:end]))
        assert repair_run(folder) and RunFolder.open(folder).config() == whole
        (folder / "config.yaml").write_text("".join(lines[:end]))
        about = (folder / "run.json").read_text()
        (folder / "run.json").write_text(about[: len(about) // 2])
        with pytest.raises(ConfigError, match="(?s)run.json and .*config.yaml are damaged.*Put a copy"):
            repair_run(folder)
        (folder / "run.json").write_text(about)


def test_a_run_file_of_a_version_with_fewer_keys_is_whole(folder):
    """The keys that it lacks have their defaults, in its copy and its trials as well; nothing is trained again."""
    newer = ("bad_rows", "max_dropped_share", "packing", "max_tokens_per_micro_batch")

    def without(content: dict) -> dict:
        return {key: value for key, value in content.items() if key not in newer}

    for file in (folder / "config.yaml", *folder.glob("trials/*/config.yaml")):
        file.write_text(yaml.safe_dump(without(yaml.safe_load(file.read_text()))))
    about = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(about | {"spec": without(about["spec"])}))
    before = RunFolder(folder).trials()
    assert repair_run(folder) == [] and RunFolder(folder).trials() == before


def test_rows_written_together_are_taken_out_together(folder):
    scores = folder / "scores.jsonl"
    rows = [
        dict(
            model="m",
            trial="base",
            arm="base",
            seed=0,
            benchmark="zero_shot",
            task="qa",
            metric=m,
            attack="none",
            attack_on=None,
            value=0.125,
        )
        for m in ("acc", "acc_norm")
    ]
    before = RunFolder(folder).score_rows()
    RunFolder(folder).add_scores(rows)
    RunFolder(folder).add_scores([{**rows[0], "task": "other"}])
    scores.write_text(
        scores.read_text().replace('"acc_norm", "attack": "none", "attack_on": null, "value": 0.125', "x")
    )
    (note,) = repair_run(folder)
    assert "scored again" in note
    assert [row["task"] for row in RunFolder(folder).score_rows() if row not in before] == ["other"]


@pytest.mark.parametrize("lost", ["", "trial.json", "adapter/MANIFEST.json"])
def test_what_is_trained_again_is_scored_again(folder, lost):
    """A trial whose folder was deleted by hand, too: its scores would stand without the answers behind them."""
    trial = first(folder, "final", "trial.json").parent
    before = RunFolder(folder).score_rows()
    shutil.rmtree(trial / lost) if (trial / lost).is_dir() else (trial / lost).unlink()
    assert f"{trial.name} is trained again: its scores are made again" in repair_run(folder)
    after = RunFolder(folder).score_rows()
    assert after == [row for row in before if row["trial"] != trial.name] and after != before
    assert repair_run(folder) == []


def test_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "trials").mkdir()
    for folder, word in (("none", "no such folder"), ("other", "no run.json")):
        with pytest.raises(ConfigError, match=word):
            check_run(tmp_path / folder)


@pytest.mark.parametrize("damage", [("settings", True), ("value", "0.5"), ("arm", None), ("split", 1)])
def test_a_score_that_readers_refuse_is_taken_out(folder, damage):
    scores = folder / "scores.jsonl"
    whole = RunFolder(folder).score_rows()
    first, *rest = scores.read_text().splitlines(keepends=True)
    scores.write_text("".join([json.dumps(json.loads(first) | dict([damage])) + "\n", *rest]))
    (note,) = repair_run(folder)
    assert "scored again" in note
    assert RunFolder(folder).score_rows() == whole[1:]


def test_what_killed_writers_left_is_deleted(folder):
    left = [folder / ".run.json.4711-0123abcd.tmp", next(folder.glob("trials/*")) / ".trial.json.9-ffffffff.tmp"]
    mine = folder / ".notes.tmp"
    for file in (*left, mine):
        file.write_text("{")
    assert repair_run(folder) == []
    assert not any(file.exists() for file in left) and mine.exists()


def test_a_config_is_believed_by_its_seal_unless_this_version_would_read_it_otherwise(folder, monkeypatch):
    """A sealed one need not be validated again; by another version it is, and refused if it says something else."""
    file = FILES["trial's config.yaml"][0](folder)
    text = file.read_text()
    record = json.loads((file.parent / "trial.json").read_text())
    spec = RunFolder(folder).trial(file.parent.name).record()
    assert record["config_seal"] == config_seal(text) == spec.config_seal
    other = text.replace("learning_rate: ", "learning_rate: 1")
    assert other != text
    file.write_text(other)
    (file.parent / "trial.json").write_text(json.dumps({**record, "config_seal": config_seal(other)}))
    assert repair_run(folder) == [], "the seal is believed"
    monkeypatch.setattr(records, "_meaning", lambda: "another version")
    assert any("trained again" in note for note in repair_run(folder))

"""Storage that is full, read-only or gone for a moment: reported, waited for, and nothing half-written left behind."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tune.errors import ResourceError
from tune.storage import atomic as files
from tune.storage.atomic import atomic_write_json, lasting
from tune.storage.json_lines import append_jsonl, read_jsonl
from tune.storage.run_folder import RunFolder
from tune.storage.states import RunStatus, TaskState

SCORE = {"model": "m", "arm": "plain", "trial": "t", "seed": 0, "benchmark": "zero_shot", "metric": "acc", "value": 0.5}
SCORE |= {"attack": "none", "attack_on": None}
AWAY_S = 0.25


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of its own with 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def gone(folder: Path) -> Iterator[None]:
    """A folder that is not there in the block's first moments, as when a mount is lost and comes back."""
    away = folder.with_name("away")
    folder.rename(away)
    timer = threading.Timer(AWAY_S, lambda: away.rename(folder))
    timer.start()
    yield
    timer.join()


def everything(run_folder: RunFolder) -> None:
    """All that a sweep does with its run folder while trials end."""
    record = run_folder.trial("t")
    record.start({"seed": 0}, model="m", arm="plain", seed=0)
    record.log([{"step": 1, "loss": 2.0}])
    assert run_folder.add_scores([{**SCORE, "task": "b"}]) == 1
    record.finish(TaskState.DONE)
    run_folder.set_status(RunStatus.DONE)


WORDS = {
    "start": lambda run_folder: run_folder.trial("new").start({}, model="m", arm="plain", seed=0),
    "log": lambda run_folder: run_folder.trial("t").log([{"step": 2, "loss": 1.0}]),
    "score": lambda run_folder: run_folder.add_scores([{**SCORE, "task": "c"}]),
    "finish": lambda run_folder: run_folder.trial("t").finish(TaskState.FAILED, "x"),
    "status": lambda run_folder: run_folder.set_status(RunStatus.FAILED),
    "read scores": lambda run_folder: run_folder.score_rows(),
    "read a trial": lambda run_folder: run_folder.trial("t").record().model_dump(),
    "read metrics": lambda run_folder: run_folder.trial("t").metrics(),
}


@pytest.mark.parametrize("word", WORDS)
def test_a_journal_waits_for_storage_that_is_gone(word, tmp_path, caplog):
    """Nothing is made in the place of the lost folder, nothing taken for missing, and the user gets a message."""
    run_folder, calm = (RunFolder.create(tmp_path / name, {}, command="x") for name in ("run", "calm"))
    everything(run_folder)
    everything(calm)
    wanted = WORDS[word](calm)
    with gone(run_folder.run_dir):
        found = WORDS[word](RunFolder(run_folder.run_dir))
    if word.startswith("read"):
        assert without_times(found) == without_times(wanted) and found
    listed = [sorted(p.relative_to(j.run_dir) for p in j.run_dir.rglob("*")) for j in (run_folder, calm)]
    assert listed[0] == listed[1]
    assert len(read_jsonl(run_folder.scores_file)) == len(read_jsonl(calm.scores_file))
    assert run_folder.trial("t").record().attempts == 1
    assert [record.message for record in caplog.records] == [
        f"The storage of {run_folder.run_dir} is gone (is not there): waiting up to 120 s for it."
    ]


def without_times(found):
    return {k: v for k, v in found.items() if k not in ("started", "finished")} if isinstance(found, dict) else found


def test_a_disk_remounted_read_only_is_waited_for(disk):
    append_jsonl(disk / "x.jsonl", [{"a": 1}], within=disk)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(ResourceError, match="read-only"):
        append_jsonl(disk / "x.jsonl", [{"a": 2}])  # nobody said that it could be written before
    timer = threading.Timer(AWAY_S, subprocess.run, [["mount", "-o", "remount,rw", disk]])
    timer.start()
    append_jsonl(disk / "x.jsonl", [{"a": 2}], within=disk)
    timer.join()
    assert read_jsonl(disk / "x.jsonl") == [{"a": 1}, {"a": 2}]


def test_patience_ends_with_an_error_that_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE_S", 0.2)
    with pytest.raises(ResourceError, match="lost is gone.\nThe storage cannot be reached"):
        atomic_write_json(tmp_path / "lost" / "x.json", {}, within=tmp_path / "lost")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [n for n, trouble in files.TROUBLES.items() if trouble.passes])
def test_what_passes_is_tried_again_and_a_row_is_written_once(number, tmp_path, monkeypatch):
    """The error comes with the writing done, as a network file system may have it."""
    file, write, failures = tmp_path / "x.jsonl", os.write, [number, number]

    def flaky(handle: int, data: bytes) -> int:
        done = write(handle, data)
        if failures:
            raise OSError(failures.pop(), "flaky")
        return done

    monkeypatch.setattr(os, "write", flaky)
    append_jsonl(file, [{"a": 1}, {"a": 2}], within=tmp_path)
    assert not failures and read_jsonl(file) == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.ENOENT])
def test_what_does_not_pass_is_an_error_at_once(number, tmp_path):
    tries = []

    def fail() -> None:
        tries.append(1)
        raise OSError(number, "x")

    with pytest.raises(OSError):
        lasting(fail, within=tmp_path)
    assert len(tries) == 1


def test_a_full_disk_keeps_whole_lines(disk):
    row, file = {"text": "x" * 1000}, disk / "x.jsonl"
    with pytest.raises(ResourceError, match="free some space"):
        for _ in range(1000):
            append_jsonl(file, [row, row, row], within=disk)
    rows = read_jsonl(file)
    assert len(rows) % 3 == 0 and rows[-1] == row and file.read_bytes().endswith(b"}\n")


@pytest.mark.zero
def test_a_fine_tuning_on_a_full_disk_fails_and_the_engine_lives_on(disk, tmp_path, monkeypatch):
    """Reported with its reason, no staging folder left; with space, it resumes from the checkpoint that fitted."""
    monkeypatch.setenv("MACDROP_CACHE", str(tmp_path / "cache"))
    engine, train = _trainer()
    whole = tmp_path / "whole"
    train(whole)
    folder = disk / "trial"
    size = _checkpoint_size(tmp_path, train)
    ballast = disk / "ballast"
    room = int(1.5 * size)
    ballast.write_bytes(b"x" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - room))
    with pytest.raises(ResourceError, match="(?s)step-00000002.*The disk is full: free some space"):
        train(folder)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000001"]
    assert [path.name for path in folder.iterdir()] == ["checkpoints"]
    ballast.unlink()
    outcome = train(folder)
    assert outcome.resumed_from == 1
    assert adapter(folder) == adapter(whole)


@pytest.mark.zero
def test_a_fine_tuning_waits_for_storage_that_is_gone(tmp_path, monkeypatch):
    monkeypatch.setenv("MACDROP_CACHE", str(tmp_path / "cache"))
    engine, train = _trainer()
    train(tmp_path / "whole")
    lost = threading.Event()

    def lose(metrics: dict) -> str:
        if metrics["step"] == 2 and not lost.is_set():
            lost.set()
            (tmp_path / "run").rename(tmp_path / "away")
            threading.Timer(AWAY_S, lambda: (tmp_path / "away").rename(tmp_path / "run")).start()
        return "go_on"

    (tmp_path / "run").mkdir()
    started = time.monotonic()
    outcome = train(tmp_path / "run" / "trial", observe=lose)
    assert outcome.status == "done" and time.monotonic() - started > AWAY_S
    assert adapter(tmp_path / "run" / "trial") == adapter(tmp_path / "whole")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["trial"]


def _trainer():
    from tune.config.run_spec import TrainSpec
    from tune.data import dataset as data
    from tune.storage.places import cache_dir
    from tune.training.engine import Engine
    from tune.training.finetune import finetune
    from tune.training.process_group import prepare_process

    prepare_process()
    settings = {"cutoff_len": 64, "val_size": 4, "lora_rank": 2, "max_steps": 4, "per_device_train_batch_size": 2}
    targets = {"lora_target": ["q_proj", "up_proj"], "learning_rate": 2e-3, "zero_stage": 0, "save_steps": 1}
    spec = TrainSpec(model_name_or_path="zoo:planted-llama", macdrop={"p0": 0.0}, **settings, **targets)
    engine = Engine(spec)
    prepared = data.load(data.prepare(spec, engine.tokenizer, cache_dir() / "data"))
    return engine, lambda folder, **how: finetune(engine, spec, prepared, folder, **how)


def _checkpoint_size(root: Path, train) -> int:
    """Bytes on the disk of one checkpoint."""
    sizes = []

    def look(metrics: dict) -> str:
        for folder in (root / "sized" / "checkpoints").glob("step-*"):
            sizes.append(sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.iterdir()))
        return "go_on"

    train(root / "sized", observe=look)
    return max(sizes)


def adapter(folder: Path) -> bytes:
    assert json.loads((folder / "adapter" / "outcome.json").read_text())["outcome"]["status"] == "done"
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()

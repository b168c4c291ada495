"""A sweep as a process of its own, killed at a fixed point and resumed: it ends like an undisturbed one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.small import SMALL

from tune.storage.sealed_folder import sha256

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

#: Optuna, one trial at a time; MacDrop trials are long enough to be killed in the middle, between two checkpoints.
SPEC = {
    **SMALL,
    "lora_target": ["q_proj", "up_proj"],
    "max_steps": 160,
    "eval_steps": 40,
    "save_steps": 5,
    "ray": {"dashboard": False},
    "sweep": {
        "arms": ["base", "plain", "macdrop"],
        "search_alg": "optuna",
        "parameters": {"macdrop.p0": {"min": 0.2, "max": 1.0}},
        "num_samples": 3,
        "seeds": 1,
        "max_concurrent_trials": 1,
    },
    "eval": {"limit": 8, "zero_shot": {"qa": {"data": "zoo:qa"}}},
}
#: What differs between two runs of the same: times, how it came about, and where.
TIMES = {"started", "finished", "trained", "attempts", "resumed_from", "seconds", "batch_size"}


def sweep(folder: Path, *words: str) -> tuple[subprocess.Popen, Path]:
    """Start the command with its output in a file."""
    log = folder.parent / f"{folder.name}-{len(list(folder.parent.glob('*.log')))}.log"
    environment = {**os.environ, "COLUMNS": "300"}
    with open(log, "w") as out:
        command = [sys.executable, "-m", "tune.cli", "sweep", *words, f"output_dir={folder}"]
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment), log


def until(condition: Any, process: subprocess.Popen, log: Path, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.02)


def ended(process: subprocess.Popen, log: Path) -> str:
    assert process.wait(timeout=300) == 0, log.read_text()[-3000:]
    return log.read_text()


def records(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for file in folder.glob("trials/*/trial.json"):
        found[file.parent.name] = {k: v for k, v in json.loads(file.read_text()).items() if k not in TIMES}
    return found


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in row.items() if key not in TIMES} for row in lines]
    return sorted(kept, key=lambda row: (row["trial"], row["split"], row["task"], row["metric"]))


def report(folder: Path) -> str:
    """Without times, what they cost, and the folder's name."""
    text = (folder / "report.md").read_text().replace(folder.name, "RUN")
    text = re.sub(r"(?ms)^### Cost$.*?(?=^##)", "", text)
    return re.sub(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?|\b\d+([.,]\d+)? ?(s|min|h)\b", "TIME", text)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    os.environ["MACDROP_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    file = tmp_path_factory.mktemp("runs") / "spec.yaml"
    file.write_text(yaml.safe_dump(SPEC))
    yield file
    del os.environ["MACDROP_CACHE"]


def test_a_killed_and_resumed_sweep_equals_an_undisturbed_one(recipe):
    """SIGKILL in the middle of the second draw; then Ctrl-C in the middle of the final stage; then to the end."""
    alone, folder = recipe.parent / "alone", recipe.parent / "killed"
    ended(*sweep(alone, str(recipe)))
    process, log = sweep(folder, str(recipe))

    def trained(stage: str) -> int:
        return sum(record["stage"] == stage and "step" in record for record in records(folder).values())

    def in_the_middle(stage: str, number: int) -> bool:
        """So many trials of the stage are trained, and the next one is behind its second checkpoint."""
        of_stage = {name: record for name, record in records(folder).items() if record["stage"] == stage}
        running = [name for name, r in of_stage.items() if r["status"] == "running" and "step" not in r]
        found = [step for name in running for step in folder.glob(f"trials/{name}/checkpoints/step-*10")]
        return trained(stage) == number and bool(found)

    until(lambda: in_the_middle("search", 2), process, log)
    process.kill()
    process.wait()
    done = {name: file_stamp(folder, name) for name, r in records(folder).items() if r["status"] == "done"}
    assert done and len(done) < len(records(alone))

    again, log = sweep(folder, str(recipe))
    assert again.wait(timeout=100) == 2
    (command,) = re.findall(r"^ +(macdrop sweep --resume .*)$", log.read_text(), re.M)
    assert command == f"macdrop sweep --resume output_dir={folder}"

    process, log = sweep(folder, "--resume", "ray.resource_timeout_s=60")
    until(lambda: in_the_middle("final", 0), process, log)
    # Nobody else may work in the folder meanwhile.
    other, others = sweep(folder, "--resume")
    assert other.wait(timeout=100) == 2 and "is in use" in others.read_text(), others.read_text()[-2000:]
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130, log.read_text()[-3000:]
    text = log.read_text()
    assert command in text and "Traceback" not in text
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"

    ended(*sweep(folder, "--resume"))
    assert records(folder) == records(alone) and rows(folder) == rows(alone)
    for name in records(alone):
        one, two = (f / "trials" / name / "adapter" / "adapter_model.safetensors" for f in (alone, folder))
        assert sha256(one) == sha256(two), name
    for file in ("finalists.json", "draws.jsonl"):
        one, two = (f / "models" / "planted-llama" / file for f in (alone, folder))
        assert one.read_text() == two.read_text()
    assert report(folder) == report(alone)
    assert {name: file_stamp(folder, name) for name in done} == done, "nothing that was done is done again"
    attempts = {f.parent.name: json.loads(f.read_text())["attempts"] for f in folder.glob("trials/*/trial.json")}
    assert sum(attempts.values()) == len(attempts) + 2, "one trial was cut by each end"
    resumed = [json.loads(f.read_text()).get("resumed_from") for f in folder.glob("trials/*/trial.json")]
    assert sorted(resumed)[-2:] >= [10, 10] and sum(map(bool, resumed)) == 2


def file_stamp(folder: Path, trial: str) -> int:
    return (folder / "trials" / trial / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns


def test_a_terminated_sweep_is_interrupted_and_not_failed(recipe):
    """While it starts up, when Ray makes something else of the exception; a second signal ends it at once."""
    folder = recipe.parent / "terminated"
    process, log = sweep(folder, str(recipe), "max_steps=4000", "save_steps=0")
    until(lambda: list(folder.glob("trials/*/metrics.jsonl")), process, log)
    process.send_signal(signal.SIGTERM)
    until(lambda: "stopping" in log.read_text(), process, log) if process.poll() is None else None
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert process.wait(timeout=60) == 143 and time.monotonic() - began < 30
    assert "Traceback" not in log.read_text(), log.read_text()[-3000:]

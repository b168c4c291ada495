"""Many trials in one run: CPU that one more costs the driver and Ray, its growth, memory, and the time of a resume.

    python tests/benchmarks/scale_trials.py [--trials 100 1000] [--models 1] [--finished N] [--kill] [--no-reuse]

Controller, dispatcher, Tune and run folder are those of a real run. Lanes and evaluation actors are simulated: they
load no model, end a fine-tuning within a second or two and a benchmark at once. A trial has 40 scores of 4 benchmarks.

The idle cost (CPU per second of the control loop and the live table) is measured during the final stage, and
subtracted from the cost per trial. With several models it is not subtracted, because others are still searching.

--finished N writes a run folder of N finished trials first and resumes it: what a trial costs with so many behind it,
and how long the resume takes before it trains. --kill has the driver killed half-way and resumes. --no-reuse gives each
trial in Tune a process of its own. --trials 10000 takes most of an hour.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import ray
import ray.tune
from measure import machine, table, verdict
from rich.console import Console
from scale_actors import BENCHMARKS, FINAL_S, STEPS, SimulatedEvaluator, SimulatedLanes, finished

from tune.cli.progress import Progress
from tune.config.run_spec import RunSpec, load
from tune.distributed.sweep import runtime, study_run
from tune.distributed.sweep.scoring import Scoring
from tune.storage.run_folder import RunFolder
from tune.storage.states import Stage, TaskState
from tune.zoo.catalog import resolve

EVALUATORS, AT_ONCE = 2, 8
#: CPU of one more trial, memory of the driver, and seconds from a resume to its first fine-tuning.
TRIAL_MS, DRIVER_MB, RESUME_S = 20.0, 1000.0, 30.0
#: Seconds at both ends of the final stage's fine-tunings that are not measured.
SETTLING_S = 3.0
#: Measured at every so many trials.
EVERY = 10
#: What a child prints before its result.
RESULT = "RESULT "


@dataclass(frozen=True)
class Sample:
    """CPU seconds so far by part of the run, when so many trials had ended."""

    ended: int
    wall: float
    cpu: dict[str, float]
    driver_mb: float

    def since(self, before: Sample, part: str) -> float:
        """Return milliseconds of CPU per trial."""
        spent = self.cpu.get(part, 0.0) - before.cpu.get(part, 0.0)
        return 1000 * spent / max(1, self.ended - before.ended)


@dataclass
class Measured:
    """The result of one driver process."""

    samples: list[Sample] = field(default_factory=list)
    #: The first and the last sample of the final stage while its first trials train.
    idle: list[Sample] = field(default_factory=list)
    #: Seconds from the start of the process to the first task on a lane.
    first_task_s: float | None = None
    failures: int = 0

    @classmethod
    def of(cls, text: str) -> Measured:
        content = json.loads(text)
        return cls(**content | {name: [Sample(**each) for each in content[name]] for name in ("samples", "idle")})

    def third(self, number: int) -> tuple[Sample, Sample]:
        """Return the samples between which a third of the trials (0 to 2) ended."""
        size = (len(self.samples) - 1) // 3
        return self.samples[number * size], self.samples[(number + 1) * size]

    def idle_ms_per_second(self, part: str) -> float:
        """Return milliseconds of CPU per second while no trial ends."""
        if len(self.idle) < 2:
            return 0.0
        begin, end = self.idle
        return 1000 * (end.cpu.get(part, 0.0) - begin.cpu.get(part, 0.0)) / (end.wall - begin.wall)

    def per_trial(self, number: int, part: str) -> float:
        """Return milliseconds of CPU per trial of a third, without the idle cost."""
        begin, end = self.third(number)
        idle = self.idle_ms_per_second(part) * (end.wall - begin.wall) / max(1, end.ended - begin.ended)
        return end.since(begin, part) - idle


# --- the run ---


def spec_of(run: Path, trials: int, models: int) -> RunSpec:
    """Return a sweep of so many searched trials over so many models, which are one under several names."""
    names = ["zoo:planted-llama"]
    if models > 1:
        names = [str(run.parent / "models" / f"model-{number:02}") for number in range(models)]
        for name in names:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            if not Path(name).exists():
                Path(name).symlink_to(resolve("zoo:planted-llama"))
    content = {
        "dataset": "zoo:train",
        "cutoff_len": 64,
        "max_steps": STEPS,
        "eval_steps": STEPS,
        "output_dir": str(run),
        "sweep": {
            "models": names,
            "arms": ["base", "plain", "macdrop"],
            "search_alg": "random",
            "num_samples": max(1, trials // models),
            "max_concurrent_trials": max(1, AT_ONCE // min(models, 4)),
            "max_concurrent_models": min(models, 4),
            "seeds": 1,
            "metric": {"name": "zero_shot/mean/acc", "goal": "maximize"},
            "parameters": {"macdrop.p0": {"min": 0.2, "max": 1.0}},
        },
        "validation": {"zero_shot": {name: {"data": f"zoo:{name}"} for name in BENCHMARKS}},
        "eval": {"zero_shot": {"copy": {"data": "zoo:copy"}}},
        "ray": {"evaluators": max(1, EVALUATORS // min(models, 4))},
    }
    file = run.parent / f"{run.name}.yaml"
    file.write_text(json.dumps(content))
    return load(file)


# --- one driver process ---


class Meter:
    """Samples the CPU time of each part of a run whenever the live table is drawn, in the controller's thread."""

    def __init__(self, started: float, die_after: int | None, models: int) -> None:
        """Measure the idle cost of one model only: of several, others search during a final stage."""
        self.measured, self._started, self._die_after, self._ended = Measured(), started, die_after, 0
        self._most: dict[int, tuple[str, float]] = {}
        self._final: float | None = None
        self._alone = models == 1
        self._mine = 0.0
        self._progress = Progress(Console(file=open(os.devnull, "w"), force_terminal=True, width=160))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._progress, name)

    def show(self, snapshot: dict[str, Any], scoring: Any) -> None:
        """Draw the table, and note when a lane has its first task."""
        self._progress.show(snapshot, scoring)
        if self.measured.first_task_s is None and any(lane["task"] for lane in snapshot["lanes"].values()):
            self.measured.first_task_s = time.time() - self._started
        if self._ended >= len(self.measured.samples) * EVERY:
            self.measured.samples.append(self._sample())
        since = time.time() - self._final if self._final else 0.0
        if len(self.measured.idle) < 2 and since > (FINAL_S - SETTLING_S if self.measured.idle else SETTLING_S):
            self.measured.idle.append(self._sample())

    def stage(self, study: Any, stage: str, trials: int) -> None:
        """Note when the final stage begins."""
        self._progress.stage(study, stage, trials)
        if stage == Stage.FINAL and self._alone:
            self._final = time.time()

    def ended(self, entry: Any) -> None:
        """Count the trials that ended, and die where that is asked for."""
        self._progress.ended(entry)
        self._ended += 1
        if self._ended == self._die_after:
            os.kill(os.getpid(), signal.SIGKILL)

    def _sample(self) -> Sample:
        """Return what was spent so far; samples themselves are left out."""
        began = time.thread_time()
        me = psutil.Process()
        for process in me.children(recursive=True):
            try:
                times, name = process.cpu_times(), " ".join(process.cmdline()[:2])
            except psutil.Error:
                continue
            # A process that ends takes its times with it, and one without a call has the name of an idle one.
            part, before = _part(name), self._most.get(process.pid)
            self._most[process.pid] = (before[0] if before and part == "ray" else part, times.user + times.system)
        self._mine += time.thread_time() - began
        cpu = {"controller": time.thread_time() - self._mine, "driver": time.process_time() - self._mine}
        for part, spent in self._most.values():
            cpu[part] = cpu.get(part, 0.0) + spent
        return Sample(self._ended, time.time() - self._started, cpu, me.memory_info().rss / 1e6)


def _part(name: str) -> str:
    """Return the part of a run that a process belongs to, by its title."""
    if "Dispatcher" in name:
        return "dispatcher"
    if "Simulated" in name:
        return "simulated"
    return "trials" if "ImplicitFunc" in name or "run_trial" in name else "ray"


def drive(run: str, trials: int, models: int, resume: bool, reuse: bool, die_after: int | None) -> None:
    """Run a sweep in this process, and print what it took."""

    def tune_config(**settings: Any) -> ray.tune.TuneConfig:
        return ray.tune.TuneConfig(**{**settings, "reuse_actors": reuse})

    meter = Meter(psutil.Process().create_time(), die_after, models)
    spec = spec_of(Path(run), trials, models)
    with (
        mock.patch.object(runtime, "LanePools", SimulatedLanes),
        mock.patch.object(runtime, "Scoring", functools.partial(Scoring, kind=SimulatedEvaluator)),
        mock.patch.object(study_run, "TuneConfig", tune_config),
    ):
        meter.measured.failures = runtime.run(spec, resume=resume, clear_orphans=True, progress=meter)
    print(RESULT + json.dumps(asdict(meter.measured)), flush=True)


def in_a_process(run: Path, trials: int, models: int, **how: Any) -> Measured:
    """Run `drive` in a process of its own; nothing is measured of one that is killed."""
    given = {"run": str(run), "trials": trials, "models": models, "resume": False, "reuse": True, "die_after": None}
    command = [
        sys.executable,
        "-c",
        "import json, sys; from scale_trials import drive; drive(**json.loads(sys.argv[1]))",
    ]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    log = run.parent / f"{run.name}.log"
    with log.open("a") as file:
        done = subprocess.run(
            [*command, json.dumps({**given, **how})],
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )
    if done.returncode == -signal.SIGKILL and how.get("die_after"):
        return Measured()
    found = next((line for line in done.stdout.splitlines() if line.startswith(RESULT)), None)
    if found is None:
        raise SystemExit(f"{done.stdout[-2000:]}\n{log.read_text()[-4000:]}\nthe run ended with {done.returncode}")
    return Measured.of(found.removeprefix(RESULT))


# --- what is printed ---

HEADS = ["run", "trials/s", "controller", "dispatcher", "growth", "Tune", "its actors", "Ray", "driver MB"]
IDLE_PARTS = ("controller", "dispatcher", "Tune", "its actors", "Ray")


def line(what: str, found: Measured) -> list[str]:
    """Return milliseconds per trial in the last third of a run, and how much more that is than in the first."""
    begin, end = found.third(2)
    ms = {part: found.per_trial(2, part) for part in ("controller", "dispatcher", "driver", "trials", "ray")}
    speed = (end.ended - begin.ended) / max(1e-9, end.wall - begin.wall)
    return [
        what,
        f"{speed:.1f}",
        f"{ms['controller']:.1f}",
        f"{ms['dispatcher']:.1f}",
        f"{cost(found, 2) / max(1e-9, cost(found, 0)):.2f}",
        *(f"{each:.1f}" for each in (ms["driver"] - ms["controller"], ms["trials"], ms["ray"])),
        f"{max(each.driver_mb for each in found.samples):.0f}",
    ]


def idle_row(what: str, found: Measured) -> list[str]:
    """Return milliseconds of CPU per second."""
    ms = {part: found.idle_ms_per_second(part) for part in ("controller", "dispatcher", "driver", "trials", "ray")}
    parts = ms["controller"], ms["dispatcher"], ms["driver"] - ms["controller"], ms["trials"], ms["ray"]
    return [what, *(f"{each:.1f}" for each in parts)]


def cost(found: Measured, third: int) -> float:
    """Return milliseconds of the controller and the dispatcher per trial in a third of a run."""
    return found.per_trial(third, "controller") + found.per_trial(third, "dispatcher")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="*", default=[100, 1000], help="new trials of each run")
    parser.add_argument("--models", type=int, default=1)
    parser.add_argument("--finished", type=int, default=0, help="trials that have ended before")
    parser.add_argument("--kill", action="store_true", help="kill the driver half-way, and resume")
    parser.add_argument("--no-reuse", action="store_true", help="a process for each trial in Tune")
    parser.add_argument("--keep", type=Path, help="make the runs here, and leave them")
    asked = parser.parse_args(arguments)
    if asked.finished and asked.models > 1:
        parser.error("--finished is for one model")
    place = (asked.keep or Path(tempfile.mkdtemp(prefix="macdrop-scale-"))).absolute()
    place.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("MACDROP_CACHE", str(place / "cache"))
    print(machine())
    made, idle, lines = [], [], []
    for trials in asked.trials:
        run = place / f"trials-{trials}"
        how: dict[str, Any] = {"reuse": not asked.no_reuse}
        what = f"{trials:,} trials" + (f", {asked.models} models" if asked.models > 1 else "")
        whole = trials + asked.finished
        if asked.finished:
            what += f" after {asked.finished:,}"
            finished(run, spec_of(run, whole, asked.models), asked.finished)
        if asked.kill:
            what += ", killed half-way"
            in_a_process(run, whole, asked.models, **how, resume=bool(asked.finished), die_after=trials // 2)
        found = in_a_process(run, whole, asked.models, **how, resume=bool(asked.finished or asked.kill))
        made.append(line(what, found))
        idle.append(idle_row(what, found))
        if len(found.samples) > 3:
            lines.append(verdict(f"controller and dispatcher, {what}", cost(found, 2), TRIAL_MS, unit=" ms"))
        else:
            lines.append(f"controller and dispatcher, {what}: not measured, of too few trials")
        lines.append(verdict("driver", max(each.driver_mb for each in found.samples), DRIVER_MB, unit=" MB"))
        if asked.finished or asked.kill:
            lines.append(verdict("first fine-tuning after resume", found.first_task_s or 0.0, RESUME_S, unit=" s"))
        else:
            lines.append(f"first fine-tuning of a new run after {found.first_task_s or 0.0:.1f} s")
        records = RunFolder(run).trials()
        done = sum(record.status == TaskState.DONE for record in records)
        lines.append(f"{done} of {len(records)} trials done, {found.failures} failures")
    print("ms of CPU per trial, in the last third of a run; growth against the first third")
    print(table(HEADS, made))
    print("idle: ms of CPU per second")
    print(table(["run", *IDLE_PARTS], idle), *lines, machine(), sep="\n")
    if not asked.keep:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()

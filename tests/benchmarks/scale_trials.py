"""Many trials in one run: CPU that one more costs the driver and Ray, its growth, memory, and the time of a resume.

    python tests/benchmarks/scale_trials.py [--trials 100 1000] [--models 1] [--finished N] [--kill] [--no-reuse]

Controller, dispatcher, Tune and run folder are those of a real run. Lanes and evaluation actors are simulated: they
load no model, end a fine-tuning within a second or two and a benchmark at once. A trial has 40 scores of 4 benchmarks.

--finished N writes a run folder of N finished trials first and resumes it: what a trial costs with so many behind it,
and how long the resume takes before it trains. --kill has the driver killed half-way and resumes. --no-reuse gives each
trial in Tune a process of its own. --trials 10000 takes most of an hour.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
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

from tune.cli.progress import Progress
from tune.config.eval_spec import VALIDATION
from tune.config.run_spec import RunSpec, TrainSpec, dump, load
from tune.distributed.actors.actor_pool import PoolActor
from tune.distributed.actors.eval_task import EvalTask, Result
from tune.distributed.lanes.dispatcher import call
from tune.distributed.sweep import runtime, study_run
from tune.distributed.sweep.scoring import Scoring
from tune.distributed.sweep.searcher import points
from tune.scheduling.sharing import LaneSharing
from tune.scheduling.study import studies
from tune.storage.atomic import now
from tune.storage.run_folder import RunFolder
from tune.storage.sealed_folder import write_folder
from tune.storage.states import RunStatus, Stage, TaskState
from tune.storage.trial_folder import TrialFolder
from tune.training.finetune import Outcome
from tune.training.observer import Ending
from tune.zoo.catalog import resolve

BENCHMARKS, METRICS = ("agree", "arith", "fact", "qa"), 10
LANES, EVALUATORS, AT_ONCE = 8, 2, 8
STEPS = 8
#: Seconds of a fine-tuning, at least and at most: trials end one by one, as real ones do.
TRAIN_S = (0.2, 1.4)
#: CPU of one more trial, memory of the driver, and seconds from a resume to its first fine-tuning.
TRIAL_MS, DRIVER_MB, RESUME_S = 20.0, 1000.0, 30.0
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
    #: Seconds from the start of the process to the first task on a lane.
    first_task_s: float | None = None
    failures: int = 0

    @classmethod
    def of(cls, text: str) -> Measured:
        content = json.loads(text)
        return cls(**{**content, "samples": [Sample(**each) for each in content["samples"]]})

    def third(self, number: int) -> tuple[Sample, Sample]:
        """Return the samples between which a third of the trials (0 to 2) ended."""
        size = (len(self.samples) - 1) // 3
        return self.samples[number * size], self.samples[(number + 1) * size]


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


def rows(benchmark: str, task: str, seed: str) -> list[dict[str, Any]]:
    """Return the score rows of one benchmark."""
    value = sum(map(ord, seed)) % 997 / 997
    about = {"benchmark": benchmark, "task": task, "attack": "none", "attack_on": None, "stderr": 0.02, "n": 100}
    return [
        {**about, "metric": "acc" if number == 0 else f"acc{number}", "value": value, "higher_is_better": True}
        for number in range(METRICS)
    ]


def outcome() -> dict[str, Any]:
    """Return the outcome of a fine-tuning."""
    return asdict(Outcome(Ending.DONE, STEPS, STEPS, 1.0, 1.0, 10, 100, 2, 1.0, 0))


def write_adapter(trial: Path, within: Path) -> None:
    """Write a sealed folder that stands for an adapter."""
    write_folder(trial / "adapter", lambda folder: (folder / "adapter_config.json").write_text("{}") and None, within)


def finished(run: Path, spec: RunSpec, trials: int) -> None:
    """Write a run folder in which so many searched trials of the spec's only model have ended."""
    (study,) = studies(spec)
    run_folder = RunFolder.create(run, dump(spec))
    result = {key: value for key, value in outcome().items() if key != "status"}
    # It is written once, and a crash only means to write it again.
    with mock.patch("os.fsync"):
        for values in (points(study, spec.sweep) or [])[:trials]:
            searched: TrainSpec = study.searched(values)
            name, model = searched.trial_id(), searched.model_name_or_path
            trial = run_folder.trial(name)
            about = {"setting": searched.setting_id(), "cell": study.cell(searched), "drawn": values}
            trial.start(dump(searched), model=model, arm=searched.arm, seed=searched.seed, stage=Stage.SEARCH, **about)
            trial.log([{"step": STEPS, "eval_loss": 1.0}])
            write_adapter(trial.folder, run)
            trial.finish(TaskState.DONE, trained=now(), **about, **result)
            tag = {"model": model, "arm": searched.arm, "trial": name, "seed": searched.seed, "split": VALIDATION}
            run_folder.add_scores(
                {**tag, "entry": task, "seconds": 0.1, **row}
                for task in BENCHMARKS
                for row in rows("zero_shot", task, name)
            )
    run_folder.set_status(RunStatus.INTERRUPTED)


# --- one driver process ---


class Meter:
    """What each part of the run has spent, around the live table: the controller's thread calls it."""

    def __init__(self, started: float, die_after: int | None) -> None:
        self.measured, self._started, self._die_after, self._ended = Measured(), started, die_after, 0
        self._most: dict[int, tuple[str, float]] = {}
        self._progress = Progress(Console(file=open(os.devnull, "w"), force_terminal=True, width=160))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._progress, name)

    def show(self, snapshot: dict[str, Any], scoring: Any) -> None:
        """Draw the table, and note when a lane has its first task."""
        self._progress.show(snapshot, scoring)
        if self.measured.first_task_s is None and any(lane["task"] for lane in snapshot["lanes"].values()):
            self.measured.first_task_s = time.time() - self._started

    def ended(self, entry: Any) -> None:
        """Take a sample now and then."""
        self._progress.ended(entry)
        if self._ended % EVERY == 0:
            self.measured.samples.append(self._sample())
        self._ended += 1
        if self._ended == self._die_after:
            os.kill(os.getpid(), signal.SIGKILL)

    def _sample(self) -> Sample:
        me = psutil.Process()
        for process in me.children(recursive=True):
            try:
                times, name = process.cpu_times(), " ".join(process.cmdline()[:2])
            except psutil.Error:
                continue
            # A process that ends takes its times with it.
            self._most[process.pid] = (_part(name), times.user + times.system)
        cpu = {"controller": time.thread_time(), "driver": time.process_time()}
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


class SimulatedEvaluator(PoolActor):
    """Scores at once."""

    def prepare(self, opening: Any) -> None:
        """Load nothing."""

    def score(self, task: EvalTask) -> Result:
        return Result(task, rows(task.job.benchmark, task.job.task, task.tag["trial"]), seconds=0.1)


class SimulatedLane:
    """An actor with a thread for each lane, which trains at once."""

    def work(self, dispatcher: Any, pools: Sequence[str]) -> None:
        names = [(f"lane-{number}", pools[number % len(pools)]) for number in range(LANES)]
        threads = [threading.Thread(target=self._lane, args=(dispatcher, *each)) for each in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _lane(self, dispatcher: Any, lane: str, pool: str) -> None:
        call(dispatcher, "lane_up", lane, pool, "host", ["node"])
        while not call(dispatcher, "closing", lane):
            task = call(dispatcher, "take", lane, None)
            if task is None:
                time.sleep(0.1)
                continue
            time.sleep(random.uniform(*TRAIN_S))
            folder = Path(task.folder)
            metrics = {"step": STEPS, "eval_loss": 1.0}
            TrialFolder(folder, within=folder.parents[1]).log([metrics])
            call(dispatcher, "progress", task.id, metrics, lane)
            write_adapter(folder, folder.parents[1])
            call(dispatcher, "trained", task.id, outcome(), lane)


class SimulatedLanes:
    """What the controller asks of `LanePools`."""

    starving, leaving = False, ()

    def __init__(self, dispatcher: Any, specs: Any, needs: Any, storage: Path, **settings: Any) -> None:
        self.sharing = LaneSharing(needs)
        actor: Any = ray.remote(SimulatedLane).options(num_cpus=0)
        self._lanes = actor.remote()
        self._lanes.work.remote(dispatcher, [str(kind) for kind in specs])

    def check(self, snapshot: dict[str, Any], **settings: Any) -> None:
        self.sharing.look(snapshot)

    def has_gap(self, study: str) -> bool:
        return False

    def close(self) -> None:
        if ray.is_initialized():
            ray.kill(self._lanes)


def drive(run: str, trials: int, models: int, resume: bool, reuse: bool, die_after: int | None) -> None:
    """Run a sweep in this process, and print what it took."""

    def tune_config(**settings: Any) -> ray.tune.TuneConfig:
        return ray.tune.TuneConfig(**{**settings, "reuse_actors": reuse})

    meter = Meter(psutil.Process().create_time(), die_after)
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

HEADS = ["run", "trials/s", "controller", "dispatcher", "both, growth", "Tune", "its actors", "Ray", "driver MB"]


def line(what: str, found: Measured) -> list[str]:
    """Return milliseconds per trial in the last third of a run, and how much more that is than in the first."""
    begin, end = found.third(2)
    parts = {part: end.since(begin, part) for part in ("controller", "dispatcher", "driver", "trials", "ray")}
    before = sum(found.third(0)[1].since(found.third(0)[0], part) for part in ("controller", "dispatcher"))
    both = parts["controller"] + parts["dispatcher"]
    speed = (end.ended - begin.ended) / max(1e-9, end.wall - begin.wall)
    shown = [parts["driver"] - parts["controller"], parts["trials"], parts["ray"]]
    return [
        what,
        f"{speed:.1f}",
        f"{parts['controller']:.1f}",
        f"{parts['dispatcher']:.1f}",
        f"{both / max(1e-9, before):.2f}",
        *(f"{each:.1f}" for each in shown),
        f"{max(each.driver_mb for each in found.samples):.0f}",
    ]


def cost(found: Measured) -> float:
    """Return milliseconds of the controller and the dispatcher per trial in the last third."""
    begin, end = found.third(2)
    return end.since(begin, "controller") + end.since(begin, "dispatcher")


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
    made, lines = [], []
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
        if len(found.samples) > 3:
            lines.append(verdict(f"controller and dispatcher, {what}", cost(found), TRIAL_MS, unit=" ms"))
        else:
            lines.append(f"controller and dispatcher, {what}: not measured, of too few trials")
        lines.append(verdict("driver", max(each.driver_mb for each in found.samples), DRIVER_MB, unit=" MB"))
        if asked.finished or asked.kill:
            lines.append(verdict("first fine-tuning after resume", found.first_task_s or 0.0, RESUME_S, unit=" s"))
        records = RunFolder(run).trials()
        done = sum(record.status == TaskState.DONE for record in records)
        lines.append(f"{done} of {len(records)} trials done, {found.failures} failures")
    print("ms of CPU per trial, in the last third of a run; growth against the first third")
    print(table(HEADS, made), *lines, machine(), sep="\n")
    if not asked.keep:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()

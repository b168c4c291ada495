"""Random SIGKILLs of random processes of a sweep, and whether anything was lost, done twice or left behind.

    python tests/chaos/run.py [--kills 50] [--seed 0] [--output FOLDER]

One small sweep runs undisturbed. Then the same sweep runs again and again, in turn with a Ray of its own and on a
cluster that outlives it, while its processes are killed: kind and moment are drawn from the seed, the victims are
processes of these sweeps and of no others. A killed sweep process is followed by `macdrop sweep --resume`. The next
kill waits until work resumes after the last one; the time to that is what a kill costs.

Afterwards each sweep must equal the undisturbed one: every file whole, no row doubled, the same trials ended alike, the
same losses, adapters (sha256) and scores; what was trained is not trained again; and no process, placement group or
actor is left. Exit code 1 with any violation. All that is printed is in FOLDER/chaos.log, too.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from chaos.checks import ADAPTER, check, read, stamp

#: Every process started here inherits this name, Ray's daemons too: whose it lacks is somebody else's.
MARK, TOKEN = "MACDROP_CHAOS", uuid.uuid4().hex
ENVIRONMENT = {
    **{MARK: TOKEN, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    # A driver gives up a lost control store after this many seconds; Ray's default is a minute.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    **{"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "PYTHONUNBUFFERED": "1"},
}
RECIPE = {
    "model_name_or_path": "zoo:planted-llama",
    **{"dataset": "zoo:train", "cutoff_len": 64, "val_size": 8, "learning_rate": 2e-3},
    **{"lora_rank": 2, "lora_alpha": 4, "lora_target": ["q_proj", "gate_proj", "up_proj"]},
    **{"per_device_train_batch_size": 4, "max_steps": 60, "eval_steps": 20, "save_steps": 5},
    "sweep": {
        "arms": ["base", "plain", "macdrop"],
        "parameters": {"macdrop.p0": [0.4, 0.8]},
        "metric": {"name": "zero_shot/fact/acc", "goal": "maximize"},
        **{"seeds": 1, "max_concurrent_trials": 2},
    },
    "validation": {"limit": 12, "zero_shot": {"fact": {"data": "zoo:fact"}}},
    "eval": {
        **{"limit": 12, "attacks": ["none", "zeroing@3"]},
        "zero_shot": {"qa": {"data": "zoo:qa"}, "arith": {"data": "zoo:arith"}},
        "generation": {"answers": {"data": "zoo:generate-qa", "max_new_tokens": 2, "attacks": ["none"]}},
    },
    "ray": {"dashboard": False},
}
#: kind -> titles of its processes, and how often it is killed in one run of a sweep at most: a task may lose its
#: workers, and a benchmark its actor, only so often before the sweep rightly calls it failed.
KINDS: dict[str, tuple[str, int]] = {
    "train worker": (r"ray::RayTrainWorker", 1),
    "controller of a lane": (r"ray::TrainController", 1),
    "dispatcher": (r"ray::Dispatcher", 2),
    "Tune actor of a trial": (r"ray::(ImplicitFunc|run_trial)", 2),
    "evaluation actor": (r"ray::Evaluator", 2),
    "other Ray worker": (
        r"ray::(?!RayTrainWorker|TrainController|Dispatcher|ImplicitFunc|run_trial|Evaluator"
        r"|DashboardAgent|RuntimeEnvAgent)",
        2,
    ),
    "sweep": ("", 1),
    "Ray's own daemon": (r"\S+/core/src/ray/(gcs/gcs_server|raylet/raylet) ", 1),
}
#: Those that end a sweep, which is then resumed.
ENDS_A_SWEEP = ("sweep", "Ray's own daemon")
KILLS_A_SWEEP = 6
#: Detached actors that Ray keeps for a whole cluster, without resources.
RAYS_OWN = {"_AutoscalingCoordinatorActor"}
#: What the recipe trains: a plain adapter and two others in the search, the plain and the better one on a fresh seed.
PLANNED = 5
#: Seconds: the longest pause before a kill; for how long a sign of life is waited for, which each kill also adds to a
#: sweep's limit; and the least of that limit, which is `PATIENCE` times as long as the undisturbed sweep took.
PAUSE_S, RECOVERY_S, LIMIT_S, PATIENCE = 4.0, 60.0, 240.0, 3.0
ORPHANS_S = 15.0


@dataclass
class Kill:
    kind: str
    lost: float | None = None
    recovered: bool = False


@dataclass
class Tally:
    """What was killed and what went wrong; every report goes to a file, too."""

    file: Path
    kills: list[Kill] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    def tell(self, text: str) -> None:
        stamped = f"{time.strftime('%H:%M:%S')}  {text}"
        print(stamped, flush=True)
        with self.file.open("a") as file:
            file.write(stamped + "\n")

    def violation(self, text: str, of: str = "") -> None:
        text = f"{of}: {text}" if of else text
        self.violations.append(text)
        self.tell(f"VIOLATION {text}")

    def table(self) -> str:
        lines = [f"{'killed':<24}{'kills':>6}{'recovered':>11}{'median s':>10}{'max s':>8}"]
        rows = [(kind, [kill for kill in self.kills if kill.kind == kind]) for kind in KINDS]
        for kind, kills in [*rows, ("all", self.kills)]:
            lost = sorted(kill.lost for kill in kills if kill.lost is not None)
            spread = f"{statistics.median(lost):>10.1f}{lost[-1]:>8.1f}" if lost else f"{'-':>10}{'-':>8}"
            lines.append(f"{kind:<24}{len(kills):>6}{sum(kill.recovered for kill in kills):>11}{spread}")
        return "\n".join([*lines, f"violations: {len(self.violations)}", *self.violations])


def own_processes() -> Iterator[psutil.Process]:
    """Processes that bear the mark of this run, or whose parent does; not this one."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                if any(each.environ().get(MARK) == TOKEN for each in [process, *process.parents()[:1]]):
                    yield process


def title(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline()).strip()
    return ""


class Sweep:
    """A run of the recipe in a process of its own, with its log beside its folder."""

    def __init__(self, folder: Path, address: str | None) -> None:
        self.folder, self.log, self.started = folder, folder.with_suffix(".log"), time.monotonic()
        self._changes = [f"ray.address={address}"] if address else []
        self.process = self._start(str(folder.parent / "recipe.yaml"))
        self.seen: dict[Path, int] = {}

    def resume(self) -> None:
        self.process = self._start("--resume")

    def _start(self, *how: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "tune.cli", "sweep", *how, f"output_dir={self.folder}", *self._changes]
        with self.log.open("a") as log:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def victims(self, kind: str) -> list[psutil.Process]:
        """Its processes of a kind: those it has started; of a cluster that others share not its daemons."""
        if kind == "sweep":
            return [psutil.Process(self.process.pid)]
        if kind in ENDS_A_SWEEP and self._changes:
            return []
        return [process for process in own_processes() if re.match(KINDS[kind][0], title(process))]

    def sign(self, kind: str) -> tuple:
        """What changes when work resumes after a kill: steps, scores, or any of both and of the trials' states."""
        steps = [(file.stat().st_size, file.stat().st_mtime_ns) for file in self.folder.glob("trials/*/metrics.jsonl")]
        scores = stamp(self.folder / "scores.jsonl")
        if kind in ("train worker", "controller of a lane"):
            return tuple(steps)
        if kind == "evaluation actor":
            return (scores,)
        return (*steps, scores, *map(stamp, self.folder.glob("trials/*/trial.json")))

    def watch_done(self) -> None:
        """Remember the adapters of trials that are trained: they must stay as they are."""
        for file in self.folder.glob("trials/*/trial.json"):
            with suppress(OSError, ValueError):
                if json.loads(file.read_text()).get("status") == "done":
                    self.seen.setdefault(file.with_name("adapter") / Path(ADAPTER).name, stamp(file.parent / ADAPTER))

    def end(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])


# ------------------------------------------------------------------ one disturbed sweep


def disturb(sweep: Sweep, wanted: int, limit_s: float, draw: random.Random, tally: Tally) -> bool:
    """Kill up to `wanted` processes of a sweep and wait for its end; False when it had to be given up."""
    used: Counter[str] = Counter()
    mine: list[Kill] = []
    deadline = sweep.started + limit_s
    while sweep.process.poll() is None:
        sweep.watch_done()
        if time.monotonic() > deadline:
            tally.violation(f"{sweep.folder.name} hangs, after kills of {[kill.kind for kill in mine]}:\n{sweep.end()}")
            return False
        kinds = [kind for kind, (_, most) in KINDS.items() if used[kind] < most]
        if len(mine) == wanted or not list(sweep.folder.glob("trials/*/metrics.jsonl")):
            time.sleep(0.1)
            continue
        _pause(sweep, draw.uniform(0, PAUSE_S))
        kind = draw.choice(kinds)
        victim = _victim(sweep, kind, draw)
        if victim is None:
            continue
        name, kill, begun = title(victim)[:50], Kill(kind), time.monotonic()
        try:
            victim.kill()
        except psutil.NoSuchProcess:  # it ended meanwhile
            continue
        used[kind] += 1
        mine.append(kill)
        tally.kills.append(kill)
        deadline += RECOVERY_S
        if kind in ENDS_A_SWEEP:
            try:
                sweep.process.wait(timeout=RECOVERY_S)
            except subprocess.TimeoutExpired:
                tally.violation(f"{sweep.folder.name} outlives its Ray by {RECOVERY_S:g} s:\n{sweep.end()}")
                return False
            _orphans_gone(sweep)
            sweep.resume()
            used = Counter({each: used[each] for each in ENDS_A_SWEEP})
        _recover(sweep, kill, begun)
        cost = "the sweep ended" if kill.lost is None else f"{kill.lost:.1f} s until work went on"
        tally.tell(f"{len(tally.kills):>3}  {sweep.folder.name}  {kind} (pid {victim.pid}, {name}): {cost}")
    if sweep.process.returncode != 0:
        told = f"{sweep.folder.name} ended with code {sweep.process.returncode}"
        tally.violation(f"{told}, after kills of {[kill.kind for kill in mine]}:\n{sweep.end()}")
        return False
    for kill in mine:
        kill.recovered = True
    return True


def _pause(sweep: Sweep, seconds: float) -> None:
    with suppress(subprocess.TimeoutExpired):
        sweep.process.wait(timeout=seconds)


def _victim(sweep: Sweep, kind: str, draw: random.Random) -> psutil.Process | None:
    if sweep.process.poll() is not None:
        return None
    victims = sorted(sweep.victims(kind), key=lambda process: process.pid)
    return draw.choice(victims) if victims else None


def _orphans_gone(sweep: Sweep) -> None:
    """Wait for the workers of a killed sweep to follow it: what they still write is no sign of the next one."""
    deadline = time.monotonic() + ORPHANS_S
    while time.monotonic() < deadline and (sweep.victims("train worker") or sweep.victims("evaluation actor")):
        time.sleep(0.1)


def _recover(sweep: Sweep, kill: Kill, begun: float) -> None:
    """Wait until work resumes, or the sweep ends."""
    time.sleep(0.05)
    before = sweep.sign(kill.kind)
    while time.monotonic() - begun < RECOVERY_S:
        if sweep.process.poll() is not None:
            return
        sweep.watch_done()
        if sweep.sign(kill.kind) != before:
            kill.lost = time.monotonic() - begun
            return
        time.sleep(0.05)


# ------------------------------------------------------------------ what must not be left


def left_behind(cluster: bool, grace_s: float = 10.0) -> list[str]:
    """Placement groups, actors and processes that are there `grace_s` after a sweep."""
    deadline = time.monotonic() + grace_s
    while True:
        left = _left_on_cluster() if cluster else [title(process)[:80] for process in own_processes()]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.3)


def _left_on_cluster() -> list[str]:
    import ray
    from ray._private.state import actors
    from ray.util.placement_group import placement_group_table

    groups = [f"placement group {g['name']}" for g in placement_group_table().values() if g["state"] != "REMOVED"]
    names = [actor["ActorClassName"] for actor in actors().values() if actor["State"] != "DEAD"]
    alive = [f"actor {name}" for name in names if name not in RAYS_OWN]
    used = {name: ray.cluster_resources()[name] - free for name, free in ray.available_resources().items()}
    return groups + alive + ([f"CPUs {used['CPU']:g}"] if used.get("CPU") else [])


# ------------------------------------------------------------------ all of it


def chaos(kills: int, seed: int, output: Path) -> Tally:
    """Run sweeps until so many kills are made."""
    import ray

    tally, draw = Tally(output / "chaos.log"), random.Random(seed)
    (output / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    undisturbed = Sweep(output / "reference", None)
    if undisturbed.process.wait(timeout=2 * LIMIT_S) != 0:
        tally.violation(f"the undisturbed sweep failed:\n{undisturbed.end()}")
        return tally
    reference = read(undisturbed.folder, lambda text: tally.violation(f"undisturbed: {text}"))
    if Counter(reference.statuses.values()) != {"done": PLANNED}:
        tally.violation(f"the undisturbed sweep is not whole: {reference.statuses}\n{undisturbed.end()}")
        return tally
    spent = time.monotonic() - undisturbed.started
    tally.tell(f"undisturbed: {spent:.0f} s, {len(reference.adapters)} adapters, {len(reference.scores)} scores")
    number = idle = 0
    limit = max(LIMIT_S, PATIENCE * spent)
    while len(tally.kills) < kills and idle < 3:
        number += 1
        address = _cluster() if number % 2 == 0 else None
        sweep = Sweep(output / f"sweep-{number:02}{'-joined' if address else ''}", address)
        before = len(tally.kills)
        try:
            ended = disturb(sweep, min(KILLS_A_SWEEP, kills - before), limit, draw, tally)
            made = len(tally.kills) - before
            idle = 0 if made else idle + 1
            if ended:
                told = functools.partial(tally.violation, of=sweep.folder.name)
                check(sweep.folder, sweep.seen, reference, made, told)
                if left := left_behind(bool(address)):
                    tally.violation(f"{sweep.folder.name} left behind: {left}")
        finally:
            ray.shutdown()
            _end_all()
        took = time.monotonic() - sweep.started
        tally.tell(f"     {sweep.folder.name} {'ended' if ended else 'was given up'} after {took:.0f} s, {made} kills")
    if len(tally.kills) < kills:
        tally.violation(f"only {len(tally.kills)} of {kills} kills could be made")
    return tally


def _cluster() -> str:
    """A Ray that outlives the sweeps on it."""
    import logging

    import ray

    return ray.init(
        address="local",
        num_cpus=os.cpu_count(),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    ).address_info["gcs_address"]


def _end_all() -> None:
    for process in own_processes():
        with suppress(psutil.Error):
            process.send_signal(signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="a new folder for runs and logs; a temporary one without")
    asked = parser.parse_args()
    output = asked.output or Path(tempfile.mkdtemp(prefix="chaos-"))
    output.mkdir(parents=True, exist_ok=True)
    os.environ.update(ENVIRONMENT, MACDROP_CACHE=str((output / "cache").absolute()))
    begun = time.monotonic()
    try:
        tally = chaos(asked.kills, asked.seed, output.absolute())
    finally:
        _end_all()
    tally.tell(f"seed {asked.seed}, {time.monotonic() - begun:.0f} s in all, {output}\n{tally.table()}")
    return 1 if tally.violations else 0


if __name__ == "__main__":
    sys.exit(main())

"""An on-premise cluster in the network lab, used as its owner would: by `macdrop cluster` verbs typed on the laptop."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netlab import SHARED, Lab, Machine, until

FILE = "cluster.yaml"
#: Ray's own name of a Train worker's process, and of everything else of Ray's.
TRAINS, OF_RAY = "ray::RayTrainWorker", re.compile(r"ray::|raylet|gcs_server|/ray/")
#: What `ray up` and `ray exec` say of their own steps.
OF_RAYS_LAUNCHER = re.compile(r"\sV*(INFO|WARN) \w+\.py:|^(Shared connection|Warning: Permanently added)")
#: The demo, changed as a user would: one model, few trials, each long enough to be hit; every step is logged.
STEPS = 200
SWEEP = (
    *("sweep.models=[zoo:planted-llama]", "sweep.arms=[base, plain, macdrop]", "sweep.seeds=2", "sweep.num_samples=2"),
    *(f"max_steps={STEPS}", "logging_steps=1", "ray.num_workers=2", "eval.attacks=[none, zeroing@3]"),
)
#: Steps between two checkpoints, unless told otherwise.
SAVED_EVERY = STEPS // 10


@dataclass(frozen=True)
class Loss:
    """What a blow cost: seconds from it to the next new step of the order that was hit, and steps done again."""

    trial: str
    host: Machine
    seconds: float
    again: int


class Cluster:
    """The verbs, and eyes for what happens on hosts and storage. `told`: all that the verbs said, with times."""

    def __init__(self, lab: Lab, *, cpus: int = 2) -> None:
        self.lab, self.began = lab, time.monotonic()
        self.head, *self.workers = lab.hosts
        self.answers = (
            *(f"head_ip={self.head.address}", f"worker_ips={','.join(host.address for host in self.workers)}"),
            *("user=root", f"cpus={cpus}", "object_store_mb=150", f"storage={SHARED}", "install=none", "name=lab"),
        )

    def say(self, *words: object) -> None:
        """A line of the story, with the seconds since its beginning."""
        print(f"{time.monotonic() - self.began:6.1f}s", *words, flush=True)

    def verb(self, *words: str, timeout: float = 240, code: int | None = 0) -> str:
        """`macdrop cluster WORDS` on the laptop; what it said. `code`: how it must end, None for anyhow."""
        self.say("$ macdrop cluster", *words)
        done = self.lab.laptop.run("macdrop", "cluster", *words, timeout=timeout)
        told = [line for line in done.stdout.splitlines() if not OF_RAYS_LAUNCHER.search(line)]
        print("\n".join(f"          | {line[:200]}" for line in told[-40:]), flush=True)
        assert code is None or done.returncode == code, f"{words} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def up(self) -> float:
        """Write the launch file, check it, start the cluster; seconds of `up`, which waits for all nodes."""
        self.verb("render", "local", *self.answers, "--output", FILE)
        self.verb("check", FILE)
        began = time.monotonic()
        told = self.verb("up", FILE)
        assert f"{len(self.lab.hosts)} of {len(self.lab.hosts)} nodes" in told
        return time.monotonic() - began

    def submit(self, name: str, *overrides: str, log: Path) -> subprocess.Popen:
        """Start a shortened demo sweep; `log` gets what `submit` prints while it goes on."""
        words = ("submit", FILE, "demo", *SWEEP, *overrides, "--name", name)
        self.say("$ macdrop cluster", *words)
        return self.lab.laptop.start("macdrop", "cluster", *words, log=log)

    def wait_for_nodes(self) -> float:
        """Seconds until all nodes are alive."""
        began = time.monotonic()
        self.verb("check", FILE, "--after", "--timeout", "150")
        return time.monotonic() - began

    def listen_for_notices(self) -> None:
        """On every worker what a spot node's launch file starts, and the metadata service of its cloud."""
        for host in self.workers:
            log = host.state / "spot.log"
            self._metadata(host).parent.mkdir(parents=True, exist_ok=True)
            self._metadata(host).write_text("FALSE")
            serve = ("-m", "http.server", "8169", "--bind", "127.0.0.1", "--directory", "/run/metadata")
            host.start("python", *serve, log=log)
            watch = ("macdrop", "cluster", "spot-watch", "--cloud", "gcp", "--interval", "0.5")
            host.start(*watch, log=log, MACDROP_METADATA_URL="http://127.0.0.1:8169")

    def notice(self, host: Machine) -> None:
        """The cloud tells this host that it will be taken back."""
        self._metadata(host).write_text("TRUE")

    @staticmethod
    def _metadata(host: Machine) -> Path:
        return Path(f"{host.root}/run/metadata/computeMetadata/v1/instance/preempted")


class Run:
    """A run's folder on the shared storage, watched from outside while it is written."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster, self.name = cluster, name
        self.folder = cluster.lab.shared / "runs" / name

    def trials(self) -> dict[str, dict[str, Any]]:
        return {path.parent.name: json.loads(path.read_text()) for path in self.folder.glob("trials/*/trial.json")}

    def steps(self, trial: str) -> list[int]:
        """Steps of a trial in the order in which they were written."""
        path = self.folder / "trials" / trial / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line)["step"] for line in lines if line.endswith("}")]

    def training(self) -> str | None:
        """A trial that is being trained, has a checkpoint behind it and much before it."""
        for trial, facts in self.trials().items():
            if facts["status"] == "running" and SAVED_EVERY * 1.3 < max(self.steps(trial), default=0) < STEPS * 0.7:
                return trial
        return None

    def host(self) -> Machine | None:
        """The machine with most of the training workers."""
        found = {host.name: sum(TRAINS in line for line in host.processes()) for host in self.cluster.workers}
        name = max(found, key=found.__getitem__)
        return self.cluster.lab.machines[name] if found[name] else None

    def hit(self, blow: Callable[[Machine], object], what: str) -> Loss:
        """Strike the host that trains, in the middle of a trial, and wait until that trial goes on and is trained."""
        until(lambda: self.training() and self.host(), 180, f"a trial to {what}", 0.2)
        trial, host = self.training(), self.host()
        assert trial and host
        self.cluster.say(f"{what} {host.name}, which trains {trial}, step {self.steps(trial)[-1]}")
        began = time.monotonic()
        blow(host)
        before = self._settled(trial)
        until(lambda: self.steps(trial) != before, 180, f"{trial} to go on", 0.1)
        seconds = time.monotonic() - began
        until(lambda: "trained" in self.trials()[trial], 180, f"{trial} to be trained", 0.2)
        saved = self.trials()[trial]["resumed_from"]
        again = before[-1] - saved
        self.cluster.say(f"{trial} went on after {seconds:.1f} s from step {saved}: {again} steps were done again")
        return Loss(trial, host, seconds, again)

    def _settled(self, trial: str) -> list[int]:
        """Its steps, once what was on its way to the journal is written."""
        before: list[int] = []

        def still() -> bool:
            nonlocal before
            before, last = self.steps(trial), before
            return before == last

        until(still, 60, f"{trial} to feel the blow", 3.0)
        return before

    def done(self) -> list[str]:
        return [trial for trial, facts in self.trials().items() if facts["status"] == "done"]

    def adapter(self, trial: str) -> tuple[bytes, int]:
        """Bytes of a trial's adapter, and when they were written."""
        file = self.folder / "trials" / trial / "adapter" / "adapter_model.safetensors"
        return file.read_bytes(), file.stat().st_mtime_ns

    def ended(self) -> bool:
        """Whether the sweep is over, well or not."""
        file = self.folder / "run.json"
        return file.exists() and json.loads(file.read_text())["status"] != "running"


def ray_processes(machines: Sequence[Machine]) -> dict[str, list[str]]:
    """Machine -> what runs there of Ray."""
    found = {machine.name: [line for line in machine.processes() if OF_RAY.search(line)] for machine in machines}
    return {name: lines for name, lines in found.items() if lines}

"""An on-premise cluster in the network lab, operated by `macdrop cluster` verbs typed on the laptop."""

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
#: Ray's name for a Train worker process, and a pattern for any Ray process.
TRAIN_WORKER, RAY_PROCESS = "ray::RayTrainWorker", re.compile(r"ray::|raylet|gcs_server|/ray/")
#: Lines that `ray up` and `ray exec` print about their own steps.
RAY_LAUNCHER_LINE = re.compile(r"\sV*(INFO|WARN) \w+\.py:|^(Shared connection|Warning: Permanently added)")
#: A shortened demo: one model and few trials, each long enough to be hit by a fault; every step is logged.
STEPS = 200
SWEEP = (
    "sweep.models=[zoo:planted-llama]",
    "sweep.arms=[base, plain, macdrop]",
    "sweep.seeds=2",
    "sweep.num_samples=2",
    f"max_steps={STEPS}",
    "logging_steps=1",
    "ray.num_workers=2",
    "eval.attacks=[none, zeroing@3]",
)
#: Default number of steps between two checkpoints.
SAVED_EVERY = STEPS // 10


@dataclass(frozen=True)
class Loss:
    """The cost of a fault: seconds until the next new step of the interrupted trial, and the steps it repeated."""

    trial: str
    host: Machine
    seconds: float
    repeated: int


class Cluster:
    """A cluster on the hosts of the lab, operated by verbs; everything is printed with its time."""

    def __init__(self, lab: Lab, *, cpus: int = 2) -> None:
        self.lab, self.began = lab, time.monotonic()
        self.head, *self.workers = lab.hosts
        self.fields = (
            *(f"head_ip={self.head.address}", f"worker_ips={','.join(host.address for host in self.workers)}"),
            "user=root",
            f"cpus={cpus}",
            "object_store_mb=150",
            f"storage={SHARED}",
            "install=none",
            "name=lab",
        )

    def say(self, *words: object) -> None:
        """Print a line with the seconds since the start."""
        print(f"{time.monotonic() - self.began:6.1f}s", *words, flush=True)

    def verb(self, *words: str, timeout: float = 240, code: int | None = 0) -> str:
        """Run `macdrop cluster WORDS` on the laptop and return its output. `code`: expected exit code, None for any."""
        self.say("$ macdrop cluster", *words)
        done = self.lab.laptop.run("macdrop", "cluster", *words, timeout=timeout)
        lines = [line for line in done.stdout.splitlines() if not RAY_LAUNCHER_LINE.search(line)]
        print("\n".join(f"          | {line[:200]}" for line in lines[-40:]), flush=True)
        assert code is None or done.returncode == code, f"{words} ended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def up(self) -> float:
        """Render and check the launch file, start the cluster, wait for all nodes; return the seconds of `up`."""
        self.verb("render", "local", *self.fields, "--output", FILE)
        self.verb("check", FILE)
        began = time.monotonic()
        output = self.verb("up", FILE)
        assert f"{len(self.lab.hosts)} of {len(self.lab.hosts)} nodes" in output
        return time.monotonic() - began

    def submit(self, name: str, *overrides: str, log: Path) -> subprocess.Popen:
        """Submit a shortened demo sweep; the output of `submit` is appended to `log`."""
        words = ("submit", FILE, "demo", *SWEEP, *overrides, "--name", name)
        self.say("$ macdrop cluster", *words)
        return self.lab.laptop.start("macdrop", "cluster", *words, log=log)

    def wait_for_nodes(self) -> float:
        """Wait until all nodes are alive; return the seconds."""
        began = time.monotonic()
        self.verb("check", FILE, "--after", "--timeout", "150")
        return time.monotonic() - began

    def listen_for_notices(self) -> None:
        """Start on every worker the spot watch of a rented node, and a metadata service for it to poll."""
        for host in self.workers:
            log = host.state / "spot.log"
            self._metadata(host).parent.mkdir(parents=True, exist_ok=True)
            self._metadata(host).write_text("FALSE")
            serve = ("-m", "http.server", "8169", "--bind", "127.0.0.1", "--directory", "/run/metadata")
            host.start("python", *serve, log=log)
            watch = ("macdrop", "cluster", "spot-watch", "--cloud", "gcp", "--interval", "0.5")
            host.start(*watch, log=log, MACDROP_METADATA_URL="http://127.0.0.1:8169")

    def notice(self, host: Machine) -> None:
        """Post a termination notice for this host."""
        self._metadata(host).write_text("TRUE")

    @staticmethod
    def _metadata(host: Machine) -> Path:
        return Path(f"{host.root}/run/metadata/computeMetadata/v1/instance/preempted")


class Run:
    """A run folder on the shared storage, observed from outside while it is written."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster, self.name = cluster, name
        self.folder = cluster.lab.shared / "runs" / name

    def trials(self) -> dict[str, dict[str, Any]]:
        return {path.parent.name: json.loads(path.read_text()) for path in self.folder.glob("trials/*/trial.json")}

    def steps(self, trial: str) -> list[int]:
        """Logged steps of a trial, in file order."""
        path = self.folder / "trials" / trial / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line)["step"] for line in lines if line.endswith("}")]

    def training(self) -> str | None:
        """A trial in training that has a checkpoint and is far from its end, or None."""
        for trial, facts in self.trials().items():
            if facts["status"] == "running" and SAVED_EVERY * 1.3 < max(self.steps(trial), default=0) < STEPS * 0.7:
                return trial
        return None

    def host(self) -> Machine | None:
        """The machine with the most training workers, or None."""
        found = {host.name: sum(TRAIN_WORKER in line for line in host.processes()) for host in self.cluster.workers}
        name = max(found, key=found.__getitem__)
        return self.cluster.lab.machines[name] if found[name] else None

    def hit(self, fault: Callable[[Machine], object], what: str) -> Loss:
        """Inject a fault into the host that trains, in the middle of a trial, and wait until that trial is trained."""
        until(lambda: self.training() and self.host(), 180, f"a trial in mid-training to {what}", 0.2)
        trial, host = self.training(), self.host()
        assert trial and host
        self.cluster.say(f"{what} {host.name}, which trains {trial}, at step {self.steps(trial)[-1]}")
        began = time.monotonic()
        fault(host)
        before = self._settled(trial)
        until(lambda: self.steps(trial) != before, 180, f"{trial} to resume", 0.1)
        seconds = time.monotonic() - began
        until(lambda: "trained" in self.trials()[trial], 180, f"{trial} to be trained", 0.2)
        saved = self.trials()[trial]["resumed_from"]
        repeated = before[-1] - saved
        self.cluster.say(f"{trial} resumed after {seconds:.1f} s from step {saved} and repeated {repeated} steps")
        return Loss(trial, host, seconds, repeated)

    def _settled(self, trial: str) -> list[int]:
        """The steps of a trial, once those in flight at the fault are written."""
        before: list[int] = []

        def still() -> bool:
            nonlocal before
            before, last = self.steps(trial), before
            return before == last

        until(still, 60, f"{trial} to stop logging", 3.0)
        return before

    def done(self) -> list[str]:
        return [trial for trial, facts in self.trials().items() if facts["status"] == "done"]

    def adapter(self, trial: str) -> tuple[bytes, int]:
        """Bytes of a trial's adapter, and their modification time."""
        file = self.folder / "trials" / trial / "adapter" / "adapter_model.safetensors"
        return file.read_bytes(), file.stat().st_mtime_ns

    def ended(self) -> bool:
        """Check whether the sweep has ended, in success or failure."""
        file = self.folder / "run.json"
        return file.exists() and json.loads(file.read_text())["status"] != "running"


def ray_processes(machines: Sequence[Machine]) -> dict[str, list[str]]:
    """Ray processes per machine, machines without any left out."""
    found = {machine.name: [line for line in machine.processes() if RAY_PROCESS.search(line)] for machine in machines}
    return {name: lines for name, lines in found.items() if lines}

"""A cluster of three hosts in the network lab: start-up time, and the cost to a sweep of a killed and a cut-off host.

    python tests/benchmarks/launch.py [--cpus 2]

The hosts are namespaces of this machine (tests/launch/netlab.py), so they share its CPUs: real hosts should be
faster. `up` is `macdrop cluster up`, over ssh, to the third node. Then the shortened demo is submitted; the host that
trains is killed, and once it is back, the one that trains then is disconnected. Time lost: from the event to the next
new step of the interrupted trial. Steps repeated: those since its last checkpoint. Needs root and takes about six
minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from pathlib import Path

from measure import machine, table, verdict

sys.path.insert(0, str(Path(__file__).parents[1] / "launch"))

UP_TARGET_S, LOST_TARGET_S = 90.0, 60.0


def measured(cpus: int) -> tuple[float, list[tuple[str, float, int, int]]]:
    """Seconds of `up`; for each event its name, the seconds lost, steps repeated and steps between checkpoints."""
    from netlab import Lab, until
    from onprem import SAVED_EVERY, Cluster, Run

    with Lab() as lab, tempfile.TemporaryDirectory() as folder:
        cluster, events = Cluster(lab, cpus=cpus), []
        up = cluster.up()
        run = Run(cluster, "bench")
        cluster.submit(run.name, log=Path(folder, "submit.log"))
        until(run.training, 180, "the first trial", 0.5)
        for what, fault, undo in (("kill", lab.kill, lab.boot), ("cut", lab.cut, lab.reconnect)):
            loss = run.hit(lambda host, fault=fault: fault(host.name), what)
            events.append((what, loss.seconds, loss.repeated, SAVED_EVERY))
            undo(loss.host.name)
            cluster.wait_for_nodes()
        return up, events


def report(up: float, events: list[tuple[str, float, int, int]]) -> str:
    rows = [(f"host {what}", f"{seconds:.1f}", repeated, every) for what, seconds, repeated, every in events]
    lines = [
        f"up to 3 nodes: {up:.1f} s",
        table(("event", "s to the next step", "steps repeated", "saved every"), rows),
    ]
    lines.append(verdict("up to 3 nodes", up, UP_TARGET_S, unit=" s"))
    for what, seconds, repeated, every in events:
        lines.append(verdict(f"time lost, host {what}", seconds, LOST_TARGET_S, unit=" s"))
        lines.append(verdict(f"steps repeated, host {what}", repeated, every))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpus", type=int, default=2, help="CPUs that each worker host offers to Ray (default: 2)")
    parser.add_argument("--quiet", action="store_true", help="do not print the output of the verbs")
    options = parser.parse_args()
    import netlab

    if reason := netlab.missing():
        print(reason, file=sys.stderr)
        return 1
    print(machine())
    with contextlib.redirect_stdout(io.StringIO()) if options.quiet else contextlib.nullcontext():
        up, events = measured(options.cpus)
    print(report(up, events))
    print(machine())
    return 0


if __name__ == "__main__":
    sys.exit(main())

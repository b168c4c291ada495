"""The demo sweep from typed command to table, by phase.

    python tests/benchmarks/demo.py [--run RUN] [key=value ...]

Runs `macdrop sweep output_dir=TEMPORARY [key=value ...]` with an empty cache and times it from outside; the phases come
from the times in the run folder. The target is for two idle CPUs and at least 2 models, ZeRO-2 with 2 workers and 10
trials; what the run had is printed beside it. With --run nothing is run: it shows the phases of a run folder that is
there, from its creation on.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from measure import machine, table, verdict

from tune.storage.records import TrialRecord

TARGET_S = 240.0


@dataclass(frozen=True)
class Phase:
    """A stretch of the run; phases follow each other without a gap."""

    name: str
    seconds: float


def timestamp(text: str) -> float:
    """Seconds since 1970 of a time in the run folder."""
    return datetime.fromisoformat(text).timestamp()


def phases(run: dict[str, Any], trials: list[TrialRecord], began: float | None, ended: float | None) -> list[Phase]:
    """Split the run at the times in its records; `trials` are those of `RunFolder.trials`.

    began, ended: when the command was started and when it ended, seconds since 1970; None leaves that end out.
    """
    marks = [("", began)] if began is not None else []
    marks.append(("command to run folder: imports, checks, Ray", timestamp(run["created"])))
    opening = "lanes, evaluation actors, scan, proof"
    for model in dict.fromkeys(trial.model for trial in trials):
        mine = [trial for trial in trials if trial.model == model]
        marks.append((f"{opening}, to the first step of {model}", min(timestamp(t.started) for t in mine)))
        marks.append((f"{len(mine)} trials of {model}, trained and scored", max(timestamp(t.finished) for t in mine)))
        opening = "next model in the evaluation actors"
    marks.append(("Tune's end, base scores", timestamp(run["finished"])))
    if ended is not None:
        marks.append(("table, Ray's end", ended))
    return [Phase(name, time - before) for (_, before), (name, time) in zip(marks, marks[1:], strict=False)]


def facts(config: dict[str, Any], trials: list[TrialRecord], scores: int) -> dict[str, object]:
    """What the target asks of the run, and how its trials ended."""
    states = [trial.status for trial in trials]
    return {
        "models": len({trial.model for trial in trials}),
        "trials": len(trials),
        "trials by state": ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)),
        "workers": config["ray"]["num_workers"],
        "zero_stage": config["zero_stage"],
        "scores": scores,
        "seconds in fine-tunings": f"{sum(trial.seconds or 0 for trial in trials):.1f}",
        "optimizer steps": sum(trial.step or 0 for trial in trials),
    }


def enough(found: dict[str, Any]) -> bool:
    """Check that the run was as large as the target requires and every trial succeeded."""
    size = found["models"] >= 2 and found["trials"] >= 10 and found["workers"] >= 2 and found["zero_stage"] == 2
    return size and found["trials by state"] == f"{found['trials']} done"


def report(run_dir: Path, began: float | None, ended: float | None) -> str:
    from tune.storage.run_folder import RunFolder

    run_folder = RunFolder.open(run_dir)
    trials = run_folder.trials()
    parts = phases(run_folder.run(), trials, began, ended)
    found = facts(run_folder.config(), trials, len(run_folder.score_rows()))
    total = sum(phase.seconds for phase in parts)
    rows = [(phase.name, f"{phase.seconds:.1f}") for phase in [*parts, Phase("all", total)]]
    lines = [table(("phase", "seconds"), rows), "", *(f"{name}: {value}" for name, value in found.items())]
    what = "typed command to table" if began is not None else "run folder to its end"
    if not enough(found):
        what += " (of a run smaller than the target's, or with trials that failed)"
    return "\n".join([*lines, verdict(what, total, TARGET_S, unit=" s")])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run folder that is there, instead of a run")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_args()
    if given.run:
        print(report(given.run, None, None))
        return 0
    with tempfile.TemporaryDirectory(prefix="macdrop-demo-") as temporary:
        root = Path(temporary)
        line = [str(Path(sys.executable).with_name("macdrop")), "sweep", f"output_dir={root / 'run'}", *given.overrides]
        print(f"{machine()}\n$ macdrop {' '.join(line[1:])}\n", flush=True)
        began = time.time()
        done = subprocess.run(line, env=os.environ | {"MACDROP_CACHE": str(root / "cache"), "HF_HUB_OFFLINE": "1"})
        ended = time.time()
        print(f"\nexit code {done.returncode}\n\n{report(root / 'run', began, ended)}\n\n{machine()}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())

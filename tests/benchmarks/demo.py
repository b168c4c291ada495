"""The demo sweep from typed command to table, by phase.

    python tests/benchmarks/demo.py [--run RUN] [--against CHECKOUT] [--rounds 3] [key=value ...]

Runs `macdrop sweep output_dir=TEMPORARY [key=value ...]` with an empty cache and times it from outside; the phases come
from the times in the run folder. The target is for two idle CPUs and at least 2 models, ZeRO-2 with 2 workers and 10
trials; what the run had is printed beside it. With --run nothing is run: it shows the phases of a run folder that is
there, from its creation on.

With --against a folder with an earlier version (a `git worktree`), both versions run the same sweep once a round, in
random order, and the ratio of their times is printed as well: the target is not to be slower. Paths among the overrides
must be absolute: a run's working directory is its temporary folder.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from measure import WALL, Spent, Variant, interleave, machine, table, verdict

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


def sweep(code: Path, root: Path, overrides: Sequence[str]) -> tuple[int, float, float]:
    """Run the demo of a checkout into `root`/run, with an empty cache; return exit code, start and end."""
    line = [sys.executable, "-m", "tune.cli", "sweep", f"output_dir={root / 'run'}", *overrides]
    print(f"\n$ macdrop {' '.join(line[3:])}", flush=True)
    settings = {"MACDROP_CACHE": str(root / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(code)}
    began = time.time()
    done = subprocess.run(line, env=os.environ | settings, cwd=root)
    return done.returncode, began, time.time()


def compare(versions: Mapping[str, Path], rounds: int, overrides: Sequence[str]) -> int:
    """Run the versions `rounds` times each and print the phases of every run; the first is compared with the last.

    Returns:
        the first exit code that is not 0, without a comparison; else 0.
    """
    codes: list[int] = []

    def run(code: Path) -> Spent:
        with tempfile.TemporaryDirectory(prefix="macdrop-demo-") as temporary:
            exit_code, began, ended = sweep(code, Path(temporary), overrides)
            codes.append(exit_code)
            print(f"\nexit code {exit_code}")
            if exit_code == 0:
                print(f"\n{report(Path(temporary) / 'run', began, ended)}")
            print(f"\n{machine()}", flush=True)
        return Spent(ended - began, ended - began)

    variants = {name: Variant(partial(run, code.resolve())) for name, code in versions.items()}
    timings = interleave(variants, rounds, warm_up=0)
    if any(codes):
        return next(code for code in codes if code)
    first, *_, last = versions
    if first != last:
        ratio = timings.ratio(first, last, WALL)
        seconds = ", ".join(f"{name} {timings.median(name, WALL):.1f} s" for name in versions)
        print(f"\n{seconds}\n{verdict(f'{first} / {last}', ratio.median, 1.0)}: {ratio.show()}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run folder that is there, instead of a run")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="a folder with an earlier version")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each version")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    given = parser.parse_args()
    if given.run:
        print(report(given.run, None, None))
        return 0
    versions = {"this version": Path(__file__).parents[2]}
    if given.against:
        if not (given.against / "tune").is_dir():
            parser.error(f"{given.against} holds no macdrop: give the folder of a checkout, with tune/ in it")
        versions["the earlier one"] = given.against
    print(machine(), flush=True)
    return compare(versions, given.rounds, given.overrides)


if __name__ == "__main__":
    sys.exit(main())

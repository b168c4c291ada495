"""Reports of many models and comparisons of many trials: seconds, their growth, and the size of the overview.

    python tests/benchmarks/reports.py [--models 20 100] [--trials 10000] [--keep FOLDER]

Runs are synthetic (`helpers.run_folders`): of each model 14 trials with items, answers and judgements. The folder of
many trials is one such model with searched trials of 40 scores each besides. Nothing is trained; no GPU and no Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from measure import machine, table, verdict

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.run_folders import make_run

from tune.storage.records import SCORE_COLUMNS

SCORES = 40
TARGETS = {20: 20.0, 100: 100.0}
"""Models of 14 trials -> seconds on two cores."""
COMPARED_S, OVERVIEW_BYTES = 10.0, 3 * 2**20


def many_models(folder: Path, models: int, tried: int = 4, seeds: tuple[int, ...] = (1, 2, 3)) -> Path:
    """A run of so many models; as it stands, of 14 trials each."""
    names = [f"org/model-{number}" for number in range(models)]
    return make_run(folder, model=names, tried=tried, seeds=seeds, judge=True).run_dir


def many_trials(folder: Path, trials: int, scores: int = SCORES) -> Path:
    """A run of one model with so many searched trials, each a variation of one that `make_run` wrote."""
    run_folder = make_run(folder, judge=False)
    searched = next(each for each in run_folder.trials() if each.arm == "macdrop" and each.stage == "search")
    source = folder / "trials" / searched.trial
    record, config = json.loads((source / "trial.json").read_text()), (source / "config.yaml").read_text()
    row = next(each for each in run_folder.score_rows() if each["trial"] == searched.trial)
    with open(run_folder.scores_file, "a", encoding="utf-8") as file:
        for number in range(trials):
            name, p0 = f"model-macdrop-{number:08x}", 0.5 + 0.4 * number / trials
            (folder / "trials" / name).mkdir()
            own = {**record, "trial": name, "setting": f"{number:08x}", "eval_loss": 0.8 + 0.2 * (number * 0.618 % 1)}
            (folder / "trials" / name / "trial.json").write_text(json.dumps(own))
            (folder / "trials" / name / "config.yaml").write_text(config.replace(f"p0: {_p0(config)}", f"p0: {p0}"))
            for score in range(scores):
                made = {**dict.fromkeys(SCORE_COLUMNS), **row, "trial": name, "task": f"task{score}", "value": p0}
                file.write(json.dumps(made) + "\n")
    return folder


def _p0(config: str) -> str:
    return config.split("p0: ")[1].split("\n")[0]


def report(run: Path, output: Path) -> None:
    """What `macdrop report RUN --output OUTPUT` writes."""
    from tune.report.files import read, write

    with read([run]) as made:
        write(made, output)


def compare(*runs: Path) -> str:
    """What `macdrop compare RUN ...` prints."""
    from tune.report.files import read
    from tune.report.leaderboard import ordered, rows_of, text

    with read(list(runs)) as made:
        return text(ordered([row for each in made for row in rows_of(each)], "headline"), "markdown")


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall seconds, and CPU seconds of this process and those that it started and that have ended."""
    wall, cpu = time.perf_counter(), _cpu()
    work()
    return time.perf_counter() - wall, _cpu() - cpu


def _cpu() -> float:
    found = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in found)


def in_a_process(code: str, *arguments: object) -> tuple[float, float]:
    """Time a function of this file in a process of its own, with the imports that a user's command has."""
    import subprocess

    command = [sys.executable, "-c", f"from reports import *; {code}", *map(str, arguments)]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return timed(lambda: subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": paths}, stdout=-3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, nargs="*", default=[20, 100])
    parser.add_argument("--trials", type=int, nargs="*", default=[10_000])
    parser.add_argument("--keep", type=Path, help="make the runs here, and leave them")
    options = parser.parse_args()
    place = options.keep or Path(tempfile.mkdtemp(prefix="macdrop-reports-"))
    os.environ["MACDROP_CACHE"] = str(place / "cache")
    print(machine())
    rows, lines = [], []
    for models in options.models:
        run, output = place / f"models-{models}", place / f"report-{models}"
        if not run.exists():
            many_models(run, models)
        shutil.rmtree(place / "cache", ignore_errors=True)
        for what in ("report", "again"):
            wall, cpu = in_a_process("report(Path(sys.argv[1]), Path(sys.argv[2]))", run, output)
            size = (output / "report.html").stat().st_size
            rows.append(
                [f"{what}, {models} x 14", f"{wall:.1f}", f"{cpu:.1f}", f"{wall / models:.2f}", f"{size / 2**20:.2f}"]
            )
            if what == "report" and models in TARGETS:
                lines.append(verdict(f"report of {models} models", wall, TARGETS[models], unit=" s"))
                lines.append(verdict(f"overview of {models} models", size / 2**20, OVERVIEW_BYTES / 2**20, unit=" MiB"))
    for trials in options.trials:
        run = place / f"trials-{trials}"
        if not run.exists():
            many_trials(run, trials)
        wall, cpu = in_a_process("compare(Path(sys.argv[1]))", run)
        rows.append([f"compare, 1 x {trials:,}", f"{wall:.1f}", f"{cpu:.1f}", f"{wall:.2f}", ""])
        lines.append(verdict(f"compare of {trials:,} trials", wall, COMPARED_S, unit=" s"))
        for engine in ("ujson", "pyarrow"):
            read = "pandas.read_json(Path(sys.argv[1]) / 'scores.jsonl', lines=True, engine=sys.argv[2])"
            wall, cpu = in_a_process(f"import pandas; {read}", run, engine)
            rows.append([f"pandas, {engine}, {trials:,}", f"{wall:.1f}", f"{cpu:.1f}", "", ""])
    print(table(["", "wall s", "CPU s", "s per model", "overview MiB"], rows), *lines, machine(), sep="\n")
    if not options.keep:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()

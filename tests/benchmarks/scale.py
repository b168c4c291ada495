"""Models of several sizes on a large cluster, in virtual time: one after the other against side by side.

    python tests/benchmarks/scale.py [--models 20] [--gpus 64] [--seeds 3]

The queue, the allocation of lanes and the admission of models are those of a real run; how long each part takes is
drawn. Models come in four sizes, of 1, 2, 4 and 8 GPUs per lane, with 10, 25, 40 and 60 minutes for a fine-tuning (log
normal, sigma 0.25), a fifth of that for its validation benchmarks and two fifths for its test benchmarks. Each has a
search of 10 trials, 4 at once, and a final stage of 9, and two evaluation actors of a quarter of a GPU.

Printed are hours, the busy share of the GPU time that lanes hold, and the lower bound: all training over all GPUs, or
the longest chain of one model.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence

from measure import table, verdict

from tune.scheduling.allocation import LaneKind, Room
from tune.scheduling.simulation import Simulation, StageTimes, StudyTimes, Timeline

#: GPUs of a lane -> seconds of a fine-tuning.
SIZES = {1: 600.0, 2: 1500.0, 4: 2400.0, 8: 3600.0}
START_S, OPEN_S, LOAD_S = 30.0, 90.0, 30.0


def workload(models: int, gpus: int, seed: int) -> list[StudyTimes]:
    """Return models of the four sizes in turn."""
    draws = random.Random(seed)
    found = []
    for number in range(models):
        workers = [*SIZES][number % len(SIZES)]
        mean = SIZES[workers]
        search, final = (tuple(mean * draws.lognormvariate(0, 0.25) for _ in range(trials)) for trials in (10, 9))
        found.append(
            StudyTimes(
                name=f"model-{number}",
                kind=LaneKind(gpus // workers, workers, Room(1, 1)),
                evaluators=2,
                evaluator=Room(1, 0.25),
                stages=(StageTimes(search, 0.2 * mean, 4), StageTimes(final, 0.4 * mean, 9)),
                open_s=OPEN_S,
                base_s=0.3 * mean,
                load_s=LOAD_S,
            )
        )
    return found


def lower_bound(studies: Sequence[StudyTimes], gpus: int) -> float:
    """Return seconds that no order can beat: all work over all GPUs, or the longest chain."""
    work = sum(sum(stage.train_s) * study.kind.room.gpus for study in studies for stage in study.stages)
    chains = []
    for study in studies:
        chain = study.open_s
        for stage in study.stages:
            lanes = min(stage.at_once, study.kind.most)
            chain += max(max(stage.train_s), sum(stage.train_s) / lanes) + stage.score_s
        chains.append(chain)
    return max(work / gpus, *chains)


def both(studies: Sequence[StudyTimes], gpus: int) -> tuple[Timeline, Timeline]:
    """Return the timelines of the models one after the other, and side by side."""
    room = Room(1000.0, float(gpus))
    alone, beside = (Simulation(studies, room, most=most, start_s=START_S).run() for most in (1, None))
    return alone, beside


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=20)
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args(arguments)
    rows = []
    for seed in range(asked.seeds):
        studies = workload(asked.models, asked.gpus, seed)
        alone, beside = both(studies, asked.gpus)
        bound = lower_bound(studies, asked.gpus)
        hours = (f"{seconds / 3600:.1f}" for seconds in (alone.end, beside.end, bound))
        shares = (f"{alone.end / beside.end:.2f}", f"{beside.end / bound:.2f}", f"{beside.utilisation('lane'):.1%}")
        rows.append([str(seed), *hours, *shares])
    heads = ["seed", "one by one h", "side by side h", "lower bound h", "times shorter", "of the bound", "lanes busy"]
    print(table(heads, rows))
    worst = [min(float(row[4]) for row in rows), min(float(row[6].rstrip("%")) / 100 for row in rows)]
    print(verdict("times shorter", worst[0], 1.5, at_least=True))
    print(verdict("lanes busy", worst[1], 0.9, at_least=True))


if __name__ == "__main__":
    main()

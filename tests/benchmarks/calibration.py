"""How often the verdict is wrong where nothing differs, and how often it finds what does.

    python tests/benchmarks/calibration.py [--experiments 1000] [--seeds 2 3 5] [--items 60 2000] [--processes 2]
    python tests/benchmarks/calibration.py --zoo FOLDER [--fine-tunings 60] [--steps 60] [--splits 1000] [--minutes 4]

Simulated: two arms that do not differ, under several kinds of noise, each experiment judged by the rule that judges a
run (`comparison`). "headline" is the share of experiments whose headline says helps or hurts, "any task" the share
in which a single task does after Holm; both must be at most 5 %. Then the difference that such runs call detectable
(the mean over runs) is planted, and twice that: both must be found in at least 80 %. Intervals are exact binomial ones
of 95 %.

With --zoo real fine-tunings take the place of simulated ones: many plain adapters of a built-in model that differ in
nothing but their seed, in one process and one engine, scored without attack and under one, kept in FOLDER (a run
folder). Random disjoint splits of them into two arms go through `verdict.against`, the code that a report runs.
Splits share fine-tunings, so the interval is the delete-one jackknife's over fine-tunings (for a share of 0 the exact
binomial one of as many splits as are possible without sharing). After --minutes it stops; run it again to continue.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from helpers.simulated import Design, Rate, found, harm, tell
from measure import machine, table

from tune.storage.states import TaskState

LEVEL, POWER = 0.05, 0.8
MODEL = "zoo:planted-llama"
ATTACK = "zeroing@3"
EVAL = {
    "batch_size": 64,
    "attacks": ["none", ATTACK],
    "zero_shot": {"qa": {"data": "zoo:qa"}, "arith": {"data": "zoo:arith", "limit": 100}},
    "perplexity": {"text": {"data": "zoo:text", "window": 64, "limit": 64}},
}

# ------------------------------------------------------------------------------------------------------- simulated

NOISE: dict[str, dict[str, Any]] = {
    "hits, seeds do not matter": {},
    "hits near the ceiling": {"rate": 0.98},
    "hits, seeds differ by 2 points": {"seed_sd": 0.02},
    "hits, items that suit one arm": {"interaction": 0.3, "seed_sd": 0.01},
    "perplexity, seeds do not matter": {"perplexity": True},
    "perplexity, seeds differ by 3 %": {"perplexity": True, "seed_sd": 0.03},
}
PLANTED = ("hits, seeds do not matter", "hits, seeds differ by 2 points", "perplexity, seeds differ by 3 %")


@dataclass(frozen=True)
class Line:
    """A line of a table: a noise and a size, simulated with a seed of its own."""

    noise: str
    seeds: int
    items: int
    experiments: int
    seed: int

    @property
    def design(self) -> Design:
        return Design(self.seeds, self.items, **NOISE[self.noise])


def alike(line: Line) -> tuple:
    """A row of the first table: rates of helps or hurts where the arms do not differ."""
    rates = tell(line.design, line.experiments, line.seed)
    return line.noise, line.seeds, line.items, rates.headline, rates.any_task


def planted(line: Line) -> tuple | None:
    """A row of the second table: how often once and twice the detectable difference is found; None if it is too large.

    The arm that is hurt answers at least a tenth of the items right.
    """
    design = line.design
    effect = harm(design, 2 * line.experiments, line.seed)  # its own error must not be taken for lack of power
    if not design.perplexity and 2 * -effect > design.rate - 0.1:
        return None
    rates = [found(replace(design, effect=x * effect), line.experiments, line.seed + 1) for x in (1, 2)]
    size = math.expm1(effect) if design.perplexity else -effect
    return line.noise, line.seeds, line.items, f"{100 * size:.1f}", *rates


def simulated(seeds: Sequence[int], items: Sequence[int], experiments: int, processes: int) -> bool:
    sizes = [(s, n) for s in seeds for n in items]
    lines = [Line(noise, *size, experiments, 10 * i) for i, (noise, size) in enumerate(product(NOISE, sizes))]
    with ProcessPoolExecutor(processes) as pool:
        first = list(pool.map(alike, lines))
        head = ("arms that do not differ", "seeds", "items", "headline", "any task")
        print(f"{experiments} experiments a line, two tasks each\n")
        print(table(head, [(*row[:3], *(rate.show() for rate in row[3:])) for row in first]), flush=True)
        honest = _target("helps or hurts where nothing differs", [rate for row in first for rate in row[3:]])
        second = [row for row in pool.map(planted, [line for line in lines if line.noise in PLANTED]) if row]
    head = ("arms that differ", "seeds", "items", "detectable, points or %", "found at 1 x", "found at 2 x")
    print("\n" + table(head, [(*row[:4], *(rate.show() for rate in row[4:])) for row in second]))
    return honest & all([_found(times, [row[3 + times] for row in second]) for times in (1, 2)])


def _found(times: int, rates: Sequence[Rate]) -> bool:
    """A line is under the target where its interval is; one in forty would be by chance at exactly 80 %."""
    under = sum(rate.interval[1] < POWER for rate in rates)
    least = min(rates, key=lambda rate: rate.share)
    print(
        f"\ntarget {times} x the detectable difference is found in >= 80 %: "
        f"{'met' if not under else f'not met by {under} of {len(rates)}'} "
        f"(all {_total(rates).show()}; least {least.show()})",
        flush=True,
    )
    return not under


def _total(rates: Sequence[Rate]) -> Rate:
    return Rate(sum(rate.count for rate in rates), sum(rate.n for rate in rates))


def _target(what: str, rates: Sequence[Rate]) -> bool:
    """A line is over the target where its interval is; one in forty would be by chance at exactly 5 %."""
    over = sum(rate.interval[0] > LEVEL for rate in rates)
    most = max(rates, key=lambda rate: rate.share)
    print(
        f"\ntarget {what} <= 5 %: {'met' if not over else f'not met by {over} of {len(rates)}'} "
        f"(all {_total(rates).show()}; most {most.show()})"
    )
    return not over


# ------------------------------------------------------------------------------------------------------------- zoo


def spec_of(seed: int, steps: int) -> Any:
    from tune.config.run_spec import MacDropSpec, TrainSpec

    return TrainSpec(
        model_name_or_path=MODEL,
        cutoff_len=64,
        val_size=0.1,
        lora_rank=8,
        learning_rate=2e-3,
        max_steps=steps,
        zero_stage=0,
        seed=seed,
        macdrop=MacDropSpec(k=0, p0=0.0),
    ).canonical()


class Trainer:
    """Trains and scores plain adapters of the model in this process, each with a seed of its own."""

    def __init__(self, run_folder: Any, steps: int) -> None:
        from macdrop import load_model, load_tokenizer
        from tune.config.eval_spec import EvalSpec
        from tune.config.messages import build
        from tune.data import dataset as data
        from tune.evaluation.adapters import AdapterSlot
        from tune.evaluation.scorer import Scorer
        from tune.storage.places import cache_dir
        from tune.training.engine import Engine
        from tune.training.massive_weights import massive_weights
        from tune.training.process_group import prepare_process
        from tune.zoo.catalog import resolve

        prepare_process(1)
        self.run_folder, self.steps, spec = run_folder, steps, spec_of(1, steps)
        self.engine = Engine(spec)
        self.data = data.load(data.prepare(spec, self.engine.tokenizer, cache_dir() / "data"))
        model, tokenizer = load_model(resolve(MODEL)), load_tokenizer(resolve(MODEL))
        self.slot = AdapterSlot(model)
        self.scorer = Scorer(model, tokenizer, build(EvalSpec, EVAL), massive_weights(spec, model, tokenizer))

    def run(self, seed: int) -> None:
        """Train, score, and only then note the trial as done."""
        from tune.config.run_spec import dump
        from tune.training.finetune import finetune

        spec = spec_of(seed, self.steps)
        record = self.run_folder.trial(spec.trial_id())
        record.start(dump(spec), model=MODEL, arm="plain", seed=seed)
        outcome = finetune(self.engine, spec, self.data, record.folder, resume=False)
        tag = {"model": MODEL, "arm": "plain", "trial": record.id, "seed": seed}
        with self.slot.adapter(record.adapter_dir) as adapted:
            for job in self.scorer.jobs():
                answers = self.run_folder.answers_file(MODEL, record.id, job)
                rows = self.scorer.score(job, model=adapted, answers_path=answers)
                self.run_folder.add_scores([{**tag, **row, "entry": job.task} for row in rows])
        record.finish(TaskState(outcome.status), eval_loss=outcome.eval_loss, step=outcome.step)


def _is_done(run_folder: Any, trial: str) -> bool:
    record = run_folder.trial(trial).record()
    return record is not None and record.status == TaskState.DONE


def fine_tunings(folder: Path, number: int, steps: int, minutes: float) -> tuple[Any, list[str]]:
    """The run folder, and its trials with seeds 1 to `number` that are done; trains those that are missing."""
    from tune.storage.run_folder import RunFolder

    spec = {"model_name_or_path": MODEL, "max_steps": steps, "eval": EVAL}
    run_folder = RunFolder.open(folder) if folder.exists() else RunFolder.create(folder, spec)
    if run_folder.config() != spec:
        raise SystemExit(f"{folder} holds other fine-tunings (its config.yaml differs): give another folder.")
    names = {seed: spec_of(seed, steps).trial_id() for seed in range(1, number + 1)}
    missing = [seed for seed, name in names.items() if not _is_done(run_folder, name)]
    began, trainer = time.monotonic(), None
    for seed in missing:
        if time.monotonic() - began > 60 * minutes:
            break
        trainer = trainer or Trainer(run_folder, steps)
        trainer.run(seed)
        print(f"  seed {seed}: trained and scored, {time.monotonic() - began:.0f} s", flush=True)
    return run_folder, [name for name in names.values() if _is_done(run_folder, name)]


@dataclass(frozen=True)
class Split:
    """Two disjoint arms of a split, and what was said of them."""

    trials: frozenset[str]
    headline: bool
    attacked: bool
    any_task: bool
    any_attacked: bool


def split(run_folder: Any, trials: Sequence[str], seeds: int, splits: int, seed: int = 0) -> list[Split]:
    """Draw pairs of arms of `seeds` fine-tunings each, and compare them as a report does."""
    from tune.analysis.paired_samples import Samples
    from tune.analysis.verdict import Setting, against

    samples, draws, found = Samples(run_folder, MODEL), np.random.default_rng(seed), []
    for _ in range(splits):
        drawn = [str(name) for name in draws.choice(np.array(trials), 2 * seeds, replace=False)]
        arms = [dict(enumerate(drawn[side::2])) for side in (0, 1)]
        plain, other = (Setting(arm, "", {}, arms[i]) for i, arm in enumerate(("plain", "macdrop")))
        made = against(samples, plain, other, 3)
        said = [row.verdict != "cannot tell" for row in made.rows if not row.column.is_mean]
        clean = [row.column.attack == "none" for row in made.rows if not row.column.is_mean]
        found.append(
            Split(
                frozenset(drawn),
                *(c.verdict != "cannot tell" for c in (made.headline, made.attacked)),
                any(s for s, c in zip(said, clean, strict=True) if c),
                any(s for s, c in zip(said, clean, strict=True) if not c),
            )
        )
    return found


def show(found: Sequence[Split], trials: Sequence[str], significant: Callable[[Split], bool]) -> tuple[str, float]:
    """Return the share of significant splits as text with its 95 % interval, and the lower bound of that."""
    share, n = float(np.mean([significant(one) for one in found])), len(trials)
    if share == 0:
        return Rate(0, n // len(found[0].trials)).show(), 0.0
    without = [np.mean([significant(one) for one in found if name not in one.trials]) for name in trials]
    margin = 1.96 * math.sqrt((n - 1) / n * np.sum((np.array(without) - np.mean(without)) ** 2))
    low, high = max(0.0, share - margin), min(1.0, share + margin)
    return f"{100 * share:.1f} % [{100 * low:.1f}, {100 * high:.1f}]", low


def real(folder: Path, number: int, steps: int, seeds: Sequence[int], splits: int, minutes: float) -> bool:
    run_folder, trials = fine_tunings(folder, number, steps, minutes)
    if len(trials) < number:
        print(f"{len(trials)} of {number} fine-tunings are there; run the same command again to continue.")
        return True
    kinds = ("headline", "attacked", "any_task", "any_attacked")
    rows, met = [], True
    for s in seeds:
        found = split(run_folder, trials, s, splits)
        cells = []
        for kind in kinds:
            text, low = show(found, trials, lambda one, kind=kind: getattr(one, kind))
            cells.append(text)
            met &= low <= LEVEL
        rows.append((f"{s} seeds an arm", *cells))
    print(f"{number} plain fine-tunings of {MODEL}, {steps} steps, {splits} random splits a line\n")
    print(table(("plain against plain", "headline", f"under {ATTACK}", "any task", "any task under attack"), rows))
    print(f"\ntarget helps or hurts where nothing differs <= 5 %: {'met' if met else 'not met'}")
    return met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=1000, help="simulated runs a line (default 1000)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 5], help="seeds an arm (default 2 3 5)")
    parser.add_argument("--items", type=int, nargs="+", default=[60, 2000], help="items a task (default 60 2000)")
    parser.add_argument("--processes", type=int, default=2, help="that simulate side by side (default 2)")
    parser.add_argument("--zoo", type=Path, metavar="FOLDER", help="real fine-tunings instead, kept in FOLDER")
    parser.add_argument("--fine-tunings", type=int, default=60, help="how many (default 60)")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each (default 60)")
    parser.add_argument("--splits", type=int, default=1000, help="random splits for each number of seeds")
    parser.add_argument("--minutes", type=float, default=4.0, help="stop training after this long (default 4)")
    given = parser.parse_args()
    print(machine(), flush=True)
    if min(given.seeds) < 2 or given.fine_tunings <= 2 * max(given.seeds):
        parser.error("an arm needs two seeds or more, and --fine-tunings more than two arms' worth")
    if given.zoo is None:
        return 0 if simulated(given.seeds, given.items, given.experiments, given.processes) else 1
    done = real(given.zoo, given.fine_tunings, given.steps, given.seeds, given.splits, given.minutes)
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())

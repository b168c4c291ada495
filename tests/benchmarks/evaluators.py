"""A suite on several adapters, plain and under attacks: resident evaluation actors against lm-eval's command line.

    python tests/benchmarks/evaluators.py [--adapters 8] [--attacks zeroing@3 ...] [--limit 60] [--processes 6]
    python tests/benchmarks/evaluators.py --model PATH --benchmark arc_easy=FILE.jsonl --benchmark piqa=FILE.jsonl

The adapters are LoRA, r = 8, on all linear layers, with random lora_B. Each is scored without attack and under each of
--attacks, on base rows. Both ways score the same rows, limit, batch size and few-shot setting on the CPU with one
thread a process, as many processes at a time as there are actors, without internet. A --benchmark is rows of our own
multiple-choice format, or TASK=FILE for an lm-eval task with local rows.

lm-eval's command line runs once for each adapter and attack, with the whole suite in one call, as a user would type it:

    lm_eval run --model hf --model_args pretrained=...,peft=... --include_path FOLDER --tasks NAME,NAME ...

It knows no attacks: `pretrained` is a copy of the model with the rows set to zero, and writing these copies is not
counted. With --processes only that many of its runs are made, evenly spread, and the time of all is extrapolated.

Printed are the ratio with and without what is paid once (the start of Ray; opening model, tasks and scan in the
actors), how many scores agree, and how many calls of layers the attacks shared. The target is held against the time
with opening and without Ray, as a sweep has a running Ray anyhow.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

from measure import machine, table, verdict
from task_files import METRICS, Benchmark, write_task

TARGET = 6.0
MODEL, SUITE = "zoo:planted-llama", ("zoo:qa", "zoo:fact", "zoo:agree")
ATTACKS = ("zeroing@3", "zeroing@5", "retaining@3")
PLAIN = "none"
K = 3  # rows of the proof that opening an actor makes
POLL_S = 0.02
PRINTED_DIGITS = 4  # of a score, in lm-eval's table
Run = tuple[str, str]  # adapter, attack
Scores = dict[tuple[str, str], float]  # (benchmark, metric) -> value


@dataclass(frozen=True)
class Setting:
    """What is scored; `limit` None for all rows."""

    model: str
    suite: tuple[Benchmark, ...]
    attacks: tuple[str, ...]
    limit: int | None
    batch_size: int
    actors: int


def make_adapters(model: str, number: int, folder: Path) -> list[str]:
    """Write `number` adapters whose lora_B is random, so that each moves the scores."""
    import torch
    from peft import LoraConfig, get_peft_model

    from macdrop import load_model
    from tune.zoo.catalog import resolve

    torch.set_num_threads(1)
    torch.manual_seed(0)
    adapted = get_peft_model(
        load_model(resolve(model)), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    made = []
    for index in range(number):
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
        made.append(str(folder / f"adapter-{index}"))
        adapted.save_pretrained(made[-1])
    return made


def make_bases(setting: Setting, folder: Path) -> dict[str, str]:
    """For each attack a checkpoint with its rows set to zero; without attack the model itself."""
    from macdrop import attacked, find_massive_weights, load_model, load_tokenizer
    from macdrop.attack import Attack
    from tune.zoo.catalog import resolve

    source = str(resolve(setting.model))
    bases = {PLAIN: source}
    model, tokenizer = load_model(source), load_tokenizer(source)
    weights = find_massive_weights(model, tokenizer, source=source, fingerprint="")
    for text in setting.attacks:
        attack = Attack.parse(text)
        bases[text] = str(folder / "bases" / text)
        with attacked(model, weights, attack.kind, attack.k):
            model.save_pretrained(bases[text])
        tokenizer.save_pretrained(bases[text])
    return bases


# ------------------------------------------------------------------------------------------- fresh lm_eval processes


def command(setting: Setting, base: str, adapter: str, tasks: Path, output: Path) -> list[str]:
    model = f"pretrained={base},peft={adapter},dtype=float32"
    names = ",".join(benchmark.name for benchmark in setting.suite)
    line = [str(Path(sys.executable).with_name("lm_eval")), "run", "--model", "hf", "--model_args", model]
    line += ["--include_path", str(tasks), "--tasks", names, "--num_fewshot", "0", "--device", "cpu"]
    line += ["--batch_size", str(setting.batch_size), "--output_path", str(output)]
    return line + (["--limit", str(setting.limit)] if setting.limit else [])


def by_processes(setting: Setting, runs: list[Run], bases: dict[str, str], root: Path) -> dict[Run, tuple]:
    """One `lm_eval` process a run; returns the seconds and the scores of each."""
    for benchmark in setting.suite:
        write_task(benchmark, root / "tasks")
    environment = os.environ | {"HF_DATASETS_CACHE": str(root / "datasets"), "CUDA_VISIBLE_DEVICES": ""}

    def score(run: Run) -> tuple[float, Scores]:
        adapter, attack = run
        output = root / "results" / f"{Path(adapter).name}-{attack}"
        began = time.perf_counter()
        done = subprocess.run(
            command(setting, bases[attack], adapter, root / "tasks", output),
            env=environment,
            capture_output=True,
            text=True,
        )
        seconds = time.perf_counter() - began
        if done.returncode:
            raise RuntimeError(f"lm_eval failed:\n{done.stderr[-3000:]}")
        print(f"  lm_eval, {Path(adapter).name}, {attack}: {seconds:.1f} s", flush=True)
        (file,) = output.rglob("results_*.json")
        found = json.loads(file.read_text())["results"]
        pairs = [(b.name, metric) for b in setting.suite for metric in METRICS if f"{metric},none" in found[b.name]]
        return seconds, {(name, metric): found[name][f"{metric},none"] for name, metric in pairs}

    with ThreadPoolExecutor(setting.actors) as at_a_time:
        return dict(zip(runs, at_a_time.map(score, runs), strict=True))


def spread(runs: list[Run], number: int | None) -> list[Run]:
    """`number` of the runs, evenly spread over adapters and attacks; all without a number."""
    if number is None or number >= len(runs):
        return runs
    # Steps of about the golden ratio of all, so that they do not fall in with the number of attacks.
    step = next(step for step in range(round(0.618 * len(runs)), 2 * len(runs)) if math.gcd(step, len(runs)) == 1)
    return [runs[i * step % len(runs)] for i in range(number)]


# ------------------------------------------------------------------------------------------ resident evaluation actors


def opening(setting: Setting, root: Path) -> Any:
    """What the actors make resident; the first of them finds and proves the massive weights."""
    from tune.config.eval_spec import TEST, EvalSpec
    from tune.config.messages import build
    from tune.config.run_spec import TrainSpec
    from tune.distributed.actors.evaluators import Opening

    entries = {each.name: each.entry for each in setting.suite}
    block = {"batch_size": setting.batch_size, "limit": setting.limit, "zero_shot": entries}
    return Opening(
        spec=TrainSpec(model_name_or_path=setting.model),
        blocks={TEST: build(EvalSpec, block | {"attacks": [PLAIN, *setting.attacks]})},
        weights=str(root / "massive_weights.json"),
        scan=bool(setting.attacks),
        k=K,
        threads=1,
    )


@dataclass(frozen=True)
class ByActors:
    """Seconds of opening the actors and of scoring all, scores, and calls of layers that attacks shared."""

    opened: float
    scored: float
    scores: dict[Run, Scores]
    calls_saved: int


def by_actors(setting: Setting, adapters: list[str], root: Path) -> ByActors:
    """A pool under a running Ray."""
    from tune.config.eval_spec import TEST, jobs
    from tune.distributed.actors.eval_task import EvalTask
    from tune.distributed.actors.evaluators import EvaluatorPool

    opened = opening(setting, root)
    began = time.perf_counter()
    pool = EvaluatorPool(setting.actors, cpus=1, gpus=0)
    try:
        pool.open(opened)
        ready = time.perf_counter()
        for adapter in adapters:
            for job in jobs(opened.blocks[TEST]):
                answers = root / "answers" / f"{Path(adapter).name}-{job.key.replace('/', '-')}.jsonl"
                pool.submit(EvalTask({"adapter": adapter}, job, adapter, str(answers)))
        found: dict[Run, Scores] = {}
        saved = 0
        while pool.busy:
            for result in pool.step():
                if result.error:
                    raise RuntimeError(result.error)
                saved += result.calls_saved
                scores = {(row["task"], row["metric"]): row["value"] for row in result.rows}
                found.setdefault((result.task.adapter, result.task.job.attack), {}).update(scores)
            time.sleep(POLL_S)
        return ByActors(ready - began, time.perf_counter() - ready, found, saved)
    finally:
        pool.close()


# -------------------------------------------------------------------------------------------------------------- report


def agreement(mine: dict[Run, Scores], theirs: dict[Run, Scores]) -> tuple[int, int, int]:
    """Scores that both have: how many agree in all printed digits, how many as numbers, and how many there are."""
    pairs = [(mine[run][key], value) for run, scores in theirs.items() for key, value in scores.items()]
    printed = sum(f"{a:.{PRINTED_DIGITS}f}" == f"{b:.{PRINTED_DIGITS}f}" for a, b in pairs)
    return printed, sum(abs(a - b) < 1e-9 for a, b in pairs), len(pairs)


def report(
    each: list[float], runs: int, actors: int, ray_start: float, ours: ByActors, agreed: tuple[int, int, int]
) -> str:
    """each: seconds of the lm_eval processes that were run, of `runs` in all, `actors` at a time."""
    processes = sum(each) / actors * runs / len(each)
    ways = {
        "actors, scoring alone": ours.scored,
        "actors, opening them as well": ours.opened + ours.scored,
        "actors, Ray's start as well": ray_start + ours.opened + ours.scored,
        "lm_eval's command line": processes,
    }
    rows = [(name, f"{s:.2f}", f"{s / runs:.2f}", f"{processes / s:.2f}") for name, s in ways.items()]
    extrapolated = f"EXTRAPOLATED from {len(each)} of {runs} runs of lm_eval, evenly spread"
    printed, exactly, number = agreed
    return "\n".join(
        [
            table((f"{runs} runs of the suite", "seconds", "per run", "times faster"), rows),
            f"lm_eval: {'all runs were made' if len(each) == runs else extrapolated}; "
            f"{min(each):.1f} to {max(each):.1f} s each, {actors} at a time",
            f"equal scores: {printed} of {number} in all {PRINTED_DIGITS} digits printed, {exactly} as numbers",
            f"calls of layers that attacks shared: {ours.calls_saved}",
            f"same scores: {'yes' if printed == number else 'NO'}",
            verdict("lm_eval / (opening + scoring)", processes / (ours.opened + ours.scored), TARGET, at_least=True),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--benchmark", action="append", help="DATA or TASK=DATA; may be given several times")
    parser.add_argument("--attacks", nargs="*", default=list(ATTACKS))
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--processes", type=int, help="how many of lm_eval's runs to make; all by default")
    given = parser.parse_args()
    suite = tuple(Benchmark.parse(text) for text in given.benchmark or SUITE)
    setting = Setting(given.model, suite, tuple(given.attacks), given.limit, given.batch_size, given.actors)
    import ray

    from tune.config.run_spec import RaySpec
    from tune.distributed.cluster.ray_cluster import connect
    from tune.training.quiet import quiet_libraries

    quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="macdrop-evaluators-") as temporary:
        root = Path(temporary)
        os.environ["MACDROP_CACHE"] = str(root / "cache")
        print(machine(), flush=True)
        adapters = make_adapters(setting.model, given.adapters, root)
        bases = make_bases(setting, root)
        runs = [(adapter, attack) for adapter in adapters for attack in (PLAIN, *setting.attacks)]
        made = spread(runs, given.processes)
        # Half of the processes before the actors and half behind them: a drift of the machine's load hits both.
        half = len(made) // 2
        theirs = by_processes(setting, made[:half], bases, root / "before")
        began = time.perf_counter()
        connect(RaySpec(dashboard=False))
        ray_start = time.perf_counter() - began
        try:
            ours = by_actors(setting, adapters, root)
        finally:
            ray.shutdown()
        theirs |= by_processes(setting, made[half:], bases, root / "behind")
        for adapter, attack in made:
            scores = theirs[adapter, attack][1]
            mine = ours.scores[adapter, attack]
            pairs = " ".join(f"{'/'.join(key)} {mine[key]:.4f}|{value:.4f}" for key, value in scores.items())
            print(f"{Path(adapter).name} {attack}, actors|lm_eval: {pairs}")
        agreed = agreement(ours.scores, {run: scores for run, (_, scores) in theirs.items()})
        each = [seconds for seconds, _ in theirs.values()]
        print(f"\n{report(each, len(runs), setting.actors, ray_start, ours, agreed)}\n\n{machine()}")


if __name__ == "__main__":
    main()

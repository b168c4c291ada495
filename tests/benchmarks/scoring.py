"""Scoring adapters with resident evaluation actors over a fresh `lm_eval` process for each.

    python tests/benchmarks/scoring.py [--adapters 4] [--limit 60] [--actors 1]
    python tests/benchmarks/scoring.py --model PATH --task arc_easy --data FILE.jsonl --limit 100

The adapters are LoRA, r = 8, on all linear layers, with random lora_B. Both ways score the same rows, limit, batch size
and few-shot setting on the CPU with one thread a process, as many processes at a time as there are actors, without
internet, and must give the same accuracies: on `zoo:qa` by default, as a task of our own, or with --task and --data on
an lm-eval task with local rows. The command is what a user would type:

    lm_eval run --model hf --model_args pretrained=...,peft=... --include_path FOLDER --tasks NAME ...

Printed with and without what is paid once: the start of Ray, and opening the model and the tasks in the actors. The
target is held against the time with opening and without Ray, as a sweep has a running Ray anyhow.
"""

from __future__ import annotations

import argparse
import json
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

TARGET = 4.0
MODEL, DATA = "zoo:planted-llama", "zoo:qa"
POLL_S = 0.02
METRICS = ("acc", "acc_norm")
Scores = list[dict[str, float]]


@dataclass(frozen=True)
class Setting:
    """What is scored: `task` is an lm-eval task, None for rows of our own format; `limit` None for all rows."""

    model: str
    task: str | None
    data: str
    limit: int | None
    batch_size: int
    actors: int

    @property
    def name(self) -> str:
        """The task's name in lm-eval: `macdrop_local` is no name of its own."""
        return f"macdrop_local_{self.task or 'choices'}"


def make_adapters(model: str, number: int, folder: Path) -> list[str]:
    """Write `number` adapters whose lora_B is random, so that each moves the scores."""
    import torch
    from peft import LoraConfig, get_peft_model

    from macdrop import load_model
    from tune.zoo import resolve

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


# ------------------------------------------------------------------------------------------- fresh lm_eval processes


def write_task(setting: Setting, folder: Path) -> None:
    """Write the task file for lm-eval's --include_path: local rows as the test split, all else as the task has it."""
    import yaml

    from tune.benchmarks.catalogue import find_task
    from tune.benchmarks.files import locate

    rows = str(locate(setting.data).resolve())
    kind = {".parquet": "parquet", ".csv": "csv"}.get(Path(rows).suffix, "json")
    config: dict[str, Any] = {
        "task": setting.name,
        "dataset_path": kind,
        "dataset_kwargs": {"data_files": {"test": rows}},
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        "num_fewshot": 0,
    }
    if setting.task:
        config |= {"include": str(find_task(setting.task)), "dataset_name": None, "tag": None}
    else:
        metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in METRICS]
        config |= {
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "label",
            "target_delimiter": " ",
            "metric_list": metrics,
        }
    folder.mkdir(parents=True)
    (folder / f"{setting.name}.yaml").write_text(yaml.safe_dump(config))


def command(setting: Setting, adapter: str, tasks: Path, output: Path) -> list[str]:
    from tune.zoo import resolve

    model = f"pretrained={resolve(setting.model)},peft={adapter},dtype=float32"
    line = [str(Path(sys.executable).with_name("lm_eval")), "run", "--model", "hf", "--model_args", model]
    line += ["--include_path", str(tasks), "--tasks", setting.name, "--num_fewshot", "0", "--device", "cpu"]
    line += ["--batch_size", str(setting.batch_size), "--output_path", str(output)]
    return line + (["--limit", str(setting.limit)] if setting.limit else [])


def by_processes(setting: Setting, adapters: list[str], root: Path) -> tuple[list[float], float, Scores]:
    """One `lm_eval` process an adapter; returns the seconds of each, in all, and the scores."""
    write_task(setting, root / "tasks")
    environment = os.environ | {"HF_DATASETS_CACHE": str(root / "datasets"), "CUDA_VISIBLE_DEVICES": ""}

    def score(adapter: str) -> tuple[float, dict[str, float]]:
        output = root / "results" / Path(adapter).name
        began = time.perf_counter()
        done = subprocess.run(
            command(setting, adapter, root / "tasks", output), env=environment, capture_output=True, text=True
        )
        seconds = time.perf_counter() - began
        if done.returncode:
            raise RuntimeError(f"lm_eval failed:\n{done.stderr[-3000:]}")
        print(f"  lm_eval, {Path(adapter).name}: {seconds:.1f} s", flush=True)
        (file,) = output.rglob("results_*.json")
        found = json.loads(file.read_text())["results"][setting.name]
        return seconds, {name: found[f"{name},none"] for name in METRICS}

    began = time.perf_counter()
    with ThreadPoolExecutor(setting.actors) as at_a_time:
        scored = list(at_a_time.map(score, adapters))
    return [seconds for seconds, _ in scored], time.perf_counter() - began, [scores for _, scores in scored]


# ------------------------------------------------------------------------------------------ resident evaluation actors


def opening(setting: Setting, root: Path) -> Any:
    """What the actors make resident; no massive weights are looked for, as nothing is attacked."""
    from tune.benchmarks import EvalSpec
    from tune.evaluators import Opening
    from tune.spec import TrainSpec

    entry = {"data": setting.data} | ({"task": setting.task} if setting.task else {"target_delimiter": " "})
    block = {"batch_size": setting.batch_size, "limit": setting.limit, "zero_shot": {"scored": entry}}
    return Opening(
        spec=TrainSpec(model_name_or_path=setting.model),
        eval=EvalSpec.parse(block),
        weights=str(root / "massive_weights.json"),
        scan=False,
        k=0,
        threads=1,
    )


def by_actors(setting: Setting, adapters: list[str], root: Path) -> tuple[float, float, Scores]:
    """A pool under a running Ray; returns the seconds of opening it and of scoring all adapters, and the scores."""
    from tune.benchmarks import jobs
    from tune.evaluators import Item, Pool

    opened = opening(setting, root)
    (job,) = jobs(opened.eval)
    began = time.perf_counter()
    pool = Pool(setting.actors, cpus=1, gpus=0)
    try:
        pool.open(opened)
        ready = time.perf_counter()
        for adapter in adapters:
            pool.submit(Item({"adapter": adapter}, job, adapter, str(root / "answers.jsonl")))
        found: dict[str, dict[str, float]] = {}
        while pool.busy:
            for result in pool.step():
                if result.error:
                    raise RuntimeError(result.error)
                found[result.item.adapter] = {row["metric"]: row["value"] for row in result.rows}
            time.sleep(POLL_S)
        return ready - began, time.perf_counter() - ready, [found[adapter] for adapter in adapters]
    finally:
        pool.close()


# -------------------------------------------------------------------------------------------------------------- report


def same(mine: Scores, theirs: Scores) -> bool:
    """Whether all adapters have the same scores, to what summing in another order can change."""
    pairs = zip(mine, theirs, strict=True)
    return all(abs(a[name] - b[name]) < 1e-9 for a, b in pairs for name in METRICS)


def report(each: list[float], fresh: float, ray_start: float, opened: float, scored: float, equal: bool) -> str:
    number = len(each)
    ways = {
        "actors, scoring alone": scored,
        "actors, opening them as well": opened + scored,
        "actors, Ray's start as well": ray_start + opened + scored,
        "fresh lm_eval processes": fresh,
    }
    rows = [(name, f"{s:.2f}", f"{s / number:.2f}", f"{fresh / s:.2f}") for name, s in ways.items()]
    return "\n".join(
        [
            table((f"{number} adapters", "seconds", "per adapter", "times faster"), rows),
            f"seconds of each lm_eval process: {', '.join(f'{seconds:.1f}' for seconds in each)}",
            f"same scores: {'yes' if equal else 'NO'}",
            verdict("processes / (opening + scoring)", fresh / (opened + scored), TARGET, at_least=True),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--task", help="an lm-eval task; without it --data is in our own multiple-choice format")
    parser.add_argument("--data", default=DATA)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--actors", type=int, default=1)
    given = parser.parse_args()
    setting = Setting(given.model, given.task, given.data, given.limit, given.batch_size, given.actors)
    import ray

    from tune.cluster_state import connect
    from tune.spec import RaySpec
    from tune.terminal import quiet_libraries

    quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="macdrop-scoring-") as temporary:
        root = Path(temporary)
        os.environ["MACDROP_CACHE"] = str(root / "cache")
        print(machine(), flush=True)
        adapters = make_adapters(setting.model, given.adapters, root)
        # Half of the processes before the actors and half behind them: a drift of the machine's load hits both.
        half = len(adapters) // 2
        before = by_processes(setting, adapters[:half], root / "before")
        began = time.perf_counter()
        connect(RaySpec())
        ray_start = time.perf_counter() - began
        try:
            opened, scored, ours = by_actors(setting, adapters, root)
        finally:
            ray.shutdown()
        behind = by_processes(setting, adapters[half:], root / "behind")
        each, fresh, theirs = (mine + others for mine, others in zip(before, behind, strict=True))
        for name in METRICS:
            print(f"{name}: actors {_show(ours, name)}   processes {_show(theirs, name)}")
        print(f"\n{report(each, fresh, ray_start, opened, scored, same(ours, theirs))}\n\n{machine()}")


def _show(scores: Scores, name: str) -> str:
    return " ".join(f"{score[name]:.4f}" for score in scores)


if __name__ == "__main__":
    main()

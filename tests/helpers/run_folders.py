"""Synthetic run folders, complete and written through the real RunFolder: for tests of whatever reads a run.

    python tests/helpers/run_folders.py OUT [--judge] [--cells] [--models NAME ...]

Accuracies come from a Gaussian copula: an item is answered right when a standard normal, correlated between trials,
lies below the quantile of the trial's accuracy. So means are what was asked for, and adapters agree on items as real
ones do. Everything repeats for the same arguments.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import norm

from tune.config.run_spec import TrainSpec, dump, slug
from tune.config.sections import ARMS, MacDropSpec
from tune.storage.atomic import atomic_write_json, atomic_write_yaml
from tune.storage.environment import record_environment
from tune.storage.run_folder import BASE, RunFolder
from tune.storage.states import RunStatus, TaskState

OFF = {"k": 0, "p0": 0.0, "schedule": "step", "alpha": None}
SEARCHED = [
    {"k": 3, "p0": 0.8683, "schedule": "exp", "alpha": 0.05},
    {"k": 5, "p0": 0.7617, "schedule": "step", "alpha": None},
    {"k": 5, "p0": 0.6301, "schedule": "step", "alpha": None},
    {"k": 3, "p0": 0.4121, "schedule": "constant", "alpha": None},
    {"k": 3, "p0": 0.95, "schedule": "exp", "alpha": 0.01},
    {"k": 5, "p0": 0.55, "schedule": "exp", "alpha": 0.05},
]
"""Settings of the search, best first."""
EFFECT = {("macdrop", "zeroing@3"): 0.34, ("macdrop", "zeroing@5"): 0.34, ("macdrop", "zeroing@10"): 0.3}
"""(arm, attack) -> accuracy more than plain has; nothing where it is not named."""
LEFT = {"none": 1.0, "zeroing@1": 0.97, "zeroing@3": 0.55, "zeroing@5": 0.5, "zeroing@10": 0.45, "retaining@3": 0.9}
"""What an attack leaves of the plain adapter's accuracy."""
TASKS = {"qa": 0.85, "arith": 0.8}
CATEGORIES = ("writing", "math")
JUDGE = {"kind": "local", "model": "tiny-judge", "revision": "0000000", "date": "2026-01-01", "rubric": "helpful@1"}
STEPS = 100


@dataclass
class _Maker:
    """The numbers of one run; see `make_run` for what they mean."""

    run_folder: RunFolder
    attacks: Sequence[str]
    effect: Mapping[tuple[str, str], float]
    items: int
    seed_sd: float
    correlation: float
    judge: bool
    rows: list[dict[str, Any]] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=lambda: {BASE: BASE})
    """What the draws of a trial depend on: not its id, which changes with every new key of a run file."""

    def rate(self, task: str, arm: str, attack: str, shift: float) -> float:
        plain = 0.3 if arm == BASE else TASKS.get(task, 0.7)
        rate = plain * LEFT.get(attack, 0.8) + self.effect.get((arm, attack), 0.0) + shift
        return min(max(rate, 0.0), 1.0)

    def hits(self, model: str, trial: str, task: str, attack: str, rate: float) -> np.ndarray:
        shared = generator(model, task, attack).standard_normal(self.items)
        own = generator(model, self.names[trial], task, attack).standard_normal(self.items)
        z = math.sqrt(self.correlation) * shared + math.sqrt(1 - self.correlation) * own
        return (norm.cdf(z) < rate).astype(float)

    def score(self, model: str, trial: str, arm: str, seed: int | None, split: str) -> None:
        """Rows of scores.jsonl and answers files of all benchmarks of one trial, or of the base."""
        tag = {"model": model, "arm": arm, "trial": trial, "seed": seed, "split": split}
        folder = self.run_folder.answers_dir(model, trial)
        folder.mkdir(parents=True, exist_ok=True)
        luck = generator(model, self.names[trial], "seed").standard_normal() * self.seed_sd
        for attack in self.attacks if split == "test" else self.attacks[:1]:
            under = {"attack": attack, "attack_on": None if attack == "none" else "base"}
            self._zero_shot(tag | under, folder, luck)
            self._perplexity(tag | under, folder, luck)
            if split == "test":
                self._references(tag | under, folder, luck)
                self._questions(tag | under, folder, luck)

    def _zero_shot(self, tag: dict[str, Any], folder: Path, luck: float) -> None:
        for task in TASKS:
            rate = self.rate(task, tag["arm"], tag["attack"], luck)
            hits = self.hits(tag["model"], tag["trial"], task, tag["attack"], rate)
            items = [
                {"task": task, "doc_id": i, "doc_hash": digest(task, i) * 8, "filter": "none",
                 "metrics": {"acc": hit, "acc_norm": hit},
                 "answers": [[-0.1, True], [-2.0 - hit, False]]}
                for i, hit in enumerate(hits)
            ]  # fmt: skip
            self._write(tag, folder, "zero_shot", task, items)
            for metric in ("acc", "acc_norm"):
                extra = {"version": "1", "num_fewshot": 0, "settings": "lm_eval=0.4.13 data=local"}
                self._row(tag, "zero_shot", task, metric, hits, True, **extra)

    def _perplexity(self, tag: dict[str, Any], folder: Path, luck: float) -> None:
        shared = generator(tag["model"], "text").standard_normal(self.items)
        own = generator(tag["model"], self.names[tag["trial"]], "text", tag["attack"]).standard_normal(self.items)
        mean = 2.6 - 2 * (self.rate("text", tag["arm"], tag["attack"], luck) - 0.7)
        tokens = np.full(self.items, 63)
        nll = tokens * (mean + 0.3 * shared + 0.05 * own)
        measured = enumerate(zip(tokens.tolist(), nll.tolist(), strict=True))
        items = [{"window": i, "tokens": n, "nll": x} for i, (n, x) in measured]
        self._write(tag, folder, "perplexity", "text", items)
        value, total = math.exp(nll.sum() / tokens.sum()), int(tokens.sum())
        stderr = value * math.sqrt(self.items * np.var(nll - tokens * math.log(value), ddof=1)) / total
        row = {"value": value, "stderr": stderr, "n": total, "higher_is_better": False, "version": "1"}
        settings = f"window=64 stride=none bos=1 windows={self.items}"
        self._add(tag, "perplexity", "text", "perplexity", **row, settings=settings)

    def _references(self, tag: dict[str, Any], folder: Path, luck: float) -> None:
        rate = self.rate("answers", tag["arm"], tag["attack"], luck)
        hits = self.hits(tag["model"], tag["trial"], "answers", tag["attack"], rate)
        items = [
            {"question_id": i, "category": "", "turns": [f"question : where does person {i} live ? answer :"],
             "reference": "oslo .", "answers": ["oslo " if hit else "rome "], "tokens": [2], "ended": ["stop"],
             "metrics": {"exact_match": [hit]}}
            for i, hit in enumerate(hits)
        ]  # fmt: skip
        self._write(tag, folder, "generation", "answers", items)
        settings = "format=reference template=plain greedy max_new_tokens=4 prompts_cut_left=0"
        self._row(tag, "generation", "answers", "exact_match", hits, True, version="1", settings=settings)

    def _questions(self, tag: dict[str, Any], folder: Path, luck: float) -> None:
        """Spec-Bench: two categories of three questions, those of the first with two turns, judged where asked."""
        items, judged = [], []
        quality = 5 * self.rate("spec_bench", tag["arm"], tag["attack"], luck)
        draws = generator(tag["model"], self.names[tag["trial"]], "spec_bench", tag["attack"])
        for i in range(6):
            category = CATEGORIES[i // 3]
            turns = [f"Write a line about number {i}.", "Now shorter."][: 2 - i // 3]
            answers = [f"Line {i} of {tag['trial']} under {tag['attack']}, turn {t}." for t in range(len(turns))]
            lengths = [int(n) for n in draws.integers(8, 24, len(turns))]
            metrics = {"new_tokens": [float(n) for n in lengths], "empty_share": [0.0] * len(turns)}
            metrics |= {"eos_share": [1.0] * len(turns), "repeated_4grams": [float(draws.random() / 9) for _ in turns]}
            items.append({"question_id": 80 + i, "category": category, "turns": turns, "answers": answers,
                          "tokens": lengths, "ended": ["eos"] * len(turns), "metrics": metrics})  # fmt: skip
            for turn in range(len(turns)):
                score = int(np.clip(round(quality + draws.normal(0, 0.7)), 1, 5)) if draws.random() > 0.05 else None
                feedback = [f"Clear enough. [RESULT] {score}"] if score else ["I cannot say.", "No."]
                judged.append({"item": f"{80 + i}/{turn + 1}", "category": category, "turns": len(turns),
                               "score": score, "feedback": feedback, "attempts": len(feedback), "error": None,
                               "judge": JUDGE})  # fmt: skip
        self._write(tag, folder, "generation", "spec_bench", items)
        settings = "format=spec_bench template=alpaca greedy max_new_tokens=32 prompts_cut_left=0"
        for name in ("spec_bench", *(f"spec_bench/{category}" for category in CATEGORIES)):
            mine = [item for item in items if name == "spec_bench" or name.endswith(item["category"])]
            for metric in ("new_tokens", "empty_share", "eos_share", "repeated_4grams"):
                better = None if metric in ("new_tokens", "eos_share") else False
                values = np.array([v for item in mine for v in item["metrics"][metric]])
                self._row(tag, "generation", name, metric, values, better, version="1", settings=settings)
        if self.judge and tag["attack"] == "none":
            self._judged(tag, folder.parent / "judgements", judged)

    def _judged(self, tag: dict[str, Any], folder: Path, judged: list[dict[str, Any]]) -> None:
        folder.mkdir(exist_ok=True)
        file = folder / f"spec_bench--{slug(JUDGE['model'])}.jsonl"
        file.write_text(lines(judged), encoding="utf-8")
        kept = {"version": "1", "judgements": str(file.relative_to(self.run_folder.run_dir))}
        kept["settings"] = f"judge={JUDGE['model']}@{JUDGE['revision']} date={JUDGE['date']} rubric={JUDGE['rubric']}"
        for name in ("spec_bench", *(f"spec_bench/{category}" for category in CATEGORIES)):
            mine = [row for row in judged if name == "spec_bench" or name.endswith(row["category"])]
            scores = np.array([row["score"] for row in mine if row["score"] is not None], dtype=float)
            lost = np.array([float(row["score"] is None) for row in mine])
            self._row(tag, "generation", name, "judge_score", scores, True, **kept)
            self._row(tag, "generation", name, "judge_unparsed", lost, False, **kept)

    def _write(self, tag: dict[str, Any], folder: Path, benchmark: str, entry: str, items: list[dict]) -> None:
        parts = ["validation" if tag["split"] == "validation" else None, benchmark, entry, tag["attack"]]
        name = "-".join(part for part in (*parts, tag["attack_on"]) if part)
        under = {"attack": tag["attack"], "attack_on": tag["attack_on"]}
        (folder / f"{name}.jsonl").write_text(lines(item | under for item in items), encoding="utf-8")

    def _row(
        self, tag: dict[str, Any], benchmark: str, task: str, metric: str, values: np.ndarray, better: bool | None,
        **extra: Any,
    ) -> None:  # fmt: skip
        n = len(values)
        stderr = float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else None
        row = {"value": float(values.mean()) if n else None, "stderr": stderr, "n": n, "higher_is_better": better}
        self._add(tag, benchmark, task, metric, **row, **extra)

    def _add(self, tag: dict[str, Any], benchmark: str, task: str, metric: str, **row: Any) -> None:
        shared = {"batch_size": 64, "limit": None, "num_fewshot": None, "max_length": 128}
        shared |= {"entry": task.partition("/")[0], "seconds": 0.25}
        self.rows.append({**tag, "benchmark": benchmark, "task": task, "metric": metric, **shared, **row})


def make_run(
    folder: str | Path,
    *,
    model: str | Sequence[str] = "zoo:planted-llama",
    seeds: Sequence[int] = (1, 2, 3),
    arms: Sequence[str] = ("plain", "macdrop", "random_rows"),
    effect: Mapping[tuple[str, str], float] = EFFECT,
    tried: int = 4,
    items: int = 60,
    judge: bool = False,
    attacks: Sequence[str] = ("none", "zeroing@1", "zeroing@3", "zeroing@5", "zeroing@10", "retaining@3"),
    cells: Sequence[Mapping[str, Any]] | None = None,
    seed_sd: float = 0.003,
    correlation: float = 0.97,
    lost: Iterable[tuple[str, int]] = (),
    status: str = "done",
) -> RunFolder:
    """Write a run folder of one or several models and return it.

    Args:
        seeds: of the final stage; none: it has not begun; (0,): the search's own trials are compared (sweep.seeds: 0).
        arms: arms of the final stage, besides the base, which is always scored.
        effect: (arm, attack) -> true accuracy more than plain has; perplexity falls by the factor exp(-2 effect).
        tried: MacDrop settings of the search, at most `len(SEARCHED)`; the last of five or more has diverged.
        items: of each zero-shot task, windows of text, and prompts with references.
        cells: values of the searched adapter kind, such as [{"use_dora": False}, {"use_dora": True}].
        seed_sd: standard deviation of a trial's true accuracy around its arm's.
        lost: (arm, seed) of final trials that are still running.
    """
    models, cells = [model] if isinstance(model, str) else list(model), list(cells or [{}])
    fresh = len([seed for seed in seeds if seed])
    run_folder = RunFolder.create(folder, _config(models, cells, arms, attacks, fresh), command="macdrop sweep demo")
    record_environment(run_folder.run_dir, resumed=False)
    maker = _Maker(run_folder, attacks, effect, items, seed_sd, correlation, judge)
    for name in models:
        _findings(run_folder, name)
        maker.score(name, BASE, BASE, None, "test")
        found = [_cell(maker, name, cell, seeds, arms, tried, set(lost)) for cell in cells]
        best = [made["searched"][0] for made in found]
        record = {
            "tried": tried * len(cells),
            "statuses": {"done": tried * len(cells)} if tried < 5 else
            {"done": (tried - 1) * len(cells), "diverged": len(cells)},
            "objectives": [{"name": "eval_loss", "goal": "minimize"}],
            "seeds": list(seeds), "pareto": best, "cells": [made["row"] for made in found],
            "settings": {setting: spec for made in found for setting, spec in made["settings"].items()},
        }  # fmt: skip
        atomic_write_json(run_folder.finalists_file(name), record)
    for row in maker.rows:  # rows of one call stand or fall together
        run_folder.add_scores([row])
    run_folder.set_status(RunStatus(status))
    return run_folder


def make_resumable_run(folder: Path) -> Path:
    """A finished run of one model that `storage.repair` finds whole: full run file, adapters, checkpoints and draws."""
    from tune.config.run_spec import load
    from tune.storage import search_state
    from tune.storage.sealed_folder import commit, folder_name

    arms = ("plain", "macdrop")
    run_folder = make_run(folder, seeds=(1,), items=4, attacks=("none",), tried=1, arms=arms)
    spec = dump(load(None, ["model=zoo:planted-llama", "eval_steps=50", "macdrop.p0=0.6", "eval.zero_shot=[arc_easy]"]))
    atomic_write_yaml(folder / "config.yaml", spec)
    atomic_write_json(folder / "run.json", {**run_folder.run(), "spec": spec})
    for record in run_folder.trials():
        trial = folder / "trials" / record.trial
        if record.status == TaskState.DONE:
            for place in ("adapter", f"checkpoints/{folder_name(3)}"):
                staging = trial / "staging"
                staging.mkdir(parents=True)
                (staging / "adapter_model.safetensors").write_bytes(bytes(range(200)))
                (staging / "adapter_config.json").write_text("{}")
                (trial / place).parent.mkdir(exist_ok=True)
                commit(staging, trial / place)
    for number in range(3):
        search_state.remember(run_folder.draws_file("zoo:planted-llama"), number, {"macdrop.p0": number / 10})
    search_state.SearchTime(run_folder.search_time_file("zoo:planted-llama"), run_folder.run_dir).keep()
    return folder


def _cell(
    maker: _Maker, model: str, cell: Mapping[str, Any], seeds: Sequence[int], arms: Sequence[str], tried: int,
    lost: set[tuple[str, int]],
) -> dict[str, Any]:  # fmt: skip
    searched = []
    for number, block in enumerate([OFF, *SEARCHED[:tried]]):
        arm = "macdrop" if number else "plain"
        loss = 0.8 + 0.01 * number if number else 0.83
        ended = "diverged" if number >= 5 and number == tried else "done"
        trial = _trial(maker, _spec(model, cell, arm, block, 0), cell, "search", loss, ended)
        searched += [trial] if number else []
        if ended == "done":
            maker.score(model, trial, arm, 0, "validation")
    specs = {arm: _spec(model, cell, arm, OFF if arm == "plain" else SEARCHED[0], 0) for arm in arms}
    for arm, spec in specs.items():
        for seed in seeds:
            ended = None if (arm, seed) in lost else "done"
            trial = _trial(maker, spec.model_copy(update={"seed": seed}), cell, "final", 0.81, ended)
            if ended:
                maker.score(model, trial, arm, seed, "test")
    ids = {arm: spec.setting_id() for arm, spec in specs.items()}
    row = {"cell": dict(cell), "plain": ids.get("plain"), "macdrop": [ids["macdrop"]] if "macdrop" in ids else []}
    row["placebos"] = {arm: setting for arm, setting in ids.items() if arm not in ("plain", "macdrop")}
    return {"searched": searched, "row": row, "settings": {ids[arm]: dump(spec) for arm, spec in specs.items()}}


def _trial(maker: _Maker, spec: TrainSpec, cell: Mapping[str, Any], stage: str, loss: float, ended: str | None) -> str:
    record, block = maker.run_folder.trial(spec.trial_id()), spec.macdrop
    about = {"model": spec.model_name_or_path, "arm": spec.arm, "seed": spec.seed, "setting": spec.setting_id()}
    record.start(dump(spec), **about, stage=stage, cell=cell)
    name = maker.names[record.id] = f"{spec.arm} {stage} {spec.seed} {sorted(cell.items())} {block.k} {block.p0}"
    loss += 0.002 * generator(name, "loss").standard_normal()
    record.log(_curve(block, loss, generator(name, "curve")))
    record.adapter_dir.mkdir(exist_ok=True)
    dropped = sum(row.get("entries_dropped", 0) for row in record.metrics()) * 5
    summary = {"step": STEPS, "total_steps": STEPS, "train_loss": loss - 0.1, "eval_loss": loss, "seconds": 9.5}
    summary |= {"entries_dropped": dropped, "entries_masked": 63360 if block.p0 else 0, "resumed_from": 0}
    if ended == "diverged":
        record.finish(TaskState(ended), "Step 31 of 100: loss nan, gradient norm nan; training has diverged.")
    elif ended:
        record.finish(TaskState(ended), None, **summary, rows_hooked=2 * block.k)
    return record.id


def _curve(block: MacDropSpec, loss: float, draws: np.random.Generator) -> list[dict[str, Any]]:
    config = block.config(seed=0)
    rows: list[dict[str, Any]] = [{"step": 0, "eval_loss": 5.9}]
    for step in range(5, STEPS + 1, 5):
        p = config.probability(step, STEPS, 1, 1) if config.enabled else 0.0
        now = loss + 5 * math.exp(-step / 15) + 0.02 * float(draws.standard_normal())
        rows.append({
            "step": step, "epoch": 1, "loss": now, "learning_rate": 2e-3 * (1 - step / STEPS), "grad_norm": 1.5, "p": p,
            "entries_dropped": int(640 * p), "tokens_per_second": 3500 + 100 * float(draws.standard_normal()),
        })  # fmt: skip
        if step % 50 == 0:
            rows[-1]["eval_loss"] = loss + 5 * math.exp(-step / 15) * (step < STEPS)
    return rows


def _spec(model: str, cell: Mapping[str, Any], arm: str, block: Mapping[str, Any], seed: int) -> TrainSpec:
    return TrainSpec(
        model_name_or_path=model, cutoff_len=64, val_size=0.1, lora_rank=8, learning_rate=2e-3, max_steps=STEPS,
        eval_steps=50, logging_steps=5, seed=seed, macdrop=MacDropSpec(**block, scope=ARMS.get(arm, "massive")), **cell,
    ).canonical()  # fmt: skip


def _config(
    models: list[str], cells: Sequence[Mapping[str, Any]], arms: Sequence[str], attacks: Sequence[str], seeds: int
) -> dict[str, Any]:
    spec = {key: value for key, value in dump(_spec("", {}, "plain", OFF, 0)).items() if key != "model_name_or_path"}
    parameters: dict[str, Any] = {"macdrop.k": {"values": [3, 5]}, "macdrop.p0": {"min": 0.4, "max": 1.0}}
    parameters |= {"macdrop.schedule": {"values": ["step", "constant", "exp"]}}
    parameters |= {key: {"values": [cell[key] for cell in cells]} for key in (cells[0] if cells else ())}
    zero_shot = {task: {"data": f"zoo:{task}"} for task in TASKS}
    text = {"text": {"data": "zoo:text", "window": 64, "limit": 64}}
    answers = {"data": "zoo:generate-qa", "metrics": ["exact_match"], "stop": ["."], "max_new_tokens": 4}
    sweep = {
        "models": [{"model_name_or_path": name} for name in models], "arms": [BASE, *arms], "parameters": parameters,
        "metric": {"name": "eval_loss", "goal": "minimize"}, "search_alg": "optuna", "search_seed": 0, "num_samples": 4,
        "finalists": 1, "seeds": seeds,
    }  # fmt: skip
    generation = {"answers": answers, "spec_bench": {"data": "spec_bench.jsonl", "max_new_tokens": 32}}
    test = {"batch_size": 64, "attacks": list(attacks), "zero_shot": zero_shot, "perplexity": text}
    validation = {"batch_size": 64, "attacks": ["none"], "zero_shot": zero_shot, "perplexity": text}
    return {**spec, "sweep": sweep, "validation": validation, "eval": {**test, "generation": generation}}


def _findings(run_folder: RunFolder, model: str) -> None:
    """massive_weights.json and proof.json, with the numbers of zoo:planted-llama."""
    rows = [98, 107, 10, 66, 130, *(i for i in range(192) if i not in (98, 107, 10, 66, 130))]
    magnitudes = [644.8, 195.0, 58.97, 17.8, 5.4, *(0.3 * 0.98**i for i in range(187))]
    states = [(0, 2.121, 0.081, 0.3187, 0.029), (1, 184.3, 0.2166, 644.8, 0.0278), (2, 184.3, 1.664, 5.253, 0.2837)]
    keys = ("layer", "hidden_max", "hidden_median", "intermediate_max", "intermediate_median")
    layers = [dict(zip(keys, state, strict=True)) for state in [*states, (3, 184.3, 6.976, 14.43, 0.7426)]]
    confidence = {"level": "strong", "top_over_median": 23188.0, "spike": 184.3, "spike_over_median": 851.0,
                  "share": 1.0, "text": "strong: layer 1 writes 184.3 into the hidden state at bos"}  # fmt: skip
    weights = {
        "format": 1, "model": model, "fingerprint": "6828cc7da907" + "0" * 52, "layer": 1, "path": "model.layers.1.mlp",
        "kind": "gated", "expert": None, "indices": rows, "magnitudes": magnitudes, "intermediate_size": 192,
        "hidden_size": 64, "bos_token_id": 1, "bos_rule": "tokenizer", "layers": layers, "confidence": confidence,
    }  # fmt: skip
    proof = {
        "k": 3, "seed": 0, "blocks": 16, "tokens": 1024, "untouched": 3.728, "zeroed": 86.1, "retained": 4.615,
        "random": [3.728, 3.729, 3.729], "verdict": "sensitive", "text": "sensitive: perplexity 3.728 becomes 86.1",
    }  # fmt: skip
    atomic_write_json(run_folder.massive_weights_file(model), weights)
    atomic_write_json(run_folder.model_dir(model) / "proof.json", proof)


def generator(*key: object) -> np.random.Generator:
    """A generator of its own for each key; the same in every process."""
    return np.random.default_rng(int(digest(*key), 16))


def digest(*key: object) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:8]


def lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="the folder to write; it must not be there")
    parser.add_argument("--judge", action="store_true", help="with judgements")
    parser.add_argument("--cells", action="store_true", help="LoRA and DoRA")
    parser.add_argument("--models", nargs="+", default=["zoo:planted-llama"])
    given = parser.parse_args()
    both = [{"use_dora": False}, {"use_dora": True}] if given.cells else None
    print(make_run(given.out, model=given.models, judge=given.judge, cells=both).run_dir)


def contents(folder: Path) -> dict[str, bytes]:
    """The files below a folder, by their relative paths."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def repair_run(folder: Path) -> list[str]:
    """Repair a run folder as a resume does; return what was done."""
    from tune.storage.repair import repair_contents, repair_spec

    return repair_spec(folder) + repair_contents(folder)

"""One optimizer step of tiny models, by the product in a process group, and by the paper's listing example by example.

Gradients are read as AdamW's first moment with beta 1 = 0, which every ZeRO stage has; the adapter's B is not zero, so
that no gradient is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from helpers import reference, tiny
from macdrop.hooks import MacDrop, keep_mask
from tune.config.run_spec import TrainSpec
from tune.data.batching import Batches
from tune.data.dataset import Examples, Prepared
from tune.data.templates import IGNORE
from tune.training.checkpoint import AdapterState
from tune.training.engine import Engine
from tune.training.step import Training

SEED, P, SLICES, PER_SLICE = 3, 0.7, 4, 2
LENGTHS = (12, 5, 9, 3, 7, 14, 4, 6, 11, 8)
#: A budget of tokens that spreads the step's examples over several micro-batches, and that of one.
TIGHT, WIDE = 16, 200


@dataclass(frozen=True)
class Case:
    """Settings of one step; `budget` None is `packing: off`, and `apart` keeps slices in rows of their own."""

    family: str = "llama"
    stage: int = 0
    dora: bool = False
    checkpointing: bool = False
    bf16: bool = False
    budget: int | None = TIGHT
    masks: bool = True
    apart: bool = False
    scope: str = "massive"


def examples(lengths=LENGTHS, prompt: int = 2) -> Examples:
    """Random tokens after bos, the first `prompt` of each example without loss."""
    generator = np.random.default_rng(0)
    tokens = np.concatenate([[1, *generator.integers(3, tiny.VOCAB, length - 1)] for length in lengths])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    labels = tokens.copy()
    for start in offsets[:-1]:
        labels[start : start + prompt] = IGNORE
    return Examples(tokens.astype(np.int32), labels.astype(np.int32), offsets, np.arange(len(lengths)))


def write_model(family: str, folder: Path) -> None:
    """Write a tiny model, in the attention that transformers chooses for it, with its tokenizer."""
    tiny.build(family).save_pretrained(folder / family)
    tiny.tokenizer().save_pretrained(folder / family)


def spec(case: Case, models: Path, world: int, **others) -> TrainSpec:
    settings = {
        "model_name_or_path": str(models / case.family),
        "lora_rank": 4,
        "lora_alpha": 8,
        # PEFT puts no adapter on the experts of gpt_oss.
        "lora_target": ["q_proj", "v_proj"] if case.family == "gpt_oss" else "all",
        "use_dora": case.dora,
        "bf16": case.bf16,
        "gradient_checkpointing": case.checkpointing,
        "zero_stage": case.stage,
        "cutoff_len": 16,
        "packing": "off" if case.budget is None else "on",
        "max_tokens_per_micro_batch": case.budget,
        "per_device_train_batch_size": PER_SLICE,
        "gradient_accumulation_steps": SLICES // world,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "warmup_ratio": 0,
        "max_grad_norm": 0,
        "adam_beta1": 0,
        "seed": SEED,
        "macdrop": {"k": len(tiny.ROWS), "p0": P if case.masks else 0.0, "schedule": "constant", "scope": case.scope},
    }
    return TrainSpec(**{**settings, **others})


def start(engine: Engine) -> AdapterState:
    """A state whose factors are all random, by name."""
    state = engine.initial_state(SEED)
    for number, (name, tensor) in enumerate(sorted(state.weights.items())):
        if "magnitude" not in name:
            generator = torch.Generator().manual_seed(number)
            state.weights[name] = 0.2 * torch.randn(tensor.shape, generator=generator)
    return state


def by_product(case: Case, models: Path, world: int, steps: int = 1, data: Examples | None = None) -> dict:
    """Losses, gradients of the last step, and entries dropped, of this process's group."""
    wanted = spec(case, models, world)
    engine = Engine(wanted)
    data = data or examples()
    weights = tiny.massive_weights(case.family) if case.masks else None
    training = Training(engine, wanted, Prepared(data, examples((7,)), {}), weights)
    engine.load_state(start(engine))
    training.choose_layout()
    if training.drop:
        training.drop.attach()
    training.set_optimizer()
    with mock.patch.object(MacDrop, "one_mask_at_a_time", True) if case.apart else mock.MagicMock():
        done = [training.step(step).metrics for step in range(1, steps + 1)]
    eval_loss = training.validate()
    if training.drop:
        training.drop.detach()
    return {
        "losses": [metrics["loss"] for metrics in done],
        "norms": [metrics["grad_norm"] for metrics in done],
        "dropped": [metrics["entries_dropped"] for metrics in done],
        "eval_loss": eval_loss,
        "gradients": engine.read_state(0, {}).optimizer["exp_avg"],
    }


def by_listing(case: Case, engine: Engine, data: Examples | None = None) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss, gradients and entries dropped of step 1: one example at a time, its massive rows edited in place."""
    data = data or examples()
    model = engine.model
    state = start(engine)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state.weights[name])
            parameter.grad = None
    model.train()
    picked = Batches(len(data), seed=SEED, per_device=PER_SLICE, accumulation=SLICES, world=1).step(1)
    label_tokens = int(data.label_counts[picked].sum())
    total, dropped = 0.0, 0
    for number, slice_ in enumerate(picked):
        mask = keep_mask(SEED, number, P if case.masks else 0.0, (len(tiny.ROWS), tiny.HIDDEN))
        dropped += int((~mask).sum())
        for index in slice_:
            ids, labels = (torch.from_numpy(part)[None] for part in data[int(index)])
            share = int(data.label_counts[index]) / label_tokens
            batch = {"input_ids": ids, "labels": labels}
            expert = tiny.massive_weights(case.family).expert
            loss = reference.training_step(model, batch, case.family, tiny.ROWS, mask, expert=expert, divide=1 / share)
            total += loss * share
    matrices = 1 if case.family in ("opt", "gpt2") else 2
    return total, {name: p.grad.float() for name, p in parameters.items()}, matrices * dropped


def worst(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> float:
    """Largest difference of a gradient's entry, over the largest entry of its tensor."""
    assert expected.keys() == found.keys() and expected
    return max(float((expected[n] - found[n]).abs().max() / expected[n].abs().max()) for n in expected)

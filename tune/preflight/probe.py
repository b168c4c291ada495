"""Short probe of one model in this process: a few real steps, a few items of each benchmark, memory and sizes."""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from macdrop.weights import MassiveWeights
from tune.config.eval_spec import NO_ATTACK, EvalJob, EvalSpec, jobs
from tune.config.run_spec import RunSpec, TrainSpec
from tune.config.sections import Arm
from tune.data import dataset as data
from tune.data.dataset import Prepared
from tune.errors import ResourceError
from tune.evaluation.scorer import Scorer
from tune.preflight.adapter import model_outline
from tune.preflight.base_memory import base_bytes
from tune.preflight.forecast import Measured
from tune.scheduling.study import Study
from tune.storage.capacity import memory
from tune.storage.places import cache_dir
from tune.training.engine import Engine
from tune.training.finetune import Word, finetune
from tune.training.massive_weights import scanned
from tune.training.process_group import prepare_process

#: Timed steps, warm-up steps before them, and items per benchmark.
STEPS, WARM_STEPS = 8, 3
ITEMS = 16
#: Activations, adapter, optimizer and buffers take at least this share of the weights on top of them.
HEADROOM = 1.2


def device_name() -> str:
    """Return the accelerator's name, or `cpu`."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"


def check_memory(spec: TrainSpec) -> int:
    """Return the bytes of the model's weights, from its shapes alone.

    Raises:
        ResourceError: they do not fit in free memory; nothing was loaded.
    """
    size = base_bytes(model_outline(spec), spec)
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else memory()[0]
    if size * HEADROOM > free:
        raise ResourceError(
            f"{spec.model_name_or_path} has {size / 2**30:.1f} GiB of weights, with {HEADROOM - 1:.0%} on top "
            f"{size * HEADROOM / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free here.\n"
            "Plan on a machine like those that will train, or use bf16: true, or quantization_bit: 4."
        )
    return size


def probe(run: RunSpec, study: Study) -> Measured:
    """Measure one model with the study's own batch, adapter and benchmarks.

    Raises:
        ResourceError: its weights do not fit here; see `check_memory`.
        and whatever training or scoring raises.
    """
    spec = study.spec.canonical()
    check_memory(spec)
    prepare_process(run.ray.threads_per_worker)
    started = time.monotonic()
    attacked = any(job.attack != NO_ATTACK for block in (run.eval, run.validation) for job in jobs(block))
    weights = scanned(spec) if attacked or spec.arm != Arm.PLAIN else None
    engine = Engine(spec)
    load = time.monotonic() - started
    folder = data.prepare(spec, engine.tokenizer, cache_dir() / "data")
    times, validation = _train(engine, spec, data.load(folder), weights)
    tests, items = _score(engine, run.eval, weights)
    validations, more = _score(engine, run.validation, weights)
    quartiles = statistics.quantiles(times, n=4)
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    adapter = sum(p.numel() for p in engine.model.parameters() if p.requires_grad) * (2 if spec.bf16 else 4)
    cached = sum(file.stat().st_size for file in folder.iterdir())
    return Measured(
        load=load,
        step=quartiles[1],
        fast=quartiles[0],
        slow=quartiles[2],
        validation=validation,
        memory=peak,
        adapter=adapter,
        data=cached,
        tests=tests,
        validations=validations,
        answers=items + more,
    )


def _train(
    engine: Engine, spec: TrainSpec, prepared: Prepared, weights: MassiveWeights | None
) -> tuple[list[float], float]:
    """Return (seconds of each timed step, seconds of a validation)."""
    steps = WARM_STEPS + STEPS
    settings = {"max_steps": steps, "logging_steps": 1, "eval_steps": None, "save_steps": 0}
    moments: list[float] = []

    def watch(metrics: dict[str, Any]) -> Word:
        moments.append(time.monotonic())
        return Word.GO_ON

    with tempfile.TemporaryDirectory() as folder:
        short = spec.model_copy(update=settings)
        rows = weights if spec.arm != Arm.PLAIN else None
        finetune(engine, short, prepared, Path(folder), weights=rows, observe=watch, resume=False)
    gaps = [later - earlier for earlier, later in zip(moments, moments[1:], strict=False)]
    timed = gaps[WARM_STEPS - 1 : -1]  # the last step has the validation
    return timed, max(0.0, gaps[-1] - statistics.median(timed))


def _score(engine: Engine, block: EvalSpec, weights: MassiveWeights | None) -> tuple[float, int]:
    """Return (seconds of all jobs of a block on one adapter, their items), extrapolated from a few items per entry."""
    if not jobs(block):
        return 0.0, 0
    here = block.model_copy(update={"generation_server": None})  # its speed is not this machine's
    scorer = Scorer(engine.model, engine.tokenizer, here, weights)
    scorer.prepare()
    engine.model.eval()
    rate: dict[tuple[str, str], float] = {}
    seconds, items = 0.0, 0
    for job in scorer.jobs():
        key = (job.benchmark, job.task)
        whole = scorer.items(job)
        if key not in rate:
            rate[key] = _rate(scorer, job)
        seconds, items = seconds + whole * rate[key], items + whole
    return seconds, items


def _rate(scorer: Scorer, job: EvalJob) -> float:
    """Return the seconds per item of a job's entry."""
    for _ in range(2):  # the first warms up; with the same items, as lm-eval keeps its requests
        started = time.monotonic()
        scorer.score(job, limit=ITEMS)
        spent = time.monotonic() - started
    return spent / max(scorer.items(job, ITEMS), 1)

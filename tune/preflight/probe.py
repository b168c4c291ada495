"""A short probe of one model in this process: a few real steps, a few items of each benchmark, memory and sizes."""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune.config.eval_spec import PLAIN, EvalSpec, jobs
from tune.config.run_spec import RunSpec, TrainSpec
from tune.errors import ResourceError
from tune.scheduling.study import Study

#: Steps that are timed, after steps that warm up; items of a benchmark.
STEPS, WARM_STEPS = 8, 3
ITEMS = 16
#: Activations, adapter, optimizer and buffers take at least this share of the weights on top of them.
HEADROOM = 1.2


def device_name() -> str:
    """The accelerator's name, or `cpu`."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"


def check_memory(spec: TrainSpec) -> int:
    """Bytes of the model's weights, by its shapes alone.

    Raises:
        ResourceError: they do not fit into the free memory; nothing was loaded.
    """
    import torch

    from tune.preflight.inputs import model_outline
    from tune.storage.environment import memory

    size = sum(p.numel() for p in model_outline(spec).parameters()) * (2 if spec.bf16 else 4)
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else memory()[0]
    if size * HEADROOM > free:
        raise ResourceError(
            f"{spec.model_name_or_path} has {size / 2**30:.1f} GiB of weights, with {HEADROOM - 1:.0%} on top "
            f"{size * HEADROOM / 2**30:.1f} GiB; free here are {free / 2**30:.1f} GiB.\n"
            "Plan on a machine like those that will train, or use bf16: true."
        )
    return size


def probe(run: RunSpec, study: Study) -> Measured:
    """Measure one model with the study's own batch, adapter and benchmarks.

    Raises:
        ResourceError: its weights do not fit here; see `check_memory`.
        and whatever training or scoring raises.
    """
    import torch

    from tune.data import dataset as data
    from tune.storage.cache import cache_dir
    from tune.training.engine import Engine
    from tune.training.massive_weights import scanned
    from tune.training.process_group import prepare_process

    spec = study.spec.canonical()
    check_memory(spec)
    prepare_process(run.ray.threads_per_worker)
    started = time.monotonic()
    attacked = any(job.attack != PLAIN for block in (run.eval, run.validation) for job in jobs(block))
    weights = scanned(spec) if attacked or spec.arm != "plain" else None
    engine = Engine(spec)
    load = time.monotonic() - started
    folder = data.prepare(spec, engine.tokenizer, cache_dir() / "data")
    times, validation = _train(engine, spec, data.load(folder), weights)
    tests, items = _score(engine, run.eval, weights)
    validations, more = _score(engine, run.validation, weights)
    quartiles = statistics.quantiles(times, n=4)
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    adapter = sum(p.numel() for p in engine.model.parameters() if p.requires_grad) * (2 if spec.bf16 else 4)
    cached = sum(file.stat().st_size for file in folder.iterdir())
    return Measured(
        load, quartiles[1], quartiles[0], quartiles[2], validation, memory, adapter, cached, tests, validations,
        items + more,
    )  # fmt: skip


def _train(engine: Any, spec: TrainSpec, prepared: Any, weights: Any) -> tuple[list[float], float]:
    """(seconds of each timed step, seconds of a validation)."""
    from tune.training.finetune import Word, finetune

    steps = WARM_STEPS + STEPS
    settings = {"max_steps": steps, "logging_steps": 1, "eval_steps": None, "save_steps": 0}
    moments = []

    def watch(metrics: dict[str, Any]) -> Word:
        moments.append(time.monotonic())
        return "go_on"

    with tempfile.TemporaryDirectory() as folder:
        short = spec.model_copy(update=settings)
        finetune(engine, short, prepared, Path(folder), weights=weights if spec.arm != "plain" else None,
                 observe=watch, resume=False)  # fmt: skip
    gaps = [later - earlier for earlier, later in zip(moments, moments[1:], strict=False)]
    timed = gaps[WARM_STEPS - 1 : -1]  # the last step has the validation
    return timed, max(0.0, gaps[-1] - statistics.median(timed))


def _score(engine: Any, block: EvalSpec, weights: Any) -> tuple[float, int]:
    """(seconds of all jobs of a block on one adapter, items of them), from a few items of each entry."""
    from tune.evaluation.scorer import Scorer

    if not jobs(block):
        return 0.0, 0
    scorer = Scorer(engine.model, engine.tokenizer, block, weights)
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


def _rate(scorer: Any, job: Any) -> float:
    """Seconds per item of a job's entry."""
    for _ in range(2):  # the first warms up; with the same items, as lm-eval keeps its requests
        started = time.monotonic()
        scorer.score(job, limit=ITEMS)
        spent = time.monotonic() - started
    return spent / max(scorer.items(job, ITEMS), 1)


@dataclass(frozen=True)
class Measured:
    """What a probe of one model found. Times in seconds, memory and disk in bytes; `slow` is the upper quartile."""

    load: float
    step: float
    fast: float
    slow: float
    validation: float
    memory: int
    adapter: int
    data: int
    tests: float  # all test benchmarks of one adapter, plain and attacked
    validations: float  # the same for the validation benchmarks
    answers: int  # items scored for one adapter

"""One fine-tuning from the command line: in this process, under torchrun, or on Ray Train workers."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from macdrop.errors import ConfigError
from tune.cli.console import console, line
from tune.config.recipes import fresh_folder, recipe
from tune.config.run_spec import RunSpec, TrainSpec
from tune.trackers.sync import OneTrial
from tune.training.finetune import Observer, Outcome
from tune.training.observer import Word
from tune.training.quiet import quiet_libraries
from tune.training.single import train_here

FOLLOW_EVERY_S = 0.3
SHOWN = ("loss", "eval_loss", "learning_rate", "grad_norm", "p", "entries_dropped", "tokens_per_second")


def train_one(spec: RunSpec, folder: Path, *, observe: Observer, resume: bool) -> Outcome:
    """Train the run's one model into `folder`; see `finetune` for what lies there afterwards.

    Raises:
        ConfigError: the spec lists several models, the folder holds another run, a value does not fit.
        and whatever `finetune` raises.
    """
    models = spec.studies()
    if len(models) != 1:
        raise ConfigError(f"train takes one model, and sweep.models lists {len(models)}. Use `macdrop sweep` for them.")
    if folder.exists() and any(folder.iterdir()) and not resume:
        raise ConfigError(f"output_dir {folder} is not empty. Add --resume to go on there, or choose another one.")
    with OneTrial(spec.report_to, models[0], folder, warn=lambda text: print(text, file=sys.stderr)) as followed:
        if spec.ray.num_workers == 1 and spec.ray.address is None:
            outcome = train_here(models[0], folder, observe=observe, threads=spec.ray.threads_per_worker)
        else:
            outcome = _train_on_workers(spec, models[0], folder, observe)
        followed.status = outcome.status
    return outcome


def _train_on_workers(spec: RunSpec, train_spec: TrainSpec, folder: Path, observe: Observer) -> Outcome:
    """Run `train_here` on Ray Train workers and follow the metrics that rank 0 writes."""
    from tune.distributed.lanes.train_run import Workers
    from tune.storage.atomic import read_jsonl

    file = folder / "metrics.jsonl"
    seen = len(read_jsonl(file)) if file.is_file() else 0
    with Workers(spec.ray, train_spec, folder) as workers:
        while True:
            finished = workers.wait(FOLLOW_EVERY_S)
            rows = read_jsonl(file) if file.is_file() else []
            for metrics in rows[seen:]:
                observe(metrics)
            seen = len(rows)
            if finished:
                return workers.outcome()


def train(file: str | None, overrides: list[str], *, resume: bool) -> None:
    from tune.config.eval_spec import jobs
    from tune.config.run_spec import load
    from tune.scheduling.resources import check_local, one_lane
    from tune.storage.sealed_folder import newest

    spec = load(recipe(file), overrides)
    folder = Path(spec.output_dir or fresh_folder(file or "train"))
    models = spec.studies()
    if len(models) != 1:
        raise ConfigError(f"train takes one model, and sweep.models lists {len(models)}. Use `macdrop sweep` for them.")
    check_local(one_lane(spec.ray))
    checkpoint = _newest(folder, newest) if resume else None
    quiet_libraries()
    from tune.preflight.inputs import check_folder, check_trackers, check_training

    check_folder(folder, resume=resume, remedy=shlex.join(["macdrop", *sys.argv[1:], "--resume"]))
    check_trackers(spec.report_to, folder)
    with console.status("Reading model settings and data"):
        steps = check_training(models[0], spec.ray.num_workers)
    if checkpoint is not None:
        line("resuming", f"from {checkpoint}")
    def show(metrics: dict[str, Any]) -> Word:
        parts = [f"step {metrics['step']:>{len(str(steps))}}/{steps}"]
        parts += [f"{name} {metrics[name]:.4g}" for name in SHOWN if metrics.get(name) is not None]
        console.print("  ".join(parts), highlight=False, soft_wrap=True)
        return Word.GO_ON

    outcome = train_one(spec, folder, observe=show, resume=resume)
    line("adapter", str(folder / "adapter"))
    line("trained", f"{outcome.step} of {outcome.total_steps} steps in {outcome.seconds:.1f} s")
    if outcome.eval_loss is not None:
        line("eval loss", f"{outcome.eval_loss:.4f} nats per answer token, masks off")
    hooked = "features of the intermediate state" if models[0].arm == "activations" else "rows"
    if outcome.entries_masked:
        share = outcome.entries_dropped / outcome.entries_masked
        told = f"{outcome.entries_dropped} of {outcome.entries_masked} masked entries ({share:.1%})"
        line("dropped", f"{told} in {outcome.rows_hooked} hooked {hooked}")
    elif outcome.rows_hooked:
        line("dropped", f"nothing in these steps, whose p is 0 ({outcome.rows_hooked} hooked {hooked})")
    else:
        line("dropped", "nothing: plain fine-tuning, MacDrop is off (macdrop.p0 or macdrop.k is 0)")
    benchmarks = [file] if file and jobs(spec.eval) else []
    if not benchmarks and not models[0].model_name_or_path.startswith("zoo:"):
        benchmarks = ["eval.zero_shot=[arc_easy,piqa]"]
    line(
        "next", " ".join(["macdrop eval", models[0].model_name_or_path, *benchmarks, f"--adapter {folder / 'adapter'}"])
    )


def _newest(folder: Path, newest: Any) -> Path:
    checkpoint = newest(folder / "checkpoints")
    if checkpoint is None and (folder / "adapter").is_dir():
        raise ConfigError(f"{folder} has been trained to its end: there is nothing to go on with.")
    if checkpoint is None:
        raise ConfigError(f"{folder} has no checkpoint to go on from. Leave --resume out.")
    return checkpoint

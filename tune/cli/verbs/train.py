"""`macdrop train`: one fine-tuning, in this process, under torchrun, or on Ray Train workers."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from macdrop.errors import ConfigError
from tune.cli.console import console, line, warn
from tune.cli.options import Config, load_run_file, split_config

if TYPE_CHECKING:
    from tune.config.run_spec import RunSpec, TrainSpec
    from tune.preflight.inputs import Checked
    from tune.training.finetune import Outcome
    from tune.training.observer import Observer, Word

#: Metrics shown of each logged step.
SHOWN = ("loss", "eval_loss", "learning_rate", "grad_norm", "p", "entries_dropped", "tokens_per_second")

#: The first word of the last line, before the outcome as JSON: for the programs that start this one.
RESULT = "macdrop-result"

app = typer.Typer()


@app.command(epilog="Example: macdrop train my.yaml macdrop.p0=0.6 learning_rate=1e-4 output_dir=runs/one")
def train(
    config: Config = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from output_dir's newest checkpoint.")] = False,
) -> None:
    """Fine-tune one adapter with MacDrop (macdrop.p0=0: without), in this process or on ray.num_workers workers."""
    from tune.config.recipes import fresh_folder, recipe
    from tune.config.resume import shell_command
    from tune.preflight.inputs import check_folder, check_trackers, check_training
    from tune.preflight.step_memory import worker_room
    from tune.scheduling.resources import check_local, one_lane
    from tune.storage.run_lock import check_free
    from tune.storage.segments import workers_at_start
    from tune.training.checkpoint import read_meta
    from tune.training.optimizers.snr_record import is_auto, recorded_rules
    from tune.training.quiet import quiet_libraries
    from tune.training.trial_setup import check_checkpoint

    file, overrides = split_config(config)
    spec = load_run_file(recipe(file), overrides)
    folder = Path(spec.output_dir or fresh_folder(file or "train"))
    if spec.sync_to is not None:
        raise ConfigError(
            "sync_to copies the run folder of a sweep, and train makes none. Leave it out (sync_to=null)."
        )
    models = spec.studies()
    if len(models) != 1:
        raise ConfigError(f"train takes one model, and sweep.models lists {len(models)}. Use `macdrop sweep` for them.")
    (model,) = models
    check_local(one_lane(spec.ray))
    if _is_first():
        check_free(folder)
    checkpoint = _newest(folder) if resume else None
    quiet_libraries()
    remedy = shell_command("macdrop", *sys.argv[1:], "--resume")
    if _is_first():
        check_folder(folder, resume=resume, remedy=remedy)
    check_trackers(spec.report_to, folder)
    workers = int(os.environ.get("WORLD_SIZE", "1")) if _in_this_process(spec) else spec.ray.num_workers
    with console.status("Reading model settings and data"):
        room = worker_room(one_lane(spec.ray).model_copy(update={"num_workers": workers}))
        begun = workers_at_start(model, read_meta(checkpoint)) if checkpoint is not None else None
        checked = check_training(model, workers, room, begun)
    if _is_first():
        _show_checked(checked, measures=is_auto(recorded_rules(model, folder)))
    if checkpoint is not None:
        check_checkpoint(recorded_rules(model, folder), checkpoint, checked.steps, workers)
        line("resuming", f"from {checkpoint}")
    with _claimed(folder):
        if _is_first():
            check_folder(folder, resume=resume, remedy=remedy)  # another run may have been there meanwhile
        outcome = _train(spec, model, folder, _step_printer(checked.steps))
    model = recorded_rules(model, folder)
    _show_outcome(model, folder, outcome)
    line("next", _next_command(spec, model, file, folder))
    if _is_first():
        console.print(f"{RESULT} {result_json(model, folder, outcome)}", soft_wrap=True)


def _show_checked(checked: Checked, *, measures: bool) -> None:
    from tune.training.optimizers.snr_record import STEPS

    for words in checked.data:
        line("data", words)
    line("packing", checked.packing)
    if measures:
        line("rules", f"of slimadam are measured first, in {STEPS} steps of a plain fine-tuning")
    for note in checked.notes:
        line("note", note)


def _in_this_process(spec: RunSpec) -> bool:
    return spec.ray.num_workers == 1 and spec.ray.address is None


def _is_first() -> bool:
    """Return whether this is the only process, or the first of torchrun's: the one that looks after the folder."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Keep other runs out of the folder; of torchrun's processes the first one does.

    Raises:
        ConfigError: another run is there, or took the folder over.
    """
    from tune.storage.run_lock import locked

    if not _is_first():
        yield
        return
    with locked(folder) as lock:

        def end(number: int, frame: Any) -> None:
            if lock.lost is not None:
                raise ConfigError(lock.lost)
            raise SystemExit(128 + number)

        before = signal.signal(signal.SIGTERM, end)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)


def _newest(folder: Path) -> Path:
    """Return the newest checkpoint of a folder.

    Raises:
        ConfigError: there is none.
    """
    from tune.storage.sealed_folder import newest

    checkpoint = newest(folder / "checkpoints")
    if checkpoint is None and (folder / "adapter").is_dir():
        raise ConfigError(f"{folder} has finished training: there is nothing to resume.")
    if checkpoint is None:
        raise ConfigError(f"{folder} has no checkpoint to resume from. Leave --resume out.")
    return checkpoint


def _train(spec: RunSpec, model: TrainSpec, folder: Path, observe: Observer) -> Outcome:
    from tune.trackers.sync import OneTrial
    from tune.training.single import train_here

    with OneTrial(spec.report_to, model, folder, warn=warn) as tracked:
        if _in_this_process(spec):
            outcome = train_here(model, folder, observe=observe, threads=spec.ray.threads_per_worker)
        else:
            from tune.preflight.host import check_start

            if spec.ray.address is None:
                check_start()
            from tune.distributed.lanes.train_run import train_on_workers

            outcome = train_on_workers(spec.ray, model, folder, observe=observe)
        tracked.status = outcome.status
    return outcome


def _step_printer(steps: int) -> Observer:
    from tune.training.observer import Word

    def show(metrics: dict[str, Any]) -> Word:
        parts = [f"step {metrics['step']:>{len(str(steps))}}/{steps}"]
        parts += [f"{name} {metrics[name]:.4g}" for name in SHOWN if metrics.get(name) is not None]
        console.print("  ".join(parts), soft_wrap=True)
        return Word.GO_ON

    return show


def _show_outcome(model: TrainSpec, folder: Path, outcome: Outcome) -> None:
    from tune.config.sections import Arm
    from tune.storage.segments import describe
    from tune.training.finetune import slow_paths, unmoved_text
    from tune.training.observer import Ending

    line("adapter", str(folder / "adapter"))
    line("trained", f"{outcome.step} of {outcome.total_steps} steps in {outcome.seconds:.1f} s")
    if outcome.status == Ending.DONE and outcome.step < outcome.total_steps:
        line("early end", f"{model.early_stopping_patience} validations in a row did not improve on the best")
    if outcome.eval_loss is not None:
        line("eval loss", f"{outcome.eval_loss:.4f} nats per answer token, masks off")
    hooked = "features of the intermediate state" if model.arm == Arm.ACTIVATIONS else "rows"
    if outcome.entries_masked:
        share = outcome.entries_dropped / outcome.entries_masked
        dropped = f"{outcome.entries_dropped} of {outcome.entries_masked} masked entries ({share:.1%})"
        line("dropped", f"{dropped} in {outcome.rows_hooked} hooked {hooked}")
    elif outcome.rows_hooked:
        line("dropped", f"nothing in these steps, whose p is 0 ({outcome.rows_hooked} hooked {hooked})")
    else:
        line("dropped", "nothing: plain fine-tuning, MacDrop is off (macdrop.p0 or macdrop.k is 0)")
    if outcome.unmoved:
        line("unmoved", unmoved_text(outcome.unmoved))
    for text in slow_paths(asdict(outcome)):
        line("slower", text)
    if (words := describe(outcome.segments)) is not None:
        line("workers", words)


def result_json(model: TrainSpec, folder: Path, outcome: Outcome) -> str:
    """Return the outcome of a fine-tuning as one line of ASCII: its folder, name, losses, steps and seconds."""
    about = {"output_dir": str(folder), "trial": model.trial_id(), "adapter": str(folder / "adapter")}
    return json.dumps({**about, **asdict(outcome)})


def _next_command(spec: RunSpec, model: TrainSpec, file: str | None, folder: Path) -> str:
    """Return the command that scores the adapter."""
    from tune.config.eval_spec import jobs
    from tune.config.resume import shell_command
    from tune.zoo.catalog import is_planted

    benchmarks = [file] if file and jobs(spec.eval) else []
    if not benchmarks and not is_planted(model.model_name_or_path):
        benchmarks = ["eval.zero_shot=[arc_easy,piqa]"]
    words = ["macdrop", "eval", model.model_name_or_path, *benchmarks, "--adapter", folder / "adapter"]
    quantised = [] if model.quantization_bit is None else ["--quantization-bit", model.quantization_bit]
    return shell_command(*words, *quantised)

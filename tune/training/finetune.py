"""The loop of one fine-tuning in the current process group: start or resume, validate, checkpoint, stop, write.

Every rank calls it with the same arguments, in a lane's Ray Train workers as in a single process. `tune.training.step`
computes a step; nothing depends on what the engine trained before.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from macdrop.errors import ConfigError, TrainingInvariantError
from macdrop.weights import MassiveWeights
from tune.config.run_spec import TrainSpec
from tune.data.batching import save_interval
from tune.data.dataset import Prepared
from tune.errors import CheckpointError, TrainingDiverged
from tune.forward.head import UNSPLIT
from tune.storage import sealed_folder
from tune.storage.atomic import lasting, writing
from tune.storage.segments import SEGMENTS, Segment, continued
from tune.training.checkpoint import AdapterState
from tune.training.collectives import all_do, rank0_does
from tune.training.engine import Engine
from tune.training.observer import Ending, Observer, Patience, Word
from tune.training.step import Training
from tune.training.trial_setup import check_continues, identity

#: How words travel between the ranks: by their index. Only rank 0 has one, so the sum over ranks is that word; None
#: stands for an observer that raised.
WORDS: tuple[Word | None, ...] = (Word.GO_ON, Word.STOP, Word.LEAVE, None)
#: Steps without any gradient after which training ends.
SILENT_STEPS = 10
#: Names of tensors that a message lists, at most.
LISTED = 4
#: In the adapter's folder: how its fine-tuning ended.
OUTCOME = "outcome.json"


@dataclass(frozen=True)
class Outcome:
    """The outcome of a fine-tuning.

    Losses in nats per answer token, `eval_loss` with masks off.
    """

    status: Ending
    step: int
    total_steps: int
    train_loss: float | None
    eval_loss: float | None
    entries_dropped: int
    entries_masked: int
    rows_hooked: int
    seconds: float
    resumed_from: int
    #: Tensors of the adapter that are as they were at step 0, by their names in its file.
    unmoved: Sequence[str] = ()
    #: The reason for padded micro-batches where packing is `auto`.
    unpacked: str | None = None
    #: Logits were computed at all positions, as the model cannot be split into decoder and head.
    unsplit: bool = False
    #: Bytes of optimizer state besides the masters, over all workers; 0 in records of older versions.
    optimizer_bytes: int = 0
    #: Bytes that AdamW would keep.
    adamw_bytes: int = 0
    #: On how many workers it was trained, from which step on.
    segments: Sequence[Segment] = ()
    #: SlimAdam's rules, given or measured.
    slimadam_rules: Mapping[str, str] | str | None = None


def unmoved_text(names: Sequence[str]) -> str:
    """Say which tensors of an adapter training left as they were, and why that may be."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return (
        f"{len(names)} of the adapter's tensors are as they were at step 0, as no gradient reached them (an expert "
        f"that no token went to, a layer that the model does not call): {', '.join(names[:LISTED])}{more}"
    )


def slow_paths(outcome: Mapping[str, Any]) -> list[str]:
    """Say what a fine-tuning, an `Outcome` as a mapping, did the slow way for its model, and why; a sentence each."""
    found = []
    if why := outcome.get("unpacked"):
        found.append(f"micro-batches were padded, as the model cannot run packed rows: {why}")
    if outcome.get("unsplit"):
        found.append(UNSPLIT)
    return found


def finetune(
    engine: Engine,
    spec: TrainSpec,
    data: Prepared,
    folder: Path,
    *,
    weights: MassiveWeights | None = None,
    observe: Observer | None = None,
    resume: bool = True,
    begin: Callable[[], None] = lambda: None,
    beat: Callable[[], None] = lambda: None,
    workers: int | None = None,
) -> Outcome:
    """Train one adapter into `folder` (`adapter/`, and meanwhile `checkpoints/` every `data.batching.save_interval`).

    With `resume`, training continues from the newest complete checkpoint in the folder at its exact step, and a
    finished fine-tuning is not repeated. An error on one rank is raised on all. Rank 0 calls `begin`, which may write
    into the folder, once it is certain that training starts; a refused one has changed nothing. Every rank calls `beat`
    after each micro-step and each validation batch. `workers` are those that the fine-tuning began with, by default the
    ranks there are: of other ranks each takes more or fewer of a step's micro-batches.

    Raises:
        ConfigError: the spec does not fit the engine, the model, the data or the number of ranks, or the checkpoint has
            other settings.
        CheckpointError: the checkpoint is damaged.
        TrainingDiverged: a loss or gradient norm is not finite; the engine stays usable.
        TrainingInvariantError: the base changed or the adapter did not move.
        ResourceError: the folder cannot be written; the engine stays usable.
    """
    if spec.engine_key() != engine.key:
        raise ConfigError("This engine was built for other settings; build one from this spec.")
    return _Run(Training(engine, spec, data, weights, beat, workers), folder, observe).run(resume, begin)


class _Run:
    """State of one fine-tuning, shared by the steps below."""

    def __init__(self, training: Training, folder: Path, observe: Observer | None) -> None:
        self.training, self.engine, self.spec = training, training.engine, training.spec
        self.folder, self.checkpoints, self.observe = folder, folder / "checkpoints", observe
        self.steps = training.steps
        self.interval = save_interval(self.spec, self.steps)
        #: Entries dropped and masked, and seconds spent, up to the checkpoint that training resumed from.
        self.before, self.spent = (0, 0), 0.0
        self.segments: list[Segment] = []
        self.started = time.monotonic()
        self.step = self.resumed_from = 0
        self.eval_loss: float | None = None
        self.train_loss: float | None = None
        self.rows = self.silent = 0
        self.patience = Patience.of(self.spec, self.steps, training.batches.steps_per_epoch)
        #: The observer's error on rank 0, until all ranks raise it.
        self.error: Exception | None = None

    # --- loop ---

    def run(self, resume: bool, begin: Callable[[], None]) -> Outcome:
        rank0_does(self._make_folder)
        finished = rank0_does(self._finished) if resume else None
        if finished is not None:
            return Outcome(**finished)
        self._start(rank0_does(self._newest) if resume else None)
        self.training.choose_layout()
        rank0_does(self._tidy)
        rank0_does(begin)
        drop = self.training.drop
        self.rows = drop.attach() if drop else 0
        try:
            self.training.set_optimizer(self.step)
            status = self._train()
        finally:
            if drop:
                drop.detach()
        final = self._state()
        self.engine.check_base()
        dropped, masked = self._entries()
        left = status == Ending.LEFT
        outcome = Outcome(
            status=status,
            step=self.step,
            total_steps=self.steps,
            train_loss=self.train_loss,
            eval_loss=self.eval_loss,
            entries_dropped=dropped,
            entries_masked=masked,
            rows_hooked=self.rows,
            seconds=self._seconds(),
            resumed_from=self.resumed_from,
            unpacked=self.training.unpacked,
            unsplit=self.engine.loss.split is None,
            unmoved=() if left else self._unmoved(final),
            optimizer_bytes=self.engine.optimizer_bytes,
            adamw_bytes=self.engine.adamw_bytes,
            segments=self.segments,
            slimadam_rules=self.spec.slimadam_rules,
        )
        if left:
            rank0_does(lambda: self._write_checkpoint(final))
            rank0_does(self._raise)
        else:
            rank0_does(lambda: self._write_adapter(final, outcome))
        return outcome

    def _train(self) -> Ending:
        """Train from step `self.step` + 1; return how it ended."""
        every, logged, ended = self.spec.eval_steps, self.spec.logging_steps, False
        word: Word | None = Word.GO_ON
        if every and (self.step == 0 or self.patience.missed(self.step, every)):
            self.eval_loss = self.training.validate()
            word = self._report({"step": self.step, "eval_loss": self.eval_loss})
            if self.patience.ends(self.step, self.eval_loss):
                return Ending.DONE
        for step in range(self.step + 1, self.steps + 1):
            done = self.training.step(step, WORDS.index(word))
            metrics, said = done.metrics, WORDS[done.wish]
            if not done.finite:
                self._report(metrics)
                raise TrainingDiverged(
                    f"Step {step} of {self.steps}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; "
                    f"training has diverged. Lower learning_rate ({self.spec.learning_rate}) or set max_grad_norm "
                    f"({self.spec.max_grad_norm})."
                )
            self.step, self.train_loss = step, metrics["loss"]
            self.silent = self.silent + 1 if metrics["grad_norm"] == 0 else 0
            if self.silent == SILENT_STEPS:
                raise TrainingInvariantError(
                    f"No gradient reached the adapter in {SILENT_STEPS} steps: it does not learn anything. Does the "
                    f"model call the layers of lora_target ({self.spec.lora_target})?"
                )
            if said is None:
                rank0_does(self._raise)
            left = said == Word.LEAVE and step < self.steps
            last = not left and (step == self.steps or said == Word.STOP)
            if last or (every and step % every == 0 and not left):
                self.eval_loss = metrics["eval_loss"] = self.training.validate()
                ended = self.patience.ends(step, self.eval_loss)
                last = last or ended
            if last or step % logged == 0 or "eval_loss" in metrics:
                word = self._report(metrics)
            if left:
                return Ending.LEFT
            if last:
                break
            if self.interval and step % self.interval == 0:
                self._save()
        return Ending.DONE if self.step == self.steps or ended else Ending.STOPPED

    def _report(self, metrics: dict[str, Any]) -> Word | None:
        """Pass metrics to rank 0's observer; return its word, None if it raised."""
        if self.engine.rank != 0 or self.observe is None or self.error is not None:
            return Word.GO_ON if self.error is None else None
        try:
            return self.observe(metrics)
        except Exception as error:
            self.error = error
            return None

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error

    # --- state and output ---

    def _make_folder(self) -> None:
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def _tidy(self) -> None:
        with writing(self.folder):
            for root in (self.folder, self.checkpoints):
                sealed_folder.tidy(root)

    def _finished(self) -> dict[str, Any] | None:
        """Return the outcome of this very fine-tuning if its complete adapter is already in the folder."""
        try:
            sealed_folder.verify(self.folder / "adapter")
            found = json.loads((self.folder / "adapter" / OUTCOME).read_text())
        except (CheckpointError, OSError, ValueError):
            return None
        done = found["outcome"]["status"] == Ending.DONE
        return found["outcome"] if done and found["meta"] == self._meta() else None

    def _newest(self) -> Path | None:
        def look() -> Path | None:
            found = sealed_folder.newest(self.checkpoints)
            self.folder.stat()  # unmounted storage must not look like a fresh start
            return found

        return lasting(look, self.folder)

    def _start(self, checkpoint: Path | None) -> None:
        """Load the step-0 state, or that of a checkpoint, into the engine."""
        if checkpoint is None:
            state = self.engine.initial_state(self.spec.seed, self.spec.init_lora_weights)
        else:
            state = all_do(lambda: AdapterState.load(checkpoint))
            rank0_does(lambda: check_continues(self.spec, self._meta(), state.meta, checkpoint))
        self.engine.load_state(state)
        self.before, self.spent = tuple(state.meta.get("entries", (0, 0))), state.meta.get("seconds", 0.0)
        self.patience.resume(state.meta)
        self.step = self.resumed_from = state.step
        begun, world = self.training.batches.world, self.engine.world
        self.segments = continued(self.spec, state.meta, step=self.step, seconds=self.spent, begun=begun, workers=world)

    def _meta(self) -> dict[str, Any]:
        return identity(self.spec, self.steps, self.training.batches.global_batch)

    def _unmoved(self, final: AdapterState) -> list[str]:
        return self.engine.check_moved(final, self.spec.seed, self._updates(), self.spec.init_lora_weights)

    def _updates(self) -> int:
        """Return the steps so far with a learning rate above 0."""
        return sum(self.training.rate(step) > 0 for step in range(1, self.step + 1))

    def _state(self) -> AdapterState:
        spent = {"entries": list(self._entries()), "seconds": self._seconds(), SEGMENTS: self.segments}
        return self.engine.read_state(self.step, {**self._meta(), **spent, **self.patience.state()})

    def _seconds(self) -> float:
        """Return the seconds of all steps that count; steps undone by a crash do not."""
        return self.spent + time.monotonic() - self.started

    def _entries(self) -> tuple[int, int]:
        """Return the entries dropped and masked since step 0."""
        dropped, masked = self.training.entries
        return self.before[0] + dropped, self.before[1] + masked

    def _save(self) -> None:
        state = self._state()
        rank0_does(lambda: self._write_checkpoint(state))

    def _write_checkpoint(self, state: AdapterState) -> None:
        folder = self.checkpoints / sealed_folder.folder_name(state.step)
        sealed_folder.write_folder(folder, lambda staging: self.engine.write_checkpoint(state, staging), self.folder)
        sealed_folder.prune(self.checkpoints, sealed_folder.KEPT)

    def _write_adapter(self, state: AdapterState, outcome: Outcome) -> None:
        """Write the adapter with its outcome; a finished fine-tuning no longer needs its checkpoints."""
        self._raise()

        def write(staging: Path) -> None:
            self.engine.write_adapter(state, staging)
            (staging / OUTCOME).write_text(json.dumps({"outcome": asdict(outcome), "meta": self._meta()}, indent=1))

        sealed_folder.write_folder(self.folder / "adapter", write, self.folder)
        if outcome.status == Ending.DONE:
            shutil.rmtree(self.checkpoints, ignore_errors=True)

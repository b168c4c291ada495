"""One fine-tuning in the current process group: a live `Engine`, MacDrop on the frozen rows, and the loop.

Called on every rank with the same arguments, by a lane's Ray Train workers as by a single process. Nothing in here
depends on what the engine trained before: batches, masks, learning rate and dropout are functions of (seed, step).
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from macdrop.errors import CheckpointError, ConfigError, MacDropError, TrainingDiverged
from tune import checkpoint as checkpoints
from tune.batching import Batches, learning_rates, total_steps
from tune.checkpoint import AdapterState
from tune.spec import TrainSpec

if TYPE_CHECKING:
    import torch

    from macdrop import MacDrop, MassiveWeights
    from tune.data import Examples, Prepared
    from tune.engine import Engine

#: Called on rank 0 with the metrics of each logged step; returns False to stop the fine-tuning early.
Observer = Callable[[dict[str, Any]], bool]
KEPT_CHECKPOINTS = 2


@dataclass(frozen=True)
class Outcome:
    """How a fine-tuning ended. Losses in nats per answer token, `eval_loss` with masks off."""

    status: str
    step: int
    total_steps: int
    train_loss: float | None
    eval_loss: float | None
    entries_dropped: int
    entries_masked: int
    rows_hooked: int
    seconds: float
    resumed_from: int


def finetune(
    engine: Engine,
    spec: TrainSpec,
    data: Prepared,
    folder: Path,
    *,
    weights: MassiveWeights | None = None,
    observe: Observer | None = None,
    resume: bool = True,
) -> Outcome:
    """Train one adapter into `folder` (`adapter/`, and `checkpoints/` every `save_steps`).

    With `resume` the newest whole checkpoint in the folder is continued at its exact step.

    Raises:
        ConfigError: the spec does not fit the engine, the model or the data.
        CheckpointError: the checkpoint belongs to other settings.
        TrainingDiverged: a loss or gradient norm is not finite; the engine can be used on.
        TrainingInvariantError: the base changed or the adapter did not move.
    """
    if spec.engine_key() != engine.key:
        raise ConfigError("This engine was built for other settings; build one from this spec.")
    return _Run(engine, spec, data, folder, weights, observe).run(resume)


class _Run:
    """The state of one fine-tuning; a class only so that the steps below need no dozen arguments."""

    def __init__(
        self,
        engine: Engine,
        spec: TrainSpec,
        data: Prepared,
        folder: Path,
        weights: MassiveWeights | None,
        observe: Observer | None,
    ) -> None:
        self.engine, self.spec, self.data, self.folder, self.observe = engine, spec, data, folder, observe
        self.batches = Batches(
            len(data.train),
            seed=spec.seed,
            per_device=spec.per_device_train_batch_size,
            accumulation=spec.gradient_accumulation_steps,
            world=engine.world,
        )
        self.steps = total_steps(spec, len(data.train), self.batches.global_batch)
        self.epochs = self.batches.epoch(self.steps)
        self.rate = learning_rates(spec, self.steps)
        self.config = spec.macdrop.config(seed=spec.seed)
        self.drop = _macdrop(engine, weights, self.config)
        #: Entries dropped and masked before the checkpoint that is resumed from.
        self.before = (0, 0)
        self.eval_loss: float | None = None
        self.train_loss: float | None = None

    # ------------------------------------------------------------------- loop

    def run(self, resume: bool) -> Outcome:
        started = time.monotonic()
        checkpoint = checkpoints.newest(self.folder / "checkpoints") if resume else None
        state = self._load(checkpoint)
        first = state.step
        rows = self.drop.attach() if self.drop else 0
        try:
            self._set_optimizer()
            status = self._train(first)
        finally:
            if self.drop:
                self.drop.detach()
        final = self._state(self.step)
        self.engine.check_after_training(final)
        if self.engine.rank == 0:
            self._write_adapter(final)
        _barrier()
        return Outcome(
            status=status,
            step=self.step,
            total_steps=self.steps,
            train_loss=self.train_loss,
            eval_loss=self.eval_loss,
            entries_dropped=self._entries()[0],
            entries_masked=self._entries()[1],
            rows_hooked=rows,
            seconds=time.monotonic() - started,
            resumed_from=first,
        )

    def _train(self, first: int) -> str:
        self.step = first
        if first == 0 and self.spec.eval_steps:
            self.eval_loss = self._validate()
            self._report({"step": 0, "eval_loss": self.eval_loss})
        stop = False
        for step in range(first + 1, self.steps + 1):
            metrics, stop = self._step(step, stop)
            self.step, self.train_loss = step, metrics["loss"]
            last = step == self.steps or stop
            if last or (self.spec.eval_steps and step % self.spec.eval_steps == 0):
                self.eval_loss = metrics["eval_loss"] = self._validate()
            if last or step % self.spec.logging_steps == 0 or "eval_loss" in metrics:
                stop = self._report(metrics) or stop
            if self.spec.save_steps and step % self.spec.save_steps == 0 and step < self.steps:
                self._save(step)
            if last and step < self.steps:
                return "stopped"
        return "done"

    def _step(self, step: int, stop: bool) -> tuple[dict[str, Any], bool]:
        """One optimizer step. `stop` is rank 0's wish; the reduced wish of all ranks comes back."""
        import torch

        started = time.monotonic()
        engine, rank = self.engine.engine, self.engine.rank
        p = self._probability(step)
        rate = self.rate(step)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        picked = self.batches.step(step)
        label_tokens = int(self.data.train.label_counts[picked].sum())
        loss_sum = torch.zeros((), dtype=torch.float64, device=engine.device)
        dropped = self.drop.entries_dropped if self.drop else 0
        engine.train()
        for micro in range(self.batches.accumulation):
            number = (step - 1) * self.batches.accumulation + micro
            # Dropout of the adapter or the base model: repeats in a resumed run, differs between ranks.
            torch.manual_seed((self.spec.seed * 1_000_003 + number) * self.engine.world + rank)
            with self.drop.micro_step(p, number) if self.drop else nullcontext():
                nats = self._nats(self.data.train, picked[micro, rank])
                # DeepSpeed averages over micro-steps and ranks; the loss is the mean over the step's answer tokens.
                engine.backward(nats * (self.batches.accumulation * self.engine.world / label_tokens))
            loss_sum += nats.detach().double()
            norm = self._gradient_norm() if micro == self.batches.accumulation - 1 else None
            engine.step()
        norm = norm if norm is not None else engine.get_global_grad_norm()
        norm = float("nan") if norm is None else float(norm)
        total = torch.stack([loss_sum, loss_sum.new_tensor(float(not math.isfinite(norm))), loss_sum.new_tensor(stop)])
        torch.distributed.all_reduce(total)
        loss = float(total[0]) / label_tokens
        metrics = {
            "step": step,
            "epoch": self.batches.epoch(step),
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "p": p,
            "entries_dropped": (self.drop.entries_dropped if self.drop else 0) - dropped,
            "tokens_per_second": int(self.data.train.lengths[picked].sum()) / (time.monotonic() - started),
        }
        if not math.isfinite(loss) or total[1] > 0:
            self._report(metrics)
            raise TrainingDiverged(
                f"Step {step} of {self.steps}: loss {loss}, gradient norm {norm}; training has diverged. "
                f"Lower learning_rate ({self.spec.learning_rate}) or set max_grad_norm ({self.spec.max_grad_norm})."
            )
        return metrics, bool(total[2] > 0)

    def _nats(self, examples: Examples, picked: Any) -> torch.Tensor:
        """Sum over the answer tokens of a micro-batch of -log p, in fp32."""
        import torch
        from torch.nn.functional import cross_entropy

        from tune.data import collate

        batch = collate([examples[int(index)] for index in picked], self.engine.tokenizer.pad_token_id or 0)
        batch = {name: tensor.to(self.engine.engine.device) for name, tensor in batch.items()}
        logits = self.engine.engine(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        targets = batch["labels"][:, 1:]  # (B, T - 1)
        return cross_entropy(
            logits[:, :-1].float().reshape(-1, logits.shape[-1]),
            targets.reshape(-1),
            ignore_index=-100,
            reduction="sum",
        ).to(torch.float32)

    def _gradient_norm(self) -> float | None:
        """Stage 0 in fp32: DeepSpeed clips with the norm but does not keep it, and zeroes the gradients in `step`."""
        import torch

        if self.spec.zero_stage or self.spec.bf16:
            return None
        return float(
            torch.nn.utils.get_total_norm([p.grad for p in self.engine._adapter.values() if p.grad is not None])
        )

    def _probability(self, step: int) -> float:
        if not self.drop:
            return 0.0
        return self.config.probability(step, self.steps, self.batches.epoch(step), self.epochs)

    # ------------------------------------------------------------- validation

    def _validate(self) -> float | None:
        """Mean nats per answer token of the validation examples, masks off and asserted off; None without any."""
        import torch

        examples = self.data.validation
        if examples is None or len(examples) == 0:
            return None
        dropped = self.drop.entries_dropped if self.drop else 0
        engine = self.engine.engine
        size, world, rank = self.spec.per_device_eval_batch_size, self.engine.world, self.engine.rank
        total = torch.zeros(2, dtype=torch.float64, device=engine.device)
        engine.eval()
        with torch.no_grad():
            # Every rank runs equally many forwards, as ZeRO-3 gathers in each; a rank without examples repeats one.
            for start in range(0, len(examples), size * world):
                mine = range(start + rank * size, min(start + (rank + 1) * size, len(examples)))
                nats = self._nats(examples, mine if len(mine) else [0])
                if len(mine):
                    total += total.new_tensor([float(nats), float(examples.label_counts[list(mine)].sum())])
        engine.train()
        torch.distributed.all_reduce(total)
        if self.drop and self.drop.entries_dropped != dropped:
            raise MacDropError("Weights were dropped while the validation loss was measured.")
        return float(total[0] / total[1])

    # ------------------------------------------------------- state and output

    def _load(self, checkpoint: Path | None) -> AdapterState:
        if checkpoint is None:
            state = self.engine.initial_state(self.spec.seed)
        else:
            state = AdapterState.load(checkpoint)
            expected = self._meta()
            differing = {
                key: (state.meta.get(key), value) for key, value in expected.items() if state.meta.get(key) != value
            }
            if differing:
                raise CheckpointError(
                    f"{checkpoint} was made with other settings (there, here): {differing}. "
                    "Continue with the settings it was made with, or train into another folder."
                )
        self.engine.load_state(state)
        self.before = tuple(state.meta.get("entries", (0, 0)))
        return state

    def _meta(self) -> dict[str, Any]:
        return {"trial": self.spec.trial_id(), "total_steps": self.steps, "global_batch": self.batches.global_batch}

    def _state(self, step: int) -> AdapterState:
        return self.engine.read_state(step, {**self._meta(), "entries": list(self._entries())})

    def _entries(self) -> tuple[int, int]:
        """Entries dropped, and masked, since step 0."""
        dropped, masked = (self.drop.entries_dropped, self.drop.entries_masked) if self.drop else (0, 0)
        return self.before[0] + dropped, self.before[1] + masked

    def _set_optimizer(self) -> None:
        for group in self.engine.engine.optimizer.param_groups:
            group["betas"] = (self.spec.adam_beta1, self.spec.adam_beta2)
            group["eps"] = self.spec.adam_epsilon
            group["weight_decay"] = self.spec.weight_decay

    def _save(self, step: int) -> None:
        state = self._state(step)
        if self.engine.rank == 0:
            root = self.folder / "checkpoints"
            self.engine.save_checkpoint(state, root / checkpoints.folder_name(step))
            checkpoints.prune(root, KEPT_CHECKPOINTS)

    def _write_adapter(self, state: AdapterState) -> None:
        staging = self.folder / ".tmp-adapter"
        shutil.rmtree(staging, ignore_errors=True)
        self.engine.write_adapter(state, staging)
        checkpoints.commit(staging, self.folder / "adapter")

    def _report(self, metrics: dict[str, Any]) -> bool:
        """Show rank 0's observer the metrics; True when it wants to stop."""
        if self.engine.rank != 0 or self.observe is None:
            return False
        return not self.observe(metrics)


def _macdrop(engine: Engine, weights: MassiveWeights | None, config: Any) -> MacDrop | None:
    from macdrop import MacDrop

    if not config.enabled:
        return None
    if weights is None:
        raise ConfigError(
            "MacDrop needs the model's massive weights. Scan it first (`macdrop scan MODEL`), or set macdrop.p0 to 0."
        )
    return MacDrop(engine.engine.module, weights, config)


def _barrier() -> None:
    import torch

    torch.distributed.barrier()

"""One optimizer step and the validation loss of a fine-tuning; every rank makes the same calls.

Batches, masks, learning rate and dropout are functions of (seed, step), so a step depends on earlier ones only through
the engine's state. The examples of a step and their masks depend neither on packing nor on the number of ranks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from macdrop.config import SCOPES, MacDropConfig
from macdrop.errors import ConfigError, MacDropError, TrainingInvariantError
from macdrop.hooks import MacDrop
from macdrop.masking.layout import Span
from macdrop.weights import MassiveWeights
from tune.config.run_spec import TrainSpec
from tune.data.batching import Batches, learning_rates, total_steps
from tune.data.dataset import Examples, Prepared
from tune.data.micro_batches import MicroBatch, packed_row, padded_batch
from tune.data.packing import check_budget, plan_rows, token_budget
from tune.forward.forward_pass import ForwardPass
from tune.storage.segments import check_shared
from tune.training.engine import Engine
from tune.training.optimizers.method import SCALE
from tune.training.optimizers.methods import method_of


@dataclass(frozen=True)
class Stepped:
    """A finished step: metrics, whether loss and gradient norm were finite on every rank, and the sum of the wishes."""

    metrics: dict[str, Any]
    finite: bool
    wish: int


class Training:
    """One fine-tuning's engine, data, and MacDrop on the frozen rows (`drop`; None for a plain adapter).

    `entries` counts the weight entries (dropped, masked) of all steps so far: once per mask, on whichever ranks.

    Raises:
        ConfigError: MacDrop is on, but there are no massive weights; or the ranks cannot share a step evenly.
    """

    def __init__(
        self,
        engine: Engine,
        spec: TrainSpec,
        data: Prepared,
        weights: MassiveWeights | None,
        beat: Callable[[], None] = lambda: None,
        workers: int | None = None,
    ) -> None:
        """beat: called after each micro-step and each validation batch.

        workers: those that the fine-tuning began with, which decide its batches; by default the ranks there are.
        """
        workers = workers or engine.world
        check_shared(spec, workers, engine.world)
        self.engine, self.spec, self.data, self.beat = engine, spec, data, beat
        self.batches = Batches(
            len(data.train),
            seed=spec.seed,
            per_device=spec.per_device_train_batch_size,
            accumulation=spec.gradient_accumulation_steps,
            world=workers,
        )
        self.steps = total_steps(spec, len(data.train), self.batches.global_batch)
        self.epochs = self.batches.epoch(self.steps)
        self.rate = learning_rates(spec, self.steps)
        self.config = spec.macdrop.config(seed=spec.seed)
        self.drop = _macdrop(engine, weights, self.config)
        self.entries = (0, 0)
        #: The reason for padded micro-batches where packing is `auto`; None where they are packed, or not asked for.
        self.unpacked: str | None = None
        self.forward = ForwardPass(engine.loss, engine.engine.device)

    def choose_layout(self) -> None:
        """Choose packed or padded micro-batches for the model with the weights it has now; a collective.

        Raises:
            ConfigError: an example is longer than the budget, or packing is `on` and the model cannot run packed rows.
        """
        if self.spec.packing == "off":
            return
        check_budget(int(self.data.train.lengths.max()), token_budget(self.spec))
        self.forward.attention, self.unpacked = self.engine.packed_attention(self.data.train)
        if self.unpacked is not None and self.spec.packing == "on":
            raise ConfigError(
                f"packing is on, but {self.spec.model_name_or_path} cannot run packed rows: {self.unpacked}.\n"
                "Set packing to auto or off."
            )

    def set_optimizer(self, step: int = 0) -> None:
        """Apply the optimizer's settings after `step` steps; the learning rate is set in every step."""
        method_of(self.spec).begin(self.engine.engine.optimizer.param_groups, self.rate, step)

    def step(self, step: int, wish: int = 0) -> Stepped:
        """Run optimizer step `step` (from 1). `wish` is this rank's, summed over ranks with the loss.

        Raises:
            TrainingInvariantError: the loss of no rank depends on the adapter; raised on all of them.
        """
        with self.engine.norms.for_step():
            return self._step(step, wish)

    def _step(self, step: int, wish: int) -> Stepped:
        started = time.monotonic()
        engine = self.engine.engine
        p, rate, picked = self._probability(step), self.rate(step), self.batches.step(step)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate * group[SCALE]
        label_tokens = int(self.data.train.label_counts[picked].sum())
        loss_sum = torch.zeros((), dtype=torch.float64, device=engine.device)
        unreached = 0
        norm = None
        engine.train()
        batches = self._micro_batches(picked)
        for micro, batch in enumerate(batches):
            last = micro == len(batches) - 1
            self._seed_dropout(step, micro)
            engine.set_gradient_accumulation_boundary(last)
            with self._masked(p, step, batch), self.forward.nats(batch) as nats:
                if not nats.requires_grad:
                    # A rank whose tokens reach no layer of the adapter must not leave: the others would wait for it.
                    unreached += 1
                    nats = nats + 0.0 * sum(p.float().sum() for p in self.engine._adapter.values())
                # DeepSpeed averages over ranks; the loss is the mean over the step's answer tokens.
                engine.backward(nats * (self.engine.world / label_tokens), scale_wrt_gas=False)
            loss_sum += nats.detach().double()
            norm = self._gradient_norm() if last else None
            engine.step()
            self.beat()
        norm = norm if norm is not None else engine.get_global_grad_norm()
        norm = float("nan") if norm is None else float(norm)
        ours = [float(not math.isfinite(norm)), float(wish), float(unreached)]
        total = torch.cat([loss_sum.reshape(1), loss_sum.new_tensor(ours)])
        torch.distributed.all_reduce(total)
        if int(total[3]) == len(batches) * self.engine.world:
            raise TrainingInvariantError(
                f"The loss does not depend on the adapter: the model calls no layer of lora_target "
                f"({self.spec.lora_target})."
            )
        loss = float(total[0]) / label_tokens
        metrics = {
            "step": step,
            "epoch": self.batches.epoch(step),
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "p": p,
            "entries_dropped": self._count_entries(step),
            "tokens_per_second": int(self.data.train.lengths[picked].sum()) / (time.monotonic() - started),
        }
        return Stepped(metrics, math.isfinite(loss) and not total[1] > 0, int(total[2]))

    # --- micro-batches ---

    def _micro_batches(self, picked: np.ndarray) -> list[MicroBatch]:
        """Return this rank's micro-batches of the examples (slices, per_device); equally many on every rank."""
        train, rank, world = self.data.train, self.engine.rank, self.engine.world
        if self.forward.attention is None:
            return [padded_batch(train, picked[s], s, self._pad) for s in range(rank, self.batches.slices, world)]
        apart = self.drop is not None and self.drop.one_mask_at_a_time
        plan = plan_rows(train.lengths[picked], world, token_budget(self.spec), apart=apart)
        return [packed_row(train, picked, rows[rank]) for rows in plan]

    @property
    def _pad(self) -> int:
        return self.engine.tokenizer.pad_token_id or 0

    def _seed_dropout(self, step: int, micro: int) -> None:
        """Seed dropout of the adapter or the base model: it repeats in a resumed run, and differs between ranks."""
        micro_batches = self.batches.slices // self.engine.world
        most = micro_batches if self.forward.attention is None else self.batches.global_batch
        number = (step - 1) * most + micro
        torch.manual_seed((self.spec.seed * 1_000_003 + number) * self.engine.world + self.engine.rank)

    # --- masks ---

    def _masked(self, p: float, step: int, batch: MicroBatch) -> AbstractContextManager[Any]:
        """Put the masks of the slices that a micro-batch holds examples of in force."""
        if self.drop is None:
            return nullcontext()
        first = self._first_mask(step)
        spans = [Span(each.row, each.start, each.stop, first + each.slice, each.place) for each in batch.examples]
        return self.drop.micro_step(p, spans if batch.counts else ())

    def _first_mask(self, step: int) -> int:
        """Return the number of the mask of a step's first slice: a slice has one mask, whoever computes it."""
        return (step - 1) * self.batches.slices

    def _count_entries(self, step: int) -> int:
        """Return the entries that the masks of a finished step dropped, each mask counted once; a collective."""
        if self.drop is None:
            return 0
        counts = torch.zeros(self.batches.slices, 2, dtype=torch.int64, device=self.engine.engine.device)
        for number, found in self.drop.take_counts().items():
            counts[number - self._first_mask(step)] = counts.new_tensor(found)
        # A mask of rows is the same on every rank that uses it; activations belong to one rank's examples.
        of_rows = SCOPES[self.config.scope].rows is not None
        operation = torch.distributed.ReduceOp.MAX if of_rows else torch.distributed.ReduceOp.SUM
        torch.distributed.all_reduce(counts, operation)
        dropped, masked = counts.sum(0).tolist()
        self.entries = (self.entries[0] + dropped, self.entries[1] + masked)
        return dropped

    def _gradient_norm(self) -> float | None:
        """Return the norm under stage 0 in fp32, where DeepSpeed clips with it but does not keep it; None elsewhere."""
        if self.spec.zero_stage or self.spec.bf16:
            return None
        return float(
            torch.nn.utils.get_total_norm([p.grad for p in self.engine._adapter.values() if p.grad is not None])
        )

    def _probability(self, step: int) -> float:
        if not self.drop:
            return 0.0
        return self.config.probability(step, self.steps, self.batches.epoch(step), self.epochs)

    def validate(self) -> float | None:
        """Return the mean nats per validation answer token (None without any); assert that masks are off."""
        examples = self.data.validation
        if examples is None or len(examples) == 0:
            return None
        dropped = self.drop.entries_dropped if self.drop else 0
        engine = self.engine.engine
        total = torch.zeros(2, dtype=torch.float64, device=engine.device)
        engine.eval()
        with torch.no_grad(), self.engine.live.averaged():
            for batch in self._validation_batches(examples):
                with self.forward.nats(batch) as nats:
                    total += total.new_tensor([float(nats), float(len(batch.targets) if batch.counts else 0)])
                self.beat()
        engine.train()
        torch.distributed.all_reduce(total)
        if self.drop and self.drop.entries_dropped != dropped:
            raise MacDropError("Weights were dropped while the validation loss was measured.")
        return float(total[0] / total[1])

    def _validation_batches(self, examples: Examples) -> Iterator[MicroBatch]:
        """Yield this rank's micro-batches of a validation; equally many on every rank, as ZeRO-3 gathers in each."""
        size, world, rank = self.spec.per_device_eval_batch_size, self.engine.world, self.engine.rank
        picked = np.arange(len(examples))[None]
        if self.forward.attention is not None:
            for rows in plan_rows(examples.lengths[picked], world, size * self.spec.cutoff_len):
                yield packed_row(examples, picked, rows[rank])
            return
        for start in range(rank * size, math.ceil(len(examples) / (size * world)) * size * world, size * world):
            yield padded_batch(examples, picked[0, start : start + size], 0, self._pad)


def _macdrop(engine: Engine, weights: MassiveWeights | None, config: MacDropConfig) -> MacDrop | None:
    if not config.enabled:
        return None
    if weights is None:
        raise ConfigError(
            "MacDrop needs the model's massive weights. Scan it first (`macdrop scan MODEL`), or set macdrop.p0 to 0."
        )
    return MacDrop(engine.engine.module, weights, config)

"""One optimizer step and the validation loss of a fine-tuning; every rank makes the same calls.

Batches, masks, learning rate and dropout are functions of (seed, step), so a step depends on earlier ones only through
the engine's state.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from macdrop.config import MacDropConfig
from macdrop.errors import ConfigError, MacDropError, TrainingInvariantError
from macdrop.hooks import MacDrop
from macdrop.weights import MassiveWeights
from tune.config.run_spec import TrainSpec
from tune.data.batching import Batches, collate, learning_rates, total_steps
from tune.data.dataset import Examples, Prepared
from tune.training.engine import Engine


@dataclass(frozen=True)
class Stepped:
    """A finished step: metrics, whether loss and gradient norm were finite on every rank, and the sum of the wishes."""

    metrics: dict[str, Any]
    finite: bool
    wish: int


class Training:
    """One fine-tuning's engine, data, and MacDrop on the frozen rows (`drop`; None for a plain adapter).

    Raises:
        ConfigError: MacDrop is on, but there are no massive weights.
    """

    def __init__(
        self,
        engine: Engine,
        spec: TrainSpec,
        data: Prepared,
        weights: MassiveWeights | None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """beat: called after each micro-step and each validation batch."""
        self.engine, self.spec, self.data, self.beat = engine, spec, data, beat
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

    def set_optimizer(self) -> None:
        """Apply the fine-tuning's AdamW settings; the learning rate is set in every step."""
        for group in self.engine.engine.optimizer.param_groups:
            group["betas"] = (self.spec.adam_beta1, self.spec.adam_beta2)
            group["eps"] = self.spec.adam_epsilon
            group["weight_decay"] = self.spec.weight_decay

    def step(self, step: int, wish: int = 0) -> Stepped:
        """Run optimizer step `step` (from 1). `wish` is this rank's, summed over ranks with the loss.

        Raises:
            TrainingInvariantError: the loss of no rank depends on the adapter; raised on all of them.
        """
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
        unreached = 0
        engine.train()
        for micro in range(self.batches.accumulation):
            number = (step - 1) * self.batches.accumulation + micro
            # Dropout of the adapter or the base model: repeats in a resumed run, differs between ranks.
            torch.manual_seed((self.spec.seed * 1_000_003 + number) * self.engine.world + rank)
            with self.drop.micro_step(p, number) if self.drop else nullcontext():
                nats = self._nats(self.data.train, picked[micro, rank])
                if not nats.requires_grad:
                    # A rank whose tokens reach no layer of the adapter must not leave: the others would wait for it.
                    unreached += 1
                    nats = nats + 0.0 * sum(p.float().sum() for p in self.engine._adapter.values())
                # DeepSpeed averages over micro-steps and ranks; the loss is the mean over the step's answer tokens.
                engine.backward(nats * (self.batches.accumulation * self.engine.world / label_tokens))
            loss_sum += nats.detach().double()
            norm = self._gradient_norm() if micro == self.batches.accumulation - 1 else None
            engine.step()
            self.beat()
        norm = norm if norm is not None else engine.get_global_grad_norm()
        norm = float("nan") if norm is None else float(norm)
        ours = [float(not math.isfinite(norm)), float(wish), float(unreached)]
        total = torch.cat([loss_sum.reshape(1), loss_sum.new_tensor(ours)])
        torch.distributed.all_reduce(total)
        if int(total[3]) == self.batches.accumulation * self.engine.world:
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
            "entries_dropped": (self.drop.entries_dropped if self.drop else 0) - dropped,
            "tokens_per_second": int(self.data.train.lengths[picked].sum()) / (time.monotonic() - started),
        }
        return Stepped(metrics, math.isfinite(loss) and not total[1] > 0, int(total[2]))

    def _nats(self, examples: Examples, picked: Iterable[int]) -> torch.Tensor:
        """Return the sum of -log p over the answer tokens of a micro-batch, in fp32."""
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
        size, world, rank = self.spec.per_device_eval_batch_size, self.engine.world, self.engine.rank
        total = torch.zeros(2, dtype=torch.float64, device=engine.device)
        engine.eval()
        with torch.no_grad():
            # Every rank runs the same number of forwards, as ZeRO-3 gathers in each; one without examples repeats one.
            for start in range(0, len(examples), size * world):
                mine = range(start + rank * size, min(start + (rank + 1) * size, len(examples)))
                nats = self._nats(examples, mine if len(mine) else [0])
                if len(mine):
                    total += total.new_tensor([float(nats), float(examples.label_counts[list(mine)].sum())])
                self.beat()
        engine.train()
        torch.distributed.all_reduce(total)
        if self.drop and self.drop.entries_dropped != dropped:
            raise MacDropError("Weights were dropped while the validation loss was measured.")
        return float(total[0] / total[1])


def _macdrop(engine: Engine, weights: MassiveWeights | None, config: MacDropConfig) -> MacDrop | None:
    if not config.enabled:
        return None
    if weights is None:
        raise ConfigError(
            "MacDrop needs the model's massive weights. Scan it first (`macdrop scan MODEL`), or set macdrop.p0 to 0."
        )
    return MacDrop(engine.engine.module, weights, config)

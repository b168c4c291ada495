"""The loss of one micro-batch, padded or packed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from tune.data.micro_batches import MicroBatch
from tune.forward.answer_loss import AnswerLoss
from tune.forward.packed_attention import PackedAttention


class ForwardPass:
    """Runs micro-batches through a model.

    loss: of answer tokens, with the model that it runs.
    attention: runs packed rows, once a model is known to (`tune.forward.packing_check`).
    """

    def __init__(self, loss: AnswerLoss, device: torch.device | str) -> None:
        self.loss, self.device = loss, device
        self.attention: PackedAttention | None = None

    @contextmanager
    def nats(self, batch: MicroBatch) -> Iterator[torch.Tensor]:
        """Yield the sum of -log p over the targets of a micro-batch, in fp32; the block spans the backward pass."""
        inputs: dict[str, Any] = {"input_ids": self._tensor(batch.input_ids)}
        segments = batch.segments
        if segments is None:
            assert batch.attention_mask is not None, "a padded micro-batch has one"
            inputs["attention_mask"] = self._tensor(batch.attention_mask)
            context: Any = nullcontext({})
        else:
            assert self.attention is not None and batch.position_ids is not None, "the model has been checked for it"
            inputs["position_ids"] = self._tensor(batch.position_ids)
            context = self.attention.segments(segments, self.device)
        with context as arguments:
            nats = self.loss(self._tensor(batch.positions), self._tensor(batch.targets), **inputs, **arguments)
            yield nats if batch.counts else 0.0 * nats

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.device)

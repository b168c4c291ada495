"""The loss of answer tokens, with logits at their positions alone, a chunk at a time.

A tensor of (all positions x vocabulary) never exists: each chunk's logits, their softmax and the gradients are
computed together, in the forward pass. The backward pass only scales these gradients, so no logits are kept for it or
computed again. Parameters of an adapted head have theirs computed in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy, log_softmax

from tune.forward.head import SplitModel

#: Bytes of the fp32 logits of one chunk: smaller ones slow the head's matrix product, larger ones only take memory.
CHUNK_BYTES = 64 * 2**20


class AnswerLoss:
    """The sum of -log p over answer tokens, in fp32 whatever the model's precision.

    Models that cannot be split (`SplitModel.of` returns None, and `split` is None) are run whole, with all logits.
    """

    def __init__(self, model: nn.Module, chunk_bytes: int = CHUNK_BYTES) -> None:
        """model: a causal language model, with an adapter or without, or the DeepSpeed engine around it.

        Under ZeRO-3 every rank must make and call it together; their numbers of answer tokens may differ.
        """
        self.model, self.chunk_bytes = model, chunk_bytes
        self.split = SplitModel.of(model)

    def __call__(self, positions: torch.Tensor, targets: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """Run the model and return the sum of -log p of the targets, a scalar; 0 with its graph where there are none.

        Args:
            positions: where each target is predicted, as indices into the flattened (B * T) tokens, int64 (N,).
            targets: token ids, int64 (N,).
            inputs: what the model is called with, without labels.
        """
        if self.split is None:
            logits = self.model(**inputs).logits.flatten(0, 1)[positions]
            return cross_entropy(logits.float(), targets, reduction="sum")
        return self.split.run(lambda hidden: self._nats(hidden.flatten(0, 1)[positions], targets), **inputs)

    def _nats(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss of hidden states (N, d)."""
        assert self.split is not None
        adapted = list(
            dict.fromkeys(p for m in self.split.head for p in m.parameters(recurse=False) if p.requires_grad)
        )
        learning = torch.is_grad_enabled() and (hidden.requires_grad or bool(adapted))

        def chunks(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self._chunks(hidden.detach(), targets, adapted, learning)

        if not learning:
            return self.split.with_head(chunks, hidden)[0]
        if adapted:  # ZeRO-3 gathers the head again for the backward pass, where its gradients need it
            return self.split.with_head(lambda hidden: _Joined.apply(*chunks(hidden), hidden, *adapted), hidden)
        return _Joined.apply(*self.split.with_head(chunks, hidden.detach()), hidden)

    def _chunks(
        self, hidden: torch.Tensor, targets: torch.Tensor, adapted: Sequence[nn.Parameter], learning: bool
    ) -> tuple[torch.Tensor, ...]:
        """Return the loss and, when learning, its gradients of hidden states (N, d) and of parameters of the head."""
        split = self.split
        assert split is not None
        nats = torch.zeros((), dtype=torch.float32, device=hidden.device)
        sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in adapted]
        of_hidden = []
        count = min(math.ceil(len(hidden) * split.vocabulary * 4 / self.chunk_bytes), len(hidden))
        parts = zip(hidden.tensor_split(count), targets.tensor_split(count), strict=True) if count else ()
        for part, wanted in parts:
            with torch.set_grad_enabled(learning):
                logits = split.logits(part.requires_grad_(learning))
            log_p = log_softmax(logits.detach(), -1, dtype=torch.float32)
            nats -= log_p.gather(1, wanted[:, None]).sum()
            if learning:
                slope = log_p.exp_()  # of the loss over the logits: p, less 1 at the target
                slope[torch.arange(len(wanted), device=wanted.device), wanted] -= 1
                of_part, *of_adapted = torch.autograd.grad(logits, [part, *adapted], slope.to(logits.dtype))
                of_hidden.append(of_part)
                for total, gradient in zip(sums, of_adapted, strict=True):
                    total += gradient
        if not learning:
            return (nats,)
        return nats, torch.cat([hidden[:0], *of_hidden]), *(s.to(p.dtype) for s, p in zip(sums, adapted, strict=True))


class _Joined(torch.autograd.Function):
    """The loss, with gradients that are known already: ``apply(loss, *gradients, *inputs)``."""

    @staticmethod
    def forward(ctx: Any, nats: torch.Tensor, *gradients_and_inputs: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients_and_inputs[: len(gradients_and_inputs) // 2]
        return nats.clone()

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *(None for _ in ctx.gradients), *(gradient * scale for gradient in ctx.gradients)

"""Model calls of benchmarks: token ids in, logits out, the vocabulary head at the positions that are read alone.

The head of a small model is half of its work, and logits of all positions are its largest tensor by far: 8 windows of
1,024 tokens and a vocabulary of 128,256 make 4.2 GB. Whoever names positions (`at`) pays for those, and whoever says
what is kept of their logits (`read`) never holds more than a chunk of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn

from tune.forward.answer_loss import CHUNK_BYTES
from tune.forward.head import SplitModel
from tune.forward.row_attention import Rows, in_rows

#: Positions of a batch: bool (B, T), or N row and N column numbers.
Positions = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
#: Maps the logits (n, vocabulary) of the n positions of a slice of `at` to what is kept of them, (n, ...).
Reader = Callable[[torch.Tensor, slice], torch.Tensor]


class Logits(Protocol):
    """Runs a model on one batch, without a KV cache and without gradients."""

    def __call__(
        self,
        model: nn.Module,
        ids: torch.Tensor,
        mask: torch.Tensor | Rows | None = None,
        *,
        positions: torch.Tensor | None = None,
        at: Positions | None = None,
        read: Reader | None = None,
    ) -> torch.Tensor:
        """Return the logits of a batch, or what `read` keeps of them.

        Args:
            ids: token ids (B, T).
            mask: (B, T), 0 at padding; (B, 1, T, T), handed to the model's attention as it is; or the rows that the
                attention of a packed batch runs in, whose B is 1.
            positions: position ids (B, T); None for those that the model counts itself.
            at: the N positions whose logits are wanted, in order: of a bool (B, T) those that are true, row by row.
            read: called on one chunk of positions after the other, so that logits of all N never exist together. Needs
                `at`. A model that cannot be split into decoder and head still computes all logits at once.

        Returns:
            (B, T, vocabulary) without `at`; with it (N, vocabulary), or what `read` returned, joined to (N, ...).
        """


@dataclass(frozen=True)
class ModelInputs:
    """One batch: token ids (B, T), attention mask (B, T) or (B, 1, T, T) or rows, position ids (B, T)."""

    ids: torch.Tensor
    mask: torch.Tensor | Rows | None = None
    positions: torch.Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        """Return arguments of the model's forward; without `positions` none of them: not every model takes them."""
        mask = None if isinstance(self.mask, Rows) else self.mask
        given = {"input_ids": self.ids, "attention_mask": mask, "use_cache": False}
        return given if self.positions is None else given | {"position_ids": self.positions}

    def key(self) -> Hashable:
        """Return what tells this batch from others: a digest, as a mask (B, 1, T, T) may be larger than the outputs."""
        digest = hashlib.sha256()
        mask = (self.mask.tokens, self.mask.mask) if isinstance(self.mask, Rows) else (self.mask,)
        for tensor in (self.ids, *mask, self.positions):
            digest.update(b"none" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}".encode())
            if tensor is not None:
                digest.update(tensor.contiguous().view(torch.uint8).cpu().numpy().data)
        return digest.digest()


class Reading:
    """The part of a pass over a batch that is read: all logits, or those `at` some positions, by `read`."""

    def __init__(self, model: nn.Module, at: Positions | None, read: Reader | None) -> None:
        assert read is None or at is not None, "what reads chunks of logits needs their positions"
        self._model, self._at, self._read = model, at, read
        self._split = None if at is None else _split(model)

    def states(self, inputs: ModelInputs) -> torch.Tensor:
        """Run the model as far as all positions go: to hidden states (B, T, d), or to logits (B, T, vocabulary)."""
        rows = in_rows(self._model, inputs.mask) if isinstance(inputs.mask, Rows) else nullcontext()
        with rows:
            if self._split is not None:
                return self._split.hidden(**inputs.arguments())
            return self._model(**inputs.arguments()).logits

    def of(self, states: torch.Tensor) -> torch.Tensor:
        """Return what is read, from the `states` that have just been computed."""
        if self._at is None:
            return states
        picked = states[self._at]
        head = _unchanged if self._split is None else self._split.logits
        if self._read is None:
            return head(picked)
        step = max(1, CHUNK_BYTES // (4 * _vocabulary(self._model)))
        slices = [slice(start, start + step) for start in range(0, max(1, len(picked)), step)]
        return torch.cat([self._read(head(picked[rows]), rows) for rows in slices])


#: The decoder of each model that can be split, None of one that cannot: finding out takes passes of the model.
_DECODERS: WeakKeyDictionary[nn.Module, nn.Module | None] = WeakKeyDictionary()


def _split(model: nn.Module) -> SplitModel | None:
    if model not in _DECODERS:
        found = SplitModel.of(model)
        _DECODERS[model] = None if found is None else found.decoder
    decoder = _DECODERS[model]
    return None if decoder is None else SplitModel(model, decoder)


def is_unsplit(model: nn.Module) -> bool:
    """Return whether a model has been found to compute logits at all positions, whichever are read."""
    return model in _DECODERS and _DECODERS[model] is None


def _unchanged(logits: torch.Tensor) -> torch.Tensor:
    return logits


def _vocabulary(model: nn.Module) -> int:
    config: Any = model.config
    return int(config.get_text_config().vocab_size)


@torch.no_grad()
def plain_logits(
    model: nn.Module,
    ids: torch.Tensor,
    mask: torch.Tensor | Rows | None = None,
    *,
    positions: torch.Tensor | None = None,
    at: Positions | None = None,
    read: Reader | None = None,
) -> torch.Tensor:
    """Run the model itself, as `Logits` says."""
    reading = Reading(model, at, read)
    return reading.of(reading.states(ModelInputs(ids, mask, positions)))

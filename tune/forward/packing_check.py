"""One check at the start of a run: packed and padded, a model must compute the same of two examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from macdrop.errors import MacDropError
from macdrop.families import bare_model
from macdrop.probe import evaluating
from tune.forward.gathered_head import forget_order
from tune.forward.packed_attention import PackedAttention

#: Tokens of the two examples, at least; the second one goes beyond a sliding window where an example of the run does.
#: It is the one that stands apart from the row's start, and that could see another.
LENGTHS = (7, 12)
#: Positions at the end of each example whose logits are compared with padded ones: where a window has an effect.
COMPARED = 4
#: Largest relative difference of the logits, as vectors: the order of sums in fp32, some roundings in half precision.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
#: Entries of a config that limit how far a token sees, in tokens.
WINDOWS = ("sliding_window", "attention_chunk_size", "attention_window_size", "window_size")


def check_packing(
    model: torch.nn.Module, device: torch.device | str, tokens: np.ndarray, longest: int
) -> PackedAttention:
    """Return the attention that runs packed rows of a model, proven to compute what padded batches do.

    Every rank must call it under ZeRO-3. Dropout is off meanwhile.

    Args:
        model: a causal language model, with an adapter or without, or the DeepSpeed engine around it.
        device: where token ids go.
        tokens: ids to make two examples of, int64 (N,); fewer than these need are repeated.
        longest: tokens of the longest example of the run.

    Raises:
        MacDropError: the model cannot run packed rows; the message says why, as the end of a sentence.
    """
    bare = bare_model(getattr(model, "module", model))
    if getattr(bare, "_is_stateful", False):
        raise MacDropError("it carries a state from token to token, which examples of a row would share")
    attention = PackedAttention(model)
    first, second = (torch.from_numpy(ids).to(device) for ids in _two_examples(tokens, _lengths(bare, longest)))
    with evaluating(model):
        try:
            padded = _padded(model, first, second)
            forget_order(model)
            packed = _packed(model, attention, first, second)
            forget_order(model)
            beside_another = _packed(model, attention, first.flip(0).roll(1), second)
            forget_order(model)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise MacDropError(f"its forward pass of a packed row ends with {type(error).__name__}: {error}") from error
    allowed = TOLERANCE[bare.dtype]  # type: ignore[index]
    found = _difference(padded, torch.cat([part[-COMPARED:] for part in packed]))
    if not found <= allowed:
        raise MacDropError(f"its logits of a packed row differ from those of a padded batch by {found:.2g} (relative)")
    found = _difference(packed[1], beside_another[1])
    if not found <= allowed:
        raise MacDropError("its logits of an example change with the example before it in a packed row")
    return attention


def _lengths(bare: torch.nn.Module, longest: int) -> tuple[int, int]:
    """Return the lengths of the two examples: windows that no example of the run is longer than never matter."""
    config: Any = bare.config
    text = config.get_text_config()
    windows = [size for name in WINDOWS if isinstance(size := getattr(text, name, None), int) and size < longest]
    return LENGTHS[0], max([LENGTHS[1], *(size + COMPARED for size in windows)])


def _two_examples(tokens: np.ndarray, lengths: Sequence[int]) -> list[np.ndarray]:
    ids = np.resize(tokens, sum(lengths)).astype(np.int64)
    return [ids[: lengths[0]], ids[lengths[0] :]]


def _padded(model: torch.nn.Module, *examples: torch.Tensor) -> torch.Tensor:
    """Return the last logits of each example (2 * COMPARED, V), in a batch padded on the right."""
    input_ids = torch.nn.utils.rnn.pad_sequence(list(examples), batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(each) for each in examples], batch_first=True)
    logits = model(input_ids=input_ids, attention_mask=mask).logits
    return torch.cat([row[len(each) - COMPARED : len(each)] for row, each in zip(logits, examples, strict=True)])


def _packed(model: torch.nn.Module, attention: PackedAttention, *examples: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the logits (n, V) of each example in a packed row."""
    lengths = [len(each) for each in examples]
    positions = torch.cat([torch.arange(length, device=examples[0].device) for length in lengths])
    with attention.segments(lengths, examples[0].device) as arguments:
        (logits,) = model(input_ids=torch.cat(examples)[None], position_ids=positions[None], **arguments).logits
    return logits.split(lengths)


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).norm() / one.float().norm())

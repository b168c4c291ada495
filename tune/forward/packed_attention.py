"""Attention within the examples of a packed row, which costs the sum of their squares and not the square of the row.

While a row is in force the model's configs name attention functions of ours. They run the model's own function once
per segment with the segment's own mask, so that soft caps, sinks and windows stay the model's; or, where the kernel
takes bounds of segments (FlashAttention, torch's varlen attention on CUDA), that kernel once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from macdrop.errors import MacDropError
from tune.forward.attention_functions import SPLIT, AttentionNames, own_function

#: Implementations that transformers itself gives the bounds of segments.
BOUNDED = ("flash_attention_2", "flash_attention_3", "flash_attention_4")
_PREFIX = "segments_of_"


@dataclass(frozen=True)
class _Segments:
    lengths: tuple[int, ...]
    bounds: torch.Tensor  # int32 (segments + 1,)


#: The row in force. Not a context variable: autograd recomputes checkpointed layers in threads of its own.
_in_force: _Segments | None = None


class PackedAttention:
    """Switches a model between its own attention and that of packed rows.

    model: a causal language model, with an adapter or without; under DeepSpeed the engine's ``module``.

    Raises `MacDropError` for an implementation that packed rows are not known for.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._named = AttentionNames(model, (*SPLIT, *BOUNDED))
        self._bounded = not self._named.names.isdisjoint(BOUNDED)

    @contextmanager
    def segments(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> Iterator[dict[str, Any]]:
        """Run rows of segments of these lengths; yields further arguments for the model's forward pass.

        The block spans forward AND backward pass: gradient checkpointing recomputes attention in the latter.
        """
        global _in_force
        assert _in_force is None, "one packed row at a time"
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        _in_force = _Segments(tuple(lengths), bounds)
        # With a cache transformers does not look for segments in the positions.
        arguments: dict[str, Any] = {"use_cache": False}
        if self._bounded:
            arguments |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
            arguments |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
        try:
            with self._named.replaced(_PREFIX):
                yield arguments
        finally:
            _in_force = None


class SegmentMasks:
    """The masks of a row's segments, made when they are first needed; passes through a model as its mask would."""

    def __init__(self, make: Callable[[int, int], torch.Tensor | None], local_size: int | None) -> None:
        assert _in_force is not None, "a packed row is in force"
        self.local_size = local_size
        self._make, self._lengths = make, _in_force.lengths

    @functools.cached_property
    def each(self) -> list[torch.Tensor | None]:
        """One mask (1, 1, n, n) per segment of n tokens; None where causal attention needs none."""
        stops = torch.tensor(self._lengths).cumsum(0).tolist()
        return [self._make(stop - length, length) for stop, length in zip(stops, self._lengths, strict=True)]


def _mask(original: str, **arguments: Any) -> SegmentMasks:
    """Stand in for the mask function of `original`: remember how to make the masks of the segments."""
    local_size, own = arguments.get("local_size"), arguments["mask_function"]
    make_mask = ALL_MASK_ATTENTION_FUNCTIONS[original]
    common = {**arguments, "attention_mask": None, "batch_size": 1}

    def make(start: int, length: int) -> torch.Tensor | None:
        shape = {"q_length": length, "kv_length": length}
        if not arguments.get("use_vmap") and (local_size is None or length < local_size):
            offsets = {"q_offset": 0, "kv_offset": 0}
            plain = {"mask_function": causal_mask_function, "allow_is_causal_skip": True}
            return make_mask(**{**common, **shape, **offsets, **plain})
        # The model's own pattern at the row's own places: it knows of the segments by their positions.
        offsets = {"q_offset": start, "kv_offset": start}
        return make_mask(**{**common, **shape, **offsets, "mask_function": own, "allow_is_causal_skip": False})

    return SegmentMasks(make, local_size)


def _attend(
    original: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: SegmentMasks | None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each segment of query, key and value (1, heads, N, head size); returns (1, N, heads, head size)."""
    assert _in_force is not None, "the model's configs name this function only while a row is in force"
    if not isinstance(attention_mask, SegmentMasks):
        raise MacDropError("its attention does not use the mask that transformers makes")
    if original == "sdpa" and _has_varlen_kernel(query, value, attention_mask, arguments):
        return _varlen(query, key, value, arguments), None
    function = own_function(original, module)
    lengths = list(_in_force.lengths)
    parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), attention_mask.each, strict=True)
    outputs = [function(module, q, k, v, mask, **arguments)[0] for q, k, v, mask in parts]
    return torch.cat(outputs, dim=1), None


# --- torch's varlen attention ---


@functools.cache
def _varlen_attn() -> Callable[..., Any] | None:
    """Return torch's variable-length attention; releases before 2.10 have none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def _has_varlen_kernel(
    query: torch.Tensor, value: torch.Tensor, masks: SegmentMasks, arguments: dict[str, Any]
) -> bool:
    """Return whether one call of the varlen kernel computes what the model's sdpa would."""
    if not query.is_cuda or query.dtype not in (torch.float16, torch.bfloat16) or _varlen_attn() is None:
        return False
    plain = not arguments.get("dropout") and all(
        arguments.get(name) is None for name in ("softcap", "s_aux", "position_bias")
    )
    same_window = masks.local_size == arguments.get("sliding_window")  # sdpa follows the mask, the kernel the argument
    size = query.shape[-1]
    return plain and same_window and size == value.shape[-1] and size % 8 == 0 and size <= 256


def _varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    assert _in_force is not None, "the caller has checked it"
    kernel = _varlen_attn()
    assert kernel is not None, "the caller has checked it"
    longest, window = max(_in_force.lengths), arguments.get("sliding_window")
    output = kernel(
        *(tensor[0].transpose(0, 1) for tensor in (query, key, value)),  # (N, heads, head size)
        _in_force.bounds,
        _in_force.bounds,
        longest,
        longest,
        scale=arguments.get("scaling"),
        # A window of W tokens is the token itself and the W - 1 before it.
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[None]


for _name in SPLIT:
    AttentionInterface.register(_PREFIX + _name, functools.partial(_attend, _name))
    AttentionMaskInterface.register(_PREFIX + _name, functools.partial(_mask, _name))

"""Masks on the outputs of a frozen linear layer, and on what PEFT's DoRA computes from its weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from macdrop.gather import read_rows
from macdrop.masking.layout import Layout
from macdrop.structure import Projection


class OutputMask:
    """Masks k rows of a linear layer by recomputing its k output features (2 k of a fused gate and up).

    The features are written in place of the originals, ``x @ (rows * mask).T + bias``; never as a difference to them,
    which cancels in bf16. The rows are copied once, so that no step needs the weight matrix: it may be partitioned.
    Where tokens have different masks, each range of tokens with one mask is computed on its own.
    """

    one_mask_at_a_time = False

    def __init__(
        self, projections: Sequence[Projection], indices: Sequence[int], on_use: Callable[[], None], name: str
    ) -> None:
        """on_use: called at the first use in a micro-step. name: of the layer, for messages."""
        self.module = projections[0].module
        self.matrices = len(projections)
        self.used = False
        self._name = name
        self._wrapper = projections[0].wrapper
        self._on_use = on_use
        self._features = torch.tensor([f for p in projections for f in p.features(indices)])
        self._rows = torch.cat([read_rows(p, indices) for p in projections])
        self.rows = len(self._features)
        self._layout: Layout | None = None
        self._keeps: Mapping[int, torch.Tensor] = {}
        self._masked: dict[tuple[int, torch.device, torch.dtype], torch.Tensor] = {}
        self._handle = self.module.register_forward_hook(self._replace, prepend=True)
        self._dora = [_DoraPatch(layer, self) for layer in self._dora_layers()]

    @property
    def fewest_entries(self) -> int | None:
        """The non-zero entries of the row that has the fewest of them; None where no DoRA divides by its norm."""
        entries = (self._rows != 0).sum(dim=1)
        return int(entries[entries > 0].min()) if self._dora and bool(entries.any()) else None

    def open(self, keeps: Mapping[int, torch.Tensor], layout: Layout) -> None:
        """Mask by `keeps`, a boolean (k, d) for each mask of `layout`, from now on; the same for gate and up."""
        if [patch.layer for patch in self._dora] != self._dora_layers():
            raise RuntimeError("a DoRA adapter was added or removed after attach(): call detach() and attach() again")
        self._keeps, self._layout = keeps, layout
        self.used = False

    def close(self) -> None:
        self._layout, self._keeps = None, {}
        self._masked.clear()

    def remove(self) -> None:
        self.close()
        self._handle.remove()
        for patch in reversed(self._dora):
            patch.remove()

    def masks(self, module: nn.Module) -> bool:
        """Return whether `module` (the linear or a DoRA layer of it) must be masked in this forward pass."""
        return self._layout is not None and module.training

    def ranges(self, x: torch.Tensor) -> list[tuple[int, int, int]]:
        """Return (start, stop, mask) of the tokens of `x` (..., d), flattened."""
        assert self._layout is not None, "only while a mask is in force"
        return self._layout.ranges(x.numel() // x.shape[-1], self._name)

    def features(self, device: torch.device) -> torch.Tensor:
        """Return the output features (n,) that are masked."""
        self._features = self._features.to(device)
        return self._features

    def masked_rows(self, mask: int, like: torch.Tensor) -> torch.Tensor:
        """Return the rows (n, d) under one mask, on the device and in the precision of `like`."""
        key = (mask, like.device, like.dtype)
        if key not in self._masked:
            keep = self._keeps[mask].to(like)
            self._masked[key] = self._rows.to(like) * keep.repeat(self.matrices, 1)
        return self._masked[key]

    def replace(self, output: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`output` (..., out) of the layer for the input `x` (..., d), with the features of the masked rows."""
        features, ranges = self.features(x.device), self.ranges(x)
        bias = None if bias is None else bias[features]
        if len(ranges) == 1:
            masked = F.linear(x, self.masked_rows(ranges[0][2], x), bias)
        else:
            flat = x.reshape(-1, x.shape[-1])
            pieces = [F.linear(flat[start:stop], self.masked_rows(mask, x), bias) for start, stop, mask in ranges]
            masked = torch.cat(pieces).view(*x.shape[:-1], self.rows)
        masked = masked.to(output.dtype)
        if output._is_view():
            return output.index_copy(-1, features, masked)
        return output.index_copy_(-1, features, masked)

    def _replace(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        if not self.masks(module):
            return None
        if not self.used:
            self.used = True
            self._on_use()
        return self.replace(output, args[0], getattr(module, "bias", None))

    def _dora_layers(self) -> list[nn.Module]:
        layers, wrapper = [], self._wrapper
        while wrapper is not None:
            magnitudes = getattr(wrapper, "lora_magnitude_vector", None) or {}
            layers += [layer for layer in magnitudes.values() if hasattr(layer, "get_weight_norm")]
            wrapper = getattr(wrapper, "base_layer", None)
        return layers


class _DoraPatch:
    """Makes one DoRA layer of PEFT see the masked rows; `remove` puts its own functions back.

    DoRA reads the base weight outside the base layer's forward pass in two places: for the norm that divides the
    magnitude, and, when LoRA dropout gives the adapter another input, for a base result of its own.
    """

    def __init__(self, layer: nn.Module, mask: OutputMask) -> None:
        self.layer, self._mask = layer, mask
        self._before = {name: layer.__dict__.get(name) for name in ("get_weight_norm", "forward")}
        self._norm: Callable[..., torch.Tensor] = getattr(layer, "get_weight_norm")  # noqa: B009 (PEFT's own)
        self._forward = layer.forward
        #: Of the forward pass that runs now: the ranges of its tokens, and how many times too large the result of
        #: each is in the features of the masked rows (ranges, n), where PEFT has divided by one norm for all.
        self._ranges: list[tuple[int, int, int]] = []
        self._shrink: torch.Tensor | None = None
        vars(layer).update(get_weight_norm=self.get_weight_norm, forward=self.forward)

    def remove(self) -> None:
        for name, function in self._before.items():
            if function is None:
                delattr(self.layer, name)
            else:
                setattr(self.layer, name, function)

    def get_weight_norm(
        self, weight: torch.Tensor, lora_weight: torch.Tensor, scaling: float, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        norm = self._norm(weight, lora_weight, scaling, *args, **kwargs)
        if not self._ranges:
            return norm
        features = self._mask.features(weight.device)
        delta = scaling * lora_weight[features]
        rows = [torch.linalg.norm(self._mask.masked_rows(mask, weight) + delta, dim=1) for _, _, mask in self._ranges]
        # A row of which nothing is left gives 0 and no gradient: PEFT divides the magnitude by what stands here.
        masked = torch.stack(rows)
        masked = masked.masked_fill(masked == 0, torch.inf).to(norm.dtype)
        if len(masked) == 1:
            return norm.index_copy(0, features, masked[0])
        self._shrink = (norm[features] / masked).detach()
        return norm

    def forward(
        self, x: torch.Tensor, *, base_layer: nn.Module, base_result: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        if not self._mask.masks(self.layer):
            return self._forward(x, base_layer=base_layer, base_result=base_result, **kwargs)
        self._ranges = self._mask.ranges(x)
        bias: torch.Tensor | None = getattr(base_layer, "bias", None)
        if base_result is None:
            from peft.utils.integrations import dequantize_module_weight

            weight = dequantize_module_weight(base_layer).to(x.dtype)
            weight = weight.T if self.layer.fan_in_fan_out else weight
            # PEFT subtracts the bias from a base result that it is given.
            bias = None if bias is None else bias.to(x.dtype)
            base_result = self._mask.replace(F.linear(x, weight, bias), x, bias)
        try:
            result = self._forward(x, base_layer=base_layer, base_result=base_result, **kwargs)
            return result if len(self._ranges) == 1 else self._by_range(result, base_result, bias)
        finally:
            self._ranges, self._shrink = [], None

    def _by_range(self, result: torch.Tensor, base_result: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Divide each range of tokens by its own norms: ``result + base`` is the whole layer over the common one."""
        features = self._mask.features(result.device)
        base = base_result[..., features]
        base = base if bias is None else base - bias[features]
        assert self._shrink is not None, "PEFT asks for the norm in every forward pass"
        counts = torch.tensor([stop - start for start, stop, _ in self._ranges], device=result.device)
        factors = self._shrink.repeat_interleave(counts, 0).view(base.shape)
        own = (result[..., features] + base) * factors - base
        return result.index_copy_(-1, features, own.to(result.dtype))

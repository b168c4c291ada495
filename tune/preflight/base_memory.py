"""The bytes of a base model's weights, from its shapes alone: plain, or quantised while it is loaded."""

from __future__ import annotations

import math
from typing import Any

from transformers import PreTrainedModel

from macdrop.quantised import quantised_layers, stored_bytes
from macdrop.structure import parameter_shape
from tune.config.run_spec import TrainSpec

#: Dequantised copies of a layer's weight that one forward or backward pass of it holds at a time: the weight as it is
#: computed with, and for DoRA's norm the same with the adapter added.
COPIES = 2


def base_bytes(outline: PreTrainedModel, spec: TrainSpec) -> int:
    """Return the bytes of the weights of a model's outline as a spec loads them."""
    size = 2 if spec.bf16 else 4
    matrices = _quantised(outline, spec)
    whole = sum(parameter.numel() for parameter in outline.parameters())
    plain = whole - sum(math.prod(shape) for shape in matrices)
    bits = spec.quantization_bit
    return plain * size + sum(stored_bytes(outputs, inputs, bits) for outputs, inputs in matrices if bits)


def dequantised_bytes(outline: PreTrainedModel, spec: TrainSpec) -> int:
    """Return the bytes of dequantised weights that training holds at a time, beside the base; 0 for a plain one."""
    size = 2 if spec.bf16 else 4
    return COPIES * size * max(map(math.prod, _quantised(outline, spec)), default=0)


def _quantised(outline: PreTrainedModel, spec: TrainSpec) -> list[tuple[int, ...]]:
    """List the shapes (out, in) of the matrices that are quantised."""
    if spec.quantization_bit is None:
        return []
    modules: list[Any] = [outline.get_submodule(name) for name in quantised_layers(outline)]
    shapes = [(parameter_shape(module.weight), hasattr(module, "out_features")) for module in modules]
    return [shape if is_linear else shape[::-1] for shape, is_linear in shapes]

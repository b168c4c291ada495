"""The trained tensors of an adapter by what they are: found in PEFT's layers, not by words in their names."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from peft.tuners.lora.layer import Embedding, LoraLayer, ParamWrapper
from torch import nn


class Factor(StrEnum):
    """The part of an adapter that a tensor is: the update is B A, and DoRA scales its rows by magnitudes."""

    A = "A"
    B = "B"
    MAGNITUDE = "magnitude"


class Base(StrEnum):
    """The kind of layer that a tensor adapts; experts share one tensor for each factor."""

    LINEAR = "linear"
    EMBEDDING = "embedding"
    CONVOLUTION = "convolution"
    EXPERTS = "experts"


@dataclass(frozen=True)
class AdapterTensor:
    """A trained tensor; `layer` is the last part of the name of the layer that it adapts, such as ``q_proj``."""

    layer: str
    factor: Factor
    shape: tuple[int, ...]
    base: Base = Base.LINEAR

    @property
    def kind(self) -> str:
        """Name of the kind of tensor: `q_proj/A`."""
        return f"{self.layer}/{self.factor}"

    @property
    def is_matrix(self) -> bool:
        """True for a factor of one linear layer."""
        return self.is_linear and self.factor != Factor.MAGNITUDE

    @property
    def is_linear(self) -> bool:
        return self.base == Base.LINEAR


#: Attributes of PEFT's layers that hold tensors by adapter -> what they are.
_HOLDERS = {
    "lora_A": Factor.A,
    "lora_B": Factor.B,
    "lora_embedding_A": Factor.A,
    "lora_embedding_B": Factor.B,
    "lora_magnitude_vector": Factor.MAGNITUDE,
}


def adapter_tensors(model: nn.Module) -> dict[str, AdapterTensor]:
    """Return the trained tensors of a PEFT model by their parameters' names; on torch's meta device as well.

    Raises:
        NotImplementedError: a trained parameter is no tensor of a LoRA layer.
    """
    found: dict[int, AdapterTensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            _add(found, name, module)
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if id(parameter) not in found:
                raise NotImplementedError(f"{name} is no tensor of a LoRA adapter.")
            tensors[name] = found[id(parameter)]
    return tensors


def _add(found: dict[int, AdapterTensor], name: str, module: Any) -> None:
    layer = module.parameter_name if isinstance(module, ParamWrapper) else name.rsplit(".", 1)[-1]
    for attribute, factor in _HOLDERS.items():
        held: Any = getattr(module, attribute, {})
        for each in held.values():
            tensor: torch.Tensor = each if isinstance(each, nn.Parameter) else each.weight
            shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
            found[id(tensor)] = AdapterTensor(layer, factor, shape, _base(module))


def _base(module: Any) -> Base:
    if isinstance(module, ParamWrapper):
        return Base.EXPERTS
    if isinstance(module, Embedding):
        return Base.EMBEDDING
    return Base.CONVOLUTION if "Conv" in type(module).__name__ else Base.LINEAR

"""An optimizer as the engine sees it: what it keeps for a tensor, and the object that DeepSpeed steps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tune.config.run_spec import TrainSpec
from tune.training.checkpoint import AdapterState
from tune.training.optimizers.adapter_tensors import AdapterTensor, Base, Factor

#: Keys of a parameter group: what its learning rate is multiplied by, and whether LoRA+ chooses that.
SCALE, FASTER = "lr_scale", "is_faster"


@dataclass(frozen=True)
class StateTensor:
    """Shape and type of a tensor that an optimizer keeps."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def zeros(self, device: torch.device | str = "cpu") -> torch.Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=device)


class Method(ABC):
    """An optimizer with the settings of a spec."""

    #: Whether every entry is updated from its own gradients alone, so that flat parts of tensors will do.
    elementwise = True
    #: Parts of its state that are weights of their own, and no memory of gradients.
    points: tuple[str, ...] = ()

    def __init__(self, spec: TrainSpec) -> None:
        self.spec = spec

    @abstractmethod
    def layout(self, tensor: AdapterTensor) -> dict[str, StateTensor]:
        """Return what is kept for a tensor besides itself, by the library's names."""

    @abstractmethod
    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer | None:
        """Return the optimizer of parameter groups (`groups`); None where DeepSpeed builds it from its configuration.

        Raises:
            ConfigError: its library is missing.
        """

    def groups(
        self, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, AdapterTensor]
    ) -> list[dict[str, Any]]:
        """Split the adapter's parameters into groups of one setting each, in their order."""
        found: dict[tuple[Any, ...], dict[str, Any]] = {}
        for name, parameter in parameters.items():
            settings = self.settings(tensors[name])
            group = found.setdefault(tuple(settings.items()), {"params": [], **settings})
            group["params"].append(parameter)
        return list(found.values())

    def settings(self, tensor: AdapterTensor) -> dict[str, Any]:
        """Return what tells the group of a tensor from others, for all fine-tunings of an engine."""
        return {} if self.spec.canonical().loraplus_lr_ratio is None else {FASTER: is_faster(tensor)}

    def fresh(self, group: dict[str, Any], master: torch.Tensor, tensor: AdapterTensor) -> dict[str, Any]:
        """Return the live state of a master before the first step.

        group: the parameter group that it is in. tensor: what it is; under ZeRO a flat part of several.
        """
        state: dict[str, Any] = {part: kept.zeros(master.device) for part, kept in self.layout(tensor).items()}
        return {"step": torch.tensor(0.0, dtype=torch.float32), **state}

    def initial(self, tensor: AdapterTensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the state of a whole tensor, as checkpoints keep it, before the first step from `weight`."""
        return {part: kept.zeros() for part, kept in self.layout(tensor).items()}

    def masters(self, state: AdapterState) -> dict[str, torch.Tensor]:
        """Return the masters of a state by name: the point that the next gradient is taken at."""
        return state.weights

    def result(
        self, masters: dict[str, torch.Tensor], state: dict[str, dict[str, torch.Tensor]], group: dict[str, Any]
    ) -> AdapterState:
        """Return the state of masters and of what the optimizer keeps beside them; its weights are the adapter's.

        group: a live parameter group, with the settings of the fine-tuning; those of `spec` are the engine's first.
        """
        return AdapterState(masters, state)

    def begin(self, groups: list[dict[str, Any]], rate: Callable[[int], float], step: int) -> None:
        """Put the spec's settings, and what depends on earlier learning rates, into the live groups.

        rate: the learning rate at a step. step: the steps that are done.
        """
        for group in groups:
            group[SCALE] = self.spec.loraplus_lr_ratio if group.get(FASTER) else 1.0
            group["betas"] = (self.spec.adam_beta1, self.spec.adam_beta2)
            group["eps"] = self.spec.adam_epsilon
            group["weight_decay"] = self.spec.weight_decay


def is_faster(tensor: AdapterTensor) -> bool:
    """Return whether LoRA+ trains a tensor at its higher rate, as in PEFT: magnitudes, and B except on embeddings."""
    return len(tensor.shape) == 1 or (tensor.factor == Factor.B and tensor.base != Base.EMBEDDING)


def state_bytes(method: Method, tensors: Mapping[str, AdapterTensor]) -> int:
    """Return the bytes of optimizer state for all tensors of an adapter, over all ranks."""
    return sum(kept.bytes for tensor in tensors.values() for kept in method.layout(tensor).values())


def relative_state(method: Method) -> float:
    """Return the bytes of optimizer state over those of a factor in fp32, roughly."""
    tensor = AdapterTensor("", Factor.A, (16, 4096))
    return sum(kept.bytes for kept in method.layout(tensor).values()) / StateTensor(tensor.shape).bytes

"""Step-0 values of an adapter's tensors: drawn as PEFT does, each from a generator of its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from macdrop.errors import ConfigError
from tune.config.train.adapter_keys import InitLoraWeights
from tune.training.lora import is_drawn, start
from tune.training.optimizers.adapter_tensors import AdapterTensor, Factor


def initial_weights(
    tensors: Mapping[str, AdapterTensor],
    magnitudes: Mapping[str, torch.Tensor],
    *,
    seed: int,
    rank: int,
    init: InitLoraWeights = True,
) -> dict[str, torch.Tensor]:
    """Return the weights that a fine-tuning of a seed starts with, in fp32.

    Generators are keyed by seed and the place of a tensor's name, so a draw depends on nothing else.

    magnitudes: DoRA's, which are norms of the base weights. init: as `init_lora_weights`, which `check_init` allowed.
    """
    weights: dict[str, torch.Tensor] = {}
    partners = _partners(tensors)
    for number, name in enumerate(sorted(tensors)):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        if name in magnitudes:
            weights[name] = magnitudes[name].cpu().clone()
        elif init == "orthogonal":
            if name in partners:
                other = partners[name]
                weights[name], weights[other] = _orthogonal(tensors[name].shape, tensors[other].shape, generator)
        elif init == "gaussian" and "lora_A" in name:
            weights[name] = torch.randn(tensors[name].shape, generator=generator) / rank
        else:
            weights[name] = start(name, tensors[name].shape, generator)
    return weights


def check_init(tensors: Mapping[str, AdapterTensor], init: InitLoraWeights) -> None:
    """Refuse an initialisation that PEFT does not have for one of the layers.

    Raises:
        ConfigError: a layer other than a linear one would be orthogonal.
    """
    other = next((tensor for tensor in tensors.values() if not tensor.is_linear), None)
    if init == "orthogonal" and other is not None:
        raise ConfigError(
            f"init_lora_weights: orthogonal is for linear layers, and lora_target has {other.layer} ({other.base}). "
            "Leave the layer out of lora_target, or choose true or gaussian."
        )


def _partners(tensors: Mapping[str, AdapterTensor]) -> dict[str, str]:
    """Return the name of the B that belongs to each A."""
    found = {name: name.replace(".lora_A.", ".lora_B.") for name, each in tensors.items() if each.factor == Factor.A}
    return {a: b for a, b in found.items() if is_drawn(a) and b in tensors}


def _orthogonal(
    a: tuple[int, ...], b: tuple[int, ...], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (r, in) and B (out, r) with rows and columns in orthogonal halves of r dimensions: B A = 0."""
    rank = a[0]
    q, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator))
    odd, even = q[0::2], q[1::2]
    of_a = torch.randn(a[1], rank // 2, generator=generator).mm(odd).T / 10.0
    of_b = torch.randn(rank // 2, b[0], generator=generator).T.mm(even) / 10.0
    return of_a.contiguous(), of_b.contiguous()

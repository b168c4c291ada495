"""The SNR of second moments along dimensions of a tensor, SNR_K(V) = E[(mean_K V)^2 / Var_K V] (arXiv 2503.01843)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from tune.config.train.optimizer_rules import SlimRule
from tune.training.optimizers.adapter_tensors import AdapterTensor
from tune.training.optimizers.slim_adam import dimensions
from tune.training.optimizers.snr_record import CHOICES, KindSnr, TensorsSnr, rule_for

#: SNR of second moments that are equal, whose variance is 0.
LARGEST = 1e12


def snr(second: torch.Tensor, rule: SlimRule) -> float | None:
    """Return the SNR of second moments along the dimensions of a rule, averaged over the other ones; in fp64.

    Variance is that of the population. Slices without any gradient do not count.

    second: of one tensor, [out, in, ...]. None: there is one entry along the dimensions, or no gradient.
    """
    over = dimensions(rule, second.dim())
    if math.prod(second.shape[number] for number in over) < 2 or (rule == "both" and second.dim() == 1):
        return None
    second = second.double()
    means = second.mean(over, keepdim=True)
    variances = (second - means).square().mean(over, keepdim=True)
    reached = means > 0
    if not bool(reached.any()):
        return None
    squares = means.square()
    ratios = squares / torch.maximum(variances, squares / LARGEST)
    return float(ratios[reached].mean())


class SnrMeter:
    """Averages of SNRs over steps, for each tensor of an adapter."""

    def __init__(self, tensors: Mapping[str, AdapterTensor]) -> None:
        self._tensors = tensors
        self._found: dict[tuple[str, SlimRule], list[float]] = {}

    def add(self, second: Mapping[str, torch.Tensor]) -> None:
        """Count the second moments after a step, by the tensors' names."""
        for name in self._tensors:
            for rule in CHOICES:
                value = snr(second[name], rule)
                if value is not None:
                    self._found.setdefault((name, rule), []).append(value)

    def kinds(self) -> dict[str, KindSnr]:
        """Return the averages over the layers of each kind of tensor, with its rule."""
        found = {}
        for kind, names in self._grouped(lambda tensor: tensor.kind).items():
            values = self._averages(names)
            rule = rule_for({choice: values[choice] for choice in CHOICES})
            kept = sum(_kept(self._tensors[name].shape, rule) for name in names)
            found[kind] = KindSnr(**values, rule=rule, kept=kept)
        return found

    def factors(self) -> dict[str, TensorsSnr]:
        """Return the averages over all tensors of each factor: A, B, and DoRA's magnitudes."""
        groups = self._grouped(lambda tensor: tensor.factor.value)
        return {factor: TensorsSnr(**self._averages(names)) for factor, names in groups.items()}

    def _grouped(self, key: Any) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for name in sorted(self._tensors, key=lambda name: (key(self._tensors[name]), name)):
            groups.setdefault(key(self._tensors[name]), []).append(name)
        return groups

    def _averages(self, names: Iterable[str]) -> dict[str, Any]:
        names = list(names)
        means = {
            rule: [_mean(self._found[name, rule]) for name in names if (name, rule) in self._found] for rule in CHOICES
        }
        entries = sum(math.prod(self._tensors[name].shape) for name in names)
        averages = {str(rule): _mean(values) if values else None for rule, values in means.items()}
        return {"tensors": len(names), "entries": entries, **averages}


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _kept(shape: tuple[int, ...], rule: SlimRule) -> int:
    over = dimensions(rule, len(shape))
    return math.prod(size for number, size in enumerate(shape) if number not in over)

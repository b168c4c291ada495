"""SlimAdam (arXiv 2503.01843): AdamW whose second moments are means over some dimensions of a tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from macdrop.errors import ConfigError, nearest
from tune.config.train.optimizer_rules import AUTO, Measured, SlimRule
from tune.training.optimizers.adamw import MOMENTS
from tune.training.optimizers.adapter_tensors import AdapterTensor
from tune.training.optimizers.method import Method, StateTensor

#: Key of a parameter group: the dimensions K that second moments are means over; empty for AdamW.
OVER = "mean_over"


class SlimAdam(Method):
    """SlimAdam by rules for kinds of tensors (`slimadam_rules`); a kind without a rule is AdamW's."""

    elementwise = False

    @property
    def rules(self) -> Mapping[str, SlimRule]:
        """Return the rules; none where they are yet to be measured, which is AdamW and the most that may be kept."""
        rules = self.spec.slimadam_rules
        return {} if rules is None or rules == AUTO else rules

    def layout(self, tensor: AdapterTensor) -> dict[str, StateTensor]:
        over = dimensions(rule_of(tensor, self.rules), len(tensor.shape))
        slim = tuple(1 if number in over else size for number, size in enumerate(tensor.shape))
        return {MOMENTS[0]: StateTensor(tensor.shape), MOMENTS[1]: StateTensor(slim)}

    def settings(self, tensor: AdapterTensor) -> dict[str, Any]:
        rule = rule_of(tensor, self.rules)
        return {**super().settings(tensor), OVER: dimensions(rule, len(tensor.shape))}

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return SlimAdamW(groups, lr=self.spec.learning_rate)


def check_rules(tensors: Mapping[str, AdapterTensor], rules: Mapping[str, SlimRule] | Measured | None) -> None:
    """Refuse rules for tensors that the adapter does not have; those that will be measured are for all that it has.

    Raises:
        ConfigError: a rule names no kind of tensor.
    """
    kinds = sorted({each.kind for each in tensors.values()} | {each.factor.value for each in tensors.values()})
    for name in {} if rules is None or rules == AUTO else rules:
        if name not in kinds:
            raise ConfigError(
                f"slimadam_rules names {name!r}, and the adapter has no such tensors.{nearest(name, kinds)} "
                f"Kinds: {', '.join(kinds)}."
            )


def rule_of(tensor: AdapterTensor, rules: Mapping[str, SlimRule]) -> SlimRule:
    """Return the rule of a tensor: that of its kind (`q_proj/A`), else that of its factor (`A`), else none."""
    general: SlimRule = rules.get(tensor.factor.value, "none")
    return rules.get(tensor.kind, general)


def dimensions(rule: SlimRule, count: int) -> tuple[int, ...]:
    """Return the dimensions of a rule in a tensor of `count` dimensions, [out, in, ...]: K."""
    outer, inner = (0,), tuple(range(1, count))
    return {"none": (), "fan_out": outer, "fan_in": inner, "both": outer + inner}[rule]


class SlimAdamW(torch.optim.Optimizer):
    """Groups with dimensions to take means over are updated here, the others by torch's AdamW itself."""

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0})
        whole = [group for group in self.param_groups if not group[OVER]]
        self._adamw = torch.optim.AdamW([dict(group) for group in whole], lr=lr) if whole else None
        if self._adamw is not None:
            for group, theirs in zip(whole, self._adamw.param_groups, strict=True):
                for key, value in theirs.items():
                    group.setdefault(key, value)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        if self._adamw is not None:
            # DeepSpeed puts its own masters into the groups.
            self._adamw.param_groups = [group for group in self.param_groups if not group[OVER]]
            self._adamw.state = self.state
            self._adamw.step()
        for group in self.param_groups:
            if group[OVER]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter, group)

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state, gradient, over = self.state[parameter], parameter.grad, group[OVER]
        assert gradient is not None, "checked by the caller"
        if not state:
            state["step"] = torch.tensor(0.0)
            state[MOMENTS[0]] = torch.zeros_like(parameter)
            state[MOMENTS[1]] = torch.zeros_like(parameter).mean(over, keepdim=True)
        state["step"] += 1
        step, (beta1, beta2) = float(state["step"]), group["betas"]
        first, second = state[MOMENTS[0]], state[MOMENTS[1]]
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).add_(gradient.square().mean(over, keepdim=True), alpha=1 - beta2)
        size = group["lr"] / (1 - beta1**step)
        denominator = (second.sqrt() / math.sqrt(1 - beta2**step)).add_(group["eps"])
        parameter.addcdiv_(first, denominator, value=-size)

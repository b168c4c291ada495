"""Schedule-free AdamW: gradients are taken at y, between the steps' own z and their average x, which is the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tune.training.checkpoint import AdapterState
from tune.training.optimizers.adapter_tensors import AdapterTensor
from tune.training.optimizers.libraries import require
from tune.training.optimizers.method import SCALE, Method, StateTensor

#: Parts of the state: the steps' own point, and (in checkpoints alone) the point that gradients are taken at.
Z, Y = "z", "y"


class ScheduleFreeAdamW(Method):
    """AdamWScheduleFree of schedulefree.

    Masters and working copies hold y, the library's mode `train`, throughout: its swap of x and y in place loses bits.
    x is computed aside where it is read. Warm-up is that of the learning rate, which the averages are weighted by.
    """

    points = (Z, Y)

    def layout(self, tensor: AdapterTensor) -> dict[str, StateTensor]:
        return {Z: StateTensor(tensor.shape), "exp_avg_sq": StateTensor(tensor.shape)}

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        kind: Any = _with_parameters(require("schedulefree").AdamWScheduleFree)
        optimizer: torch.optim.Optimizer = kind(groups, lr=self.spec.learning_rate)
        self._train(optimizer.param_groups)
        return optimizer

    def fresh(self, group: dict[str, Any], master: torch.Tensor, tensor: AdapterTensor) -> dict[str, Any]:
        return {Z: master.detach().clone(), "exp_avg_sq": torch.zeros_like(master.detach())}

    def initial(self, tensor: AdapterTensor, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return {**super().initial(tensor, weight), Z: weight.clone(), Y: weight.clone()}

    def masters(self, state: AdapterState) -> dict[str, torch.Tensor]:
        return state.optimizer[Y]

    def result(
        self, masters: dict[str, torch.Tensor], state: dict[str, dict[str, torch.Tensor]], group: dict[str, Any]
    ) -> AdapterState:
        beta1 = group["betas"][0]  # y = beta1 x + (1 - beta1) z
        averages = {name: y.lerp(state[Z][name], 1 - 1 / beta1) for name, y in masters.items()}
        return AdapterState(averages, {**state, Y: masters})

    def begin(self, groups: list[dict[str, Any]], rate: Callable[[int], float], step: int) -> None:
        super().begin(groups, rate, step)
        self._train(groups)
        for group in groups:
            scale, power = group[SCALE], group["weight_lr_power"]
            group["k"], group["lr_max"], group["weight_sum"] = step, -1.0, 0.0
            for done in range(1, step + 1):  # what the steps so far have left, in the library's order
                group["lr_max"] = max(rate(done) * scale, group["lr_max"])
                group["weight_sum"] += group["lr_max"] ** power

    @staticmethod
    def _train(groups: list[dict[str, Any]]) -> None:
        for group in groups:
            group["train_mode"] = True


def _with_parameters(kind: type) -> type:
    """Return the optimizer for ZeRO-3, which steps one group at a time and takes the parameters of the others away:
    a group's averages must not go on without them."""

    class WithParameters(kind):
        param_groups: list[dict[str, Any]]

        def step(self, closure: Any = None) -> Any:
            groups = self.param_groups
            self.param_groups = [group for group in groups if group["params"]]
            try:
                return super().step(closure)
            finally:
                self.param_groups = groups

    return WithParameters

"""Muon for the factors of linear layers, and AdamW for all other tensors of an adapter."""

from __future__ import annotations

from typing import Any

import torch

from tune.training.optimizers.adamw import MOMENTS
from tune.training.optimizers.adapter_tensors import AdapterTensor
from tune.training.optimizers.libraries import check_library
from tune.training.optimizers.method import Method, StateTensor

#: Key of a parameter group: whether Muon updates it.
BY_MUON = "use_muon"


class Muon(Method):
    """torch's Muon, whose steps are scaled to the size of AdamW's, so that one learning rate does for both."""

    elementwise = False

    def settings(self, tensor: AdapterTensor) -> dict[str, Any]:
        return {**super().settings(tensor), BY_MUON: tensor.is_matrix}

    def layout(self, tensor: AdapterTensor) -> dict[str, StateTensor]:
        parts = ("momentum_buffer",) if tensor.is_matrix else MOMENTS
        return {part: StateTensor(tensor.shape) for part in parts}

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        check_library("muon")
        return MuonWithAdamW(groups, lr=self.spec.learning_rate)

    def fresh(self, group: dict[str, Any], master: torch.Tensor, tensor: AdapterTensor) -> dict[str, Any]:
        state = super().fresh(group, master, tensor)
        if group[BY_MUON]:
            del state["step"]
        return state


class MuonWithAdamW(torch.optim.Optimizer):
    """Groups marked `use_muon` are Muon's, the others AdamW's; both work on this optimizer's groups and state."""

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self._inner: dict[bool, torch.optim.Optimizer] = {}
        for by_muon in (True, False):
            own = [group for group in self.param_groups if group[BY_MUON] == by_muon]
            if own:
                self._inner[by_muon] = _inner(by_muon, own, lr)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for by_muon, inner in self._inner.items():
            # DeepSpeed puts its own masters into the groups.
            inner.param_groups = [group for group in self.param_groups if group[BY_MUON] == by_muon]
            inner.state = self.state
            inner.step()


def _inner(by_muon: bool, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    copies = [dict(group) for group in groups]
    if by_muon:
        kind: Any = torch.optim.Muon
        inner: torch.optim.Optimizer = kind(copies, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    else:
        inner = torch.optim.AdamW(copies, lr=lr, weight_decay=0.0)
    for group, defaults in zip(groups, inner.param_groups, strict=True):
        for key, value in defaults.items():
            group.setdefault(key, value)
    return inner

"""AdamW: torch's own, which needs no compiler on the cluster and is the same code on CPU and GPU."""

from __future__ import annotations

from typing import Any

import torch

from tune.training.optimizers.adapter_tensors import AdapterTensor
from tune.training.optimizers.method import Method, StateTensor

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW(Method):
    """AdamW, built by DeepSpeed from its configuration."""

    def layout(self, tensor: AdapterTensor) -> dict[str, StateTensor]:
        return {moment: StateTensor(tensor.shape) for moment in MOMENTS}

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer | None:
        return None

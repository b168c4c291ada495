"""Lion and 8-bit AdamW of bitsandbytes, the library that transformers takes for them."""

from __future__ import annotations

from typing import Any

import torch

from tune.training.optimizers.adapter_tensors import AdapterTensor
from tune.training.optimizers.libraries import require
from tune.training.optimizers.method import Method, StateTensor

#: bitsandbytes quantises in blocks of so many entries, and leaves smaller tensors than this in fp32.
BLOCK, SMALLEST = 256, 4096


class Lion(Method):
    """Lion with its momentum in fp32."""

    def layout(self, tensor: AdapterTensor) -> dict[str, StateTensor]:
        return {"state1": StateTensor(tensor.shape)}

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        kind: Any = _eager(require("bitsandbytes").optim.Lion32bit)
        optimizer: torch.optim.Optimizer = kind(groups, lr=self.spec.learning_rate)
        return optimizer

    def fresh(self, group: dict[str, Any], master: torch.Tensor, tensor: AdapterTensor) -> dict[str, Any]:
        return {**super().fresh(group, master, tensor), "step": 0}


class AdamW8bit(Method):
    """AdamW with both moments in 8 bits, quantised in blocks of a tensor; those of small tensors stay in fp32."""

    elementwise = False  # blocks of a flat partition would be others, and change with the number of workers

    def layout(self, tensor: AdapterTensor) -> dict[str, StateTensor]:
        size = StateTensor(tensor.shape).bytes // 4
        if size < SMALLEST:
            return {"state1": StateTensor(tensor.shape), "state2": StateTensor(tensor.shape)}
        scales = StateTensor((-(-size // BLOCK),))
        codes = StateTensor(tensor.shape, torch.uint8)
        return {"state1": codes, "state2": codes, "absmax1": scales, "absmax2": scales}

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        kind: Any = _eager(require("bitsandbytes").optim.AdamW8bit)
        optimizer: torch.optim.Optimizer = kind(groups, lr=self.spec.learning_rate, weight_decay=0.0)
        return optimizer

    def fresh(self, group: dict[str, Any], master: torch.Tensor, tensor: AdapterTensor) -> dict[str, Any]:
        state = {**super().fresh(group, master, tensor), "step": 0}
        if "absmax1" in state:
            functional = require("bitsandbytes").functional
            for part, signed in (("qmap1", True), ("qmap2", False)):
                state[part] = functional.create_dynamic_map(signed=signed).to(master.device)
        return state


def _eager(kind: type) -> type:
    """Return bitsandbytes' optimizer without torch.compile, with which it updates on a CPU: bits must not depend on
    whether a node has a compiler."""

    class Eager(kind):
        def step(self, closure: Any = None) -> Any:
            with torch.compiler.set_stance("force_eager"):
                return super().step(closure)

    return Eager

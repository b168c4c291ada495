"""The paper's listing, slow and plain: edit the massive rows in place, forward, backward, restore.

And ordinary dropout on the intermediate state, written into the down projection. Neither shares code with `macdrop`:
where a family of `tiny` keeps its rows is written out here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch.nn import functional as F

from helpers.tiny import FFN

_ALL = slice(None)


def stored_rows(family: str, rows: torch.Tensor, expert: int | None) -> list[tuple[str, tuple, bool]]:
    """(parameter name in its layer, index of the rows, whether they are stored as columns) of W_gate and W_up."""
    return {
        "llama": [("mlp.gate_proj.weight", (rows,), False), ("mlp.up_proj.weight", (rows,), False)],
        "phi3": [("mlp.gate_up_proj.weight", (rows,), False), ("mlp.gate_up_proj.weight", (rows + FFN,), False)],
        "opt": [("fc1.weight", (rows,), False)],
        "gpt2": [("mlp.c_fc.weight", (_ALL, rows), True)],
        "mixtral": [
            ("mlp.experts.gate_up_proj", (expert, rows), False),
            ("mlp.experts.gate_up_proj", (expert, rows + FFN), False),
        ],
        "gpt_oss": [
            ("mlp.experts.gate_up_proj", (expert, _ALL, 2 * rows), True),
            ("mlp.experts.gate_up_proj", (expert, _ALL, 2 * rows + 1), True),
        ],
    }[family]


def find_parameter(model: torch.nn.Module, name: str, layer: int = 1) -> torch.nn.Parameter:
    """The base parameter `name` of a layer, PEFT-wrapped or not."""
    found = []
    for full, parameter in model.named_parameters():
        plain = full.replace("base_layer.", "")
        if any(plain.endswith(f"{layers}.{layer}.{name}") for layers in ("layers", "h")):
            found.append(parameter)
    assert len(found) == 1, (name, len(found))
    return found[0]


def training_step(
    model: torch.nn.Module,
    batch: dict[str, torch.Tensor],
    family: str,
    rows: Iterable[int],
    mask: torch.Tensor,
    *,
    layer: int = 1,
    expert: int | None = None,
    divide: int = 1,
) -> float:
    """Loss of one micro-batch with the rows times `mask` (k, d); gradients are added to the adapter's."""
    saved = []
    with torch.no_grad():
        for name, index, columns in stored_rows(family, torch.tensor(list(rows)), expert):
            parameter = find_parameter(model, name, layer)
            saved.append((parameter, index, parameter[index].clone()))
            parameter[index] = parameter[index] * (mask.T if columns else mask).to(parameter.dtype)
    loss = model(**batch).loss
    (loss / divide).backward()
    with torch.no_grad():
        for parameter, index, values in reversed(saved):
            parameter[index] = values
    return loss.item()


def with_dora_by_hand(model: torch.nn.Module) -> torch.nn.Module:
    """The model with every DoRA layer computed from its weights: row i is m_i V_i / |V_i|, and 0 where V_i is 0.

    V is the base weight plus the adapter's, |V_i| a constant to the gradients (DoRA, section 4.3). Without dropout.
    """
    for layer in model.modules():
        if getattr(layer, "lora_magnitude_vector", None):
            layer.forward = functools.partial(_dora_output, layer)
    return model


def _dora_output(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    base, (name,) = layer.base_layer, layer.active_adapters
    magnitude = layer.lora_magnitude_vector[name].weight
    weight = base.weight.T if layer.fan_in_fan_out else base.weight
    rows = []
    for row, own in enumerate(layer.lora_B[name].weight):
        whole = weight[row] + layer.scaling[name] * (own @ layer.lora_A[name].weight)
        norm = whole.detach().norm()
        rows.append(magnitude[row] / norm * whole if norm > 0 else torch.zeros_like(whole))
    return F.linear(x.to(rows[0].dtype), torch.stack(rows), base.bias).to(x.dtype)


DOWN = {
    "llama": "layers.1.mlp.down_proj",
    "phi3": "layers.1.mlp.down_proj",
    "opt": "layers.1.fc2",
    "gpt2": "h.1.mlp.c_proj",
}


def dropout_step(
    model: torch.nn.Module,
    batch: dict[str, torch.Tensor],
    family: str,
    draw: Callable[[tuple[int, ...]], torch.Tensor],
    p: float,
    *,
    divide: int = 1,
) -> float:
    """Loss of one micro-batch with inverted dropout on the intermediate state of layer 1, kept where `draw(shape)`."""
    (down,) = [module for name, module in model.named_modules() if name.endswith(DOWN[family])]
    own = down.forward

    def forward(x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        scaled = x / (1 - p) if p < 1 else x
        return own(torch.where(draw(tuple(x.shape)), scaled, torch.zeros(())), *args, **kwargs)

    down.forward = forward
    loss = model(**batch).loss
    (loss / divide).backward()
    down.forward = own
    return loss.item()

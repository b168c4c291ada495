"""Tiny models that bitsandbytes has quantised, and twins of plain layers with the weights that these stand for."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from helpers import tiny
from macdrop.load import load_model
from macdrop.quantised import is_quantised

#: The 16 values of NF4, as the QLoRA paper prints them (arXiv 2305.14314, appendix E).
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
NF4 += [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
NF4 += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


@functools.cache
def saved(family: str) -> Path:
    """The folder of a tiny model."""
    folder = Path(tempfile.mkdtemp()) / family
    tiny.build(family).save_pretrained(folder)
    return folder


def quantised(family: str, bits: int, dtype: str = "float32") -> PreTrainedModel:
    """A tiny model whose linear layers are quantised to so many bits."""
    model = load_model(saved(family), dtype=dtype, quantization_bit=bits, attn_implementation="eager")
    return model.requires_grad_(False)


def by_hand(module: torch.nn.Module) -> torch.Tensor:
    """The weight (out, in) of a quantised layer in fp32, entry by entry from its codes and scales."""
    weight = module.weight
    if type(weight).__name__ == "Int8Params":
        scales = weight.SCB if module.state.SCB is None else module.state.SCB
        return weight.data.float() * (scales[:, None] / 127)
    state = weight.quant_state
    nested = state.state2
    blocks = torch.arange(len(state.absmax))
    absmax = nested.code[state.absmax.int()] * nested.absmax[blocks // nested.blocksize] + state.offset
    codes = torch.stack([weight.data.flatten() >> 4, weight.data.flatten() & 15], dim=1).flatten()
    entries = torch.tensor(NF4)[codes.int()][: state.shape.numel()]
    return (entries * absmax[torch.arange(len(entries)) // state.blocksize]).view(state.shape)


def twin(family: str, bits: int) -> PreTrainedModel:
    """The plain model of the same family with the weights that the quantised one stands for, in fp32."""
    model, plain = quantised(family, bits), tiny.build(family).requires_grad_(False)
    for name, module in model.named_modules():
        if is_quantised(getattr(module, "weight", None)):
            there = plain.get_submodule(name)
            there.weight.copy_(by_hand(module).T if isinstance(there, Conv1D) else by_hand(module))
    return plain

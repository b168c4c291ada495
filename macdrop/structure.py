"""Structure of one FFN module: the linear layers or 3-D parameters that make a feed-forward network.

Names and shapes decide, never a model's name. `macdrop.families` looks through whole models with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

# Names of (gate, up, down) that share one module. Data, not model names: shapes must agree as well.
GATED_NAMES = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    ("w1", "v1", "w2"),
    ("w2", "w1", "c_proj"),
    ("c_fc_0", "c_fc_1", "c_proj"),
    ("wi_0", "wi_1", "wo"),
)
# Names of (up or fused gate_up, down). One is fused when its output is twice the down projection's input, else plain.
SINGLE_NAMES = (
    ("gate_up_proj", "down_proj"),
    ("up_proj", "down_proj"),
    ("fc1", "fc2"),
    ("fc_in", "fc_out"),
    ("dense_h_to_4h", "dense_4h_to_h"),
    ("c_fc", "c_proj"),
    ("input_linear", "output_linear"),
    ("Wi", "Wo"),
    ("wi", "wo"),
    ("w1", "w2"),
)


@dataclass(frozen=True, eq=False)
class Projection:
    """One matrix, or one half of a fused one, whose rows make the intermediate features.

    Feature i of this role is output feature ``offset + stride * i`` of `module`. The matrix is ``module.<parameter>``,
    stored (out, in), or (in, out) when `transposed`, with a leading expert axis when `expert_axis`.
    """

    role: str  # "gate" or "up"
    module: nn.Module  # owns the parameter; PEFT wrappers are peeled off
    parameter: str
    wrapper: nn.Module | None = None  # the PEFT tuner layer around it
    offset: int = 0
    stride: int = 1
    transposed: bool = False
    expert_axis: bool = False
    expert: int | None = None  # which matrix of a 3-D parameter; None until chosen (and always for 2-D ones)

    @property
    def tensor(self) -> nn.Parameter:
        """The stored parameter, whole (a partitioned one under ZeRO-3 has no rows to read: gather it first)."""
        return getattr(self.module, self.parameter)

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias that belongs to the parameter, whole: (out,), or (experts, out). It is never masked nor zeroed."""
        return getattr(self.module, f"{self.parameter}_bias" if self.parameter != "weight" else "bias", None)

    def features(self, indices: Iterable[int]) -> list[int]:
        """Output features of `module` that make the intermediate entries `indices`, in the same order."""
        return [self.offset + self.stride * int(i) for i in indices]

    def matrix(self, tensor: torch.Tensor | None = None) -> torch.Tensor:
        """An (out features, hidden) view of the stored matrix; writes to it write to the parameter.

        `tensor` is the gathered parameter; without it the module's own is viewed.
        """
        matrix = self.tensor if tensor is None else tensor
        if self.expert_axis:
            assert self.expert is not None, "choose an expert first: find_ffn(model, path, expert)"
            matrix = matrix[self.expert]
        return matrix.T if self.transposed else matrix


@dataclass(frozen=True, eq=False)
class FFN:
    """The feed-forward network of one decoder layer (layers count from 0)."""

    layer: int
    path: str  # module path in the bare model: "model.layers.1.mlp"; for routed experts the module that owns them
    kind: str  # "gated", "fused", "plain", "conv1d" or "experts"
    module: nn.Module
    projections: tuple[Projection, ...]
    down: nn.Module | None  # its input is the intermediate state; None for routed experts
    intermediate_size: int
    hidden_size: int
    num_experts: int | None = None
    shared: FFN | None = None  # a dense FFN beside routed experts
    experts: tuple[FFN, ...] = field(default=(), repr=False)  # experts that are modules of their own, in router order

    @property
    def gated(self) -> bool:
        return any(p.role == "gate" for p in self.projections)

    def with_expert(self, expert: int) -> FFN:
        """The same FFN with its projections pointing at one expert of the 3-D parameters."""
        return replace(self, projections=tuple(replace(p, expert=expert) for p in self.projections))


@dataclass(frozen=True)
class Slot:
    """A linear layer, or a 3-D parameter, found under one name of a container."""

    inputs: int
    outputs: int
    module: nn.Module
    parameter: str
    wrapper: nn.Module | None
    transposed: bool
    experts: int | None = None


def parameter_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Shape of the whole parameter, also where DeepSpeed ZeRO-3 has partitioned it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def peel(module: nn.Module) -> nn.Module:
    """The layer inside PEFT tuner layers."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def match_ffn(module: nn.Module, layer: int, path: str) -> FFN | None:
    inner = peel(module)
    slots = {name: slot for name, child in inner.named_children() if (slot := linear_slot(child))}
    slots.update(_expert_slots(module, inner))
    for names in (*GATED_NAMES, *SINGLE_NAMES):
        if all(name in slots for name in names):
            return build_ffn(inner, layer, path, [slots[name] for name in names], names[-1])
    return None


def build_ffn(
    module: nn.Module, layer: int, path: str, slots: list[Slot], down_name: str, *, interleaved: bool | None = None
) -> FFN | None:
    """An FFN from its slots (inputs, then down), or None where the shapes contradict that.

    `interleaved` says whether gate and up alternate in a fused projection; None asks the module.
    """
    if len({slot.experts for slot in slots}) != 1:
        return None
    *inputs, down = slots
    if down.experts is not None:
        inputs, down = _orient(inputs, down)
    size, hidden = down.inputs, down.outputs
    if any(slot.inputs != hidden for slot in inputs):
        return None
    fused = len(inputs) == 1 and inputs[0].outputs == 2 * size
    if not fused and any(slot.outputs != size for slot in inputs):
        return None
    if fused:
        stride = 2 if (_interleaved(module, inputs[0], size) if interleaved is None else interleaved) else 1
        places = [("gate", inputs[0], 0, stride), ("up", inputs[0], 1 if stride == 2 else size, stride)]
    else:
        roles = ("gate", "up") if len(inputs) == 2 else ("up",)
        places = [(role, slot, 0, 1) for role, slot in zip(roles, inputs, strict=True)]
    routed = down.experts is not None
    if routed:
        kind = "experts"
    elif inputs[0].transposed:
        kind = "conv1d"
    else:
        kind = "gated" if len(inputs) == 2 else "fused" if fused else "plain"
    return FFN(
        layer=layer,
        path=path,
        kind=kind,
        module=module,
        projections=tuple(
            Projection(role, s.module, s.parameter, s.wrapper, offset, stride, s.transposed, expert_axis=routed)
            for role, s, offset, stride in places
        ),
        down=None if routed else getattr(module, down_name),
        intermediate_size=size,
        hidden_size=hidden,
        num_experts=down.experts,
    )


def linear_slot(module: nn.Module) -> Slot | None:
    inner = peel(module)
    weight = getattr(inner, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return None
    wrapper = module if module is not inner else None
    if isinstance(inner, Conv1D):
        inputs, outputs = parameter_shape(weight)
        return Slot(inputs, outputs, inner, "weight", wrapper, transposed=True)
    sizes = getattr(inner, "in_features", None), getattr(inner, "out_features", None)
    if isinstance(sizes[0], int) and isinstance(sizes[1], int):
        return Slot(sizes[0], sizes[1], inner, "weight", wrapper, transposed=False)
    return None


def _expert_slots(module: nn.Module, inner: nn.Module) -> dict[str, Slot]:
    """3-D parameters of a container, read as if stored (experts, out, in); `_orient` turns them where they are not."""
    slots = {}
    for name, parameter in inner.named_parameters(recurse=False):
        shape = parameter_shape(parameter)
        if len(shape) == 3:
            wrapper = _parameter_wrapper(module, name)
            slots[name] = Slot(shape[2], shape[1], inner, name, wrapper, transposed=False, experts=shape[0])
    return slots


def _parameter_wrapper(module: nn.Module, name: str) -> nn.Module | None:
    """PEFT's layer around one parameter of a module; such layers are nested, one a parameter."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        if getattr(module, "parameter_name", None) == name:
            return module
        module = inner
    return None


def _orient(inputs: list[Slot], down: Slot) -> tuple[list[Slot], Slot]:
    """Turn the slots when the shapes only fit a stored (experts, in, out)."""

    def fits(slots: list[Slot], last: Slot) -> bool:
        per_slot = (1, 2) if len(slots) == 1 else (1,)
        return all(s.inputs == last.outputs and s.outputs in [n * last.inputs for n in per_slot] for s in slots)

    def turn(slot: Slot) -> Slot:
        return replace(slot, inputs=slot.outputs, outputs=slot.inputs, transposed=True)

    turned = [turn(slot) for slot in inputs], turn(down)
    marked = getattr(down.module, "is_transposed", None)  # newer transformers releases say it; shapes can be square
    if fits(*turned) and (not fits(inputs, down) or marked):
        return turned
    return inputs, down


def _interleaved(module: nn.Module, fused: Slot, size: int) -> bool:
    """Return whether gate and up alternate in a fused projection (GPT-OSS) instead of following each other.

    Asked of the module's own gating function where it has one: does the first intermediate entry change with output
    feature 1, or with feature `size`? In releases without it only the transposed layout with biases alternates.
    """
    apply_gate = getattr(module, "_apply_gate", None)
    if fused.experts is None or size < 2:
        return False
    if apply_gate is None:
        return fused.transposed and hasattr(module, f"{fused.parameter}_bias")
    outputs = torch.full((1, 2 * size), 0.5)
    changed = outputs.clone()
    changed[0, 1] = -0.5
    with torch.no_grad():
        return bool((apply_gate(outputs) != apply_gate(changed))[0, 0])

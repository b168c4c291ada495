"""Feed-forward networks (FFNs) of a model, found by structure, never by model name.

Terms are the paper's (arXiv 2410.01866, section 2): the *intermediate state* of an FFN is ``act(W_gate x) * W_up x``,
or ``act(W_up x)`` when there is no gate, and is the input of the down projection. Row i of W_gate and row i of W_up
make entry i of it. A `Projection` says where these rows are stored, whichever way a model family stores them.

What is recognised:

* gated: separate gate, up and down linears (Llama, Mistral, Qwen, Gemma, OLMo, Cohere, StableLM, ...)
* fused: one linear that makes gate and up, and a down linear (Phi-3, GLM, GLM-4)
* plain: up and down linears (OPT, GPT-NeoX, Falcon, Bloom, Starcoder2, Phi, Nemotron, ...)
* conv1d: plain or gated FFNs whose weights are stored (in, out) (GPT-2)
* experts: 3-D parameters, one matrix an expert (Mixtral, Qwen-MoE, OLMoE, GPT-OSS, Llama 4), or a list of expert
  modules; with or without a shared expert beside them
* dense ones under unknown names, identified by shapes and a trial run of the module (`macdrop.probe`)

Rows of the weight matrices are all that is ever masked or zeroed: the biases of a plain FFN (and of GPT-OSS experts)
stay, so entry i of a plain FFN with a masked row is ``act(bias_i)``, not 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from macdrop.errors import NoMassiveWeights, UnsupportedModel
from macdrop.probe import probe_ffn
from macdrop.structure import (
    FFN,
    GATED_NAMES,
    SINGLE_NAMES,
    Projection,
    linear_slot,
    match_ffn,
    parameter_shape,
    peel,
)
from macdrop.weights import MassiveWeights

__all__ = [
    "FFN",
    "Projection",
    "bare_model",
    "decoder_layers",
    "embedding_device",
    "find_ffn",
    "find_ffns",
    "massive_ffn",
    "parameter_shape",
    "peel",
]
_LISTED = 24  # how many sub-modules an error message names


def bare_model(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model (or the model itself). Tuner layers inside it stay where they are."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def embedding_device(model: nn.Module) -> torch.device:
    """Return the device of the input embeddings, where token ids go."""
    embeddings = getattr(bare_model(model), "get_input_embeddings")()  # noqa: B009 (nn.Module does not declare it)
    return embeddings.weight.device


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and module list of the decoder layers: the longest list whose elements hold an FFN.

    Raises `UnsupportedModel` when there is none, naming what one layer holds.
    """
    bare = bare_model(model)
    found = [entry for entry in _layer_lists(bare, "") if any(_layer_ffn(layer, 0, "") for layer in entry[1])]
    if not found:
        raise UnsupportedModel(_nothing_found(bare))
    return max(found, key=lambda entry: len(entry[1]))


def find_ffns(model: nn.Module) -> list[FFN]:
    """The FFN of each decoder layer, first to last, of a bare or PEFT-wrapped model.

    Layers without an FFN (in hybrid models) are left out; `FFN.layer` is the true index. Under a DeepSpeed engine pass
    ``engine.module``. Raises `UnsupportedModel` with what was found when no layer, or a part of one, is understood.
    """
    path, layers = decoder_layers(model)
    ffns = [_layer_ffn(layer, index, f"{path}.{index}") for index, layer in enumerate(layers)]
    return [ffn for ffn in ffns if ffn is not None]


def find_ffn(model: nn.Module, path: str, expert: int | None = None) -> FFN:
    """The FFN at `path` of the bare model, shared experts and experts of their own included.

    For 3-D experts `expert` chooses the matrix. Raises `UnsupportedModel` when the model has no FFN at that path.
    """
    for ffn in find_ffns(model):
        for candidate in (ffn, *ffn.experts, *([ffn.shared] if ffn.shared else [])):
            if candidate.path == path:
                has_axis = any(p.expert_axis for p in candidate.projections)
                return candidate.with_expert(expert) if has_axis and expert is not None else candidate
    known = ", ".join(f.path for f in find_ffns(model)[:3])
    raise UnsupportedModel(f"The model has no feed-forward network at {path!r}. Its first ones are: {known}.")


def massive_ffn(model: nn.Module, weights: MassiveWeights) -> FFN:
    """Find the FFN that `weights` are of, in a bare or PEFT-wrapped model, with its expert chosen.

    Raises `NoMassiveWeights` when the model's FFN has another size, so that the scan is of another model.
    """
    ffn = find_ffn(model, weights.path, weights.expert)
    if (ffn.intermediate_size, ffn.hidden_size) != (weights.intermediate_size, weights.hidden_size):
        raise NoMassiveWeights(
            f"The massive weights of {weights.model} do not fit this model: {weights.path} has "
            f"{ffn.intermediate_size} rows of {ffn.hidden_size}, the scan {weights.intermediate_size} of "
            f"{weights.hidden_size}.\nScan this model: macdrop scan MODEL"
        )
    return ffn


def _layer_lists(module: nn.Module, path: str) -> Iterator[tuple[str, nn.ModuleList]]:
    """Outermost module lists, so that a list of experts inside a layer is never taken for the layers."""
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        if isinstance(child, nn.ModuleList) and len(child):
            yield child_path, child
        else:
            yield from _layer_lists(child, child_path)


def _layer_ffn(layer: nn.Module, index: int, path: str) -> FFN | None:
    found = list(_walk(layer, index, path, match_ffn)) or list(_walk(layer, index, path, probe_ffn))
    routed = [ffn for ffn, in_list in found if ffn.kind == "experts" and not in_list]
    listed = [ffn for ffn, in_list in found if in_list]
    dense = [ffn for ffn, in_list in found if ffn.kind != "experts" and not in_list]
    lists = {_parent(ffn) for ffn in listed}
    routed += [_expert_list(layer, index, path, [f for f in listed if _parent(f) == name]) for name in sorted(lists)]
    if len(dense) > 1 or len(routed) > 1:
        names = "\n".join(f"  {ffn.path} ({ffn.kind}, {ffn.intermediate_size} features)" for ffn, _ in found[:_LISTED])
        raise UnsupportedModel(
            f"Layer {index} holds more than one feed-forward network, and macdrop knows no rule for these:\n{names}\n"
            "It handles one dense network, or routed experts with at most one dense network beside them."
        )
    if routed:
        return replace(routed[0], shared=dense[0] if dense else None)
    return dense[0] if dense else None


def _parent(ffn: FFN) -> str:
    return ffn.path.rpartition(".")[0]


def _expert_list(layer: nn.Module, index: int, path: str, listed: Sequence[FFN]) -> FFN:
    first, parent = listed[0], _parent(listed[0])
    return FFN(
        layer=index,
        path=parent,
        kind="experts",
        module=layer.get_submodule(parent[len(path) + 1 :]),
        projections=(),
        down=None,
        intermediate_size=first.intermediate_size,
        hidden_size=first.hidden_size,
        num_experts=len(listed),
        experts=tuple(listed),
    )


def _walk(
    module: nn.Module, layer: int, path: str, match: Callable[..., FFN | None], in_list: bool = False
) -> Iterator[tuple[FFN, bool]]:
    """FFNs at and below `module`, each with whether it is an element of a module list. A match is not looked into."""
    ffn = match(module, layer, path)
    if ffn is not None:
        yield ffn, in_list
        return
    for name, child in peel(module).named_children():
        if linear_slot(child) is None:
            yield from _walk(child, layer, f"{path}.{name}", match, isinstance(module, nn.ModuleList))


def _nothing_found(bare: nn.Module) -> str:
    lists = sorted(_layer_lists(bare, ""), key=lambda entry: -len(entry[1]))
    where, root = (f"{lists[0][0]}.0", lists[0][1][0]) if lists else ("the model", bare)
    matrices = {name: parameter_shape(p) for name, p in root.named_parameters() if len(parameter_shape(p)) > 1}
    shapes = [f"  {name.replace('.base_layer', '')}: {s}" for name, s in matrices.items() if ".lora_" not in name]
    more = [f"  ... and {len(shapes) - _LISTED} more"] if len(shapes) > _LISTED else []
    known = ", ".join("/".join(names) for names in (*GATED_NAMES, *SINGLE_NAMES))
    return "\n".join(
        [
            f"{type(bare).__name__} has no feed-forward network that macdrop knows. Weights found in {where}:",
            *(shapes[:_LISTED] or ["  (none)"]),
            *more,
            f"Known, if the shapes agree, are modules that hold the linear layers or 3-D parameters {known}.",
        ]
    )

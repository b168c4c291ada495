"""The states of a model when bos is its whole input: hidden states between layers, and intermediate states of FFNs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from macdrop.errors import UnsupportedModel
from macdrop.families import FFN, bare_model, decoder_layers, embedding_device, find_ffns
from macdrop.probe import evaluating

_MISFIT = 0.02  # of a block's output that the outputs of its experts do not add up to


@dataclass
class _Seen:
    """Observations of hooks at bos, by module path.

    states: of an FFN, its intermediate state, read once the forward pass has ended, and the expert it is of. outputs:
    (d,), of experts in a module list, of the shared one beside them, and of the block around them.
    """

    states: dict[str, Callable[[], tuple[torch.Tensor, int | None]]] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Intermediate:
    """The intermediate state of one FFN at bos: (I,), float32, signed. `ffn` has its expert chosen.

    weight: how much of it counts, relative to the other routed experts of the layer.
    """

    ffn: FFN
    state: torch.Tensor
    expert: int | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class BosStates:
    """States in one forward pass of bos alone.

    hidden: (L + 1, d) float32 on the CPU, the residual stream before the first and after each of the L layers.
    intermediates: per layer the states of its FFNs, none for a layer without one; of routed experts first the one with
    the largest routing weight, then (in module lists) the others that were called, then the shared one if there is one.
    """

    hidden: torch.Tensor
    intermediates: tuple[tuple[Intermediate, ...], ...]


def bos_states(model: nn.Module, bos_token_id: int) -> BosStates:
    """Run `model` on bos alone at position 0 and return the states; model, modes and gradients stay as they are.

    An adapter in place takes part. Works in any floating type and on any device. Raises `UnsupportedModel` for a model
    without a known FFN.
    """
    ffns = {ffn.layer: ffn for ffn in find_ffns(model)}
    _, layers = decoder_layers(model)
    hidden: list[torch.Tensor] = []
    seen = _Seen()
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))

        def watch(handle: torch.utils.hooks.RemovableHandle) -> None:
            stack.callback(handle.remove)

        def first_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden.append(_bos_vector(args[0] if args else kwargs["hidden_states"], ffn_size(ffns)))

        def output(_module: nn.Module, _args: tuple[Any, ...], result: Any) -> None:
            tensor = result if isinstance(result, torch.Tensor) else result[0]
            hidden.append(_bos_vector(tensor, ffn_size(ffns)))

        watch(layers[0].register_forward_pre_hook(first_input, with_kwargs=True))
        for layer in layers:
            watch(layer.register_forward_hook(output))
        for ffn in ffns.values():
            for part in _parts(ffn):
                watch(_record(part, seen))
            for path, module in _summed(ffn, bare_model(model)):
                watch(module.register_forward_hook(partial(_keep_output, seen, path, ffn.hidden_size)))
        device = embedding_device(model)
        bare_model(model)(input_ids=torch.tensor([[bos_token_id]], device=device), use_cache=False)
        states = tuple(tuple(_collect(ffns[i], seen)) if i in ffns else () for i in range(len(layers)))
    if len(hidden) != len(layers) + 1:
        raise UnsupportedModel(
            f"{type(bare_model(model)).__name__} runs its {len(layers)} decoder layers {len(hidden) - 1} times in one "
            "forward pass.\nmacdrop needs models that run each layer once, in order."
        )
    return BosStates(torch.stack(hidden), states)


def ffn_size(ffns: dict[int, FFN]) -> int:
    """Hidden size of the model."""
    return next(iter(ffns.values())).hidden_size


def _bos_vector(tensor: torch.Tensor, size: int) -> torch.Tensor:
    return tensor.detach().reshape(-1, size)[0].float().cpu()


def _parts(ffn: FFN) -> list[FFN]:
    """Every FFN of a layer that has a state of its own to watch."""
    routed = list(ffn.experts) if ffn.experts else [ffn]
    return routed + ([ffn.shared] if ffn.shared else [])


def _record(ffn: FFN, seen: _Seen) -> torch.utils.hooks.RemovableHandle:
    if ffn.down is not None:

        def down_input(_module: nn.Module, args: tuple[Any, ...]) -> None:
            state = args[0].detach().reshape(-1, ffn.intermediate_size)
            if len(state):  # an expert that bos is not routed to may be called with no token
                seen.states[ffn.path] = lambda: (state[0].float().cpu(), None)

        return ffn.down.register_forward_pre_hook(down_input)

    def experts_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.states[ffn.path] = lambda: _routed_state(ffn, *_routing(ffn, [*args, *kwargs.values()]))

    return ffn.module.register_forward_pre_hook(experts_input, with_kwargs=True)


def _routing(ffn: FFN, values: list[Any]) -> tuple[int, torch.Tensor]:
    """The expert with the largest routing weight, and its input (1, d), from what an experts module is called with.

    Either (tokens, indices, weights), where indices and weights have one shape; or, as Llama 4 does it, one input a
    expert, already scaled by the routing weight, which is zero for the experts that are not chosen.
    """
    tensors = [value.detach() for value in values if isinstance(value, torch.Tensor)]
    tokens = tensors[0].reshape(-1, ffn.hidden_size)
    chosen = [t for t in tensors[1:] if not t.is_floating_point() and t.dtype != torch.bool]
    if chosen:
        weights = next(t for t in tensors[1:] if t.is_floating_point())
        indices, weights = chosen[0].reshape(-1, chosen[0].shape[-1])[0], weights.reshape(-1, weights.shape[-1])[0]
        # Some routers hand over the weights of all experts, others only those of the chosen ones.
        scores = weights if len(weights) == len(indices) else weights[indices]
        return int(indices[scores.argmax()]), tokens[:1]
    assert len(tokens) == ffn.num_experts, "without indices there is one input an expert"
    expert = int(tokens.float().norm(dim=-1).argmax())
    return expert, tokens[expert : expert + 1]


def _routed_state(ffn: FFN, expert: int, tokens: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The intermediate state of one of the fused experts, which no module of its own ever holds."""
    outputs = []
    for projection in ffn.with_expert(expert).projections:
        features = torch.tensor(projection.features(range(ffn.intermediate_size)), device=tokens.device)
        matrix = projection.matrix()
        part = tokens @ matrix[features].T
        bias = projection.bias
        outputs.append(part if bias is None else part + bias[expert][features])
    module: Any = ffn.module  # its act_fn and _apply_gate are callables that nn.Module does not declare
    if not ffn.gated:
        state = module.act_fn(outputs[0])
    elif hasattr(module, "_apply_gate"):
        gate, up = ffn.projections
        whole = torch.empty(1, 2 * ffn.intermediate_size, dtype=tokens.dtype, device=tokens.device)
        offset = ffn.intermediate_size if up.parameter != gate.parameter else up.offset
        whole[:, gate.offset :: gate.stride][:, : ffn.intermediate_size] = outputs[0]
        whole[:, offset :: up.stride][:, : ffn.intermediate_size] = outputs[1]
        state = module._apply_gate(whole)
    else:
        state = module.act_fn(outputs[0]) * outputs[1]
    return state[0].float().cpu(), expert


def _collect(ffn: FFN, seen: _Seen) -> Iterator[Intermediate]:
    if ffn.experts:
        called = {
            number: seen.states[part.path]()[0] for number, part in enumerate(ffn.experts) if part.path in seen.states
        }
        weights = _routing_weights(ffn, called, seen.outputs)
        for number in sorted(called, key=lambda n: -weights[n]):
            yield Intermediate(ffn.experts[number], called[number], number, weights[number])
    else:
        state, expert = seen.states[ffn.path]()
        yield Intermediate(ffn if expert is None else ffn.with_expert(expert), state, expert)
    if ffn.shared:
        yield Intermediate(ffn.shared, seen.states[ffn.shared.path]()[0])


# --- experts in a module list: the routing weights, which no module hands over ---


def _summed(ffn: FFN, bare: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of the block around a list of experts, and of what it adds up."""
    if ffn.experts:
        block = ffn.path.rpartition(".")[0]
        yield block, bare.get_submodule(block)
        for part in _parts(ffn):
            assert part.down is not None, "an expert in a list is dense"
            yield part.path, part.down


def _keep_output(seen: _Seen, path: str, size: int, _module: nn.Module, _args: tuple[Any, ...], result: Any) -> None:
    output = (result if isinstance(result, torch.Tensor) else result[0]).detach().reshape(-1, size)
    if len(output):
        seen.outputs[path] = output[0].double().cpu()


def _routing_weights(ffn: FFN, called: dict[int, torch.Tensor], outputs: dict[str, torch.Tensor]) -> dict[int, float]:
    """The weights with which the outputs of the called experts (and of the shared one) add up to that of the block.

    Where they do not add up, as when a norm follows, the sizes of the states stand for the weights.
    """
    block = outputs.get(ffn.path.rpartition(".")[0])
    parts = [*(ffn.experts[number] for number in called), *([ffn.shared] if ffn.shared else [])]
    if block is not None and all(part.path in outputs for part in parts):
        matrix = torch.stack([outputs[part.path] for part in parts], dim=1)
        weights = torch.linalg.lstsq(matrix, block[:, None], driver="gelsd").solution[:, 0]
        if float((matrix @ weights - block).norm()) <= _MISFIT * float(block.norm()):
            return dict(zip(called, weights.abs().tolist(), strict=False))
    return {number: float(state.abs().max()) for number, state in called.items()}

"""Linear layers with LoRA that are computed in one go.

PEFT adds ``B(A(x)) * scaling`` to the base layer's output by three operations on tensors of the output's size, and
autograd adds the gradients that reach ``x`` on two ways. Here the scaling goes into the rank-r tensor, and both sums
are part of a matrix product. Outputs and gradients are PEFT's up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import nn

from macdrop.gather import is_partitioned


def fuse_linears(model: nn.Module) -> None:
    """Let the LoRA layers of a PEFT model that are on linear ones run in one go; they are changed for good."""
    for module in model.modules():
        if type(module) is Linear and not module.lora_variant:
            module.__class__ = FusedLinear


class FusedLinear(Linear):
    """PEFT's LoRA on a linear layer, in one go while nothing but the layer and one adapter take part in it.

    Dropout, several adapters, merged or switched-off ones, other precisions, autocast, weights that DeepSpeed gathers
    or that are quantised are left to PEFT, and so is a layer while one of its parts has a hook, such as MacDrop's.
    """

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter = None if args or kwargs else self._only_adapter()
        if adapter is None or not self.is_ready(adapter) or not _is_plain(x, self._parts(adapter)):
            return super().forward(x, *args, **kwargs)
        return self.run_fused(x, adapter)

    def is_ready(self, adapter: str) -> bool:
        """Return whether `run_fused` may run now: here, where the adapter is LoRA alone."""
        return adapter not in self.lora_variant

    def run_fused(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        """Return ``W x + bias + scaling * B A x`` (..., out) of `x` (..., in)."""
        base, a, b = self._parts(adapter)
        return _AddedLora.apply(x, base.weight, base.bias, a.weight, b.weight, self.scaling[adapter])

    def _only_adapter(self) -> str | None:
        """Return the adapter that is active alone and without dropout, or None."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        (adapter,) = self.active_adapters
        return adapter if adapter in self.lora_A and isinstance(self.lora_dropout[adapter], nn.Identity) else None

    def _parts(self, adapter: str) -> tuple[Any, Any, Any]:
        return self.get_base_layer(), self.lora_A[adapter], self.lora_B[adapter]


def _is_plain(x: torch.Tensor, parts: tuple[Any, Any, Any]) -> bool:
    """Return whether base, A and B are plain linear layers, of which the base is frozen and A and B have no bias."""
    base, a, b = parts
    return (
        all(type(part) is nn.Linear and not _has_hooks(part) and _is_whole(part.weight, x) for part in parts)
        and not any(parameter.requires_grad for parameter in base.parameters())
        and a.bias is None
        and b.bias is None
        and not torch.is_autocast_enabled(x.device.type)
    )


def _has_hooks(module: nn.Module) -> bool:
    """Return whether a call of a module runs more than its class's forward, as with hooks of torch or accelerate."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def _is_whole(weight: torch.Tensor, x: torch.Tensor) -> bool:
    """Return whether a weight holds numbers in the precision of `x`: tensors of another class may be quantised."""
    return type(weight) is nn.Parameter and weight.dtype == x.dtype and not is_partitioned(weight)


class _AddedLora(torch.autograd.Function):
    """``W x + bias + scaling * B A x`` for `x` (..., in), W (out, in), A (r, in), B (out, r); W and bias are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        low = (flat @ a.T).mul_(scaling)
        out = x.new_empty(*x.shape[:-1], len(weight))  # not a view, so that DoRA may scale it in its place
        rows = out.view(-1, len(weight))
        torch.mm(flat, weight.T, out=rows) if bias is None else torch.addmm(bias, flat, weight.T, out=rows)
        rows.addmm_(low, b.T)
        ctx.save_for_backward(flat, low, weight, a, b)
        ctx.scaling, ctx.shape = scaling, x.shape
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat, low, weight, a, b = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])
        of_low = (gradient @ b).mul_(ctx.scaling)
        of_x = (gradient @ weight).addmm_(of_low, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return of_x, None, None, of_low.T @ flat, gradient.T @ low, None

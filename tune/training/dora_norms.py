"""DoRA layers that take their weight norms from one place: computed once in an optimizer step, in factored form.

PEFT adds up W + s B A densely in every forward pass to find the norms of its rows. They change with the optimizer's
steps only, and |W + s B A|^2 = |W|^2 + 2 s (W A^T) . B + s^2 (B A A^T) . B for each row, of which |W|^2 never changes.
The output is computed in one go as well (`tune.forward.fused_linear`). Loss and gradients are PEFT's, and so is what is
saved; in eval mode PEFT's own functions run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from macdrop.gather import gathered, is_partitioned
from tune.forward.fused_linear import FusedLinear


class DoraNorms:
    """The weight norms of a model's DoRA layers on linear ones; without such layers every call does nothing.

    model: a PEFT model, under DeepSpeed the engine's ``module``, whose layers are changed here for good. Other kinds of
        layers (embeddings, convolutions) stay PEFT's, and so do those that MacDrop is attached to, whose masks are part
        of their norms. With dropout before the adapter PEFT computes another base result: there it is the norm alone
        that is kept.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers: list[_FactoredDora] = []
        modules: Iterator[Any] = model.modules()
        for module in modules:
            for adapter, variant in getattr(module, "lora_variant", {}).items():
                if type(variant) is DoraLinearVariant:
                    module.lora_variant[adapter] = _OnePass()
                    if type(module) is Linear:
                        module.__class__ = _FusedDora
                    layer = module.lora_magnitude_vector[adapter]
                    # The class is changed, not the object: DeepSpeed and the optimizer hold its parameter.
                    layer.__class__ = _FactoredDora
                    layer.set_up(module, adapter)
                    self._layers.append(layer)

    @contextmanager
    def for_step(self) -> Iterator[None]:
        """Compute the norms for the micro-steps of one optimizer step; outside of the block PEFT computes its own.

        The update ends what they are good for: no forward pass may follow it in the block. Collective under ZeRO-3.
        """
        try:
            for layer in self._layers:
                layer.compute_norm()
            yield
        finally:
            for layer in self._layers:
                layer.norm = None


class _FusedDora(FusedLinear):
    """PEFT's DoRA on a linear layer, in one go while norms are there."""

    def is_ready(self, adapter: str) -> bool:
        return bool(self.lora_magnitude_vector[adapter].has_norm)

    def run_fused(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        """Return DoRA's output (..., out) of `x` (..., in)."""
        layer: Any = self.lora_magnitude_vector[adapter]
        return layer(super().run_fused(x, adapter), bias=self.get_base_layer().bias)


class _OnePass(DoraLinearVariant):
    """PEFT's DoRA beside the base layer's result, but for the forward pass while norms are there: under ZeRO-3."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        layer: Any = module.lora_magnitude_vector[active_adapter]
        if not layer.has_norm or not isinstance(module.lora_dropout[active_adapter], nn.Identity):
            return DoraLinearVariant.forward(module, active_adapter=active_adapter, x=x, result=result, **kwargs)
        bias = getattr(module.get_base_layer(), "bias", None)
        bias = None if bias is None else bias.detach().clone()  # ZeRO-3 takes a partitioned one away again
        lora = module.lora_B[active_adapter](module.lora_A[active_adapter](x) * module.scaling[active_adapter])
        return layer(result + lora, bias=bias)


class _FactoredDora(DoraLinearLayer):
    """PEFT's DoRA layer with a norm that is kept for some time."""

    #: (out,) in fp32 or finer, while it is in force.
    norm: torch.Tensor | None = None

    def set_up(self, module: Any, adapter: str) -> None:
        # In a tuple, as they are not sub-modules of this one.
        self._parts = (module.get_base_layer(), module.lora_A[adapter], module.lora_B[adapter])
        self._scaling = module.scaling
        self._adapter = adapter
        self._squares: torch.Tensor | None = None

    @torch.no_grad()
    def compute_norm(self) -> None:
        base, lora_a, lora_b = self._parts
        a, b, scaling = lora_a.weight, lora_b.weight, self._scaling[self._adapter]
        with gathered([base.weight, a, b]):
            weight: torch.Tensor = dequantize_module_weight(base)
            weight = weight.T if self.fan_in_fan_out else weight
            if self._squares is None:
                self._squares = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float64).square()
            # In double precision but for the one product that reads W: the sum may cancel.
            products = (weight @ a.to(weight.dtype).T).double()
            a64, b64 = a.double(), b.double()
            change = 2 * scaling * products + scaling**2 * (b64 @ (a64 @ a64.T))
            squares = self._squares + (change * b64).sum(dim=1)
            self.norm = squares.clamp_min_(0).sqrt_().to(torch.promote_types(weight.dtype, torch.float32))
        self._versions = self._current_versions()

    @property
    def has_norm(self) -> bool:
        """True while a norm is in force, unless MacDrop has put functions of its own here: it masks some rows."""
        return self.norm is not None and self.training and "forward" not in vars(self)

    def get_lora_weight(self, lora_A: nn.Module, lora_B: nn.Module, adapter_name: str | None = None) -> torch.Tensor:
        """PEFT's dense B A, which it computes for `get_weight_norm` alone: nothing where the norm is there already."""
        if self.has_norm:
            return self.weight.new_empty(0)
        return super().get_lora_weight(lora_A=lora_A, lora_B=lora_B, adapter_name=adapter_name)

    def get_weight_norm(
        self, weight: torch.Tensor, lora_weight: torch.Tensor, scaling: float, adapter_name: str | None = None
    ) -> torch.Tensor:
        if self.has_norm and adapter_name is not None:  # None: of weights that are being merged
            return self._current_norm().to(weight.dtype)
        return super().get_weight_norm(weight, lora_weight, scaling, adapter_name=adapter_name)

    def _current_norm(self) -> torch.Tensor:
        assert self.norm is not None, "norms are in force for the micro-steps of one step"
        assert self._versions == self._current_versions(), "the adapter has changed since its norms were computed"
        return self.norm

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """PEFT's; or, given `bias`, the output of the whole layer for that of base and LoRA, `x`, which it overwrites.

        A call of the layer as any: DeepSpeed gathers its parameter for it.
        """
        if "bias" not in kwargs:
            return super().forward(x, **kwargs)
        scale = (self.weight / self._current_norm()).to(x.dtype)
        return _Scaled.apply(x, scale, kwargs["bias"])

    def _current_versions(self) -> tuple[int, ...]:
        """Count the changes in place of the factors; what ZeRO-3 gathers has no such count."""
        return tuple(part.weight._version for part in self._parts[1:] if not is_partitioned(part.weight))


class _Scaled(torch.autograd.Function):
    """``scale * (x - bias) + bias`` for x (..., out), in its place; the bias is frozen.

    Only the output is kept for the backward pass, which most layers that follow keep as well.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if bias is None:
            x.mul_(scale)
        else:
            torch.addcmul((bias * (1 - scale)).to(x.dtype), x, scale, out=x)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x, scale, bias)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        out, scale, bias = ctx.saved_tensors
        whole = out if bias is None else out - bias
        of_scale = (gradient * whole).flatten(0, -2).sum(0) / scale
        return gradient * scale, of_scale.to(scale.dtype), None

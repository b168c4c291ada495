"""Sites where a mask meets the model: outputs of frozen linears, PEFT's DoRA norm, stored rows of fused experts.

All three make the forward and backward pass that the paper's edited weights would make. Biases are never masked.
`InputDropout`, for the placebo that drops activations, masks the intermediate state instead. `attacked` zeroes rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from macdrop.attack import attacked_rows
from macdrop.errors import ConfigError, TrainingInvariantError
from macdrop.families import massive_ffn
from macdrop.gather import is_partitioned, read_rows, write_rows
from macdrop.structure import FFN, Projection
from macdrop.weights import MassiveWeights

#: Called with the mask at the first use of a site in a micro-step.
OnUse = Callable[[torch.Tensor], None]


class OutputMask:
    """Masks k rows of a linear layer by recomputing its k output features (2 k of a fused gate and up).

    The features are written in place of the originals, ``x @ (rows * mask).T + bias``; never as a difference to them,
    which cancels in bf16. The rows are copied once, so that no step needs the weight matrix: it may be partitioned.
    """

    def __init__(self, projections: Sequence[Projection], indices: Sequence[int], on_use: OnUse) -> None:
        self.module = projections[0].module
        self.matrices = len(projections)
        self.used = False
        self._wrapper = projections[0].wrapper
        self._on_use = on_use
        self._features = torch.tensor([f for p in projections for f in p.features(indices)])
        self._rows = torch.cat([read_rows(p, indices) for p in projections])
        self.rows = len(self._features)
        self._keep: torch.Tensor | None = None
        self._masked: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}
        self._handle = self.module.register_forward_hook(self._replace, prepend=True)
        self._dora = [_DoraPatch(layer, self) for layer in self._dora_layers()]

    @property
    def fewest_entries(self) -> int | None:
        """The non-zero entries of the row that has the fewest of them; None where no DoRA divides by its norm."""
        entries = (self._rows != 0).sum(dim=1)
        return int(entries[entries > 0].min()) if self._dora and bool(entries.any()) else None

    def open(self, keep: torch.Tensor) -> None:
        """Mask by `keep` (k, d), boolean, from now on; the same mask for gate and up."""
        if [patch.layer for patch in self._dora] != self._dora_layers():
            raise RuntimeError("a DoRA adapter was added or removed after attach(): call detach() and attach() again")
        self._keep = keep
        self.used = False

    def close(self) -> None:
        self._keep = None
        self._masked.clear()

    def remove(self) -> None:
        self.close()
        self._handle.remove()
        for patch in reversed(self._dora):
            patch.remove()

    def masks(self, module: nn.Module) -> bool:
        """Return whether `module` (the linear or a DoRA layer of it) must be masked in this forward pass."""
        return self._keep is not None and module.training

    def masked_rows(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Output features (n,) and their masked rows (n, d), on the device and in the precision of `like`."""
        key = (like.device, like.dtype)
        if key not in self._masked:
            self._features = self._features.to(like.device)
            assert self._keep is not None, "only while a mask is in force"
            self._masked[key] = self._rows.to(*key) * self._keep.to(*key).repeat(self.matrices, 1)
        return self._features, self._masked[key]

    def replace(self, output: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`output` (..., out) of the layer for the input `x` (..., d), with the features of the masked rows."""
        features, rows = self.masked_rows(x)
        masked = F.linear(x, rows, None if bias is None else bias[features]).to(output.dtype)
        if output._is_view():
            return output.index_copy(-1, features, masked)
        return output.index_copy_(-1, features, masked)

    def _replace(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        if self._keep is None or not self.masks(module):
            return None
        if not self.used:
            self.used = True
            self._on_use(self._keep)
        return self.replace(output, args[0], getattr(module, "bias", None))

    def _dora_layers(self) -> list[nn.Module]:
        layers, wrapper = [], self._wrapper
        while wrapper is not None:
            magnitudes = getattr(wrapper, "lora_magnitude_vector", None) or {}
            layers += [layer for layer in magnitudes.values() if hasattr(layer, "get_weight_norm")]
            wrapper = getattr(wrapper, "base_layer", None)
        return layers


class _DoraPatch:
    """Makes one DoRA layer of PEFT see the masked rows; `remove` puts its own functions back.

    DoRA reads the base weight outside the base layer's forward pass in two places: for the norm that divides the
    magnitude, and, when LoRA dropout gives the adapter another input, for a base result of its own.
    """

    def __init__(self, layer: nn.Module, mask: OutputMask) -> None:
        self.layer, self._mask = layer, mask
        self._before = {name: layer.__dict__.get(name) for name in ("get_weight_norm", "forward")}
        self._norm: Callable[..., torch.Tensor] = getattr(layer, "get_weight_norm")  # noqa: B009 (PEFT's own)
        self._forward = layer.forward
        vars(layer).update(get_weight_norm=self.get_weight_norm, forward=self.forward)

    def remove(self) -> None:
        for name, function in self._before.items():
            if function is None:
                delattr(self.layer, name)
            else:
                setattr(self.layer, name, function)

    def get_weight_norm(
        self, weight: torch.Tensor, lora_weight: torch.Tensor, scaling: float, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        norm = self._norm(weight, lora_weight, scaling, *args, **kwargs)
        if not self._mask.masks(self.layer):
            return norm
        features, rows = self._mask.masked_rows(weight)
        masked = torch.linalg.norm(rows + scaling * lora_weight[features], dim=1)
        # A row of which nothing is left gives 0 and no gradient: PEFT divides the magnitude by what stands here.
        masked = masked.masked_fill(masked == 0, torch.inf)
        return norm.index_copy(0, features, masked.to(norm.dtype))

    def forward(
        self, x: torch.Tensor, *, base_layer: nn.Module, base_result: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        if base_result is None and self._mask.masks(self.layer):
            from peft.utils.integrations import dequantize_module_weight

            weight = dequantize_module_weight(base_layer).to(x.dtype)
            weight = weight.T if self.layer.fan_in_fan_out else weight
            # PEFT subtracts the bias from a base result that it is given.
            bias: torch.Tensor | None = getattr(base_layer, "bias", None)
            bias = None if bias is None else bias.to(x.dtype)
            base_result = self._mask.replace(F.linear(x, weight, bias), x, bias)
        return self._forward(x, base_layer=base_layer, base_result=base_result, **kwargs)


class EditedRows:
    """Masks k rows of one expert in a 3-D parameter: edits them when opened, restores them bit by bit when closed.

    The experts' kernels read the parameter itself, so there is no output of one matrix to replace.
    """

    def __init__(self, projections: Sequence[Projection], indices: Sequence[int], on_use: OnUse) -> None:
        self.module = projections[0].module
        self.matrices = len(projections)
        self.rows = len(indices) * self.matrices
        self._projections, self._indices, self._on_use = projections, list(indices), on_use
        self._saved: list[tuple[Projection, torch.Tensor]] = []
        self._refuse_partitioned()
        for projection in projections:
            read_rows(projection, self._indices)  # raises where they cannot be read
        self._handle = self.module.register_forward_pre_hook(self._check)

    @property
    def used(self) -> bool:
        return True  # edited rows are seen by any kernel

    def open(self, keep: torch.Tensor) -> None:
        """Mask by `keep` (k, d), boolean, from now on; the same mask for gate and up. Nothing in eval mode."""
        if not self.module.training:
            return
        self._refuse_partitioned()
        for projection in self._projections:
            rows = read_rows(projection, self._indices)
            self._saved.append((projection, rows))
            write_rows(projection, self._indices, rows * keep.to(rows.device, rows.dtype))
        self._on_use(keep)

    def close(self) -> None:
        while self._saved:
            projection, rows = self._saved.pop()
            write_rows(projection, self._indices, rows)

    def remove(self) -> None:
        self.close()
        self._handle.remove()

    def _refuse_partitioned(self) -> None:
        for projection in self._projections:
            if is_partitioned(projection.tensor):
                raise ConfigError(
                    f"{type(self.module).__name__}.{projection.parameter} is partitioned by DeepSpeed ZeRO-3, and\n"
                    "MacDrop must edit rows of fused experts in place, which that does not allow.\n"
                    "Use ZeRO stage 0, 1 or 2 for this model."
                )

    def _check(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._saved and not module.training:
            raise TrainingInvariantError("the experts ran in eval mode with masked massive rows: call end() first")


class InputDropout:
    """Inverted dropout on the intermediate state: the input of an FFN's down projection, an adapter's part included.

    Entries are zeroed with probability p and the others scaled by 1 / (1 - p), for every token alike, padding too.
    """

    matrices = 1

    def __init__(self, ffn: FFN, on_use: OnUse) -> None:
        if ffn.down is None:
            raise ConfigError(
                f"The experts of {ffn.path} are fused: no layer takes their intermediate state, so that activations\n"
                "cannot be dropped there. Leave the placebo 'activations' out for this model."
            )
        self.module = ffn.down
        self.rows = ffn.intermediate_size
        self.used = False
        self._on_use = on_use
        self._draw: Callable[..., torch.Tensor] | None = None
        self._p = 0.0
        self._handle = self.module.register_forward_pre_hook(self._drop)

    def open(self, draw: Callable[..., torch.Tensor], p: float) -> None:
        """Drop with probability p from now on, by the masks that `draw(shape, device)` makes, true where kept."""
        self._draw, self._p, self.used = draw, p, False

    def close(self) -> None:
        self._draw = None

    def remove(self) -> None:
        self.close()
        self._handle.remove()

    def _drop(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._draw is None or not module.training:
            return None
        state = args[0]
        keep = self._draw(state.shape, state.device)
        if not self.used:
            self.used = True
            self._on_use(keep)
        scale = 1 / (1 - self._p) if self._p < 1 else 0.0
        return (state * (keep.to(state.dtype) * scale), *args[1:])


@contextmanager
def attacked(model: nn.Module, weights: MassiveWeights, kind: str, k: int = 0, *, seed: int = 0) -> Iterator[int]:
    """Set rows of the massive layer to zero inside the block; yields how many, over all matrices.

    The model that is passed decides which weights are attacked. With a PEFT adapter in place the rows of the base are
    zeroed and the adapter's part of these rows stays alive; with a merged model the merged rows are zeroed. These are
    different experiments: name which one a score is of. Biases of plain FFNs (and of GPT-OSS experts) are kept.

    The rows come back bit for bit at the end, after exceptions too; blocks may be nested. Only the rows that are zeroed
    are copied meanwhile. Of routed experts only the one that bos is routed to is touched. For inference: autograd
    refuses a backward pass of a forward pass from before the block.

    Raises `ConfigError` for an unknown kind, an impossible k, and for weights whose rows cannot be written in place
    (quantised, or partitioned by DeepSpeed ZeRO-3), and `NoMassiveWeights` when `weights` belong to another model.
    """
    rows = attacked_rows(weights, kind, k, seed=seed)
    if not rows:
        yield 0
        return
    ffn = massive_ffn(model, weights)
    for projection in ffn.projections:
        _require_writable(projection.tensor, kind)
    saved = []
    try:
        for projection in ffn.projections:
            saved.append((projection, read_rows(projection, rows)))
            write_rows(projection, rows, torch.zeros((), dtype=saved[-1][1].dtype, device=saved[-1][1].device))
        yield len(rows) * len(ffn.projections)
    finally:
        for projection, original in saved:
            write_rows(projection, rows, original)


def _require_writable(parameter: torch.Tensor, kind: str) -> None:
    if is_partitioned(parameter):
        raise ConfigError(
            f"The attack {kind!r} needs whole weights, but DeepSpeed ZeRO-3 has partitioned them.\n"
            "Score attacks with a model that is loaded outside the training engine."
        )
    if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
        raise ConfigError(
            f"The attack {kind!r} cannot set rows of quantised weights to zero ({parameter.dtype}).\n"
            "Load the model in float32, bfloat16 or float16."
        )

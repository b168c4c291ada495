"""Attacks on a model: rows of its massive layer set to zero for a while, and brought back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from macdrop.attack import attacked_rows
from macdrop.errors import ConfigError
from macdrop.families import massive_ffn
from macdrop.gather import is_partitioned, is_writable, zeroed_rows
from macdrop.weights import MassiveWeights


@contextmanager
def attacked(model: nn.Module, weights: MassiveWeights, kind: str, k: int = 0, *, seed: int = 0) -> Iterator[int]:
    """Set rows of the massive layer to zero inside the block; yields how many, over all matrices.

    The model that is passed decides which weights are attacked. With a PEFT adapter in place the rows of the base are
    zeroed and the adapter's part of these rows stays alive; with a merged model the merged rows are zeroed. These are
    different experiments: name which one a score is of. Biases of plain FFNs (and of GPT-OSS experts) are kept.

    The rows come back bit for bit at the end, after exceptions too; blocks may be nested. Only the rows that are zeroed
    are copied meanwhile. Weights that bitsandbytes has quantised are zeroed as they would be if they were dequantised
    first: their rows get the code of 0, and the scales stay. Of routed experts only the one that bos is routed to is
    touched. For inference: autograd refuses a backward pass of a forward pass from before the block.

    Raises `ConfigError` for an unknown kind, an impossible k, and for weights whose rows cannot be written in place
    (quantised by something else, or partitioned by DeepSpeed ZeRO-3), and `NoMassiveWeights` when `weights` belong to
    another model.
    """
    rows = attacked_rows(weights, kind, k, seed=seed)
    if not rows:
        yield 0
        return
    ffn = massive_ffn(model, weights)
    for projection in ffn.projections:
        _require_writable(projection.tensor, kind)
    with ExitStack() as stack:
        for projection in ffn.projections:
            stack.enter_context(zeroed_rows(projection, rows))
        yield len(rows) * len(ffn.projections)


def _require_writable(parameter: torch.Tensor, kind: str) -> None:
    if is_partitioned(parameter):
        raise ConfigError(
            f"The attack {kind!r} needs whole weights, but DeepSpeed ZeRO-3 has partitioned them.\n"
            "Score attacks with a model that is loaded outside the training engine."
        )
    if not is_writable(parameter):
        raise ConfigError(
            f"The attack {kind!r} cannot set rows of weights in {parameter.dtype} to zero.\n"
            "Load the model in float32, bfloat16 or float16, or let bitsandbytes quantise it (quantization_bit)."
        )

"""Attacks on the massive weights (arXiv 2410.01866, section 3): rows of W_gate and W_up set to zero, then put back.

Which weights are attacked follows from the model that is passed. With a PEFT adapter in place the rows of the frozen
base are zeroed and the adapter's part of these rows stays alive; with a merged model the merged rows are. These are
different experiments: name which one a score is of. Biases of plain FFNs (and of GPT-OSS experts) are never touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from macdrop.errors import ConfigError, NoMassiveWeights, nearest
from macdrop.families import FFN, find_ffn
from macdrop.gather import is_partitioned, read_rows, write_rows
from macdrop.weights import MassiveWeights

KINDS = ("zeroing", "retaining", "random")


@dataclass(frozen=True)
class Attack:
    """An attack by its kind and k, as written in recipes: ``zeroing@3``; ``none`` is the untouched model."""

    kind: str
    k: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "none" else f"{self.kind}@{self.k}"


def parse_attack(text: str) -> Attack:
    """Read ``zeroing@3``, ``retaining@5``, ``random@5`` or ``none``. Raises `ConfigError` for anything else."""
    if text == "none":
        return Attack("none")
    kind, _, k = str(text).partition("@")
    if kind not in KINDS or not re.fullmatch(r"[0-9]+", k):
        hint = nearest(kind, (*KINDS, "none")) if kind not in KINDS else ""
        raise ConfigError(
            f"{text!r} is no attack.{hint}\nWrite none, or {', '.join(KINDS[:-1])} or {KINDS[-1]} with k: zeroing@5."
        )
    return Attack(kind, int(k))


def attacked_rows(weights: MassiveWeights, kind: str, k: int, *, seed: int = 0) -> tuple[int, ...]:
    """The rows that an attack sets to zero.

    zeroing: the top k. retaining: all but the top k. random: k drawn by `seed` from all but the top k. So zeroing with
    k = 0 is the untouched model, and retaining with k = 0 zeroes the whole matrices. Raises `ConfigError` for an
    unknown kind and for a k that is impossible.
    """
    if kind == "none":
        return ()
    if kind not in KINDS:
        raise ConfigError(f"Unknown attack {kind!r}.{nearest(kind, KINDS)} Allowed: {', '.join(KINDS)}, none.")
    top = weights.top(k)
    if kind == "zeroing":
        return top
    rest = weights.indices[k:]
    if kind == "retaining":
        return rest
    return random_rows(weights, k, spared=k, seed=seed)


def random_rows(weights: MassiveWeights, k: int, *, spared: int, seed: int) -> tuple[int, ...]:
    """k rows drawn by `seed`, without replacement, from all but the top `spared` (at least k).

    Raises `ConfigError` when the layer has fewer than k + spared rows.
    """
    rest = weights.indices[spared:]
    if k > len(rest):
        size = weights.intermediate_size
        raise ConfigError(
            f"{k} random rows beside the top {spared} are not possible: layer {weights.layer} of {weights.model} has "
            f"{size} rows in all.\nGive k of at most {max(0, size - spared) if k < spared else size // 2}."
        )
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed)).tolist()
    return tuple(rest[i] for i in order[:k])


@contextmanager
def attacked(model: nn.Module, weights: MassiveWeights, kind: str, k: int = 0, *, seed: int = 0) -> Iterator[int]:
    """The model with rows of its massive layer set to zero inside the block; yields how many, over all matrices.

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


def massive_ffn(model: nn.Module, weights: MassiveWeights) -> FFN:
    """The FFN that `weights` speak of, in a bare or PEFT-wrapped model, with its expert chosen.

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

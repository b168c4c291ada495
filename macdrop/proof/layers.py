"""A proof in every layer: zero and retain each layer's own top rows, and ask whether the scan's layer is the one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from macdrop.attack import attacked_rows
from macdrop.bootstrap import mean_interval
from macdrop.masking import attacked
from macdrop.probe import evaluating
from macdrop.proof.factors import Factor
from macdrop.proof.losses import Replay, as_perplexity
from macdrop.proof.proving import SENSITIVE_FACTOR, require_blocks, require_finite
from macdrop.weights import MassiveWeights

ATTACKS = ("zeroing", "retaining")
FORMAT = 1  # of the JSON file
#: What the layers say of the scan's one.
SAME, UNCLEAR, OTHER, NONE = "the rule's layer", "cannot tell", "another layer", "no layer"


@dataclass(frozen=True)
class LayerRow:
    """One layer with its own top rows at bos: what zeroing them, and retaining only them, does to perplexity."""

    layer: int
    expert: int | None
    rows: tuple[int, ...]
    top: float  # largest |intermediate state|
    zeroed: Factor
    retained: Factor


@dataclass(frozen=True)
class LayerProof:
    """The proof of every layer that has an FFN. `best` is the layer whose zeroing factor is the largest.

    measured_on: the text, for people; empty in files of earlier versions.
    finding: one of "the rule's layer", "cannot tell", "another layer", "no layer"; see `prove_layers`.
    """

    k: int
    blocks: int
    tokens: int
    untouched: float
    layer: int  # the scan's, by its rule
    best: int
    finding: str
    text: str
    rows: tuple[LayerRow, ...]
    measured_on: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON types only; an infinite number is the string "inf"."""
        rows = [
            {**asdict(row), "rows": list(row.rows), "zeroed": row.zeroed.to_list(), "retained": row.retained.to_list()}
            for row in self.rows
        ]
        return {"format": FORMAT, **{**asdict(self), "rows": rows}}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LayerProof:
        """The inverse of `to_dict`. Raises `ValueError`, `KeyError` or `TypeError` for anything else."""
        if data["format"] != FORMAT:
            raise ValueError(f"format {data['format']!r} instead of {FORMAT}")
        values = {key: value for key, value in data.items() if key != "format"}
        rows = [
            LayerRow(
                **{
                    **row,
                    "rows": tuple(row["rows"]),
                    "zeroed": Factor.from_list(row["zeroed"]),
                    "retained": Factor.from_list(row["retained"]),
                }
            )
            for row in values["rows"]
        ]
        return cls(**{**values, "rows": tuple(rows)})


def layer_seconds(model: nn.Module, blocks: torch.Tensor, layers: int, *, batch_size: int = 8) -> float:
    """Estimate the seconds that `prove_layers` takes on blocks (n, T), from one timed pass of its first batch.

    A pass from layer l on counts as a whole one, so that models with a large vocabulary are not underestimated.
    """
    batches = blocks.split(batch_size)
    with evaluating(model):
        Replay(model, batches[0][:1], [])  # the first pass of a process also loads kernels
        started = time.monotonic()
        Replay(model, batches[0], [])
    return (time.monotonic() - started) * len(batches) * (1 + len(ATTACKS) * layers)


def prove_layers(
    model: nn.Module,
    blocks: torch.Tensor,
    scans: Sequence[MassiveWeights],
    layer: int,
    *,
    k: int = 5,
    seed: int = 0,
    batch_size: int = 8,
    measured_on: str = "",
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> LayerProof:
    """In each layer zero, then retain, that layer's own top k rows; the other layers are untouched.

    blocks: (n, T) token ids, bos first, n >= 5. scans: the rows of each layer (`macdrop.scan.layer_weights`). layer:
    the one that the scan's rule chose. measured_on: what the blocks are of, for people. progress: called with (passes
    made, passes in all).

    The finding compares the layer with the largest factor of zeroing, `best`, and the rule's: *no layer* when the
    interval of the largest factor lies below 2; *cannot tell* when it does not lie above 1; *the rule's layer* when it
    is the best one, and the paired difference to the second best has an interval above 0; *another layer* when the best
    one is another and its difference to the rule's layer has an interval above 0; else *cannot tell*.

    Raises `ConfigError` for bad arguments or an untouched perplexity that is not finite; `DataError` for too few
    blocks.
    """
    require_blocks(blocks, k=k, batch_size=batch_size)
    for weights in scans:
        for kind in ATTACKS:
            attacked_rows(weights, kind, k)
    untouched, losses = _measure(model, blocks.split(batch_size), scans, k, progress)
    rows = []
    for weights, (zeroed, retained) in zip(scans, losses, strict=True):
        factors = [Factor.of(each, untouched, seed=seed) for each in (zeroed, retained)]
        rows.append(LayerRow(weights.layer, weights.expert, weights.top(k), weights.magnitudes[0], *factors))
    order = sorted(range(len(rows)), key=lambda i: -rows[i].zeroed.value)
    own = next(i for i, row in enumerate(rows) if row.layer == layer)
    finding = _finding(rows, order, own, [zeroed for zeroed, _ in losses], seed)
    return LayerProof(
        k=k,
        blocks=len(blocks),
        tokens=blocks.shape[0] * (blocks.shape[1] - 1),
        untouched=as_perplexity(untouched),
        layer=layer,
        best=rows[order[0]].layer,
        finding=finding,
        text=_text(finding, rows, order, own),
        rows=tuple(rows),
        measured_on=measured_on,
    )


def _measure(
    model: nn.Module,
    batches: Sequence[torch.Tensor],
    scans: Sequence[MassiveWeights],
    k: int,
    progress: Callable[[int, int], None],
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Losses (n,) of all blocks: untouched; and for each layer, zeroed and retained."""
    untouched: list[np.ndarray] = []
    found: list[list[list[np.ndarray]]] = [[[] for _ in ATTACKS] for _ in scans]
    passes, done = len(batches) * (1 + len(ATTACKS) * len(scans)), 0
    with evaluating(model):
        for batch in batches:
            replay = Replay(model, batch, [weights.layer for weights in scans])
            require_finite(model, replay.untouched, scans[0].model)
            untouched.append(replay.untouched)
            done += 1
            for weights, kinds in zip(scans, found, strict=True):
                for kind, losses in zip(ATTACKS, kinds, strict=True):
                    with attacked(model, weights, kind, k):
                        losses.append(replay.losses(weights.layer))
                    done += 1
                    progress(done, passes)
    return np.concatenate(untouched), [(np.concatenate(z), np.concatenate(r)) for z, r in found]


def _finding(rows: list[LayerRow], order: list[int], own: int, zeroed: list[np.ndarray], seed: int) -> str:
    best = order[0]
    if rows[best].zeroed.high < SENSITIVE_FACTOR:
        return NONE
    if not rows[best].zeroed.low > 1:
        return UNCLEAR
    other = (order[1] if len(order) > 1 else None) if best == own else own
    clear = other is None or _exceeds(zeroed[best], zeroed[other], seed)
    if best == own:
        return SAME if clear else UNCLEAR
    return OTHER if clear else UNCLEAR


def _exceeds(first: np.ndarray, second: np.ndarray, seed: int) -> bool:
    """Return whether the first losses are above the second beyond doubt, paired by block."""
    if not np.isfinite(first).all():
        return bool(np.isfinite(second).all())
    return mean_interval(first - second, seed=seed)[0] > 0


def _text(finding: str, rows: list[LayerRow], order: list[int], own: int) -> str:
    """Put the finding into words."""
    best, rule = rows[order[0]], rows[own]
    second = rows[order[1]] if len(order) > 1 else None
    beside = f", the next one is layer {second.layer} with {second.zeroed}" if second else ""
    if finding == SAME:
        return f"the rule's layer is the one that matters: layer {rule.layer}, {rule.zeroed}{beside}"
    if finding == NONE:
        also = "the rule's" if best is rule else f"the rule's is layer {rule.layer} with {rule.zeroed}"
        return (
            f"no layer matters: zeroing a layer's own rows multiplies perplexity by {best.zeroed} at most, in layer "
            f"{best.layer} ({also}){beside if best is rule else ''}"
        )
    if finding == OTHER:
        return (
            f"ANOTHER LAYER matters more: layer {best.layer}, {best.zeroed}; the rule chose layer {rule.layer}, "
            f"{rule.zeroed}"
        )
    if best is rule:
        return f"cannot tell: the rule's layer {rule.layer} has the largest factor, {rule.zeroed}{beside}"
    return f"cannot tell: layer {best.layer} has {best.zeroed}, the rule's layer {rule.layer} has {rule.zeroed}"

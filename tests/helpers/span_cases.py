"""Examples of several lengths, laid out in one micro-batch or alone, each with the number of its mask and its place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from helpers import reference, tiny
from helpers.hook_cases import SEED, SHAPE, P, gradients
from macdrop.hooks import keep_mask
from macdrop.masking.layout import Span

#: Length, number of the mask, place.
EXAMPLES = ((5, 4, 0), (9, 0, 0), (3, 0, 1), (7, 4, 1), (2, 9, 0))
LAYOUTS = ("packed", "padded", "left", "two rows")


@dataclass(frozen=True)
class Laid:
    """A micro-batch: what the model takes, and where each of EXAMPLES lies in it."""

    inputs: dict[str, torch.Tensor]
    spans: list[Span]


def tokens(number: int) -> torch.Tensor:
    return tiny.batch(100 + number, rows=1, length=EXAMPLES[number][0])["input_ids"][0]


def lay(layout: str, dtype: torch.dtype = torch.float32) -> Laid:
    """All examples: in one row after each other, in a row each with padding, or in two rows of several."""
    longest = max(length for length, _, _ in EXAMPLES)
    places, width, filler = [], longest, 2
    for number, (length, _, _) in enumerate(EXAMPLES):
        if layout in ("padded", "left"):
            places.append((number, longest - length if layout == "left" else 0))
        else:
            row = number // 3 if layout == "two rows" else 0
            inside = [EXAMPLES[i][0] for i in range(number) if layout == "packed" or i // 3 == row]
            places.append((row, sum(inside)))
    rows = 1 + max(row for row, _ in places)
    width = max(start + EXAMPLES[n][0] for n, (_, start) in enumerate(places)) + filler
    ids, positions = torch.zeros(rows, width, dtype=torch.long), torch.zeros(rows, width, dtype=torch.long)
    seen = torch.eye(width, dtype=torch.bool).repeat(rows, 1, 1, 1)
    spans = []
    for number, (row, start) in enumerate(places):
        length, mask, place = EXAMPLES[number]
        stop = start + length
        ids[row, start:stop], positions[row, start:stop] = tokens(number), torch.arange(length)
        seen[row, 0, start:stop, start:stop] = torch.ones(length, length, dtype=torch.bool).tril()
        spans.append(Span(row, start, stop, mask, place))
    attention = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return Laid({"input_ids": ids, "position_ids": positions, "attention_mask": attention}, spans)


def by_spans(model, drop, laid: Laid, p: float = P):
    """Losses of the examples, and the gradients of their mean, from one micro-batch."""
    with drop.micro_step(p, laid.spans):
        logits = model(**laid.inputs).logits.float()
        losses = []
        for number, span in enumerate(laid.spans):
            found = logits[span.row, span.start : span.stop - 1]
            losses.append(cross_entropy(found, tokens(number)[1:]))
        torch.stack(losses).mean().backward()
    return [loss.item() for loss in losses], gradients(model)


def one_by_one(model, family: str, p: float = P):
    """The same by the paper's listing: each example alone, with the rows of the weights edited by its mask."""
    losses = []
    for number, (_, mask, _) in enumerate(EXAMPLES):
        batch = {"input_ids": tokens(number)[None], "labels": tokens(number)[None]}
        keep = keep_mask(SEED, mask, p, SHAPE)
        losses.append(reference.training_step(model, batch, family, tiny.ROWS, keep, divide=len(EXAMPLES)))
    return losses, gradients(model)

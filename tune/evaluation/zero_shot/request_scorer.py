"""Log-likelihoods of requests by a resident model, which share their contexts where the model lets them.

Nothing is assumed about a model: the longest row with branches is also computed request by request. If the two
differ, or the model refuses the mask, requests are not put together. A packed batch is tried first, then a padded one.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from enum import Enum
from typing import TYPE_CHECKING

import torch

from macdrop.families import bare_model
from tune.evaluation.decode import one_length_a_batch
from tune.evaluation.logits import Logits, plain_logits
from tune.evaluation.zero_shot.shared_context import Batch, Pair, Tree, batches_of, input_of, trees_of
from tune.forward.packing_check import WINDOWS
from tune.forward.row_attention import runs_in_rows

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    Model = PreTrainedModel | PeftModel

#: Log-likelihood of a continuation, and whether it is what greedy decoding would write.
Answer = tuple[float, bool]
#: Largest mean difference of a token's log-probability by which a shared row counts as equal: rounding, in each dtype.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_COMPARED = 2  # requests at either end of the row that is computed both ways


class Sharing(Enum):
    """Layout of a batch of requests."""

    PACKED = "rows of attention over distinct tokens"
    PADDED = "rows of the whole model under a mask"
    APART = "rows of one request"


class RequestScorer:
    """Scores lists of requests, one after the other; `apart`: contexts that could be shared were not, since `begin`."""

    def __init__(self) -> None:
        self.apart = False
        #: For each kind of model how it shares, and the tokens of the longest row that this was proven with.
        self._proven: dict[Hashable, tuple[Sharing, int]] = {}

    def begin(self) -> None:
        """Begin another entry."""
        self.apart = False

    def score(self, model: Model, pairs: Sequence[Pair], batch_size: int, logits: Logits) -> list[Answer]:
        """Return the answers to requests, in their order.

        Args:
            pairs: context and continuation, neither of them empty.
            batch_size: requests as long as the longest whose tokens a batch may hold.
            logits: runs the model.
        """
        longest = max((len(input_of(pair)) for pair in pairs), default=0)
        budget, answers = batch_size * longest, {}
        for group, packed in self._groups(model, pairs, budget):
            for trees in batches_of(group, budget, overhead=longest):
                batch = Batch.of(trees, pairs, packed)
                read = _read(model, batch, logits)
                for number, places in batch.answers.items():
                    tokens = zip(places, pairs[number][1], strict=True)
                    greedy = all(read[n][-1] == token for (n, _), token in tokens)
                    answers[number] = math.fsum(read[n][k] for n, k in places), greedy
        return [answers[number] for number in range(len(pairs))]

    def _groups(self, model: Model, pairs: Sequence[Pair], budget: int) -> list[tuple[list[Tree], bool]]:
        """Return rows of requests within the model's windows and of those beyond, each with whether they are packed.

        No batch may mix the two: the mask of rows with branches is that of the whole batch, in all layers, and would
        lift the windows.
        """
        window = _look_back(model)
        near = [number for number, pair in enumerate(pairs) if len(input_of(pair)) <= window]
        far = [number for number in range(len(pairs)) if len(input_of(pairs[number])) > window]
        trees, sharing = trees_of(pairs, near, budget, share=True), Sharing.APART
        if any(tree.branches for tree in trees):
            sharing = self._sharing(model, trees, pairs)
            if sharing is Sharing.APART:
                self.apart = True
                trees = trees_of(pairs, near, budget, share=False)
        return [(trees, sharing is Sharing.PACKED), (trees_of(pairs, far, budget, share=False), False)]

    def _sharing(self, model: Model, trees: Sequence[Tree], pairs: Sequence[Pair]) -> Sharing:
        """Return how rows give what their requests give alone; each kind of model is tried with its longest row."""
        kind = (type(model).__name__, type(bare_model(model)).__name__, model.dtype, model.config._attn_implementation)
        ways = [Sharing.PACKED, Sharing.PADDED] if runs_in_rows(model) else [Sharing.PADDED]
        if kind not in self._proven:
            self._proven[kind] = (Sharing.APART if one_length_a_batch(model) else ways[0], 0)
        sharing, proven = self._proven[kind]
        longest = max((tree for tree in trees if tree.branches), key=lambda tree: len(tree.tokens))
        if sharing is not Sharing.APART and proven < len(longest.tokens):
            rows = [min(trees, key=lambda tree: len(tree.tokens)), longest]
            ways = ways[ways.index(sharing) :]
            sharing = next((way for way in ways if _agree(model, rows, pairs, way)), Sharing.APART)
            self._proven[kind] = (sharing, len(longest.tokens))
        return sharing


def _look_back(model: Model) -> float:
    """Return the tokens up to which all layers see all: a mask of ours would let some see more."""
    config = model.config.get_text_config()
    return min((w for w in (getattr(config, key, None) for key in WINDOWS) if isinstance(w, int)), default=math.inf)


def _agree(model: Model, trees: list[Tree], pairs: Sequence[Pair], sharing: Sharing) -> bool:
    """Return whether requests of the last of some rows get what they get alone."""
    numbers = list(trees[-1].paths)
    numbers = list(dict.fromkeys(numbers[:_COMPARED] + numbers[-_COMPARED:]))
    try:
        together = _continuations(model, Batch.of(trees, pairs, sharing is Sharing.PACKED), numbers)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a model may do anything with a mask it does not know
        return False
    each = [(n, Batch.of(trees_of(pairs, [n], 0, share=False), pairs)) for n in numbers]
    alone = [p for number, batch in each for p in _continuations(model, batch, [number])]
    difference = (torch.tensor(together) - torch.tensor(alone)).abs().mean().item()
    return difference <= TOLERANCES.get(model.dtype, TOLERANCES[torch.bfloat16])


def _continuations(model: Model, batch: Batch, numbers: list[int]) -> list[float]:
    """Return the log-probabilities of all tokens of the continuations of `numbers`."""
    read = _read(model, batch, plain_logits)
    return [read[n][k] for number in numbers for n, k in batch.answers[number]]


def _read(model: Model, batch: Batch, logits: Logits) -> list[list[float]]:
    """Return the log-probabilities of K targets at each of N positions, in fp32, and then the likeliest token."""
    device = model.device
    targets = batch.targets.to(device)

    def keep(chunk: torch.Tensor, rows: slice) -> torch.Tensor:
        chunk = chunk.float()
        top, likeliest = chunk.max(-1, keepdim=True)
        wanted = chunk.gather(-1, targets[rows])
        total = top + (chunk - top).exp_().sum(-1, keepdim=True).log_()
        return torch.cat([wanted - total, likeliest.float()], -1)  # exact: ids are far below 2 ** 24

    rows, columns = batch.at
    found = logits(
        model,
        batch.ids.to(device),
        batch.mask(model.dtype, device),
        positions=None if batch.depths is None else batch.depths.to(device),
        at=(rows.to(device), columns.to(device)),
        read=keep,
    )
    return found.tolist()

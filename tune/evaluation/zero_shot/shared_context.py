"""Log-likelihoods of many requests, with the prefixes that their inputs share computed once.

The inputs of neighbouring requests, such as a question followed by each of its choices, form a tree of tokens. A tree
is laid out depth-first as one row of a batch: each token attends to its ancestors alone, and its position is its depth,
so that each path gets the logits of the input that it spells. Logits are computed at the positions that are read: one
for several choices of one token each.

A packed batch is without padding, and without the beginnings that its rows have in common but once: only attention
runs in rows. Where a model's attention cannot be replaced, the whole model does, padded on the right. What is not
shared is a row of its own without a mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from tune.forward.row_attention import Rows

#: Token ids of a request's context and of its continuation.
Pair = tuple[list[int], list[int]]
#: A request joins the row of its neighbour if this part of its input, or more, is in there already: below that, the
#: attention of a longer row costs more than the shared tokens save.
SHARE = 1 / 3
#: Tokens of a row, in lengths of the longest input: the mask of a row, and its attention, grow with the square.
WIDTH = 2


def input_of(pair: Pair) -> list[int]:
    """Return the tokens of a request that a model is given: all but the last of the continuation."""
    return pair[0] + pair[1][:-1]


@dataclass
class Tree:
    """A row: inputs as paths of one tree, depth-first; a token's descendants follow it, up to `ends` of it.

    paths: request number -> places in the row of the tokens that its continuation is read at.
    """

    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    paths: dict[int, list[int]] = field(default_factory=dict)
    _last: list[int] = field(default_factory=list)  # places of the input added last

    @property
    def branches(self) -> bool:
        """Return whether the tree holds more than one path."""
        return len(self.tokens) > len(self._last)

    def shared(self, tokens: Sequence[int]) -> int:
        """Return the length of the longest common prefix of `tokens` and the input added last."""
        count = 0
        for place, token in zip(self._last, tokens, strict=False):
            if self.tokens[place] != token:
                break
            count += 1
        return count

    def add(self, number: int, tokens: Sequence[int], read: int) -> None:
        """Add an input, of which the last `read` positions are read; inputs come in lexicographic order."""
        shared = self.shared(tokens)
        start, new = len(self.tokens), len(tokens) - shared
        for place in self._last[shared:]:
            self.ends[place] = start
        self.tokens += tokens[shared:]
        self.depths += range(shared, len(tokens))
        self._last = self._last[:shared] + list(range(start, start + new))
        self.ends += [0] * new
        for place in self._last:
            self.ends[place] = start + new
        self.paths[number] = self._last[len(tokens) - read :]


def trees_of(pairs: Sequence[Pair], numbers: Sequence[int], budget: int, share: bool) -> list[Tree]:
    """Lay requests out in rows of at most `budget` tokens, or of one input that is longer.

    share: otherwise inputs share a row only with their own beginnings, which takes no mask.
    """
    inputs = {number: input_of(pairs[number]) for number in numbers}
    room = min(budget, WIDTH * max(map(len, inputs.values()), default=0))
    trees: list[Tree] = []
    whole = 0
    for number in sorted(inputs, key=inputs.__getitem__):
        tokens = inputs[number]
        tree = trees[-1] if trees else Tree()
        shared = tree.shared(tokens)
        fits = share and shared >= SHARE * len(tokens) and len(tree.tokens) + len(tokens) - shared <= room
        if not trees or not (fits or (shared == whole and not tree.branches)):
            tree = Tree()
            trees.append(tree)
        tree.add(number, tokens, len(pairs[number][1]))
        whole = len(tokens)
    return trees


def batches_of(trees: Sequence[Tree], budget: int, overhead: int) -> Iterator[list[Tree]]:
    """Yield rows in batches of at most `budget` padded tokens, longest first, so that the fewest tokens are computed.

    overhead: tokens that one more batch must save. A row longer than the budget is a batch.
    """
    rows = sorted(trees, key=lambda tree: (-len(tree.tokens), min(tree.paths)))
    best, then = [0] * (len(rows) + 1), [0] * len(rows)
    for start in range(len(rows) - 1, -1, -1):
        width = len(rows[start].tokens)
        stops = range(start + 1, min(start + max(1, budget // width), len(rows)) + 1)
        best[start], then[start] = min((best[stop] + (stop - start) * width + overhead, stop) for stop in stops)
    start = 0
    while start < len(rows):
        yield rows[start : then[start]]
        start = then[start]


@dataclass(frozen=True)
class Batch:
    """Rows as tensors: B of T tokens, with N positions that are read, for up to K continuation tokens each.

    ids: (B, T); of a packed batch (1, M), its M distinct tokens. ends, depths: for each token of rows with branches,
    as `Tree` has them; None where no row has any. tokens: (B, T), which of the M tokens of a packed batch stands where.
    at: rows and columns of `ids`, each (N,). targets: (N, K). answers: request number -> for each token of its
    continuation, (position n, target k).
    """

    ids: torch.Tensor
    ends: torch.Tensor | None
    depths: torch.Tensor | None
    tokens: torch.Tensor | None
    at: tuple[torch.Tensor, torch.Tensor]
    targets: torch.Tensor
    answers: dict[int, list[tuple[int, int]]]

    @classmethod
    def of(cls, trees: Sequence[Tree], pairs: Sequence[Pair], packed: bool = False) -> Batch:
        """Make tensors of rows, padded on the right; padding is its own only ancestor."""
        width = max(len(tree.tokens) for tree in trees)

        def padded(rows: Iterable[list[int]]) -> torch.Tensor:
            return torch.tensor([row + [0] * (width - len(row)) for row in rows])

        ids, depths = padded(tree.tokens for tree in trees), padded(tree.depths for tree in trees)
        ends = torch.tensor([tree.ends + list(range(len(tree.ends) + 1, width + 1)) for tree in trees])
        places = [[(row, place) for place in range(len(tree.tokens))] for row, tree in enumerate(trees)]
        tokens = None
        if packed:
            distinct, numbers = _distinct(trees)
            ids, depths = (torch.tensor([each]) for each in zip(*distinct, strict=True))
            tokens, places = padded(numbers), [[(0, number) for number in row] for row in numbers]
        read: dict[tuple[int, int], dict[int, int]] = {}  # row and column of `ids` -> target token -> its k
        answers: dict[int, list[tuple[int, int]]] = {}
        for tree, where in zip(trees, places, strict=True):
            for number, path in tree.paths.items():
                for place, token in zip(path, pairs[number][1], strict=True):
                    wanted = read.setdefault(where[place], {})
                    wanted.setdefault(token, len(wanted))
        order = {where: n for n, where in enumerate(read)}
        for tree, where in zip(trees, places, strict=True):
            for number, path in tree.paths.items():
                reads = [(where[place], token) for place, token in zip(path, pairs[number][1], strict=True)]
                answers[number] = [(order[place], read[place][token]) for place, token in reads]
        most = max(map(len, read.values()))
        targets = torch.tensor([[*found, *[next(iter(found))] * (most - len(found))] for found in read.values()])
        rows, columns = torch.tensor(list(read)).unbind(1)
        at = (rows, columns)
        if not (packed or any(tree.branches for tree in trees)):
            return cls(ids, None, None, None, at, targets, answers)
        return cls(ids, ends, depths, tokens, at, targets, answers)

    def mask(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor | Rows | None:
        """Return what is added to attention scores, (B, 1, T, T): 0 from a token to its ancestors and itself.

        Of a packed batch, the rows that have this mask.
        """
        if self.ends is None:
            return None
        ends = self.ends.to(device)
        place = torch.arange(ends.shape[1], device=device)
        query, key = place[:, None], place[None, :]
        seen = (key <= query) & (query < ends[:, None, :])
        hidden = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)
        if self.tokens is None:
            return hidden[:, None]
        return Rows(self.tokens.to(device), hidden[:, None])


def _distinct(trees: Sequence[Tree]) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """Return the distinct tokens of rows as (id, depth), and for each row which of them it consists of.

    Tokens are the same if all their ancestors are.
    """
    numbers: dict[tuple[int, int], int] = {}  # the number of the parent, and the token's id
    distinct: list[tuple[int, int]] = []
    rows = []
    for tree in trees:
        path, row = [-1], []
        for token, depth in zip(tree.tokens, tree.depths, strict=True):
            del path[depth + 1 :]
            number = numbers.setdefault((path[-1], token), len(numbers))
            if number == len(distinct):
                distinct.append((token, depth))
            path.append(number)
            row.append(number)
        rows.append(row)
    return distinct, rows

"""Cache of outputs below the attacked FFN, shared by the plain score and all attacks of one benchmark.

An attack zeroes rows of one FFN, in layer l. The embedding, the layers below l and whatever layer l runs before that
FFN (its attention) are unaffected: their outputs for one batch are bit-identical under every attack on base rows. The
first forward pass of a batch records them, later passes replay them in place of the calls.

Nothing is assumed about a model: the first replayed batch is also computed in full, and if one bit of its outputs (the
hidden states of all positions, or the logits) differs, or the modules are not called as expected, nothing is shared.
Only forward passes without a KV cache are shared (log-likelihoods, perplexity), not generation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from macdrop.errors import MacDropError
from macdrop.families import bare_model, decoder_layers, massive_ffn
from macdrop.weights import MassiveWeights
from tune.evaluation.logits import ModelInputs, Positions, Reader, Reading
from tune.forward.row_attention import Rows

#: Bytes of outputs kept by default; on a GPU at most a quarter of the free memory. Batches beyond it are computed in
#: full each time: evicting the oldest would not help, because every attack visits the batches in the same order.
BUDGET = 1 << 30
_BELOW = -1  # the key of the output of the layers below l, among those of the parts of l

Kept = dict[int, Any]


class PrefixCache:
    """Outputs below the attacked FFN, of one model and one benchmark at a time.

    The weights must not change between two scorings with the same cache; call `clear` when they do. `calls_saved`
    counts the calls saved: of decoder layers, and of parts of the attacked layer.
    """

    def __init__(self, budget: int = BUDGET) -> None:
        self.budget = budget
        self.calls_saved = 0
        self._of: tuple[Any, Hashable] = (None, None)
        self._batches: dict[Hashable, Kept] = {}
        self._room, self._bytes, self._full = budget, 0, False
        self._site: _Site | None = None
        #: Whether the first replayed batch of each kind of model equalled the full computation.
        self._trusted: dict[Hashable, bool] = {}

    def clear(self) -> None:
        """Forget all outputs."""
        self._of, self._bytes, self._full = (None, None), 0, False
        self._batches.clear()

    @contextmanager
    def sharing(self, model: nn.Module, weights: MassiveWeights, benchmark: Hashable) -> Iterator[None]:
        """Let `logits` share outputs inside the block with earlier blocks of the same model and benchmark."""
        if self._of[0] is not model or self._of[1] != benchmark:
            self.clear()
            self._of = (model, benchmark)
            self._room = _room(model, self.budget)
        with ExitStack() as stack:
            site = _find(model, weights)
            if site is not None and self._trusted.get(site.kind, True):
                stack.enter_context(site.patched())
                self._site = site
            try:
                yield
            finally:
                self._site = None

    @torch.no_grad()
    def logits(
        self,
        model: nn.Module,
        ids: torch.Tensor,
        mask: torch.Tensor | Rows | None = None,
        *,
        positions: torch.Tensor | None = None,
        at: Positions | None = None,
        read: Reader | None = None,
    ) -> torch.Tensor:
        """Run the model as `Logits` says, bit-identical to `plain_logits`; what is kept does not depend on `at`."""
        inputs, reading, site = ModelInputs(ids, mask, positions), Reading(model, at, read), self._site
        if site is None:
            return reading.of(reading.states(inputs))
        key = inputs.key()
        kept = self._batches.get(key)
        if kept is not None:
            states = self._replay(site, inputs, reading, kept)
        elif self._full:
            states = reading.states(inputs)
        else:
            states = self._record(site, inputs, reading, key)
        return reading.of(states)

    def _record(self, site: _Site, inputs: ModelInputs, reading: Reading, key: Hashable) -> torch.Tensor:
        kept: Kept = {}
        with site.mode(record=kept):
            states = reading.states(inputs)
        size = sum(_size(value) for value in kept.values())
        if not kept or self._bytes + size > self._room:
            self._full = True
        else:
            self._batches[key] = kept
            self._bytes += size
        return states

    def _replay(self, site: _Site, inputs: ModelInputs, reading: Reading, kept: Kept) -> torch.Tensor:
        if self._trusted.get(site.kind):
            with site.mode(replay=kept):
                states = reading.states(inputs)
            self.calls_saved += site.calls
            return states
        # Other tokens first, so that state which a model keeps from its last pass cannot hide a difference.
        reading.states(dataclasses.replace(inputs, ids=torch.where(inputs.ids > 0, inputs.ids - 1, inputs.ids + 1)))
        shared: torch.Tensor | None
        try:
            with site.mode(replay=kept):
                shared = reading.states(inputs)
        except Exception:  # a model may do anything with outputs it did not expect
            shared = None
        full = reading.states(inputs)
        self._trusted[site.kind] = shared is not None and _same_bits(full, shared)
        if not self._trusted[site.kind]:
            self._site = None
        return full


class _Site:
    """The modules of one model whose outputs are recorded and replayed."""

    def __init__(
        self, kind: Hashable, below: list[nn.Module], parts: list[nn.Module], attacked: list[nn.Module]
    ) -> None:
        self.kind = kind
        self.calls = 0
        self._below, self._parts, self._attacked = below, parts, attacked
        self._record: Kept | None = None
        self._replay: Kept | None = None
        self._begun = False  # the attacked modules have run in this forward pass

    @contextmanager
    def mode(self, *, record: Kept | None = None, replay: Kept | None = None) -> Iterator[None]:
        """Record outputs into `record`, or replay those of `replay`, in the one forward pass of the block."""
        self._record, self._replay, self._begun, self.calls = record, replay, False, 0
        try:
            yield
        finally:
            self._record = self._replay = None

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Wrap the modules' forward functions for the block."""
        with ExitStack() as stack:
            for layer in self._below:
                stack.enter_context(_instead(layer, self._stand_in(layer.forward, _BELOW, layer is self._below[-1])))
            for place, part in enumerate(self._parts):
                stack.enter_context(_instead(part, self._stand_in(part.forward, place, True)))
            for module in self._attacked:
                handle = module.register_forward_pre_hook(self._begin)
                stack.callback(handle.remove)
            yield

    def _begin(self, *_: Any) -> None:
        self._begun = True

    def _stand_in(self, own: Callable[..., Any], place: int, keeps: bool) -> Callable[..., Any]:
        """Wrap `own`. `keeps`: its output is recorded, not only skipped because a later one is."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._replay is not None and place in self._replay:
                self.calls += 1
                return _copy(self._replay[place])
            output = own(*args, **kwargs)
            if self._record is not None and keeps and not self._begun and _copyable(output):
                self._record[place] = _copy(output)
            return output

        return forward


def _find(model: nn.Module, weights: MassiveWeights) -> _Site | None:
    """Find the modules below the FFN that `weights` name; None if the model's structure is unknown."""
    try:
        ffn, layers = massive_ffn(model, weights), decoder_layers(model)[1]
    except MacDropError:
        return None
    attacked = {projection.module for projection in ffn.projections}

    def holds(module: nn.Module) -> bool:
        return not attacked.isdisjoint(module.modules())

    below, layer = list(layers[: ffn.layer]), layers[ffn.layer]
    if not holds(layer) or any(holds(other) for other in below):
        return None
    # Norms are left to the model: computing them costs less than keeping them.
    parts = [part for part in layer.children() if not holds(part) and any(p.dim() > 1 for p in part.parameters())]
    kind = (type(model).__name__, type(bare_model(model)).__name__, ffn.path)
    return _Site(kind, below, parts, [part for part in layer.children() if holds(part)])


@contextmanager
def _instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the module's forward function for the block."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _room(model: nn.Module, budget: int) -> int:
    """Return the bytes that may be kept on the model's device."""
    device = next(model.parameters()).device
    return min(budget, torch.cuda.mem_get_info(device)[0] // 4) if device.type == "cuda" else budget


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Compare bits: padding that attends to nothing may be NaN, which equals nothing."""
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


def _copyable(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_copyable(item) for item in value)
    return value is None or isinstance(value, torch.Tensor)


def _copy(value: Any) -> Any:
    """Copy an output: callers may write into what they are given."""
    if isinstance(value, (tuple, list)):
        return type(value)(_copy(item) for item in value)
    return None if value is None else value.clone()


def _size(value: Any) -> int:
    if isinstance(value, (tuple, list)):
        return sum(_size(item) for item in value)
    return 0 if value is None else value.nbytes

"""What lies below the attacked FFN is computed once for the plain score and all attacks of one benchmark.

An attack sets rows of one FFN, in layer l, to zero. The embedding, the layers below l and whatever layer l runs before
that FFN (its attention) see none of it, so that their outputs for one batch are the same to the bit under every attack
on base rows. The first forward pass of a batch keeps them, the others put them back in place of the calls.

Nothing about a model is assumed: the first batch that is put together from kept outputs is computed in full as well,
and where one bit of the logits differs, or the modules are not called in the way that is expected, nothing is shared.
Only forward passes without KV cache are shared (log-likelihoods, perplexity); generation runs as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from macdrop.errors import MacDropError

#: Bytes of outputs kept by default; on a GPU no more than a quarter of what is free. A later batch that finds it full
#: is computed in full each time: to drop the oldest would help no one, as every attack goes through the batches in the
#: same order.
BUDGET = 1 << 30
_BELOW = -1  # the place of what the layers below layer l make, among the parts of layer l

Kept = dict[int, Any]
#: Makes logits (B, T, vocabulary) of a model, token ids (B, T) and a mask (B, T), which may be left out.
Logits = Callable[..., torch.Tensor]


class PrefixCache:
    """Keeps outputs below the attacked FFN, of one model and one benchmark at a time.

    The weights must not change between two scorings that are given the same cache; `clear` is for when they do.
    `calls_saved` counts calls that were not made: of decoder layers, and of parts of the attacked layer.
    """

    def __init__(self, budget: int = BUDGET) -> None:
        self.budget = budget
        self.calls_saved = 0
        self._of: tuple[Any, Hashable] = (None, None)
        self._batches: dict[Hashable, Kept] = {}
        self._room, self._bytes, self._full = budget, 0, False
        self._site: _Site | None = None
        #: How each kind of model fared when its first shared batch was computed in full as well.
        self._trusted: dict[Hashable, bool] = {}

    def clear(self) -> None:
        """Forget all outputs."""
        self._of, self._bytes, self._full = (None, None), 0, False
        self._batches.clear()

    @contextmanager
    def sharing(self, model: nn.Module, weights: Any, benchmark: Hashable) -> Iterator[None]:
        """Let `logits` share inside the block, with earlier blocks of the same model and benchmark."""
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
    def logits(self, model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of one batch (B, T, vocabulary): the same bits as those of the model itself."""
        if self._site is None:
            return plain_logits(model, ids, mask)
        key = _key(ids, mask)
        kept = self._batches.get(key)
        if kept is None:
            return self._record(model, ids, mask, key)
        return self._replay(model, ids, mask, kept)

    def _record(self, model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None, key: Hashable) -> torch.Tensor:
        if self._full:
            return plain_logits(model, ids, mask)
        kept: Kept = {}
        with self._site.mode(record=kept):
            logits = plain_logits(model, ids, mask)
        size = sum(_size(value) for value in kept.values())
        if not kept or self._bytes + size > self._room:
            self._full = True
        else:
            self._batches[key] = kept
            self._bytes += size
        return logits

    def _replay(self, model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None, kept: Kept) -> torch.Tensor:
        site = self._site
        if self._trusted.get(site.kind):
            with site.mode(replay=kept):
                logits = plain_logits(model, ids, mask)
            self.calls_saved += site.calls
            return logits
        # Other tokens first, so that nothing which a model remembers of its last pass can pass for what was kept.
        plain_logits(model, torch.where(ids > 0, ids - 1, ids + 1), mask)
        try:
            with site.mode(replay=kept):
                shared = plain_logits(model, ids, mask)
        except Exception:  # whatever a model does with layers that it did not expect
            shared = None
        full = plain_logits(model, ids, mask)
        self._trusted[site.kind] = shared is not None and torch.equal(full, shared)
        if not self._trusted[site.kind]:
            self._site = None
        return full


def plain_logits(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of one batch (B, T, vocabulary), without KV cache. ids, mask: (B, T); mask 0 at padding."""
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


class _Site:
    """The places of one model where outputs are kept and put back."""

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
        """Keep outputs in `record`, or put those of `replay` back, in the one forward pass of the block."""
        self._record, self._replay, self._begun, self.calls = record, replay, False, 0
        try:
            yield
        finally:
            self._record = self._replay = None

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Stand between the modules and their callers for the block."""
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
        """`own` while nothing is shared. `keeps`: its output is kept, not only left out below another that is."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._replay is not None and place in self._replay:
                self.calls += 1
                return _copy(self._replay[place])
            output = own(*args, **kwargs)
            if self._record is not None and keeps and not self._begun and _copyable(output):
                self._record[place] = _copy(output)
            return output

        return forward


def _find(model: nn.Module, weights: Any) -> _Site | None:
    """Where outputs can be kept below the FFN that `weights` name; None where the model is not understood."""
    from macdrop.families import bare_model, decoder_layers, massive_ffn

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
    # Norms and the like are left to the model: they cost less than they take to keep.
    parts = [part for part in layer.children() if not holds(part) and any(p.dim() > 1 for p in part.parameters())]
    kind = (type(model).__name__, type(bare_model(model)).__name__, ffn.path)
    return _Site(kind, below, parts, [part for part in layer.children() if holds(part)])


@contextmanager
def _instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """`forward` in place of the module's own for the block."""
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
    """Bytes that may be kept where the model is."""
    device = next(model.parameters()).device
    return min(budget, torch.cuda.mem_get_info(device)[0] // 4) if device.type == "cuda" else budget


def _key(ids: torch.Tensor, mask: torch.Tensor | None) -> Hashable:
    tensors = [ids] if mask is None else [ids, mask]
    return tuple((tuple(t.shape), t.cpu().numpy().tobytes()) for t in tensors)


def _copyable(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_copyable(item) for item in value)
    return value is None or isinstance(value, torch.Tensor)


def _copy(value: Any) -> Any:
    """A copy of an output, as callers may write into what they are given."""
    if isinstance(value, (tuple, list)):
        return type(value)(_copy(item) for item in value)
    return None if value is None else value.clone()


def _size(value: Any) -> int:
    if isinstance(value, (tuple, list)):
        return sum(_size(item) for item in value)
    return 0 if value is None else value.nbytes

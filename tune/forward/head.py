"""A causal language model in two parts: the decoder, and the head that makes logits of its hidden states.

`SplitModel` lets a caller read logits at chosen positions, in chunks, without a rule per model family. The decoder is
the submodule around the layers that makes the last hidden states. Everything after it (head, bias, adapter of the head,
soft cap, logit scale) is the model's own forward pass, run with a stand-in that hands it given hidden states in the
decoder's place. One check with a few tokens says which submodule that is, and whether the model can be split so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from macdrop.families import bare_model, embedding_device
from macdrop.probe import evaluating
from tune.forward.gathered_head import any_partitioned, forget_order, forward_once, inside_hooks

#: Largest difference of a logit by parts from that of the whole model, relative to the largest logit: the order of
#: sums in fp32 (TF32 included), four roundings in half precision.
TOLERANCE, ROUNDINGS = 5e-4, 4
#: What is said of a model of which `SplitModel.of` returns None.
UNSPLIT = (
    "logits were computed at all positions, as the model cannot be split into decoder and head: slower, and with more "
    "memory"
)
#: Shape of the batch that a model is checked with.
CHECKED = (2, 3)


class SplitModel:
    """Decoder and head of one causal language model; see the module's docstring. Made by `SplitModel.of`."""

    def __init__(self, model: nn.Module, decoder: nn.Module) -> None:
        """decoder: the submodule of the bare model that its forward pass calls to get hidden states."""
        self.model = model
        self.bare = _bare(model)
        self.decoder = decoder
        path = next(name for name, module in self.bare.named_modules() if module is decoder)
        parent, _, self._name = path.rpartition(".")
        self._parent = self.bare.get_submodule(parent)
        self._output: Callable[..., Any] | None = None  # the class of what the decoder returns
        #: The modules that are called after the decoder, in the order of their calls.
        self.head: list[nn.Module] = []
        self.vocabulary = 0  # logits per position

    @classmethod
    def of(cls, model: nn.Module) -> SplitModel | None:
        """Split a transformers model, bare, with a PEFT adapter, or in a DeepSpeed engine, and check the parts.

        Returns None where the model has no separate decoder, or its logits by parts are not those of the whole: run
        such a model whole. Runs it forward on a few tokens, so every rank under ZeRO-3 must call this.
        """
        inputs = _few_tokens(_bare(model))
        with evaluating(model):
            whole = model(**inputs).logits
            forget_order(model)
            for decoder in _decoders(_bare(model)):
                split = cls(model, decoder)
                agrees = split._agrees(whole, inputs)
                forget_order(model)
                if agrees:
                    return split
        return None

    def run(self, then: Callable[[torch.Tensor], Any], **inputs: Any) -> Any:
        """Run the model forward with `then` in the place of its head, and return what `then` returns.

        The model is called as a whole, so that hooks of an engine or an adapter around it run as ever, once. `then`
        gets the hidden states after the final norm, (B, T, d), and may call `logits`.
        """

        def parts(**inputs: Any) -> Any:
            given = {name: value for name, value in inputs.items() if value is not None}
            output = self.decoder(**{"use_cache": False, **given, "return_dict": True})
            self._output = type(output)
            return then(output.last_hidden_state)

        with forward_once(self.bare, parts):
            return self.model(**inputs)

    def hidden(self, **inputs: Any) -> torch.Tensor:
        """Return the hidden states after the final norm, (B, T, d), of what the model is called with (no labels)."""
        return self.run(lambda hidden: hidden, **inputs)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits (N, V) that the model makes of hidden states (N, d), in the model's precision."""
        assert self._output is not None, "the decoder has not been run yet"
        stand_in = _StandIn(self.decoder, self._output(last_hidden_state=hidden[None]))
        tokens = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        self._parent._modules[self._name] = stand_in
        try:
            logits = self.bare.forward(input_ids=tokens, use_cache=False, return_dict=True).logits
        finally:
            self._parent._modules[self._name] = self.decoder
        if not stand_in.called:
            raise TypeError(f"{type(self.bare).__name__} does not call {self._name} for its hidden states")
        return logits[0]

    def with_head(self, function: Callable[[torch.Tensor], Any], hidden: torch.Tensor) -> Any:
        """Return ``function(hidden)``, in which `logits` may be called any number of times; to be called inside `run`.

        Under ZeRO-3 the head is gathered once for all of them, so ranks may differ in how many there are.
        """
        return inside_hooks(self.head, function, hidden) if any_partitioned(self.head) else function(hidden)

    def _agrees(self, whole: torch.Tensor, inputs: dict[str, torch.Tensor]) -> bool:
        """Return whether the logits by parts are those of the whole, (B, T, V); note what the head consists of."""
        called: dict[nn.Module, None] = {}

        def logits_of(hidden: torch.Tensor) -> torch.Tensor:
            with _noting_calls(self.bare, called):
                return self.logits(hidden.flatten(0, 1))

        try:
            logits = self.run(logits_of, **inputs)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):  # not called like a decoder
            return False
        self.head = list(called)
        self.vocabulary = logits.shape[-1]
        whole = whole.flatten(0, 1)
        if logits.shape != whole.shape:
            return False
        bound = max(TOLERANCE, ROUNDINGS * torch.finfo(whole.dtype).eps) * whole.abs().max()
        return bool((logits - whole).abs().max() <= bound)


class _StandIn(nn.Module):
    """Returns a fixed output in the place of a decoder; any other attribute is the decoder's."""

    def __init__(self, decoder: nn.Module, output: Any) -> None:
        super().__init__()
        self.called = False
        self.__dict__.update(_decoder=decoder, _returned=output)  # past nn.Module, which would register a submodule

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.called = True
        return self._returned

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_decoder"], name)


def _bare(model: nn.Module) -> nn.Module:
    """Return the transformers model inside an engine and an adapter, or the model itself."""
    inner = getattr(model, "module", model)
    return bare_model(inner if isinstance(inner, nn.Module) else model)


def _decoders(bare: nn.Module) -> list[nn.Module]:
    """List the submodules that may be the decoder: those around a list of layers, outermost first, longest list first.

    OPT calls what is inside its base model, Llama 4 keeps its own under another name than it declares.
    """
    lists = {path: module for path, module in bare.named_modules() if isinstance(module, nn.ModuleList)}
    around: dict[str, None] = {}
    for path in sorted(lists, key=lambda path: -len(lists[path])):
        parts = path.split(".")
        parents = [".".join(parts[:end]) for end in range(1, len(parts))]
        if not any(parent in lists for parent in parents):  # else a list of experts
            around.update(dict.fromkeys(parents))
    return [bare.get_submodule(path) for path in around]


def _few_tokens(bare: nn.Module) -> dict[str, torch.Tensor]:
    rows, length = CHECKED
    ids = torch.arange(1, rows * length + 1).view(rows, length) % bare.config.get_text_config().vocab_size  # type: ignore
    ids = ids.to(embedding_device(bare))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@contextmanager
def _noting_calls(model: nn.Module, called: dict[nn.Module, None]) -> Iterator[None]:
    """Add the modules that are called inside the block, in order."""
    hooks = [m.register_forward_pre_hook(lambda module, _: called.update({module: None})) for m in model.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

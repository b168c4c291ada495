"""Losses of blocks of text, whole or from one decoder layer on: layers below an edited one need not run again."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from macdrop.errors import ConfigError, DataError
from macdrop.families import decoder_layers, embedding_device
from macdrop.probe import evaluating

#: Losses of a replay and of a whole pass agree to this, or replays are not used.
_SAME = 1e-4


def text_blocks(tokenizer: PreTrainedTokenizerBase, text: str, length: int, bos_token_id: int) -> torch.Tensor:
    """Token ids (n, length) of `text`, packed: each block is bos and the next length - 1 tokens.

    The tail that fills no block is left out.

    Raises `DataError` when the text does not fill one block, and `ConfigError` for a length below 2.
    """
    if length < 2:
        raise ConfigError(f"A block of {length} tokens has nothing to predict. Give a length of at least 2.")
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(tokens) // (length - 1)
    if not count:
        raise DataError(
            f"The text has {len(tokens)} tokens, fewer than a block of {length} holds after bos ({length - 1}).\n"
            "Give a longer text or a shorter length."
        )
    packed = torch.tensor(tokens[: count * (length - 1)], dtype=torch.long).view(count, length - 1)
    return torch.cat([torch.full((count, 1), bos_token_id, dtype=torch.long), packed], dim=1)


def perplexity(model: nn.Module, blocks: torch.Tensor, *, batch_size: int = 8) -> float:
    """exp of the mean loss a token over blocks (n, T), the first token of each given; inf for NaN or overflow."""
    return as_perplexity(block_losses(model, blocks, batch_size=batch_size))


def as_perplexity(losses: np.ndarray) -> float:
    """exp of the mean of losses (n,) of blocks of one length; inf for NaN or overflow."""
    mean = float(losses.mean())
    return math.exp(mean) if mean < 700 else math.inf


def block_losses(model: nn.Module, blocks: torch.Tensor, *, batch_size: int = 8) -> np.ndarray:
    """Mean loss a token, in nats, of each of the blocks (n, T), the first token of each given: (n,) float64."""
    with evaluating(model):
        return np.concatenate([_losses(model, batch) for batch in blocks.split(batch_size)])


def _losses(model: nn.Module, batch: torch.Tensor) -> np.ndarray:
    batch = batch.to(embedding_device(model))
    logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
    targets = batch[:, 1:].to(logits.device)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return loss.view(targets.shape).double().mean(dim=1).cpu().numpy()


class Replay:
    """The losses of one batch of blocks (b, T), with the outputs of some decoder layers of the untouched model kept.

    `untouched` has the losses (b,) of the whole pass. `losses(layer)` runs the model again from `layer` on, with the
    kept output of the layer below: right whatever is edited in `layer` or above it, as long as nothing below is. The
    model has to be in evaluation mode without gradients (`macdrop.probe.evaluating`).

    Where a trial on the untouched model does not give the losses of the whole pass (layers that share more than the
    hidden state), each pass runs whole, and `partial` is False.
    """

    def __init__(self, model: nn.Module, batch: torch.Tensor, layers: Collection[int]) -> None:
        self._model, self._batch = model, batch
        _, self._modules = decoder_layers(model)
        self._kept: dict[int, Any] = {}
        with ExitStack() as stack:
            for below in {layer - 1 for layer in layers if layer > 0}:
                handle = self._modules[below].register_forward_hook(self._keep(below))
                stack.callback(handle.remove)
            self.untouched = _losses(model, batch)
        self.partial = bool(self._kept)
        if self.partial and not np.allclose(
            self.losses(max(self._kept) + 1), self.untouched, rtol=_SAME, atol=_SAME, equal_nan=True
        ):
            self.partial, self._kept = False, {}

    def losses(self, layer: int) -> np.ndarray:
        """Losses (b,) of the model as it is now, which may differ from the untouched one in `layer` and above."""
        kept = self._kept.get(layer - 1)
        if kept is None:
            return _losses(self._model, self._batch)
        with _standing_in(list(self._modules)[:layer], lambda: _copied(kept)):
            return _losses(self._model, self._batch)

    def _keep(self, below: int) -> Callable[..., None]:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            self._kept[below] = _copied(output)

        return keep


def _copied(output: Any) -> Any:
    """Return a layer's output with tensors of its own: the next layer may add to them in place."""
    if isinstance(output, torch.Tensor):
        return output.detach().clone()
    return type(output)(_copied(part) for part in output) if isinstance(output, tuple | list) else output


@contextmanager
def _standing_in(modules: list[nn.Module], output: Callable[[], Any]) -> Iterator[None]:
    """Let each of the modules return `output()` instead of running."""
    own = [(module, module.__dict__.get("forward")) for module in modules]
    try:
        for module in modules:
            module.forward = lambda *_args, **_kwargs: output()
        yield
    finally:
        for module, forward in own:
            if forward is None:
                del module.forward
            else:
                module.forward = forward

"""Find the massive weights of a model (arXiv 2410.01866, section 2).

Bos alone is the input. The massive layer is the one whose FFN first writes the spike of the hidden state at bos; the
massive weights are its rows of W_up and W_gate, by descending |intermediate state|.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from macdrop.errors import ConfigError, NoMassiveWeights, UnsupportedModel
from macdrop.families import bare_model, massive_ffn
from macdrop.gather import is_writable, not_finite
from macdrop.masking import attacked
from macdrop.scan.states import BosStates, Intermediate, bos_states
from macdrop.weights import Confidence, LayerStats, MassiveWeights

#: Moves whenever a scan of the same model may find something else: a scan that was kept is of one rule.
RULE = 2
FIRST_WRITE = 0.5  # a write counts when it is at least this part of the largest one
MASSIVE = 100.0  # a massive activation is over this size (Sun et al., arXiv 2402.17762) ...
MASSIVE_RATIO = 1000.0  # ... and over this many times the median
CLEAR_RATIO = 100.0
_ROUTED = 0.02  # an expert with less of the largest routing weight was called in vain
_CHECKED_ROWS = 5
_SEPARATOR = "<|endoftext|>"


def massive_layer(hidden: torch.Tensor, intermediate: Sequence[torch.Tensor | None]) -> tuple[int, Confidence]:
    """The layer (0-based) where the spike of the hidden state at bos is first written, and how clear that is.

    hidden: (L + 1, d), the residual stream at bos before the first and after each layer. intermediate: L intermediate
    states (I,), None for a layer without an FFN.

    The rule. In layer l, entry j of the stream gains ``min(|h_l[j]|, |h_{l+1}[j]|) - |h_{l-1}[j]|``: what the layer
    adds and the next one leaves standing. So a large embedding counts for nothing (no layer wrote it), neither does the
    erasing of a spike (its size falls) nor what the last layer writes (no layer reads it). A layer's write is its
    largest gain over the entries; the massive layer is the FIRST whose write is at least half of the largest. Where a
    spike grows in two like steps that is the first step, and a small step before a large one does not count.

    Confidence: *strong* when the spike is over 100 and it, or the top intermediate entry, is at least 1,000 times its
    median (massive activations as in arXiv 2402.17762); *moderate* when one of the ratios is at least 100; else *weak*.
    """
    layer, entry, share = first_write(hidden, [state is not None for state in intermediate])
    spike = float(hidden[layer + 1, entry].abs())
    written = intermediate[layer]
    assert written is not None, "only a layer with an FFN can be chosen"
    state = written.abs()
    top_ratio = _ratio(float(state.max()), _median(state))
    spike_ratio = _ratio(spike, _median(hidden[layer + 1].abs()))
    ratio = max(top_ratio, spike_ratio)
    if spike > MASSIVE and ratio >= MASSIVE_RATIO:
        level = "strong"
    else:
        level = "moderate" if ratio >= CLEAR_RATIO else "weak"
    later = "" if share >= 1 else f"; a later layer writes {1 / share:.1f} times as much"
    text = (
        f"{level}: layer {layer} writes {spike:.4g} into the hidden state at bos, {spike_ratio:.0f} times the median; "
        f"the largest intermediate entry is {float(state.max()):.4g}, {top_ratio:.0f} times the median{later}"
    )
    return layer, Confidence(level, top_ratio, spike, spike_ratio, share, text)


def first_write(hidden: torch.Tensor, has_ffn: Sequence[bool]) -> tuple[int, int, float]:
    """Layer, entry of the hidden state and share of the largest write, by the rule of `massive_layer`."""
    sizes = hidden.float().abs()
    count = len(sizes) - 1
    assert len(has_ffn) == count, "one flag a layer"
    kept = torch.minimum(sizes[1:], torch.cat([sizes[2:], sizes[-1:]]))
    writes, entries = (kept - sizes[:-1]).max(dim=1)
    candidates = [i for i in range(count) if has_ffn[i] and i < count - 1] or [i for i in range(count) if has_ffn[i]]
    largest = max(float(writes[i]) for i in candidates)
    enough = FIRST_WRITE * largest if largest > 0 else largest  # not above 0: nothing was written at all
    layer = next(i for i in candidates if float(writes[i]) >= enough)
    return layer, int(entries[layer]), float(writes[layer]) / largest if largest > 0 else 1.0


def choose_bos(
    tokenizer: PreTrainedTokenizerBase | None, config: PretrainedConfig | None, bos_token_id: int | None = None
) -> tuple[int, str]:
    """The token that stands for bos, and by which rule. `tokenizer` and `config` may be None.

    The first that applies: (1) "given": `bos_token_id`; (2) "tokenizer": the tokenizer's bos token; (3) "separator":
    ``<|endoftext|>`` where the vocabulary has it, which GPT-2, GPT-NeoX and Qwen put between the documents of their
    training text; (4) "config": the bos token of the model's config; (5) "eos": the tokenizer's or the config's eos
    token. Raises `ConfigError` when there is none, or it is outside the vocabulary.
    """
    size = getattr(config, "vocab_size", None)
    rules = {
        "given": bos_token_id,
        "tokenizer": getattr(tokenizer, "bos_token_id", None),
        "separator": tokenizer.get_vocab().get(_SEPARATOR) if tokenizer is not None else None,
        "config": getattr(config, "bos_token_id", None),
        "eos": getattr(tokenizer, "eos_token_id", None),
        "eos of the config": getattr(config, "eos_token_id", None),
    }
    for rule, token in rules.items():
        token = token[0] if isinstance(token, list | tuple) and token else token
        if token is None or token == []:
            continue
        if isinstance(token, bool) or not isinstance(token, int) or token < 0 or (size and token >= size):
            raise ConfigError(
                f"The bos token {token!r} (rule: {rule}) is outside the model's vocabulary of {size} tokens.\n"
                "Give another one: bos_token_id=N."
            )
        return token, rule.split()[0]
    raise ConfigError(
        "The tokenizer has no bos token, no <|endoftext|> and no eos token, and the config names none either.\n"
        "Say which token starts a text: bos_token_id=N."
    )


def find_massive_weights(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    source: str,
    fingerprint: str,
    bos_token_id: int | None = None,
) -> MassiveWeights:
    """Scan a causal language model: two or three forward passes of one token.

    source names the model for people, fingerprint identifies its checkpoint (`checkpoint_fingerprint`). For tokenizers
    without bos see `choose_bos`. The layer is chosen by `massive_layer`. Of routed experts, the one with the largest
    routing weight for bos is scanned; the spike is measured again without each other part of the layer (a shared
    expert, and in module lists every expert that was called), which is recorded instead when less than half of what the
    layer wrote is left.

    The model comes back as it was: modes, gradients, weights. An adapter in place takes part in the scan. Before it
    returns, it zeroes the five top rows and checks that exactly their entries of the intermediate state fall silent.

    Raises `UnsupportedModel` for a model whose FFNs are unknown or fail that check, `NoMassiveWeights` for an FFN that
    is silent at bos, and `ConfigError` for a model without a usable bos.
    """
    token, rule = choose_bos(tokenizer, getattr(bare_model(model), "config", None), bos_token_id)
    states = bos_states(model, token)
    if not bool(torch.isfinite(states.hidden).all()):
        raise NoMassiveWeights(not_finite(bare_model(model), source))
    largest = [largest_state(parts) for parts in states.intermediates]
    layer, entry, _ = first_write(states.hidden, [part is not None for part in largest])
    largest[layer] = found = _writer(model, token, states, layer, entry)
    _, confidence = massive_layer(states.hidden, [part.state if part else None for part in largest])
    magnitudes, order = ranked(found)
    if float(magnitudes[0]) == 0:
        raise NoMassiveWeights(f"{source}: the intermediate state of layer {layer} is zero at bos; no row is massive.")
    weights = MassiveWeights(
        model=source,
        fingerprint=fingerprint,
        layer=layer,
        path=found.ffn.path,
        kind=found.ffn.kind,
        expert=found.expert,
        indices=tuple(order.tolist()),
        magnitudes=tuple(magnitudes.tolist()),
        intermediate_size=found.ffn.intermediate_size,
        hidden_size=found.ffn.hidden_size,
        bos_token_id=token,
        bos_rule=rule,
        layers=tuple(_stats(i, states.hidden[i + 1], part) for i, part in enumerate(largest)),
        confidence=confidence,
    )
    _check_rows(model, weights, found)
    return weights


def largest_state(parts: Sequence[Intermediate]) -> Intermediate | None:
    """Of a layer's first routed expert and its shared one: that with the largest entry; None without an FFN."""
    shown = [part for place, part in enumerate(parts) if place == 0 or part.expert is None]
    return max(shown, key=lambda part: float(part.state.abs().max()), default=None)


def ranked(part: Intermediate) -> tuple[torch.Tensor, torch.Tensor]:
    """Sizes (I,) of an FFN's intermediate state, largest first, and the rows (I,) that they are of."""
    sizes, rows = part.state.abs().sort(descending=True, stable=True)
    return sizes, rows


def _writer(model: nn.Module, token: int, states: BosStates, layer: int, entry: int) -> Intermediate:
    """Find the FFN of the massive layer that wrote the spike: the first routed expert, unless it is another part.

    Another one it is when less than half of what the layer wrote is left without it.
    """
    first, *beside = states.intermediates[layer]
    before = float(states.hidden[layer, entry].abs())
    written = float(states.hidden[layer + 1, entry].abs()) - before
    for part in beside:
        if part.expert is not None and part.weight < _ROUTED * first.weight:
            continue
        assert part.ffn.down is not None, "experts in a list, and shared ones, are dense"
        handle = part.ffn.down.register_forward_pre_hook(lambda _module, args: (torch.zeros_like(args[0]), *args[1:]))
        try:
            without = bos_states(model, token).hidden
        finally:
            handle.remove()
        if float(without[layer + 1, entry].abs()) - before < written / 2:
            return part
    return first


def _check_rows(model: nn.Module, weights: MassiveWeights, found: Intermediate) -> None:
    """Zero the top rows: their entries of the intermediate state must fall silent, and no other may move."""
    ffn = massive_ffn(model, weights)
    tensors = [projection.tensor for projection in ffn.projections]
    if not all(map(is_writable, tensors)):
        return  # such weights cannot be edited; the float checkpoint they come from can be scanned instead
    k = min(_CHECKED_ROWS, weights.intermediate_size)
    with attacked(model, weights, "zeroing", k):
        after = bos_states(model, weights.bos_token_id).intermediates[weights.layer]
    state = next(part.state for part in after if part.ffn.path == found.ffn.path and part.expert == found.expert)
    top, rest = list(weights.indices[:k]), list(weights.indices[k:])
    biased = any(projection.bias is not None for projection in ffn.projections)
    moved = (state - found.state)[rest].abs().max() if rest else torch.zeros(())
    left = state[top].abs().max()
    scale = float(found.state.abs().max())
    if float(moved) > 1e-3 * scale or (not biased and float(left) > 1e-3 * scale):
        raise UnsupportedModel(
            f"The rows found in {weights.path} ({weights.kind}) do not make the intermediate state as macdrop\n"
            f"reads it: with the top {k} rows at zero, these entries are up to {float(left):.3g} and others moved by "
            f"{float(moved):.3g}\n(largest entry: {scale:.3g}). Please report the model class: {type(model).__name__}."
        )


def _stats(layer: int, hidden: torch.Tensor, part: Intermediate | None) -> LayerStats:
    state = part.state.abs() if part else torch.zeros(1)
    sizes = hidden.abs()
    return LayerStats(layer, float(sizes.max()), float(sizes.median()), float(state.max()), _median(state))


def _median(sizes: torch.Tensor) -> float:
    """Median; over the non-zero entries where more than half are zero, as ReLU leaves them."""
    median = float(sizes.median())
    nonzero = sizes[sizes > 0]
    return float(nonzero.median()) if median == 0 and len(nonzero) else median


def _ratio(value: float, median: float) -> float:
    return value / median if median > 0 else 0.0

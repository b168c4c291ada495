"""Small, fast scores of a model on its synthetic world: token ids in, numbers out, no tokenizer and no harness."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from zoo.world import BOS_ID, PAD_ID, ChoiceItem, GenerationItem, vocabulary

_WORD_IDS = vocabulary()
SINK_FROM = 8
"""First query position whose attention to position 0 is counted; earlier ones have few other positions to attend to."""


def _encode(text: str) -> list[int]:
    return [_WORD_IDS[word] for word in text.split()]


@torch.no_grad()
def choice_accuracy(model: nn.Module, items: Sequence[ChoiceItem]) -> float:
    """Return the share of `items` whose right choice has the highest summed log-probability."""
    contexts = [[BOS_ID, *_encode(item.context)] for item in items]
    pairs = [
        (context, _encode(choice)) for context, item in zip(contexts, items, strict=True) for choice in item.choices
    ]
    longest = max(len(context) + len(choice) for context, choice in pairs)
    # Padding sits behind the tokens that count, where a causal model cannot see it: no attention mask is needed.
    tokens = torch.full((len(pairs), longest), PAD_ID)
    counts = torch.zeros(len(pairs), longest, dtype=torch.bool)
    for row, (context, choice) in enumerate(pairs):
        end = len(context) + len(choice)
        tokens[row, :end] = torch.tensor(context + choice)
        counts[row, len(context) : end] = True
    log_probs = model(input_ids=tokens, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    chosen = log_probs.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    scores = iter((chosen * counts[:, 1:]).sum(-1).tolist())
    right = 0
    for item in items:
        item_scores = [next(scores) for _ in item.choices]
        right += item_scores.index(max(item_scores)) == item.label
    return right / len(items)


@torch.no_grad()
def exact_match(model: nn.Module, items: Sequence[GenerationItem]) -> float:
    """Return the share of `items` whose reference equals the greedy answer, word for word."""
    by_length: dict[tuple[int, int], list[tuple[list[int], list[int]]]] = {}
    for item in items:
        prompt, reference = [BOS_ID, *_encode(item.prompt)], _encode(item.reference)
        by_length.setdefault((len(prompt), len(reference)), []).append((prompt, reference))
    right = 0
    for (_, length), group in by_length.items():
        tokens = torch.tensor([prompt for prompt, _ in group])
        for _ in range(length):
            following = model(input_ids=tokens, use_cache=False).logits[:, -1:].argmax(-1)
            tokens = torch.cat([tokens, following], dim=1)
        references = torch.tensor([reference for _, reference in group])
        right += int((tokens[:, -length:] == references).all(dim=1).sum())
    return right / len(items)


@torch.no_grad()
def sink_attention(model: nn.Module, blocks: torch.Tensor) -> list[float]:
    """Return per layer the mean attention that queries from position `SINK_FROM` on pay to position 0."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        attentions = model(input_ids=blocks, output_attentions=True, use_cache=False).attentions
    finally:
        model.set_attn_implementation(before)
    return [attention[:, :, SINK_FROM:, 0].mean().item() for attention in attentions]

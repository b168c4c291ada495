"""tune.forward.packing_check: it passes what packs exactly, and refuses what does not, with the reason."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from helpers.packed_rows import WINDOW
from helpers.zoo_of_families import FAMILIES, build_family, with_lora

from macdrop.errors import MacDropError
from tune.forward.packed_attention import PackedAttention, SegmentMasks
from tune.forward.packing_check import check_packing

TOKENS = np.arange(3, 30)
#: Tokens of a chunk of attention: fewer than the longer example of the check has, more than the other.
CHUNK = 8
PACKED = sorted(set(FAMILIES) - {"falcon", "bloom"})


@pytest.mark.parametrize("family", PACKED)
def test_families_that_pack_pass(family):
    assert isinstance(check_packing(build_family(family), "cpu", TOKENS, 40), PackedAttention)


@pytest.mark.parametrize("family", ["falcon", "bloom"])
def test_attention_of_its_own_fails(family):
    with pytest.raises(MacDropError, match="cannot be replaced"):
        check_packing(build_family(family), "cpu", TOKENS, 40)


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}),
        ("FalconH1Config", {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64, "intermediate_size": 24}),
    ],
)
def test_recurrent_and_hybrid_models_fail(config, settings):
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**settings))
    with pytest.raises(MacDropError, match="state from token to token"):
        check_packing(model, "cpu", TOKENS, 40)


def test_adapters_pass_and_keep_their_mode():
    model = with_lora("llama", build_family("llama")).train()
    check_packing(model, "cpu", TOKENS, 40)
    assert all(module.training for module in model.modules())


def test_bf16_passes():
    check_packing(build_family("llama").to(torch.bfloat16), "cpu", TOKENS, 40)


def test_few_tokens_are_repeated():
    check_packing(build_family("llama"), "cpu", TOKENS[:2], 2)


def test_a_model_that_sees_across_examples_fails(monkeypatch):
    model = build_family("llama")
    attention = PackedAttention(model)
    monkeypatch.setattr("tune.forward.packing_check.PackedAttention", lambda _: _OneSegment(attention))
    with pytest.raises(MacDropError, match="differ from those of a padded batch"):
        check_packing(model, "cpu", TOKENS, 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_that_reaches_into_the_next_example_alone_is_seen(dtype):
    """As a short convolution would do, of which little is left at the end of the example."""
    model = build_family("llama").to(dtype)

    def shift(module, args, output):
        return output + torch.cat([torch.zeros_like(output[:, :1]), output[:, :-1]], 1)

    model.model.embed_tokens.register_forward_hook(shift)
    with pytest.raises(MacDropError, match="of an example change with the example before|differ from"):
        check_packing(model, "cpu", TOKENS, 40)


class _OneSegment:
    """Takes a whole row for one example."""

    def __init__(self, attention: PackedAttention) -> None:
        self.attention = attention

    def segments(self, lengths, device):
        return self.attention.segments([sum(lengths)], device)


def test_a_window_that_is_not_kept_fails_where_an_example_is_longer_than_it(monkeypatch):
    model = build_family("mistral", attn_implementation="eager", sliding_window=WINDOW + 10)
    monkeypatch.setattr(SegmentMasks, "each", property(_causal))
    check_packing(model, "cpu", TOKENS, WINDOW)  # no example of the run reaches beyond the window
    with pytest.raises(MacDropError, match="differ from those of a padded batch"):
        check_packing(model, "cpu", TOKENS, 40)


def _causal(masks: SegmentMasks) -> list[torch.Tensor]:
    return [torch.full((n, n), torch.finfo(torch.float32).min).triu(1)[None, None] for n in masks._lengths]


def test_chunks_that_are_counted_from_the_start_of_the_row_fail(monkeypatch):
    """Of the examples that are longer than a chunk, only one that begins later in the row tells them apart."""
    chunked = {"attention_chunk_size": CHUNK, "layer_types": ["chunked_attention"] * 3}
    model = build_family("llama4", attn_implementation="eager", **chunked)
    check_packing(model, "cpu", TOKENS, 40)
    monkeypatch.setattr(SegmentMasks, "each", property(_chunked_by_row))
    with pytest.raises(MacDropError, match="differ from those of a padded batch"):
        check_packing(model, "cpu", TOKENS, 40)


def _chunked_by_row(masks: SegmentMasks) -> list[torch.Tensor]:
    chunks = [part // CHUNK for part in torch.arange(sum(masks._lengths)).split(list(masks._lengths))]
    apart = [(each[:, None] != each[None, :]) & (len(each) > CHUNK) for each in chunks]
    lowest = torch.finfo(torch.float32).min
    return [mask.masked_fill(other, lowest) for mask, other in zip(_causal(masks), apart, strict=True)]


def test_positions_that_a_model_does_not_take_are_the_reason():
    model = build_family("llama")
    forward = type(model).forward

    def without_positions(input_ids, attention_mask=None):
        return forward(model, input_ids=input_ids, attention_mask=attention_mask)

    model.forward = without_positions
    with pytest.raises(MacDropError, match="TypeError.*position_ids"):
        check_packing(model, "cpu", TOKENS, 40)

"""A natural case: SmolLM2-135M has two massive rows, depends on them, and is attacked, masked and restored exactly."""

from __future__ import annotations

import pytest
import torch
from helpers import reference, tiny
from helpers.hook_cases import gradients, worst
from helpers.real_models import smollm2

from macdrop.config import MacDropConfig
from macdrop.hooks import MacDrop, keep_mask
from macdrop.load import open_model
from macdrop.masking import attacked
from macdrop.proof import perplexity
from macdrop.scan import find_massive_weights, prove, text_blocks
from macdrop.weights import MassiveWeights
from tune.training.massive_weights import proof_text

pytestmark = [pytest.mark.long, pytest.mark.real]

LAYER, ROWS, K = 11, (1229, 1487), 2


@pytest.fixture(scope="module")
def opened() -> tuple:
    """The model in fp32, its tokenizer, and its massive weights."""
    folder = smollm2()
    model, tokenizer = open_model(folder)
    return model, tokenizer, find_massive_weights(model, tokenizer, source=str(folder), fingerprint="f")


def blocks_of(opened: tuple, length: int) -> torch.Tensor:
    """Token ids, (10, length), bos first: two passages of each kind of text."""
    _, tokenizer, weights = opened
    texts = proof_text(None, "").values()
    return torch.cat([text_blocks(tokenizer, text, length, weights.bos_token_id)[:2] for text in texts])


@pytest.fixture
def batch(opened) -> dict[str, torch.Tensor]:
    """Two texts of 48 tokens, bos first."""
    ids = blocks_of(opened, 48)[:2]
    return {"input_ids": ids, "labels": ids.clone()}


def test_the_scan_finds_the_two_rows_and_the_proof_that_the_model_depends_on_them(opened):
    model, _, weights = opened
    assert (weights.layer, weights.indices[:K], weights.confidence.level) == (LAYER, ROWS, "strong")
    found = prove(model, blocks_of(opened, 64), weights, k=K, draws=1)
    assert found.verdict == "sensitive" and found.key_k == K, found.text


def test_an_attack_breaks_the_model_and_leaves_every_bit_of_it(opened):
    model, _, weights = opened
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    blocks = blocks_of(opened, 64)[:4]
    untouched = perplexity(model, blocks)
    with attacked(model, weights, "zeroing", K) as zeroed:
        assert zeroed == 2 * K and perplexity(model, blocks) > 1.5 * untouched
    with attacked(model, weights, "random", K):
        assert perplexity(model, blocks) == pytest.approx(untouched, rel=0.02)
    assert perplexity(model, blocks) == untouched
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_step_is_that_of_the_paper_s_listing(opened, batch, dora):
    base, _, weights = opened
    model, p, seed = tiny.lora(base, use_dora=dora), 0.8, 3
    try:
        slow = _step(model, batch, weights, keep_mask(seed, 0, p, (K, weights.hidden_size)))
        expected = gradients(model)
        model.zero_grad()
        drop = MacDrop(model, weights, MacDropConfig(k=K, seed=seed))
        assert drop.attach() == 2 * K
        with drop.micro_step(p, 0):
            loss = model(**batch).loss
            loss.backward()
        dropped = drop.take_counts()
        drop.detach()
        assert loss.item() == pytest.approx(slow, rel=1e-6) and worst(expected, gradients(model)) < 1e-4
        assert dropped
        assert abs(model(**batch).loss.item() - slow) > 1e-3, "the mask matters here"
    finally:
        model.unload()


def _step(model: torch.nn.Module, batch: dict, weights: MassiveWeights, mask: torch.Tensor) -> float:
    return reference.training_step(model, batch, "llama", weights.indices[:K], mask, layer=weights.layer)

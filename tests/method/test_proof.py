"""The proof of dependence: perplexities against a slow reference, the verdict rule, and real checkpoints."""

import math
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.zoo_of_families import build_family

from macdrop.errors import ConfigError, DataError
from macdrop.load import load_model, load_tokenizer
from macdrop.masking import attacked
from macdrop.proof import is_sensitive, perplexity
from macdrop.scan import checkpoint_fingerprint, find_massive_weights, prove, text_blocks

ZOO = Path(__file__).parents[2] / "tune" / "zoo"


def blocks(n: int = 5, length: int = 9) -> torch.Tensor:
    return tiny.batch(0, n, length)["input_ids"]


def scan(model):
    return find_massive_weights(model, source="test", fingerprint="f", bos_token_id=1)


def slow_perplexity(model, ids: torch.Tensor) -> float:
    """Token by token, in double precision."""
    losses = []
    for row in ids:
        with torch.no_grad():
            logs = model(input_ids=row[None]).logits[0].double().log_softmax(-1)
        losses += [-float(logs[i, token]) for i, token in enumerate(row[1:])]
    return math.exp(sum(losses) / len(losses))


def test_every_number_equals_the_slow_reference():
    model, ids = build_family("llama"), blocks()
    weights = scan(model)
    proof = prove(model, ids, weights, k=2, draws=2, seed=11, batch_size=2)
    assert proof.untouched == pytest.approx(slow_perplexity(model, ids), rel=1e-5)
    for kind, value in (("zeroing", proof.zeroed), ("retaining", proof.retained)):
        with attacked(model, weights, kind, 2):
            assert value == pytest.approx(slow_perplexity(model, ids), rel=1e-5)
    for draw, value in enumerate(proof.random):
        with attacked(model, weights, "random", 2, seed=11 + draw):
            assert value == pytest.approx(slow_perplexity(model, ids), rel=1e-5)
    assert (proof.blocks, proof.tokens, len(proof.random)) == (5, 40, 2)


def test_proof_is_repeatable_and_leaves_the_model_unchanged():
    model = build_family("gpt2").train()
    weights = scan(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = prove(model, blocks(), weights, k=2)
    assert prove(model, blocks(), weights, k=2) == first
    assert model.training and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert prove(model, blocks(), weights, k=2, seed=5).random != first.random
    assert first.to_dict()["random"] == list(first.random)


@pytest.mark.parametrize(
    ("zeroed", "random", "sensitive"),
    [
        (20.0, (10.1,), True),  # x2, random +1 %
        (19.9, (10.0,), False),  # less than x2
        (30.0, (12.0, 10.0), False),  # random rows matter as well
        (30.0, (9.0, 9.5), True),  # random rows that help count as no rise
        (math.inf, (10.1,), True),
        (math.inf, (math.inf,), False),
        (9.0, (10.0,), False),
    ],
)
def test_the_verdict_rule(zeroed, random, sensitive):
    assert is_sensitive(10.0, zeroed, random) is sensitive


def test_overflow_counts_as_infinite():
    model = build_family("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    assert perplexity(model, blocks()) == math.inf
    with pytest.raises(ConfigError, match="not finite"):
        prove(model, blocks(), scan(model))


def test_text_blocks_pack_the_text_after_bos():
    tokenizer = tiny.tokenizer()
    text = " ".join(f"w{i}" for i in range(3, 25))
    ids = text_blocks(tokenizer, text, 6, bos_token_id=1)
    assert ids.tolist() == [[1, *range(start, start + 5)] for start in (3, 8, 13, 18)]
    assert ids.dtype == torch.long
    with pytest.raises(DataError, match="22 tokens"):
        text_blocks(tokenizer, text, 24, 1)
    with pytest.raises(DataError, match="0 tokens"):
        text_blocks(tokenizer, "", 6, 1)
    with pytest.raises(ConfigError, match="at least 2"):
        text_blocks(tokenizer, text, 1, 1)


def test_bad_arguments_are_refused_before_any_forward_pass():
    model = build_family("llama")
    weights = scan(model)
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    for settings in ({"k": 0}, {"k": 25}, {"k": 13}, {"draws": 0}, {"batch_size": 0}, {"k": 2.0}):
        with pytest.raises(ConfigError):
            prove(model, blocks(), weights, **settings)
    for bad in (torch.ones(3, dtype=torch.long), torch.ones(0, 5, dtype=torch.long), torch.ones(2, 5)):
        with pytest.raises(ConfigError, match="blocks must be"):
            prove(model, bad, weights)


def test_the_planted_model_is_sensitive():
    path = ZOO / "models" / "planted-llama"
    model = load_model(path)
    tokenizer = load_tokenizer(path, model=model)
    weights = find_massive_weights(model, tokenizer, source=str(path), fingerprint=checkpoint_fingerprint(path))
    assert (weights.layer, weights.confidence.level, weights.bos_rule) == (1, "strong", "tokenizer")
    ids = text_blocks(tokenizer, (ZOO / "data" / "text.txt").read_text(), 64, weights.bos_token_id)[:32]
    proof = prove(model, ids, weights, batch_size=32)
    assert proof.sensitive and proof.zeroed > 5 * proof.untouched and proof.retained < proof.zeroed / 3
    assert max(proof.random) < 1.02 * proof.untouched


def test_a_real_checkpoint_is_not_sensitive(shared):
    path, text = shared / "models" / "stories260k", shared / "data" / "wikitext_demo" / "validation.txt"
    if not path.is_dir() or not text.is_file():
        pytest.skip("no stories260k or wikitext here")
    model = load_model(path)
    tokenizer = load_tokenizer(path, model=model)
    weights = find_massive_weights(model, tokenizer, source=str(path), fingerprint=checkpoint_fingerprint(path))
    assert weights.layer == 0 and weights.confidence.top_over_median == pytest.approx(124, abs=1)
    ids = text_blocks(tokenizer, text.read_text()[:20_000], 256, weights.bos_token_id)
    proof = prove(model, ids[:16], weights, draws=2)
    assert proof.verdict == "not sensitive" and proof.zeroed < 1.2 * proof.untouched

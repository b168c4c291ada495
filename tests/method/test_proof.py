"""The proof of dependence: perplexities against a slow reference, the verdict rule, and real checkpoints."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from helpers import tiny
from helpers.zoo_of_families import build_family

from macdrop.errors import ConfigError, DataError
from macdrop.load import load_model, load_tokenizer
from macdrop.masking import attacked
from macdrop.probe import evaluating
from macdrop.proof import Factor, block_losses, perplexity
from macdrop.proof.factors import MIN_BLOCKS
from macdrop.proof.losses import Replay
from macdrop.proof.proving import judge, key_rows, rungs
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
    for k, factor in proof.by_k:
        with attacked(model, weights, "zeroing", k):
            assert factor.value == pytest.approx(slow_perplexity(model, ids) / proof.untouched, rel=1e-4)
    assert (proof.blocks, proof.tokens, len(proof.random)) == (5, 40, 2)
    assert proof.factor.value == pytest.approx(proof.zeroed / proof.untouched)
    assert proof.factor.low < proof.factor.value < proof.factor.high


def test_proof_is_repeatable_and_leaves_the_model_unchanged():
    model = build_family("gpt2").train()
    weights = scan(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = prove(model, blocks(), weights, k=2)
    assert prove(model, blocks(), weights, k=2) == first
    assert model.training and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert prove(model, blocks(), weights, k=2, seed=5).random != first.random
    stored = first.to_dict()
    assert stored["random"] == list(first.random) and stored["by_k"][1] == [2, *first.factor.to_list()]
    assert json.loads(json.dumps(stored)) == stored


def test_a_factor_is_the_mean_paired_difference_and_its_interval_is_scipys():
    draw = np.random.default_rng(3)
    untouched = draw.normal(3, 0.5, 20)
    zeroed = untouched + draw.normal(0.7, 0.2, 20)
    found = Factor.of(zeroed, untouched, seed=4)
    assert found.value == pytest.approx(math.exp((zeroed - untouched).sum() / 20))
    reference = scipy.stats.bootstrap(
        (zeroed - untouched,), np.mean, n_resamples=10_000, method="BCa", rng=np.random.default_rng(4)
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((math.exp(reference.low), math.exp(reference.high)))
    assert found.low < math.exp(0.7) < found.high and Factor.of(zeroed, untouched, seed=4) == found
    unpaired = (zeroed - untouched.mean()).std() > 2 * (zeroed - untouched).std()
    assert unpaired, "the same blocks are compared, or the interval would be much wider"


def test_the_interval_of_few_blocks_is_students():
    draw = np.random.default_rng(5)
    untouched = draw.normal(3, 0.5, 9)
    zeroed = untouched + draw.exponential(0.7, 9)
    low, high = scipy.stats.ttest_rel(zeroed, untouched).confidence_interval(0.95)
    found = Factor.of(zeroed, untouched)
    assert (found.low, found.high) == pytest.approx((math.exp(low), math.exp(high)))


def test_a_factor_without_spread_blocks_or_end():
    ones = np.ones(6)
    assert Factor.of(ones + math.log(2), ones) == Factor(*[pytest.approx(2.0)] * 3)
    for few in (1, MIN_BLOCKS - 1):
        alone = Factor.of(ones[:few] + math.log(2), ones[:few])
        assert math.isnan(alone.low) and math.isnan(alone.high) and str(alone) == "x2"
    broken = Factor.of(np.array([1.0, math.nan]), ones[:2])
    assert broken.value == broken.low == math.inf and broken.to_list() == ["inf"] * 3
    for factor in (broken, Factor(2.0, 1.5, 2.5)):
        assert Factor.from_list(factor.to_list()) == factor


def by_block(factor: float, spread: float = 0.0) -> np.ndarray:
    """Losses of eight blocks whose mean is log(10 x factor), half of them above and half below."""
    return math.log(10 * factor) + spread * np.array([1, -1] * 4)


@pytest.mark.parametrize(
    ("zeroed", "random", "verdict"),
    [
        (by_block(2.01), [by_block(1.01)], "sensitive"),
        (by_block(1.99), [by_block(1.0)], "not sensitive"),
        (by_block(2.01, 0.3), [by_block(1.0)], "borderline"),
        (by_block(1.99, 0.3), [by_block(1.0)], "borderline"),
        (by_block(3.0, 0.3), [by_block(1.0)], "sensitive"),
        (by_block(3.0), [by_block(1.2), by_block(1.0)], "not sensitive"),  # random rows matter as well
        (by_block(3.0), [by_block(1.11, 0.05)], "borderline"),  # ... or may do
        (by_block(3.0), [by_block(0.9), by_block(0.95)], "sensitive"),  # random rows that help count as no rise
        (by_block(math.inf), [by_block(1.01)], "sensitive"),
        (by_block(math.inf), [by_block(math.inf)], "not sensitive"),
        (by_block(math.inf), [by_block(1.0) * math.nan], "not sensitive"),
        (by_block(0.9), [by_block(1.0)], "not sensitive"),
    ],
)
def test_the_verdict_rule(zeroed, random, verdict):
    assert judge(by_block(1.0), zeroed, random) == verdict


def test_the_k_that_matters_most_is_the_fewest_rows_that_reach_nine_tenths():
    def factors(*values: float) -> list[tuple[int, Factor]]:
        return [(k, Factor(value, value * 0.9, value * 1.1)) for k, value in enumerate(values, 1)]

    assert key_rows(factors(1.1, 2.0, 2.05, 2.1)) == 2  # log 2 / log 2.1 = 0.93
    assert key_rows(factors(1.1, 1.9, 2.05, 2.1)) == 3  # log 1.9 / log 2.1 = 0.87
    assert key_rows(factors(0.9, 1.02)) is None  # nothing is certain to raise it
    assert key_rows([(1, Factor(3.0, 2, 4)), (2, Factor(math.inf, math.inf, math.inf))]) == 2
    assert rungs(5, 48) == [1, 2, 3, 5, 10] and rungs(30, 48) == [1, 2, 3, 5, 10, 20, 30]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_replay_from_a_layer_equals_whole_passes(family):
    model, ids = build_family(family), blocks()
    weights = scan(model)
    with evaluating(model):
        replay = Replay(model, ids, [weights.layer, 2])
        assert replay.partial and np.array_equal(replay.untouched, block_losses(model, ids))
        for kind in ("zeroing", "retaining"):
            with attacked(model, weights, kind, 3):
                assert replay.losses(weights.layer) == pytest.approx(block_losses(model, ids), rel=1e-6)
        assert np.array_equal(block_losses(model, ids), replay.untouched), "the layers run again afterwards"


def test_a_model_whose_layers_share_more_than_states_is_run_whole():
    model, ids = build_family("llama"), blocks()
    model.calls = 0
    model.model.layers[0].register_forward_hook(lambda *_: setattr(model, "calls", model.calls + 1))
    first = model.model.layers[0].mlp
    model.model.layers[2].register_forward_hook(lambda *args: args[2] + (0 if model.seen is None else 1.0))
    model.model.register_forward_pre_hook(lambda *_: setattr(model, "seen", None))
    first.register_forward_hook(lambda *_: setattr(model, "seen", True))
    with evaluating(model):
        replay = Replay(model, ids, [2])
        assert not replay.partial and np.array_equal(replay.losses(2), replay.untouched)


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
    with pytest.raises(DataError, match="4 block.* at least 5"):
        prove(model, blocks(4), weights)
    with pytest.raises(ConfigError, match="kinds names 1 blocks, and there are 5"):
        prove(model, blocks(), weights, kinds=["story"])
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
    assert proof.verdict == "not sensitive" and proof.factor.high < 1.2

"""Masks by spans: an example sees its own mask whatever it shares a micro-batch with; bad spans are refused."""

import pytest
import torch
from helpers import reference, tiny
from helpers.hook_cases import DENSE, SEED, K, P, adapted, dropping, gradients, worst
from helpers.span_cases import EXAMPLES, LAYOUTS, by_spans, lay, one_by_one, tokens
from helpers.zoo_of_families import build_family, with_expert_lists

from macdrop.config import MacDropConfig
from macdrop.errors import ConfigError
from macdrop.families import find_ffn
from macdrop.hooks import MacDrop, keep_mask
from macdrop.masking.layout import Layout, Span
from macdrop.scan import find_massive_weights

SETTINGS = [{}, {"use_dora": True}]
CASES = [
    *(("packed", family, settings, None) for family in DENSE for settings in SETTINGS),
    *((layout, "llama", settings, None) for layout in LAYOUTS[1:] for settings in SETTINGS),
    *(("packed", "llama", {"use_dora": True}, reentrant) for reentrant in (True, False)),
]
WORST = {torch.float32: 1e-5, torch.bfloat16: 0.1}


@pytest.mark.parametrize(("layout", "family", "settings", "checkpointing"), CASES)
def test_equals_each_example_alone_with_its_own_mask(layout, family, settings, checkpointing):
    slow = adapted(family, checkpointing=checkpointing, **settings)
    losses, expected = one_by_one(slow, family)
    model = adapted(family, checkpointing=checkpointing, **settings)
    found_losses, found = by_spans(model, dropping(model, family), lay(layout))
    assert found_losses == pytest.approx(losses, rel=1e-5)
    assert worst(expected, found) < 1e-5

    plain = adapted(family, checkpointing=checkpointing, **settings)
    plain_losses, other = by_spans(plain, dropping(plain, family), lay(layout), 0.0)
    assert max(abs(a - b) for a, b in zip(losses, plain_losses, strict=True)) > 1e-3  # the masks matter here
    assert worst(expected, other) > 1e-2


@pytest.mark.parametrize("settings", [*SETTINGS, {"use_dora": True, "lora_dropout": 1e-9}])
def test_equals_each_example_alone_in_bf16(settings):
    """With some dropout PEFT computes another base result for DoRA; so little of it that nothing is dropped."""
    slow, model = (adapted("llama", dtype=torch.bfloat16, **settings) for _ in range(2))
    losses, expected = one_by_one(slow, "llama")
    found_losses, found = by_spans(model, dropping(model), lay("packed", torch.bfloat16))
    assert found_losses == pytest.approx(losses, rel=2e-2)
    assert worst(expected, found) < 0.1


@pytest.mark.parametrize("family", DENSE)
def test_dora_with_its_own_base_result_equals_each_example_alone(family):
    settings = {"use_dora": True, "lora_dropout": 1e-9}
    slow, model = adapted(family, **settings), adapted(family, **settings)
    losses, expected = one_by_one(slow, family)
    found_losses, found = by_spans(model, dropping(model, family), lay("packed"))
    assert found_losses == pytest.approx(losses, rel=1e-5)
    assert worst(expected, found) < 1e-5


@pytest.mark.parametrize("untrained", [False, True])
def test_dora_where_nothing_is_left_of_a_row(untrained):
    """Half of the rows lose all their entries under one of the masks; B is 0 at the start of training."""
    slow, model = adapted(use_dora=True), adapted(use_dora=True)
    if untrained:
        tiny.zero_b(slow), tiny.zero_b(model)
    losses, expected = one_by_one(reference.with_dora_by_hand(slow), "llama", 0.98)
    found_losses, found = by_spans(model, dropping(model), lay("packed"), 0.98)
    empty = [bool((~keep_mask(SEED, mask, 0.98, (K, tiny.HIDDEN))).all(1).any()) for mask in (0, 4, 9)]
    assert any(empty)
    assert found_losses == pytest.approx(losses, rel=1e-5)
    for name, gradient in expected.items():
        assert (gradient - found[name]).abs().max() <= 1e-4 * gradient.abs().max(), name


def test_activations_depend_on_mask_and_place_alone():
    """By hand: each example alone, with the factors of its own (mask, place) on the intermediate state."""
    slow, losses = adapted(), []
    for number, (length, mask, place) in enumerate(EXAMPLES):
        keep = keep_mask(SEED, mask, P, (length, tiny.FFN), place=place)
        batch = {"input_ids": tokens(number)[None], "labels": tokens(number)[None]}
        draw = lambda shape, keep=keep: keep.view(shape)  # noqa: E731
        losses.append(reference.dropout_step(slow, batch, "llama", draw, P, divide=len(EXAMPLES)))
    for layout in LAYOUTS:
        model = adapted(checkpointing=False)
        drop = dropping(model, scope="activations")
        found_losses, found = by_spans(model, drop, lay(layout))
        assert found_losses == pytest.approx(losses, rel=1e-5)
        assert worst(gradients(slow), found) < 1e-5
        counts = drop.take_counts()
        assert {mask: counts[mask][1] for mask in counts} == {4: 12 * tiny.FFN, 0: 12 * tiny.FFN, 9: 2 * tiny.FFN}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("scope", ["massive", "random", "all"])
def test_one_mask_by_spans_has_the_bits_of_an_int(scope, settings):
    """And so has padding: all tokens have the one mask."""
    losses, found = [], []
    for masks in (7, [Span(0, 2, 9, 7), Span(1, 0, 1, 7, 1)]):
        model = adapted(**settings)
        with dropping(model, scope=scope).micro_step(P, masks):
            loss = model(**tiny.batch(0)).loss
            loss.backward()
        losses.append(loss.item())
        found.append(gradients(model))
    assert losses[0] == losses[1]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_runs_are_bit_reproducible():
    runs = []
    for _ in range(2):
        model = adapted(use_dora=True)
        runs.append(by_spans(model, dropping(model), lay("packed")))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])


@pytest.mark.parametrize("scope", ["massive", "activations"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_layers_that_flatten_their_input(settings, scope):
    """As shared experts beside routed ones do."""
    results = []
    for flat in (False, True):
        model = adapted(**settings)
        if flat:
            mlp = find_ffn(model, "model.layers.1.mlp").module
            own = mlp.forward
            mlp.forward = lambda x, own=own: own(x.reshape(-1, x.shape[-1])).view(x.shape)
        results.append(by_spans(model, dropping(model, scope=scope), lay("two rows")))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-6)
    assert worst(results[0][1], results[1][1]) < 1e-6


def test_activations_of_a_routed_expert_have_one_mask():
    """Which tokens it sees is the router's choice, so that they have no places."""
    found = []
    for masks in (7, [Span(0, 0, 9, 7, 0), Span(1, 2, 9, 7, 1)]):
        model = with_expert_lists(build_family("mixtral")).train()
        model.requires_grad_(False).get_input_embeddings().requires_grad_()
        ids = torch.arange(1, 19).view(2, 9)
        weights = find_massive_weights(model, source="test", fingerprint="f", bos_token_id=1)
        drop = MacDrop(model, weights, MacDropConfig(k=2, scope="activations"))
        drop.attach()
        with drop.micro_step(0.5, masks):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        found.append((loss.item(), drop.take_counts()))
    assert found[0] == found[1]
    assert list(found[0][1]) == [7] and found[0][1][7][0] > 0


def test_a_layer_that_sees_other_tokens_is_refused():
    model = adapted()
    mlp = find_ffn(model, "model.layers.1.mlp").module
    own = mlp.forward
    mlp.forward = lambda x: torch.cat([own(x[:, :-1]), x[:, -1:]], 1)
    drop = dropping(model)
    with pytest.raises(ConfigError, match=r"(?s)model.layers.1.mlp \(Linear gate\) sees 27 tokens of .* 1 rows of 28"):
        by_spans(model, drop, lay("packed"))
    assert not drop.active


def test_tokens_outside_have_the_mask_of_the_span_before():
    layout = Layout([Span(1, 3, 5, 8), Span(0, 1, 3, 6), Span(0, 4, 5, 7), Span(1, 0, 3, 7)])
    layout.set_shape(torch.Size((2, 6, 32)), "layer")
    assert layout.ranges(12, "layer") == [(0, 4, 6), (4, 9, 7), (9, 12, 8)]
    assert layout.masks == (6, 7, 8)


def test_counts_of_masks():
    model = adapted()
    drop = dropping(model)
    laid = lay("packed")
    expected = {m: (2 * int((~keep_mask(SEED, m, P, (K, tiny.HIDDEN))).sum()), 2 * K * tiny.HIDDEN) for m in (0, 4, 9)}
    for _ in range(2):  # a mask that two micro-steps share counts once for itself, and twice in the sum
        by_spans(model, drop, laid)
    assert drop.take_counts() == expected and drop.take_counts() == {}
    assert drop.last_dropped == sum(dropped for dropped, _ in expected.values())
    assert drop.entries_dropped == 2 * drop.last_dropped
    assert drop.entries_masked == 2 * 3 * 2 * K * tiny.HIDDEN
    with drop.micro_step(P, 4):
        model(**tiny.batch(0)).loss.backward()
    assert drop.take_counts() == {4: expected[4]}


def test_without_spans_nothing_is_dropped():
    model, plain = adapted(), adapted()
    drop = dropping(model)
    with drop.micro_step(P, []):
        assert not drop.active
        loss = model(**tiny.batch(0)).loss
    assert loss.item() == plain(**tiny.batch(0)).loss.item()
    assert drop.take_counts() == {}


BAD = [
    ([Span(0, 0, 5, 1), Span(0, 4, 6, 2)], "overlap"),
    ([Span(0, 3, 3, 1)], "no token"),
    ([Span(0, 0, 3, -1)], "whole number from 0"),
    ([Span(-1, 0, 3, 1)], "whole number from 0"),
    ([Span(0, 0, 3.0, 1)], "whole number from 0"),
    ([Span(0, 0, 3, 1, -1)], "whole number from 0"),
    ([(0, 0, 3, 1)], "list of `Span`"),
    ("0", "list of `Span`"),
    (True, "mask is True"),
    (-1, "mask is -1"),
]


@pytest.mark.parametrize(("masks", "message"), BAD)
def test_bad_spans_are_refused(masks, message):
    drop = dropping(adapted())
    with pytest.raises(ConfigError, match=message):
        drop.begin(P, masks)
    assert not drop.active
    drop.begin(P, 0)


@pytest.mark.parametrize("span", [Span(2, 0, 3, 1), Span(1, 8, 13, 1)])
def test_spans_beyond_the_batch_are_refused(span):
    model = adapted()
    drop = dropping(model)
    with pytest.raises(ConfigError, match="2 rows of 12 tokens"), drop.micro_step(P, [Span(0, 0, 2, 0), span]):
        model(**tiny.batch(0))


def test_an_example_twice_is_refused_for_activations():
    drop = dropping(adapted(), scope="activations")
    with pytest.raises(ConfigError, match="the mask 3 and the place 0"):
        drop.begin(P, [Span(0, 0, 2, 3), Span(0, 2, 4, 3)])
    assert not drop.active


@pytest.mark.parametrize("family", tiny.EXPERTS)
def test_rows_that_are_edited_take_one_mask_at_a_time(family):
    model = adapted(family)
    drop = dropping(model, family)
    assert drop.one_mask_at_a_time and not dropping(adapted()).one_mask_at_a_time
    with pytest.raises(ConfigError, match="one mask at a time, but the micro-batch has the masks 1, 2"):
        drop.begin(P, [Span(0, 0, 2, 1), Span(1, 0, 2, 2)])
    losses = []
    for masks in (1, [Span(0, 0, 2, 1), Span(1, 0, 2, 1, 1)]):
        with drop.micro_step(P, masks):
            losses.append(model(**tiny.batch(0)).loss.item())
    assert losses[0] == losses[1]

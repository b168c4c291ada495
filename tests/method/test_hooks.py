"""MacDrop equals the paper's listing, repeats itself, drops what it says, and leaves no trace."""

import pytest
import torch
from helpers import reference, tiny
from helpers.hook_cases import DENSE, SEED, SHAPE, K, P, accumulate, adapted, by_macdrop, by_reference, dropping, worst

from macdrop.hooks import keep_mask

CASES = [
    *(
        (family, {"use_dora": dora, "lora_dropout": dropout})
        for family in DENSE
        for dora in (False, True)
        for dropout in (0.0, 0.3)
    ),
    *((family, {}) for family in tiny.EXPERTS),
]


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["stored", "reentrant", "non_reentrant"])
@pytest.mark.parametrize(("family", "settings"), CASES, ids=lambda case: str(case).replace(" ", ""))
def test_equals_the_paper_s_listing(family, settings, checkpointing):
    slow = adapted(family, checkpointing=checkpointing, **settings)
    losses, expected = accumulate(slow, by_reference(slow, family))
    model = adapted(family, checkpointing=checkpointing, **settings)
    drop = dropping(model, family)
    found_losses, found = accumulate(model, by_macdrop(model, drop))
    assert found_losses == pytest.approx(losses, rel=1e-6)
    assert worst(expected, found) < 1e-5

    plain_losses, plain = accumulate(adapted(family, checkpointing=checkpointing, **settings), None)
    assert max(abs(a - b) for a, b in zip(losses, plain_losses, strict=True)) > 1e-4  # the mask matters here
    assert worst(expected, plain) > 1e-2


@pytest.mark.parametrize("p", [0.05, 1.0])
def test_equals_the_listing_for_few_and_for_all_entries(p):
    slow, model = adapted(use_dora=True), adapted(use_dora=True)
    losses, expected = accumulate(slow, by_reference(slow, "llama", p))
    found_losses, found = accumulate(model, by_macdrop(model, dropping(model), p))
    assert found_losses == pytest.approx(losses, rel=1e-6)
    assert worst(expected, found) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("untrained", [False, True], ids=["trained", "untrained"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("p", [0.5, 0.8, 0.95, 1.0])
def test_dora_where_little_or_nothing_of_a_row_is_left(p, family, untrained, dtype):
    """At the start of training B is 0: a row that loses all its entries is 0 and takes no gradient, where PEFT has 0/0.

    In bf16 both sides round, and the more so the fewer entries the norm is of.
    """

    def model():
        built = adapted(family, use_dora=True).to(dtype)
        if untrained:
            tiny.zero_b(built)
        return built

    slow, ours = reference.with_dora_by_hand(model()), model()
    losses, expected = accumulate(slow, by_reference(slow, family, p))
    found_losses, found = accumulate(ours, by_macdrop(ours, dropping(ours, family), p))
    exact = dtype == torch.float32
    assert found_losses == pytest.approx(losses, rel=1e-5 if exact else 0.02)
    assert set(found) >= set(expected) and all(bool(gradient.isfinite().all()) for gradient in found.values())
    for name, gradient in expected.items():
        largest = gradient.abs().max()
        assert (gradient - found[name]).abs().max() <= (1e-4 if exact else 0.15) * largest, name
    if p < 1 and not untrained:  # no row is empty, so that PEFT's own function is the listing's
        peft = model()
        losses, expected = accumulate(peft, by_reference(peft, family, p))
        assert found_losses == pytest.approx(losses, rel=1e-5 if exact else 0.02)
        assert worst(expected, found) < (1e-4 if exact else 0.15)


def test_recomputation_runs_the_hook_again():
    """Guards the checkpointed cases above: their activations are really recomputed."""
    calls = {}
    for checkpointing in (None, True, False):
        model = adapted(checkpointing=checkpointing)
        drop = dropping(model)
        seen = calls.setdefault(checkpointing, [])
        drop._sites[0].module.register_forward_hook(lambda *args, seen=seen: seen.append(1))
        accumulate(model, by_macdrop(model, drop))
    assert [len(seen) for seen in calls.values()] == [2, 4, 4]


SETTINGS = [{}, {"use_dora": True}, {"use_dora": True, "lora_dropout": 0.3}]


@pytest.mark.parametrize("settings", SETTINGS, ids=["lora", "dora", "dora_dropout"])
@pytest.mark.parametrize("how", ["p=0", "outside", "disabled", "detached"])
def test_unmasked_training_is_bit_identical_to_plain(settings, how):
    expected = accumulate(adapted(**settings), None)
    model = adapted(**settings)
    drop = dropping(model, k=0 if how == "disabled" else K)
    if how == "detached":
        accumulate(model, by_macdrop(model, drop))
        model.zero_grad()
        drop.detach()
    step = by_macdrop(model, drop, P if how == "disabled" else 0.0) if how in ("p=0", "disabled") else None
    losses, found = accumulate(model, step)
    assert losses == expected[0]
    assert found.keys() == expected[1].keys()
    assert all(torch.equal(found[name], expected[1][name]) for name in found)
    assert how == "detached" or (drop.entries_dropped, drop.entries_masked) == (0, 0)


@pytest.mark.parametrize("family", [*DENSE, *tiny.EXPERTS])
def test_eval_is_bit_identical_even_inside_a_micro_step(family):
    settings = {} if family in tiny.EXPERTS else {"use_dora": True}
    model = adapted(family, **settings).eval()
    batch = tiny.batch(0)
    with torch.no_grad():
        expected = model(**batch).logits
        drop = dropping(model, family)
        with drop.micro_step(P, 0):
            found = model(**batch).logits
    assert torch.equal(expected, found)
    assert (drop.entries_dropped, drop.entries_masked, drop.last_dropped) == (0, 0, 0)


@pytest.mark.parametrize("family", ["llama", "gpt2", *tiny.EXPERTS])
def test_training_moves_the_adapter_and_no_bit_of_the_base(family):
    model = adapted(family, use_dora=family == "llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    drop = dropping(model, family)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(4):
        with drop.micro_step(P, step):
            model(**tiny.batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert changed and changed <= trainable
    assert any("lora_B" in name for name in changed)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_the_dropped_fraction_is_p(p):
    """Within five standard deviations of a binomial, which a fair mask misses once in a million draws."""
    model = adapted()
    drop = dropping(model)
    for index in range(40):
        with drop.micro_step(p, index), torch.no_grad():
            model(**tiny.batch(0, rows=1, length=2))
    drawn = 40 * K * tiny.HIDDEN  # one mask serves both matrices
    assert drop.entries_masked == 2 * drawn
    assert abs(drop.entries_dropped / drop.entries_masked - p) < 5 * (p * (1 - p) / drawn) ** 0.5


def test_masks_are_entry_by_entry_and_unbiased_in_every_place():
    masks = torch.stack([keep_mask(0, index, 0.5, SHAPE) for index in range(400)]).float()
    for dim in ((1,), (2,)):  # neither whole rows nor whole columns are dropped together
        assert masks.mean(dim).std() < 0.5 * 0.5
    assert (masks.mean(0) - 0.5).abs().max() < 5 * 0.5 / 400**0.5


def test_masks_repeat_for_a_seed_and_differ_between_micro_steps_and_seeds():
    seen = {}
    for seed in range(5):
        for index in range(50):
            mask = keep_mask(seed, index, 0.5, SHAPE)
            assert torch.equal(mask, keep_mask(seed, index, 0.5, SHAPE))
            seen[mask.numpy().tobytes()] = (seed, index)
    assert len(seen) == 5 * 50
    nested = keep_mask(0, 0, 0.8, SHAPE)
    assert (nested <= keep_mask(0, 0, 0.2, SHAPE)).all()  # a smaller p drops a subset


def test_the_global_generators_are_left_alone():
    model = adapted()
    drop = dropping(model)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with drop.micro_step(P, 0):
        model(**tiny.batch(0)).loss.backward()
    assert torch.equal(torch.rand(3), expected)


def test_runs_are_bit_reproducible():
    runs = []
    for _ in range(2):
        model = adapted(use_dora=True)
        runs.append(accumulate(model, by_macdrop(model, dropping(model))))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])


@pytest.mark.parametrize("settings", SETTINGS, ids=["lora", "dora", "dora_dropout"])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_bf16_base_with_fp32_adapter_follows_the_listing(family, settings):
    """PEFT keeps adapters in fp32 on a bf16 base, so the mask meets both precisions in one layer."""
    slow, model = (adapted(family, dtype=torch.bfloat16, **settings) for _ in range(2))
    losses, expected = accumulate(slow, by_reference(slow, family))
    found_losses, found = accumulate(model, by_macdrop(model, dropping(model, family)))
    assert found_losses == pytest.approx(losses, rel=1e-2)
    assert worst(expected, found) < 0.1


def test_autocast_follows_the_listing():
    def context():
        return torch.autocast("cpu", dtype=torch.bfloat16)

    slow, model = (adapted(use_dora=True, lora_dropout=0.3) for _ in range(2))
    losses, expected = accumulate(slow, by_reference(slow, "llama"), context)
    found_losses, found = accumulate(model, by_macdrop(model, dropping(model)), context)
    assert found_losses == pytest.approx(losses, rel=1e-2)
    assert worst(expected, found) < 0.1


def test_dropped_row_vanishes_entirely_in_bf16():
    """A difference of two large outputs would leave a rounding error of their size."""
    model = tiny.build("llama", dtype=torch.bfloat16).train()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[list(tiny.ROWS)] *= 1000
    outputs = []
    drop = dropping(model)
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, args, output: outputs.append(output))
    with drop.micro_step(1.0, 0):
        model(**tiny.batch(0))
    assert (outputs[0][..., list(tiny.ROWS)] == 0).all()
    assert (outputs[0] != 0).float().mean() > 0.8


def test_a_bare_model_can_be_masked():
    model = tiny.build("opt").train()
    drop = dropping(model, "opt")
    expected = reference.training_step(model, tiny.batch(0), "opt", tiny.ROWS, keep_mask(SEED, 0, P, SHAPE))
    with drop.micro_step(0.0, 0):
        pass
    with drop.micro_step(P, 0):
        found = model(**tiny.batch(0)).loss.item()
    assert found == pytest.approx(expected, rel=1e-6)

"""The placebos of MacDrop equal slow references, repeat themselves, drop what they say, and leave no trace."""

import pytest
import torch
from helpers import reference, tiny
from helpers.hook_cases import ACCUMULATION, DENSE, SEED, P, accumulate, adapted, by_macdrop, traces, worst

from macdrop.attack import random_rows
from macdrop.config import SCOPES, MacDropConfig
from macdrop.errors import ConfigError, TrainingInvariantError
from macdrop.families import find_ffn
from macdrop.hooks import MacDrop, keep_mask

K = 5
PLACEBOS = [scope for scope in SCOPES if scope != "massive"]


def dropping(model, family, scope, **config) -> MacDrop:
    drop = MacDrop(model, tiny.massive_weights(family), MacDropConfig(**{"k": K, "seed": SEED, **config}, scope=scope))
    drop.attach()
    return drop


def drawn(family="llama", k=K, seed=SEED):
    return random_rows(tiny.massive_weights(family), k, spared=max(k, 10), seed=seed)


def edited(model, family, rows, p=P):
    """Micro-batches with `rows` edited in place, as the paper's listing does it."""
    expert = tiny.massive_weights(family).expert

    def step(batch, index):
        mask = keep_mask(SEED, index, p, (len(rows), tiny.HIDDEN))
        return reference.training_step(model, batch, family, rows, mask, expert=expert, divide=ACCUMULATION)

    return step


def functional(model, family, p=P):
    """Micro-batches with plain dropout written into the down projection."""

    def step(batch, index):
        return reference.dropout_step(
            model, batch, family, lambda shape: keep_mask(SEED, index, p, shape), p, divide=ACCUMULATION
        )

    return step


def slow(scope, model, family, p=P):
    if scope == "activations":
        return functional(model, family, p)
    return edited(model, family, drawn(family) if scope == "random" else range(tiny.FFN), p)


SETTINGS = [{}, {"use_dora": True, "lora_dropout": 0.3}]
CASES = [
    *((family, settings, scope) for family in DENSE for settings in SETTINGS for scope in PLACEBOS),
    *((family, {}, scope) for family in tiny.EXPERTS for scope in ("random", "all")),
]


CASES = [
    *((*case, None) for case in CASES),
    *((*case, reentrant) for case in CASES if case[0] in ("llama", "mixtral") for reentrant in (True, False)),
]


@pytest.mark.parametrize(
    ("family", "settings", "scope", "checkpointing"), CASES, ids=lambda case: str(case).replace(" ", "")
)
def test_equals_the_slow_reference(family, settings, scope, checkpointing):
    first = adapted(family, checkpointing=checkpointing, **settings)
    losses, expected = accumulate(first, slow(scope, first, family))
    model = adapted(family, checkpointing=checkpointing, **settings)
    found_losses, found = accumulate(model, by_macdrop(model, dropping(model, family, scope)))
    assert found_losses == pytest.approx(losses, rel=1e-6)
    assert worst(expected, found) < 1e-5


def test_the_scopes_drop_different_things():
    seen = set()
    for scope in SCOPES:
        model = adapted()
        losses, _ = accumulate(model, by_macdrop(model, dropping(model, "llama", scope)))
        seen.add(tuple(losses))
    assert len(seen) == len(SCOPES)


@pytest.mark.parametrize("scope", PLACEBOS)
def test_dropping_everything_equals_the_reference(scope):
    first, model = adapted(use_dora=True), adapted(use_dora=True)
    losses, expected = accumulate(first, slow(scope, first, "llama", 1.0))
    found_losses, found = accumulate(model, by_macdrop(model, dropping(model, "llama", scope), 1.0))
    assert found_losses == pytest.approx(losses, rel=1e-6)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert torch.allclose(gradient, found[name], rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize("scope", PLACEBOS)
def test_runs_are_bit_reproducible_and_depend_on_the_seed(scope):
    runs = []
    for seed in (0, 0, 1):
        model = adapted(use_dora=True)
        runs.append(accumulate(model, by_macdrop(model, dropping(model, "llama", scope, seed=seed))))
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert all(torch.equal(runs[0][1][name], runs[1][1][name]) for name in runs[0][1])


@pytest.mark.parametrize("scope", PLACEBOS)
@pytest.mark.parametrize("how", ["p=0", "eval", "detached"])
def test_unmasked_training_is_bit_identical_to_plain(scope, how):
    plain, model = adapted(use_dora=True), adapted(use_dora=True)
    before = traces(model)
    drop = dropping(model, "llama", scope)
    assert traces(model) != before
    if how == "eval":
        plain.eval(), model.eval()
    if how == "detached":
        drop.detach()
        assert traces(model) == before
    step = None if how == "detached" else by_macdrop(model, drop, 0.0 if how == "p=0" else P)
    (expected_losses, expected), (losses, found) = accumulate(plain, None), accumulate(model, step)
    assert losses == expected_losses
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (drop.entries_dropped, drop.entries_masked, drop.last_dropped) == (0, 0, 0)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("scope", PLACEBOS)
def test_the_dropped_share_is_p_and_checkpointing_counts_once(scope, p):
    """Within five standard deviations of a binomial."""
    model = adapted(checkpointing=False)
    drop = dropping(model, "llama", scope)
    per_step = {"random": 2 * K * tiny.HIDDEN, "all": 2 * tiny.FFN * tiny.HIDDEN, "activations": 2 * 12 * tiny.FFN}
    for index in range(10):
        with drop.micro_step(p, index):
            model(**tiny.batch(0)).loss.backward()
    assert drop.entries_masked == 10 * per_step[scope]
    drawn_once = drop.entries_masked / (1 if scope == "activations" else 2)
    assert abs(drop.entries_dropped / drop.entries_masked - p) < 5 * (p * (1 - p) / drawn_once) ** 0.5


def test_activations_are_scaled_so_that_their_mean_stays():
    model = adapted()
    down = find_ffn(model, "model.layers.1.mlp").down
    seen = []
    down.register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach()))
    drop = dropping(model, "llama", "activations")  # its hook runs after the one above
    down.register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach()))
    with drop.micro_step(0.25, 0):
        model(**tiny.batch(0))
    before, after = seen
    kept = after != 0
    assert torch.allclose(after[kept], before[kept] / 0.75)
    assert drop.entries_dropped == int((~kept).sum())


def test_batches_of_other_shapes_may_share_a_micro_step():
    model = adapted()
    drop = dropping(model, "llama", "activations")
    with drop.micro_step(P, 0):
        first = model(**tiny.batch(0)).loss
        other = model(**tiny.batch(0, length=7)).loss
        again = model(**tiny.batch(0)).loss
    assert first.item() == again.item() != other.item()


def test_random_rows_exclude_the_top_rows():
    weights = tiny.massive_weights()
    for k in (1, 5, 19):
        spared = weights.indices[: max(k, 10)]
        rows = [drawn(k=k, seed=seed) for seed in range(20)]
        assert all(len(set(r)) == k and not set(r) & set(spared) for r in rows)
        assert k == 1 or len(set(rows)) == 20
    model = tiny.lora(tiny.build())
    drop = dropping(model, "llama", "random", seed=7)
    assert drop._rows == drawn(seed=7)


def test_attach_returns_the_number_of_hooked_rows():
    def hooked(family, scope):
        model = tiny.build(family)
        weights = tiny.massive_weights(family)
        return MacDrop(model, weights, MacDropConfig(k=K, scope=scope)).attach()

    assert [hooked("llama", scope) for scope in SCOPES] == [2 * K, 2 * K, 2 * tiny.FFN, tiny.FFN]
    assert [hooked("opt", scope) for scope in SCOPES] == [K, K, tiny.FFN, tiny.FFN]
    assert [hooked("mixtral", scope) for scope in ("random", "all")] == [2 * K, 2 * tiny.FFN]


def test_down_projection_that_never_runs_is_detected():
    model = tiny.build().train()
    mlp = model.model.layers[1].mlp
    drop = dropping(model, "llama", "activations")
    mlp.forward = lambda x: x
    with pytest.raises(TrainingInvariantError, match="dropped nothing"), drop.micro_step(0.5, 0):
        model(**tiny.batch(0)).loss.backward()


@pytest.mark.parametrize("family", tiny.EXPERTS)
def test_activations_of_fused_experts_are_refused(family):
    model = tiny.build(family)
    before = traces(model)
    with pytest.raises(ConfigError, match="(?s)fused.*'activations'"):
        dropping(model, family, "activations")
    assert traces(model) == before


def test_too_few_rows_for_random_ones_are_refused():
    with pytest.raises(ConfigError, match="(?s)25 random rows beside the top 25.*48 rows.*at most 24"):
        dropping(tiny.build(), "llama", "random", k=25)
    weights = tiny.massive_weights(indices=tuple(range(14)), intermediate_size=14)
    with pytest.raises(ConfigError, match="(?s)5 random rows beside the top 10.*at most 4"):
        random_rows(weights, 5, spared=10, seed=0)


def test_canonical_forms():
    assert MacDropConfig(k=3, scope="all").canonical() == MacDropConfig(k=0, scope="all").canonical()
    assert MacDropConfig(k=0, scope="activations").enabled and not MacDropConfig(k=0, scope="random").enabled
    assert MacDropConfig(k=3, scope="random").canonical() == MacDropConfig(k=3, scope="random")
    for scope in SCOPES:
        assert MacDropConfig(p0=0, scope=scope).canonical() == MacDropConfig(k=0, p0=0.0)
    assert [MacDropConfig(k=k, scope="random").rows_needed for k in (0, 3, 12)] == [0, 13, 24]
    for wrong in ("randm", None, ["all"], 1):
        with pytest.raises(ConfigError, match="scope is"):
            MacDropConfig(scope=wrong)
    with pytest.raises(ConfigError, match="mean 'random'"):
        MacDropConfig(scope="randm")

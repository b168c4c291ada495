"""Attacks: the rows that are zeroed, their restoration bit for bit, and the effect of each kind."""

import copy
import pickle

import pytest
import torch
from helpers import zoo_of_families
from helpers.zoo_of_families import FAMILIES, build_family, with_lora

from macdrop.attack import ATTACKS, Attack, attack, attacked_rows
from macdrop.errors import ConfigError, NoMassiveWeights
from macdrop.families import massive_ffn
from macdrop.masking import attacked
from macdrop.scan import find_massive_weights
from macdrop.weights import MassiveWeights

TOKENS = torch.tensor([[1, 5, 9, 33, 7]])


def scan(model) -> MassiveWeights:
    return find_massive_weights(model, source="test", fingerprint="f", bos_token_id=1)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def bits(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(model, before: dict[str, torch.Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def edited_by_hand(model, weights: MassiveWeights, rows: list[int]):
    """The slow reference: a copy of the model with these rows multiplied by zero, feature by feature."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for projection in massive_ffn(model, weights).projections:
            matrix = projection.tensor if projection.expert is None else projection.tensor[projection.expert]
            for row in rows:
                feature = projection.offset + projection.stride * row
                (matrix[:, feature] if projection.transposed else matrix[feature]).mul_(0)
    return model


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt", "qwen2_moe", "gpt_oss", "llama4"])
@pytest.mark.parametrize("kind", ["zeroing", "retaining", "random"])
def test_attack_equals_rows_edited_by_hand_and_is_undone_bit_for_bit(name, kind):
    model = build_family(name)
    weights = scan(model)
    before, untouched = bits(model), logits(model)
    rows = {
        "zeroing": weights.indices[:3],
        "retaining": weights.indices[3:],
        "random": attacked_rows(weights, "random", 3, seed=7),
    }[kind]
    reference = logits(edited_by_hand(model, weights, list(rows)))
    with attacked(model, weights, kind, 3, seed=7) as count:
        assert torch.equal(logits(model), reference)
        assert count == len(rows) * len(massive_ffn(model, weights).projections)
    assert_same_bits(model, before)
    assert torch.equal(logits(model), untouched)
    assert not torch.equal(reference, untouched)


def test_k_zero_and_all():
    model = build_family("llama")
    weights = scan(model)
    ffn, untouched, size = massive_ffn(model, weights), logits(model), weights.intermediate_size
    with attacked(model, weights, "zeroing", 0) as count:
        assert count == 0 and torch.equal(logits(model), untouched)
    with attacked(model, weights, "none") as count:
        assert count == 0 and torch.equal(logits(model), untouched)
    for kind, k in (("retaining", 0), ("zeroing", size)):
        with attacked(model, weights, kind, k) as count:
            assert count == 2 * size
            assert all((projection.tensor == 0).all() for projection in ffn.projections)
    with attacked(model, weights, "retaining", size) as count:
        assert count == 0 and torch.equal(logits(model), untouched)


def test_biases_are_kept():
    model = build_family("opt")
    weights = scan(model)
    bias = massive_ffn(model, weights).projections[0].bias
    assert (bias != 0).all()
    with attacked(model, weights, "retaining", 0):
        assert (bias != 0).all()


def test_rows_are_restored_after_an_exception_and_in_nested_blocks():
    model = build_family("mixtral")
    weights, before = scan(model), bits(model)
    with pytest.raises(KeyError), attacked(model, weights, "retaining", 2):
        raise KeyError
    assert_same_bits(model, before)
    with attacked(model, weights, "zeroing", 4):
        inner = bits(model)
        with attacked(model, weights, "retaining", 2), attacked(model, weights, "random", 3):
            pass
        assert_same_bits(model, inner)
    assert_same_bits(model, before)


def test_only_the_expert_of_bos_is_touched():
    model = build_family("mixtral")
    weights = scan(model)
    with attacked(model, weights, "retaining", 0):
        silent = [bool((matrix == 0).all()) for matrix in massive_ffn(model, weights).module.gate_up_proj]
    assert silent == [expert == weights.expert for expert in range(4)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_are_restored(dtype):
    model = build_family("llama").to(dtype)
    weights, before = scan(model), bits(model)
    with attacked(model, weights, "zeroing", 5) as count:
        assert count == 10
    assert_same_bits(model, before)


def test_random_rows_are_reproducible_and_never_among_the_top():
    weights = scan(build_family("llama"))
    draws = [attacked_rows(weights, "random", 5, seed=seed) for seed in range(20)]
    assert draws[3] == attacked_rows(weights, "random", 5, seed=3)
    assert len(set(draws)) > 10
    for rows in draws:
        assert len(set(rows)) == 5 and not set(rows) & set(weights.top(5))


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_with_an_adapter_in_place_base_rows_are_zeroed_and_the_adapter_stays(settings):
    from peft import LoraConfig, get_peft_model

    base = build_family("llama")
    weights = scan(base)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **settings)
    model = get_peft_model(base, config).eval()
    before, adapted = bits(model), logits(model)
    merged = get_peft_model(build_family("llama"), config).eval()
    merged.load_state_dict(before)
    merged = merged.merge_and_unload()
    with attacked(model, weights, "zeroing", 3) as count:
        assert count == 6
        in_place = logits(model)
        for projection in massive_ffn(model, weights).projections:
            assert (projection.tensor[list(weights.top(3))] == 0).all()
        assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items() if "lora" in n)
    assert_same_bits(model, before)
    assert torch.equal(logits(model), adapted)
    with attacked(merged, weights, "zeroing", 3):
        of_merged = logits(merged)
    # Two experiments: of the merged rows nothing is left, of the base rows the adapter's part stays alive.
    assert not torch.allclose(in_place, of_merged, atol=1e-4)
    assert not torch.allclose(in_place, adapted, atol=1e-4)


def test_experts_with_an_adapter_on_their_parameters():
    base = build_family("gpt_oss")
    weights = scan(base)
    model = with_lora("gpt_oss", base)
    before = bits(model)
    with attacked(model, weights, "zeroing", 3):
        assert massive_ffn(model, weights).module.gate_up_proj[weights.expert].eq(0).all(0).sum() == 6
    assert_same_bits(model, before)


def test_parsing():
    assert Attack.parse("zeroing@3") == Attack("zeroing", 3) and str(Attack.parse("zeroing@3")) == "zeroing@3"
    assert Attack.parse("none") == Attack("none") and str(Attack("none")) == "none"
    with pytest.raises(ConfigError, match="Did you mean 'zeroing'"):
        Attack.parse("zeroin@3")
    for text in ("zeroing", "zeroing@", "zeroing@-1", "zeroing@1.5", "zeroing@x", "@3", "", "none@2", 3):
        with pytest.raises(ConfigError, match="is not an attack"):
            Attack.parse(text)


def test_a_kind_registered_from_outside_parses_and_zeroes_its_rows(monkeypatch):
    monkeypatch.setattr("macdrop.attack.ATTACKS", dict(ATTACKS))

    @attack("every_other")
    def rows(weights: MassiveWeights, k: int, seed: int) -> tuple[int, ...]:
        return weights.top(k)[::2]

    model = build_family("llama")
    weights, before = scan(model), bits(model)
    assert str(Attack.parse("every_other@5")) == "every_other@5"
    assert attacked_rows(weights, "every_other", 5) == weights.top(5)[::2]
    with attacked(model, weights, "every_other", 5) as count:
        assert count == 6
    assert_same_bits(model, before)
    with pytest.raises(ConfigError, match="Did you mean 'every_other'"):
        Attack.parse("every_othr@5")


@pytest.mark.parametrize("name", ["none", "zeroing", "two words", "Upper", "at@3", ""])
def test_invalid_or_taken_kind_names_are_refused(name):
    before = dict(ATTACKS)
    with pytest.raises(ValueError, match="cannot name an attack"):
        attack(name)
    assert ATTACKS == before


@pytest.mark.parametrize("k", [-1, zoo_of_families.FFN + 1, 1.0, True, "3"])
@pytest.mark.parametrize("kind", ["zeroing", "retaining", "random"])
def test_impossible_k_is_refused_before_anything_is_touched(kind, k):
    model = build_family("llama")
    weights, before = scan(model), bits(model)
    most = 12 if kind == "random" else 24  # as many random rows are drawn beside the top k
    with pytest.raises(ConfigError, match=f"from 0 to {most}"), attacked(model, weights, kind, k):
        pass
    assert_same_bits(model, before)


def test_bad_input_is_refused():
    model = build_family("llama")
    weights = scan(model)
    with pytest.raises(ConfigError, match="Did you mean 'retaining'"), attacked(model, weights, "retain", 3):
        pass
    with pytest.raises(ConfigError, match="from 0 to 12"), attacked(model, weights, "random", 13):
        pass
    with pytest.raises(NoMassiveWeights, match="24 of 32"):
        other = build_family("llama", intermediate_size=20)
        with attacked(other, weights, "zeroing", 3):
            pass
    massive_ffn(model, weights).projections[0].tensor.ds_id = 0  # what DeepSpeed ZeRO-3 marks its parameters with
    with pytest.raises(ConfigError, match="ZeRO-3"), attacked(model, weights, "zeroing", 3):
        pass


def test_quantised_weights_are_refused():
    model = build_family("llama")
    weights = scan(model)
    module = massive_ffn(model, weights).projections[0].module
    module.weight = torch.nn.Parameter(module.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match="torch.int8"), attacked(model, weights, "zeroing", 3):
        pass


def test_errors_survive_pickling():
    with pytest.raises(ConfigError) as error:
        Attack.parse("zero@3")
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


def test_every_family_can_be_attacked():
    for name in FAMILIES:
        model = build_family(name)
        weights = scan(model)
        with attacked(model, weights, "zeroing", 2) as count:
            assert count == 2 * len(massive_ffn(model, weights).projections), name

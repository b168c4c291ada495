"""A base that bitsandbytes has quantised is the plain model of its dequantised weights: masks, attacks, gradients."""

import json

import pytest
import torch
from helpers import tiny
from helpers.hook_cases import DENSE, P, accumulate, by_macdrop, by_reference, dropping, worst
from helpers.quantised import by_hand, quantised, saved, twin
from helpers.span_cases import by_spans, lay

import macdrop.quantised as module_under_test
from macdrop.errors import ConfigError
from macdrop.families import massive_ffn
from macdrop.fingerprint import format_name, quantised_fingerprint, shown, split_fingerprint
from macdrop.gather import read_rows
from macdrop.load import load_model
from macdrop.masking import attacked
from macdrop.quantised import dequantise, dequantised, is_quantised, quantised_layers, stored_bytes
from macdrop.scan import find_massive_weights

BITS = pytest.mark.parametrize("bits", [4, 8])
SETTINGS = [{}, {"use_dora": True}, {"use_dora": True, "lora_dropout": 0.3}]
CASES = [("llama", settings, masked) for settings in SETTINGS for masked in (False, True)]
CASES += [(family, {"use_dora": True}, True) for family in DENSE[1:]]
ATTACKED = [("llama", kind) for kind in ("zeroing", "retaining", "random")]
ATTACKED += [(family, "zeroing") for family in DENSE[1:]]


def layers(model):
    return {name: m for name, m in model.named_modules() if is_quantised(getattr(m, "weight", None))}


@BITS
@pytest.mark.parametrize("family", DENSE)
def test_weights_are_those_of_codes_and_scales(family, bits):
    model = quantised(family, bits)
    names = [name.replace(".base_layer", "") for name in quantised_layers(tiny.build(family))]
    assert sorted(layers(model)) == sorted(names) and names
    for module in layers(model).values():
        torch.testing.assert_close(dequantised(module), by_hand(module), rtol=2e-6, atol=0)
    assert json.loads((saved(family) / "config.json").read_text()).get("quantization_config") is None


@BITS
@pytest.mark.parametrize(("family", "settings", "masked"), CASES, ids=str)
def test_losses_and_gradients_are_those_of_the_dequantised_weights(family, masked, settings, bits):
    """Masked: of the paper's listing, which edits the rows of the twin in place."""
    slow, model = tiny.lora(twin(family, bits), **settings), tiny.lora(quantised(family, bits), **settings)
    losses, expected = accumulate(slow, by_reference(slow, family) if masked else None)
    found_losses, found = accumulate(model, by_macdrop(model, dropping(model, family)) if masked else None)
    assert found_losses == pytest.approx(losses, rel=1e-5)
    assert worst(expected, found) < 1e-4
    assert len(found) == sum(p.requires_grad for p in model.parameters())


@BITS
def test_several_masks_in_one_micro_batch(bits):
    slow, model = tiny.lora(twin("llama", bits), use_dora=True), tiny.lora(quantised("llama", bits), use_dora=True)
    (losses, expected), (found_losses, found) = (
        by_spans(each, dropping(each), lay("packed")) for each in (slow, model)
    )
    assert found_losses == pytest.approx(losses, rel=1e-5)
    assert worst(expected, found) < 1e-4


@BITS
@pytest.mark.parametrize("settings", SETTINGS[:2], ids=str)
def test_masks_repeat_and_without_any_nothing_changes(settings, bits):
    plain, again, unmasked, masked = (tiny.lora(quantised("llama", bits), **settings) for _ in range(4))
    expected = accumulate(plain, None)
    found = accumulate(unmasked, by_macdrop(unmasked, dropping(unmasked), 0.0))
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], value) for name, value in expected[1].items())
    one, two = (accumulate(each, by_macdrop(each, dropping(each), P)) for each in (again, masked))
    assert one[0] == two[0] != expected[0]
    assert all(torch.equal(one[1][name], value) for name, value in two[1].items())


# --- attacks and scans ---


def every_weight(model):
    """Codes, weights and scales of a model, copied."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}


@BITS
@pytest.mark.parametrize(("family", "kind"), ATTACKED)
def test_attacks_zero_dequantised_rows_and_bring_them_back_bit_for_bit(family, kind, bits):
    model, slow, weights = quantised(family, bits), twin(family, bits), tiny.massive_weights(family)
    before, batch = every_weight(model), tiny.batch(0)
    ffn = massive_ffn(model, weights)
    rows = [read_rows(projection, range(tiny.FFN)) for projection in ffn.projections]
    for each in (model, slow):
        each.train()  # in eval mode LLM.int8 also rounds activations
    with attacked(model, weights, kind, 3) as count, attacked(slow, weights, kind, 3):
        for projection, own in zip(ffn.projections, rows, strict=True):
            there = read_rows(projection, range(tiny.FFN))
            gone = (there == 0).all(dim=1)
            assert int(gone.sum()) == count // len(rows)
            assert torch.equal(there[~gone], own[~gone])
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, slow(**batch).logits, rtol=1e-4, atol=1e-4)
    after = every_weight(model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@BITS
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_stays_alive_in_attacked_rows(dora, bits):
    slow, model = (tiny.lora(each, use_dora=dora) for each in (twin("llama", bits), quantised("llama", bits)))
    weights, batch = tiny.massive_weights(), tiny.batch(0)
    with attacked(model, weights, "zeroing", 3), attacked(slow, weights, "zeroing", 3), torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, slow(**batch).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", DENSE)
def test_a_scan_is_of_the_dequantised_weights(family):
    found, expected = (
        find_massive_weights(model, source="tiny", fingerprint="2-0-nf4", bos_token_id=1)
        for model in (quantised(family, 4), twin(family, 4))
    )
    assert (found.layer, found.path, found.top(5)) == (expected.layer, expected.path, expected.top(5))
    assert found.magnitudes == pytest.approx(expected.magnitudes, rel=1e-4, abs=1e-5)


def test_an_odd_number_of_inputs_is_refused_in_4_bits():
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(5, 4, bias=False, quant_type="nf4").to("cpu")
    with pytest.raises(ConfigError, match="quantization_bit: 8"):
        module_under_test.zero_rows(layer, [0])


def test_weights_packed_for_one_kernel_are_refused():
    model = quantised("llama", 4)
    layer = next(iter(layers(model).values()))
    assert layer.support_avx512bf16_for_cpu is False
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ConfigError, match="AVX-512"):
        dequantised(layer)


def test_rows_that_the_library_misreads_are_read_right_or_refused(monkeypatch):
    """On CPUs with AVX-512 rows that are no multiple of a block came out wrong; forward passes as well."""
    import bitsandbytes.functional as F

    model, slow = quantised("llama", 4), tiny.build("llama")
    for name, module in layers(model).items():
        torch.testing.assert_close(dequantised(module), by_hand(module), rtol=2e-6, atol=0)
        slow.get_submodule(name).weight.data.copy_(by_hand(module))
    with torch.no_grad():
        expected, found = (each(**tiny.batch(0)).logits for each in (slow, model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    real = F.dequantize_4bit
    monkeypatch.setattr(F, "dequantize_4bit", lambda *given, **more: real(*given, **more).roll(1, dims=0))
    with pytest.raises(ConfigError, match="(?s)rows of 32 entries .*quantization_bit: 8"):
        module_under_test.settle(model)


# --- loading and leaving ---


@BITS
def test_dora_survives_passes_in_both_modes(bits):
    """PEFT replaces a weight on CPUs where it reads it for DoRA, and int8 layers would lose their scales by that."""
    model, batch = tiny.lora(quantised("llama", bits), use_dora=True), tiny.batch(0)
    losses = []
    for training in (True, False, True, False):
        model.train(training)
        with torch.no_grad():
            losses.append(model(**batch).loss.item())
    assert losses[:2] == losses[2:] and losses[0] == pytest.approx(losses[1], rel=0.02)


@BITS
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dequantised_models_are_plain_and_can_be_saved(family, bits, tmp_path):
    model, batch = quantised(family, bits), tiny.batch(0)
    count = len(layers(model))
    assert dequantise(model) == count and not layers(model)
    with torch.no_grad():
        expected = twin(family, bits)(**batch).logits
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)
        model.save_pretrained(tmp_path)
        again = load_model(tmp_path, attn_implementation="eager")
        assert torch.equal(again(**batch).logits, model(**batch).logits)


@BITS
def test_bytes_are_those_that_are_stored(bits):
    for module in layers(quantised("llama", bits)).values():
        weight = module.weight
        stored = weight.numel() * weight.element_size()
        if bits == 8:
            stored += 4 * len(module.state.SCB if module.state.SCB is not None else weight.SCB)
        else:
            state = weight.quant_state
            parts = (state.absmax, state.code, state.state2.absmax, state.state2.code)
            stored += sum(part.numel() * part.element_size() for part in parts)
        assert stored_bytes(module.out_features, module.in_features, bits) == stored


@pytest.mark.parametrize("bits", [2, 16, "4", True])
def test_other_numbers_of_bits_are_refused(bits):
    with pytest.raises(ConfigError, match="allowed are 4"):
        load_model(saved("llama"), quantization_bit=bits)


def test_what_is_stored_quantised_is_not_quantised_again(tmp_path):
    quantised("llama", 4).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="stored quantised"):
        load_model(tmp_path, quantization_bit=4)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(module_under_test, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"macdrop\[bnb\]"):
        load_model(saved("llama"), quantization_bit=8)


def test_fingerprints_tell_formats_apart():
    plain = "2-" + "a" * 64
    nf4, int8 = (quantised_fingerprint(plain, bits) for bits in (4, 8))
    assert quantised_fingerprint(plain, None) == plain and len({plain, nf4, int8}) == 3
    assert [split_fingerprint(each)[1] for each in (plain, nf4, int8)] == [None, "nf4", "int8"]
    assert {split_fingerprint(each)[0] for each in (plain, nf4, int8)} == {plain}
    assert shown(nf4) == f"{plain[:14]}-nf4" and format_name(None) is None

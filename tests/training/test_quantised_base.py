"""Fine-tunings on a quantised base: other bytes for each format, the same losses for each ZeRO stage."""

import pytest
import torch
from helpers.small import SMALL
from safetensors.torch import load_file

from macdrop.errors import ConfigError
from macdrop.families import massive_ffn
from macdrop.gather import read_rows
from macdrop.masking import attacked
from macdrop.quantised import is_quantised
from macdrop.weights import MassiveWeights
from tune.config.run_spec import TrainSpec
from tune.evaluation.adapters import AdapterSlot
from tune.evaluation.merging import merged_weights, probe_logits, write_merged
from tune.preflight.adapter import model_outline
from tune.preflight.base_memory import base_bytes, dequantised_bytes
from tune.preflight.step_memory import step_memory
from tune.training.loading import base_fingerprint, open_base, require_base
from tune.training.massive_weights import scan_file, scanned
from tune.training.single import train_here

STEPS = 3


def spec(bits=4, **keys) -> TrainSpec:
    settings = {"max_steps": STEPS, "zero_stage": 0, "macdrop": {"k": 5, "p0": 0.8}, "quantization_bit": bits}
    return TrainSpec(**{**SMALL, **settings, **keys})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train once for each setting: its folder, and the losses of its steps."""
    known = {}

    def train(bits=4, **keys):
        name = str((bits, sorted(keys.items())))
        if name not in known:
            rows, folder = [], tmp_path_factory.mktemp("trial")
            train_here(spec(bits, **keys), folder, observe=lambda row: rows.append(row) or "go_on", threads=1)
            known[name] = folder, [row["loss"] for row in rows if "loss" in row]
        return known[name]

    return train


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("dora", [False, True])
def test_each_format_trains_another_adapter(trained, dora):
    made = [adapter(trained(bits, use_dora=dora)[0]) for bits in (None, 4, 8)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        names = [name for name in made[one] if "lora_B" in name]
        assert names and all(not torch.equal(made[one][name], made[other][name]) for name in names)


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_stages_agree(trained, stage):
    losses = trained(4)[1]
    assert len(losses) == STEPS
    assert trained(4, zero_stage=stage)[1] == pytest.approx(losses, rel=1e-5)


def test_packed_rows_are_those_of_padded_batches(trained):
    """`packing: on` is refused where the check finds another output."""
    assert trained(4, packing="on")[1] == pytest.approx(trained(4, packing="off")[1], rel=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_scan_of_one_format_is_not_that_of_another(bits):
    one, plain = spec(bits), spec(None)
    found, other = scanned(one), scanned(plain)
    assert found.fingerprint == base_fingerprint(one) != other.fingerprint
    token = found.bos_token_id
    assert scan_file(one, found.fingerprint, token) != scan_file(plain, other.fingerprint, token)
    require_base(one, found.fingerprint)
    for there, here in ((found, plain), (other, one)):
        with pytest.raises(ConfigError, match="Set quantization_bit as it was"):
            require_base(here, there.fingerprint)


@pytest.mark.parametrize("bits", [4, 8])
def test_an_adapter_is_scored_on_the_same_quantised_base_and_leaves_no_trace(trained, bits):
    folder, _ = trained(bits, use_dora=True)
    weights = MassiveWeights.load(folder / "massive_weights.json")
    base, _ = open_base(spec(bits))
    projections = massive_ffn(base, weights).projections
    before, rows = probe_logits(base), [read_rows(each, range(10)) for each in projections]
    assert all(is_quantised(each.tensor) for each in projections)
    slot = AdapterSlot(base, sealed=True)
    with slot.adapter(folder / "adapter") as model:
        assert slot.delta > 0
        untouched = probe_logits(model)
        with attacked(model, weights, "zeroing", 5):
            assert not torch.equal(probe_logits(model), untouched)
        assert torch.equal(probe_logits(model), untouched)
        with pytest.raises(ConfigError, match="not quantised"), merged_weights(model):
            pass
    assert torch.equal(probe_logits(base), before)
    assert all(torch.equal(read_rows(each, range(10)), own) for each, own in zip(projections, rows, strict=True))


@pytest.mark.parametrize("bits", [4, 8])
def test_merged_weights_are_dequantised(trained, bits, tmp_path):
    folder, _ = trained(bits, use_dora=True)
    check = write_merged(spec(bits, use_dora=True), folder / "adapter", tmp_path)
    assert check.ok
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert "quantization" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("bits", [4, 8])
def test_memory_is_counted_as_it_is_stored(bits):
    model, outline = open_base(spec(bits))[0], model_outline(spec(bits))
    stored = 0
    for parameter in model.parameters():
        stored += parameter.numel() * parameter.element_size()
        if bits == 8 and is_quantised(parameter):
            stored += 4 * len(parameter)
        elif is_quantised(parameter):
            state = parameter.quant_state
            parts = (state.absmax, state.code, state.state2.absmax, state.state2.code)
            stored += sum(part.numel() * part.element_size() for part in parts)
    assert base_bytes(outline, spec(bits)) == stored
    plain = model_outline(spec(None))
    assert base_bytes(plain, spec(None)) == 4 * sum(p.numel() for p in plain.parameters())
    assert dequantised_bytes(plain, spec(None)) == 0 < dequantised_bytes(outline, spec(bits))


def test_steps_on_large_quantised_bases_take_less():
    names = {"model_name_or_path": "zoo:planted-llama"}
    plain, small = (step_memory(spec(bits, **names), gpu=False) for bits in (None, 4))
    assert small.kept == plain.kept and small.fixed != plain.fixed

"""Adapters swapped in and out of a resident base, and merged for an attack, without a trace."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil

import pytest
import torch
from helpers import benchmark_fixtures as fix
from peft import LoraConfig, PeftModel, get_peft_model

from macdrop.errors import ConfigError
from tune.config.eval_spec import EvalJob, EvalSpec
from tune.config.messages import build
from tune.errors import CheckpointError
from tune.evaluation.adapters import AdapterSlot
from tune.evaluation.decode import greedy
from tune.evaluation.merging import merged_weights
from tune.evaluation.scorer import Scorer
from tune.storage.sealed_folder import commit

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
IDS = torch.arange(2, 34)[None]


def save_adapter(path, dora=False, dtype=torch.float32, seed=1, scale=0.3, targets=fix.LORA_TARGETS):
    """Write an adapter with an effect, drawn from `seed`, as PEFT does."""
    torch.manual_seed(seed)
    lora = LoraConfig(r=4, target_modules=list(targets), use_dora=dora)
    model = get_peft_model(fix.tiny_llama(dtype=dtype), lora, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=scale) if scale else p.zero_()
    model.save_pretrained(path)
    return path, model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_swap_in_and_the_base_is_restored_bit_for_bit(tmp_path, dora, dtype):
    folders = [save_adapter(tmp_path / str(seed), dora, dtype, seed) for seed in (1, 2)]
    base = fix.tiny_llama(dtype=dtype)
    base.lm_head.weight.requires_grad_(False)
    names = [(name, p.data_ptr(), p.requires_grad) for name, p in base.named_parameters()]
    before = {name: p.clone() for name, p in base.named_parameters()}
    plain, slot = logits(base), AdapterSlot(base)
    for folder, trained in [*folders, *folders]:
        with slot.adapter(folder) as model:
            assert torch.equal(
                logits(model), logits(PeftModel.from_pretrained(fix.tiny_llama(dtype=dtype), folder).eval())
            )
            if dtype is torch.float32:
                assert torch.equal(logits(model), logits(trained))
            assert slot.delta > 1e-3 and not model.training
        assert torch.equal(logits(base), plain) and not hasattr(base, "peft_config")
        assert [(name, p.data_ptr(), p.requires_grad) for name, p in base.named_parameters()] == names
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


def test_adapter_without_effect_has_zero_delta(tmp_path):
    folder, _ = save_adapter(tmp_path / "a", scale=0)
    slot = AdapterSlot(fix.tiny_llama())
    random_state = torch.get_rng_state()
    with slot.adapter(folder):
        assert slot.delta == 0.0
    assert torch.equal(torch.get_rng_state(), random_state)
    with slot.adapter(None) as model:
        assert model is slot.base and slot.delta == 0.0


def test_base_and_its_mode_are_restored_after_an_error(tmp_path):
    folder, _ = save_adapter(tmp_path / "a")
    base = fix.tiny_llama()
    plain = logits(base)
    with pytest.raises(RuntimeError, match="while scoring"), AdapterSlot(base).adapter(folder):
        raise RuntimeError("while scoring")
    assert torch.equal(logits(base), plain)


def test_unfit_adapters_are_refused_and_the_base_stays_usable(tmp_path):
    base = fix.tiny_llama()
    base.lm_head.weight.requires_grad_(False)
    trainable = [(name, p.requires_grad) for name, p in base.named_parameters()]
    plain, slot = logits(base), AdapterSlot(base)
    good, _ = save_adapter(tmp_path / "good")
    wide, _ = save_adapter(tmp_path / "wide")
    (wide / "adapter_config.json").write_text((wide / "adapter_config.json").read_text().replace('"r": 4', '"r": 8'))
    other, _ = save_adapter(tmp_path / "other", targets=["q_proj"])
    text = (other / "adapter_config.json").read_text()
    (other / "adapter_config.json").write_text(text.replace('"q_proj"', '"fc1"'))
    partial, _ = save_adapter(tmp_path / "partial", targets=["q_proj"])
    text = (partial / "adapter_config.json").read_text()
    (partial / "adapter_config.json").write_text(text.replace('"q_proj"', '"q_proj", "v_proj"'))
    for folder in (wide, other, partial):
        with pytest.raises(CheckpointError, match="does not fit this model"), slot.adapter(folder):
            pass
        assert torch.equal(logits(base), plain)
        assert [(name, p.requires_grad) for name, p in base.named_parameters()] == trainable
        with slot.adapter(good):
            assert slot.delta > 1e-3
    with pytest.raises(ConfigError, match="no adapter_config.json"), slot.adapter(tmp_path):
        pass
    text = (good / "adapter_config.json").read_text()
    (good / "adapter_config.json").write_text(text.replace('"init_lora_weights": true', '"init_lora_weights": "pissa"'))
    with pytest.raises(ConfigError, match="init_lora_weights 'pissa'"), slot.adapter(good):
        pass
    (wide / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"), slot.adapter(wide):
        pass
    (wide / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing"), slot.adapter(wide):
        pass


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_equals_peft_and_restores_every_bit(tmp_path, dora, dtype):
    _, model = save_adapter(tmp_path / "a", dora, dtype)
    before = {name: p.clone() for name, p in model.named_parameters()}
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    adapted = logits(model)
    reference = logits(copy.deepcopy(model).merge_and_unload())
    for _ in range(2):
        with merged_weights(model) as layers:
            assert layers == 2 * len(fix.LORA_TARGETS)
            assert torch.equal(logits(model), reference)
        assert torch.equal(logits(model), adapted)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers
    with pytest.raises(ZeroDivisionError), merged_weights(model):
        raise ZeroDivisionError
    assert torch.equal(logits(model), adapted)


def test_generation_uses_the_adapter(tmp_path):
    folder, _ = save_adapter(tmp_path / "a")
    base, tokenizer = fix.tiny_llama(), fix.byte_tokenizer()
    base.generation_config.repetition_penalty = 3.0
    prompts = [tokenizer(text).input_ids for text in ("a", "the river")]
    settings = {"max_new_tokens": 10, "batch_size": 2}
    plain = greedy(base, tokenizer, prompts, **settings)
    with AdapterSlot(base).adapter(folder) as model:
        adapted = greedy(model, tokenizer, prompts, **settings)
    assert greedy(base, tokenizer, prompts, **settings) == plain != adapted
    merged = PeftModel.from_pretrained(fix.tiny_llama(), folder).merge_and_unload()
    assert greedy(merged, tokenizer, prompts, **settings) == adapted
    assert base.generation_config.repetition_penalty == 3.0


def test_bare_model_has_nothing_to_merge():
    with merged_weights(fix.tiny_llama()) as layers:
        assert layers == 0


@pytest.mark.parametrize("dora", [False, True])
def test_attacks_on_base_and_merged_rows_give_different_scores(tmp_path, dora):
    folder, _ = save_adapter(tmp_path / "a", dora)
    (tmp_path / "t.txt").write_text("The river ran past the old mill and on to the sea. " * 10)
    block = {"attacks": ["none", "zeroing@5"], "attack_on": "both", "perplexity": {"t": str(tmp_path / "t.txt")}}
    base = fix.tiny_llama()
    weights, tokenizer = fix.massive(base), fix.byte_tokenizer()
    scorer, slot = Scorer(base, tokenizer, build(EvalSpec, block), weights), AdapterSlot(base)
    with slot.adapter(folder) as model:
        found = {(job.attack, job.attack_on): scorer.score(job, model)[0]["value"] for job in scorer.jobs()}
    bare = scorer.score(EvalJob("perplexity", "t"))[0]["value"]
    assert len({bare, *found.values()}) == 4

    merged = PeftModel.from_pretrained(fix.tiny_llama(), folder).merge_and_unload()
    wrapped = PeftModel.from_pretrained(fix.tiny_llama(), folder)
    for model, place in ((merged, "merged"), (wrapped, "base")):
        mlp = model.get_submodule("base_model.model.model.layers.0.mlp" if place == "base" else "model.layers.0.mlp")
        with torch.no_grad():
            for name in ("gate_proj", "up_proj"):
                layer = getattr(mlp, name)
                getattr(layer, "base_layer", layer).weight[-5:] = 0
        plain = Scorer(model, tokenizer, build(EvalSpec, block | {"attacks": "none"}))
        assert plain.score(EvalJob("perplexity", "t"))[0]["value"] == found["zeroing@5", place]


@pytest.mark.filterwarnings("ignore::RuntimeWarning:peft", "ignore:fan_in_fan_out")
@pytest.mark.parametrize("family", ["gpt2", "phi3", "mixtral", "gpt_oss"])
def test_swapping_and_merging_restore_other_families_too(tmp_path, family):
    """Conv1D, fused projections, and experts that PEFT wraps once per parameter."""
    from helpers import tiny

    model = tiny.lora(tiny.build(family)).eval()
    model.save_pretrained(tmp_path)
    ids = torch.arange(3, 20)[None]
    base = tiny.build(family)
    with torch.no_grad():
        bare = base(input_ids=ids).logits
        with AdapterSlot(base).adapter(tmp_path) as adapted:
            assert torch.equal(adapted(input_ids=ids).logits, model(input_ids=ids).logits)
        assert torch.equal(base(input_ids=ids).logits, bare)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with merged_weights(model) as layers:
            merged = model(input_ids=ids).logits
        assert layers and torch.allclose(merged, plain, atol=1e-4) and not torch.equal(merged, plain)
        assert torch.equal(model(input_ids=ids).logits, plain)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def change_config(**changes):
    def change(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def set_a_value(value):
    def change(folder):
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / WEIGHTS)
        next(iter(tensors.values()))[0, 0] = value
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return change


def as_pickle(folder):
    torch.save({}, folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def cut(share):
    return lambda folder: os.truncate(folder / WEIGHTS, int(share * (folder / WEIGHTS).stat().st_size))


WEIGHTS = "adapter_model.safetensors"
DAMAGED = {
    "a pickle": (as_pickle, "is a pickle, which can run code"),
    "empty": (cut(0), "is damaged"),
    "half a header": (cut(0.01), "is damaged"),
    "half": (cut(0.5), "is damaged"),
    "no safetensors": (lambda folder: (folder / WEIGHTS).write_bytes(b"x" * 1000), "is damaged"),
    "nan": (set_a_value(math.nan), "not finite"),
    "inf": (set_a_value(-math.inf), "not finite"),
    "a list": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "is not a mapping"),
    "no text": (lambda folder: (folder / "adapter_config.json").write_bytes(b"\xff\xfe{"), "is damaged"),
    "tensors without a layer": (change_config(target_modules=["q_proj"]), "there is no layer for"),
    "a rank of nothing": (change_config(r=0), "does not fit"),
    "a rank of words": (change_config(r="many"), "does not fit"),
    "targets of nothing": (change_config(target_modules=None), "does not fit"),
    "a pattern that is none": (change_config(rank_pattern={"(": 3}), "does not fit"),
    "drawn from the base": (change_config(init_lora_weights="olora"), "init_lora_weights 'olora'"),
    "parts of its own": (change_config(modules_to_save=["lm_head"]), "its file lacks .*lm_head.weight"),
    "tokens of its own": (change_config(trainable_token_indices=[1]), "its file lacks .*trainable_tokens_delta"),
    "layers twice": (change_config(layer_replication=[[0, 1], [0, 1]]), "layer_replication"),
    "code by name": (change_config(megatron_config={"a": 1}, megatron_core="antigravity"), "megatron_config"),
    "a base cut down": (change_config(kasa_config={"beta": 1}), "kasa_config"),
    "after certain tokens only": (change_config(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens"),
    "a setting of the future": (change_config(use_wonders=True), "use_wonders True"),
    "another kind": (change_config(peft_type="IA3"), "peft_type 'IA3'"),
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """A resident base, a good adapter, and the logits of both."""
    base = fix.tiny_llama()
    good, _ = save_adapter(tmp_path_factory.mktemp("adapters") / "good")
    slot, plain = AdapterSlot(base), logits(base)
    with slot.adapter(good) as model:
        return slot, good, plain, logits(model)


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_adapter_is_refused_with_a_reason_and_leaves_no_trace(bench, damage, tmp_path):
    slot, good, plain, adapted = bench
    before = {name: p.clone() for name, p in slot.base.named_parameters()}
    bad = shutil.copytree(good, tmp_path / "bad")
    do, message = DAMAGED[damage]
    do(bad)
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught, slot.adapter(bad):
        pass
    assert str(bad) in str(caught.value)
    assert {name for name, _ in slot.base.named_parameters()} == set(before)
    assert all(torch.equal(p, before[name]) for name, p in slot.base.named_parameters())
    assert torch.equal(logits(slot.base), plain)
    with slot.adapter(good) as model:
        assert torch.equal(logits(model), adapted)


def test_sealed_adapter_must_match_its_manifest(bench, tmp_path):
    """One flipped byte is still a finite number: only a manifest reveals it."""
    slot, good, *_ = bench
    folder = tmp_path / "sealed"
    commit(shutil.copytree(good, tmp_path / "staging"), folder)
    with slot.adapter(folder), AdapterSlot(fix.tiny_llama(), sealed=True).adapter(folder):
        pass
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-4] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum differs"), slot.adapter(folder):
        pass
    (folder / "MANIFEST.json").unlink()
    with slot.adapter(folder):
        pass
    with (
        pytest.raises(CheckpointError, match="no MANIFEST"),
        AdapterSlot(fix.tiny_llama(), sealed=True).adapter(folder),
    ):
        pass

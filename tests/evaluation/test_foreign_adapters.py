"""Adapters as PEFT itself saves them, of every kind: scored as plain PEFT scores them, and gone without a trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import benchmark_fixtures as fix
from helpers import tiny
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from macdrop.errors import ConfigError
from tune.errors import BenchmarkError
from tune.evaluation import merging
from tune.evaluation.adapters import AdapterSlot
from tune.evaluation.merging import merged_weights

pytestmark = pytest.mark.filterwarnings("ignore")
TRAINED = ("lora_B", "lora_embedding_A", "modules_to_save", "trainable_tokens_delta")
IDS = torch.arange(2, 34)[None]
PROJECTIONS = ["q_proj", "v_proj"]

#: What is adapted, and whether the file also holds the embeddings.
KINDS = {
    "dora": ({"use_dora": True}, False),
    "rslora and ranks by layer": (
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        False,
    ),
    "drawn from a gaussian": ({"init_lora_weights": "gaussian"}, False),
    "drawn orthogonal": ({"init_lora_weights": "orthogonal"}, False),
    "the head": ({"target_modules": [*PROJECTIONS, "lm_head"]}, "auto"),
    "the head without its weights": ({"target_modules": [*PROJECTIONS, "lm_head"]}, False),
    "the embedding": ({"target_modules": [*PROJECTIONS, "embed_tokens"]}, "auto"),
    "both": ({"target_modules": [*PROJECTIONS, "embed_tokens", "lm_head"]}, "auto"),
    "embeddings beside it": ({}, True),
    "a head of its own": ({"modules_to_save": ["lm_head"]}, False),
    "an embedding of its own": ({"modules_to_save": ["embed_tokens"]}, False),
    "tokens of its own": ({"trainable_token_indices": [3, 5]}, False),
}


def base(tied: bool, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = fix.tiny_llama(dtype=dtype)
    if tied:
        model.config.tie_word_embeddings = True
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def saved(folder: Path, tied: bool, settings: dict, embeddings: bool | str, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 4, "target_modules": PROJECTIONS, **settings}, task_type="CAUSAL_LM")
    model = get_peft_model(base(tied, dtype), config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(
                part in name for part in ("lora_B", "lora_embedding_A", "modules_to_save", "trainable_tokens_delta")
            ):
                p.add_(torch.randn_like(p) * 0.2)
    model.save_pretrained(folder, save_embedding_layers=embeddings)
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def state(model) -> list[tuple]:
    places = [(n, p) for n, p in model.named_parameters(remove_duplicate=False)]
    return [(name, id(p), p.data_ptr(), p.requires_grad, p.detach().clone()) for name, p in places]


def assert_untouched(model, before: list[tuple]) -> None:
    after = state(model)
    assert [row[:4] for row in after] == [row[:4] for row in before]
    assert all(torch.equal(now[4], then[4]) for now, then in zip(after, before, strict=True))
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_scored_as_plain_peft_scores_it_merged_or_not_and_leaves_no_trace(tmp_path, kind, tied, dtype):
    folder = saved(tmp_path, tied, *KINDS[kind], dtype)
    reference = logits(PeftModel.from_pretrained(base(tied, dtype), folder).eval())
    model = base(tied, dtype)
    before, slot = state(model), AdapterSlot(model)
    with slot.adapter(folder) as adapted:
        assert torch.equal(logits(adapted), reference) and slot.delta > 1e-3
        with merged_weights(adapted) as layers:
            merged = logits(adapted)
        assert layers and torch.equal(logits(adapted), reference)
        if dtype == torch.float32:
            assert torch.allclose(merged, reference, atol=1e-3)
    assert_untouched(model, before)


@pytest.mark.parametrize("tied", [True, False])
def test_other_embeddings_in_the_file_stand_in_for_the_base_s_and_are_told(tmp_path, tied):
    """As after fine-tuning embeddings, or a vocabulary that was made longer before it."""
    folder = saved(tmp_path, tied, *KINDS["the head"])
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    (name,) = [name for name in tensors if name.endswith("lm_head.base_layer.weight")]
    tensors[name] = tensors[name] + 0.1
    save_file(tensors, file, {"format": "pt"})
    reference = logits(PeftModel.from_pretrained(base(tied), folder).eval())
    model = base(tied)
    before, slot = state(model), AdapterSlot(model)
    with slot.adapter(folder) as adapted:
        assert torch.equal(logits(adapted), reference)
        assert "other weights of the base" in slot.notes[-1] and "(258, 32)" in slot.notes[-1]
    assert_untouched(model, before)


@pytest.mark.parametrize("settings", [{"bias": "all"}, {"bias": "lora_only"}])
def test_biases_of_the_base_in_the_file_stand_in_too(tmp_path, settings):
    adapter = get_peft_model(tiny.build("opt"), LoraConfig(r=2, target_modules=PROJECTIONS, **settings))
    with torch.no_grad():
        for p in adapter.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    adapter.save_pretrained(tmp_path)
    model = tiny.build("opt")
    before, slot = state(model), AdapterSlot(model)
    with slot.adapter(tmp_path) as adapted:
        assert torch.equal(logits(adapted), logits(adapter.eval()))
        with merged_weights(adapted):
            assert torch.allclose(logits(adapted), logits(adapter), atol=1e-4)
    assert_untouched(model, before)


def test_a_layer_of_the_decoder_that_is_replaced_whole_is_refused(tmp_path):
    folder = saved(tmp_path, False, {"modules_to_save": ["mlp"]}, False)
    model = base(False)
    before = state(model)
    with pytest.raises(ConfigError, match="replace whole layers"), AdapterSlot(model).adapter(folder):
        pass
    assert_untouched(model, before)


def test_another_base_and_an_adapter_without_effect_are_told(tmp_path):
    folder = saved(tmp_path, False, {}, False)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    model = base(False)
    model.name_or_path = "here/My-Model"
    for name, said in {"org/other-model": 1, "/elsewhere/my-model": 0, "zoo:my-model": 0, None: 0}.items():
        file.write_text(json.dumps({**config, "base_model_name_or_path": name}))
        slot = AdapterSlot(model)
        with slot.adapter(folder):
            assert sum("was made for org/other-model" in note for note in slot.notes) == said
    file.write_text(json.dumps({**config, "lora_alpha": 0}))
    with slot.adapter(folder):
        assert slot.delta == 0 and "changes nothing" in slot.notes[-1]
    with slot.adapter(None):
        assert slot.notes == []


def test_a_merge_that_answers_otherwise_is_no_score(tmp_path, monkeypatch):
    folder = saved(tmp_path, False, {}, False)
    monkeypatch.setattr(merging, "_own", lambda layer: [(layer, n, p) for n, p in layer.named_parameters()])
    model = base(True)
    with AdapterSlot(model).adapter(saved(tmp_path / "head", True, *KINDS["the head"])) as adapted:
        with pytest.raises(BenchmarkError, match="do not answer as base and adapter"), merged_weights(adapted):
            pass
    with AdapterSlot(base(False)).adapter(folder) as adapted, merged_weights(adapted):
        pass

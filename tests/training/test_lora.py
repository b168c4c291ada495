"""The adapter of a spec: the layers it goes on in every kind of model, what it starts as, and what is refused."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import transformers
from helpers.zoo_of_families import FAMILIES, build_family
from torch import nn

from macdrop.errors import ConfigError
from tune.config.run_spec import TrainSpec
from tune.training.lora import add_adapter, left_alone, start, write_config
from tune.training.quiet import quiet_libraries

HYBRID = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "head_dim": 8,
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
}
BY_HAND = {
    "phimoe": ("PhimoeConfig", FAMILIES["mixtral"].settings),
    "falcon_h1": ("FalconH1Config", HYBRID),
    "mamba": ("MambaConfig", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}),
}


def outline(name: str) -> transformers.PreTrainedModel:
    kind, settings = BY_HAND.get(name) or (FAMILIES[name].config, FAMILIES[name].settings)
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings))


def spec(**settings) -> TrainSpec:
    return TrainSpec(model_name_or_path="a/model", **settings)


def targeted(model) -> set[str]:
    names = [*model.targeted_module_names, *model.targeted_parameter_names]
    return {name.removesuffix(".weight").rsplit(".", 1)[-1] for name in names}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ["llama4", "phimoe"])
def test_all_leaves_alone_routers_that_return_several_tensors_and_says_so(family, dora):
    base, wanted = outline(family), spec(use_dora=dora)
    (said,) = left_alone(base, wanted)
    assert "routers" in said and "(router)" in said
    assert "router" not in targeted(add_adapter(base, wanted)) > {"q_proj", "o_proj"}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe"])
def test_all_adapts_fused_experts_but_not_their_router(family):
    base = outline(family)
    (said,) = left_alone(base, spec())
    assert "(gate)" in said
    assert targeted(add_adapter(base, spec())) >= {"gate_up_proj", "down_proj", "q_proj"}
    assert not any("lora_" in name and ".gate." in name for name, _ in base.named_parameters())


def test_a_router_that_is_a_plain_linear_layer_is_known_by_its_name_and_size():
    base = outline("llama")
    base.config.num_local_experts = 4
    base.model.layers[1].mlp.gate = nn.Linear(32, 4, device="meta")
    base.model.layers[1].mlp.shared_expert_gate = nn.Linear(32, 1, device="meta")
    assert "(gate)" in left_alone(base, spec())[0]
    found = targeted(add_adapter(base, spec()))
    assert "gate" not in found and "shared_expert_gate" in found


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_all_has_nothing_to_say_of_a_dense_model(family):
    assert left_alone(outline(family), spec()) == []


@pytest.mark.parametrize("family", ["falcon_h1", "mamba"])
def test_all_leaves_alone_what_mamba_kernels_read_past_the_adapter(family):
    base = outline(family)
    assert "out_proj" in left_alone(base, spec())[0]
    assert "out_proj" not in targeted(add_adapter(base, spec())) > {"in_proj"}
    with pytest.raises(ConfigError, match=r"\['out_proj'\] cannot be put on a/model: the kernels of its Mamba layers"):
        add_adapter(outline(family), spec(lora_target=["out_proj"]))


@pytest.mark.parametrize("family", ["llama4", "mixtral", "qwen3_moe"])
def test_an_adapter_on_experts_trains(family):
    model = add_adapter(build_family(family), spec(lora_rank=2)).train()
    ids = torch.arange(3, 20)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    factors = {name: p for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name}
    assert factors and any(p.grad.any() for p in factors.values())


REFUSED = {
    "dora on fused experts": ("mixtral", {"use_dora": True}, "fused 3-D parameters, which cannot take DoRA"),
    "dropout on fused experts": ("mixtral", {"lora_dropout": 0.1}, "Set lora_dropout to 0"),
    "a router": ("llama4", {"lora_target": ["q_proj", "router"]}, "returns several tensors"),
    "a typo": ("llama", {"lora_target": ["q_projj"]}, "Did you mean 'q_proj'"),
    "half of a fused pair": ("mixtral", {"lora_target": ["w1"]}, "without also targeting w3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_built_is_refused_in_words_without_names_of_peft(case):
    family, settings, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as caught:
        add_adapter(outline(family), spec(**settings))
    assert not any(word in str(caught.value) for word in ("base_layer", "default", "ParamWrapper"))


def test_names_of_experts_before_they_were_fused_are_understood():
    assert "gate_up_proj" in targeted(add_adapter(outline("mixtral"), spec(lora_target=["w1", "w3"])))


def test_of_two_factors_one_is_drawn_and_the_other_zero_as_by_peft():
    names = {"lora_A.default.weight": (4, 32), "lora_B.default.weight": (32, 4)}
    names |= {"lora_embedding_A.default": (4, 64), "lora_embedding_B.default": (32, 4)}
    begun = {name: start(name, shape, torch.Generator().manual_seed(1)) for name, shape in names.items()}
    model = add_adapter(build_family("llama"), spec(lora_rank=4, lora_target=["q_proj", "embed_tokens"]))
    for name, tensor in begun.items():
        theirs = next(p for full, p in model.named_parameters() if full.endswith(name))
        assert bool(theirs.any()) == bool(tensor.any()), name
        assert float(tensor.std()) == pytest.approx(float(theirs.std()), rel=0.2), name
    with pytest.raises(NotImplementedError):
        start("lora_C.default.weight", (4, 4), torch.Generator())


def test_the_configuration_has_no_newer_key_that_says_nothing(tmp_path):
    """What it leaves out is what PEFT has by default, so that it reads the same."""
    from peft import LoraConfig

    config = add_adapter(outline("mixtral"), spec(lora_rank=3)).peft_config["default"]
    write_config(config, tmp_path)
    keys = set(json.loads((tmp_path / "adapter_config.json").read_text()))
    assert {"r", "use_dora", "target_modules", "target_parameters"} <= keys
    assert not keys & {"alora_invocation_tokens", "qalora_group_size", "peft_version", "exclude_modules"}
    read, wanted = LoraConfig.from_pretrained(str(tmp_path)).to_dict(), config.to_dict()
    assert read["inference_mode"] is True
    for key in set(wanted) - {"inference_mode"}:
        assert read[key] == wanted[key] or set(read[key]) == set(wanted[key]), key


def test_an_adapter_on_a_tied_head_is_no_warning_of_a_command():
    with torch.device("meta"):
        config = transformers.LlamaConfig(**FAMILIES["llama"].settings, tie_word_embeddings=True)
        model = transformers.AutoModelForCausalLM.from_config(config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_libraries()
        add_adapter(model, spec(lora_target=["q_proj", "lm_head"]))
    assert [str(warning.message) for warning in caught] == []

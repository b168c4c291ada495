"""Every family that macdrop must know, tiny and random, built from its config class. Used by the tests of this folder.

Hidden size 32, 3 layers, 64 tokens, bos 1. The experts' FFN size is half the hidden size, where (2 * FFN, hidden) is
square and shapes tell stored layouts apart least.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import transformers

HIDDEN, FFN, EXPERT_FFN, LAYERS, VOCAB = 32, 24, 16, 3, 64


@dataclass(frozen=True)
class Family:
    config: str
    kind: str
    path: str  # of the FFN of layer 2
    settings: dict = field(default_factory=dict)
    dense_layers: tuple[int, ...] = ()  # of a mixture of experts: the layers without experts
    shared: str | None = None
    parameters: tuple[str, ...] = ()  # LoRA targets among the 3-D parameters


_BASE = dict(
    vocab_size=VOCAB,
    hidden_size=HIDDEN,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
_LLAMA = dict(_BASE, num_key_value_heads=2, intermediate_size=FFN)
_HEAD = dict(_LLAMA, head_dim=8)
_MOE = dict(_HEAD, intermediate_size=EXPERT_FFN, num_experts_per_tok=2)
_QWEN_MOE = dict(_HEAD, moe_intermediate_size=EXPERT_FFN, num_experts=4, num_experts_per_tok=2)
_MLP = "model.layers.2.mlp"
_EXPERTS = "model.layers.2.mlp.experts"
_FUSED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")

FAMILIES: dict[str, Family] = {
    **{
        name: Family(config, "gated", _MLP, _HEAD)
        for name, config in {
            "mistral": "MistralConfig",
            "qwen2": "Qwen2Config",
            "qwen3": "Qwen3Config",
            "gemma": "GemmaConfig",
            "gemma2": "Gemma2Config",
            "gemma3": "Gemma3TextConfig",
            "olmo": "OlmoConfig",
            "olmo2": "Olmo2Config",
            "cohere": "CohereConfig",
            "stablelm": "StableLmConfig",
            "smollm3": "SmolLM3Config",
            "granite": "GraniteConfig",
        }.items()
    },
    "llama": Family("LlamaConfig", "gated", _MLP, dict(_LLAMA, mlp_bias=True)),
    "phi3": Family("Phi3Config", "fused", _MLP, _LLAMA),
    "glm": Family("GlmConfig", "fused", _MLP, _HEAD),
    "glm4": Family("Glm4Config", "fused", _MLP, _HEAD),
    "opt": Family(
        "OPTConfig",
        "plain",
        "model.decoder.layers.2",
        dict(_BASE, ffn_dim=FFN, word_embed_proj_dim=HIDDEN, dropout=0.0),
    ),
    "gpt_neox": Family("GPTNeoXConfig", "plain", "gpt_neox.layers.2.mlp", dict(_BASE, intermediate_size=FFN)),
    "falcon": Family(
        "FalconConfig", "plain", "transformer.h.2.mlp", dict(_BASE, ffn_hidden_size=FFN, bias=True, alibi=False)
    ),
    "bloom": Family("BloomConfig", "plain", "transformer.h.2.mlp", dict(_BASE, n_layer=LAYERS, n_head=4)),
    "starcoder2": Family("Starcoder2Config", "plain", _MLP, _LLAMA),
    "phi": Family("PhiConfig", "plain", _MLP, _LLAMA),
    "nemotron": Family("NemotronConfig", "plain", _MLP, _HEAD),
    "gptj": Family(
        "GPTJConfig", "plain", "transformer.h.2.mlp", dict(_BASE, n_inner=FFN, n_layer=LAYERS, n_head=4, rotary_dim=4)
    ),
    "gpt2": Family("GPT2Config", "conv1d", "transformer.h.2.mlp", dict(_BASE, n_inner=FFN)),
    "mixtral": Family("MixtralConfig", "experts", _EXPERTS, dict(_MOE, num_local_experts=4), parameters=_FUSED),
    "olmoe": Family("OlmoeConfig", "experts", _EXPERTS, dict(_MOE, num_experts=4), parameters=_FUSED),
    "qwen3_moe": Family(
        "Qwen3MoeConfig",
        "experts",
        _EXPERTS,
        dict(_QWEN_MOE, mlp_only_layers=[0]),
        dense_layers=(0,),
        parameters=_FUSED,
    ),
    "qwen2_moe": Family(
        "Qwen2MoeConfig",
        "experts",
        _EXPERTS,
        dict(_QWEN_MOE, shared_expert_intermediate_size=FFN, mlp_only_layers=[1]),
        dense_layers=(1,),
        shared="model.layers.2.mlp.shared_expert",
        parameters=_FUSED,
    ),
    "gpt_oss": Family(
        "GptOssConfig",
        "experts",
        _EXPERTS,
        dict(
            _MOE,
            num_local_experts=4,
            layer_types=["full_attention"] * LAYERS,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
        parameters=_FUSED,
    ),
    "llama4": Family(
        "Llama4TextConfig",
        "experts",
        "model.layers.2.feed_forward.experts",
        dict(_MOE, num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=FFN, moe_layers=[0, 2]),
        dense_layers=(1,),
        shared="model.layers.2.feed_forward.shared_expert",
        parameters=("feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"),
    ),
}


def build_family(name: str, seed: int = 0, **settings) -> transformers.PreTrainedModel:
    """The model in eval mode, weights and biases random enough for each of them to matter."""
    family = FAMILIES[name]
    torch.manual_seed(seed)
    config = getattr(transformers, family.config)(**{**family.settings, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" not in parameter_name and "ln_" not in parameter_name:
                parameter.normal_(std=0.2)
    return model.eval()


def with_lora(name: str, model: torch.nn.Module) -> torch.nn.Module:
    """The model with a random adapter on all linear layers, or on the experts' parameters where the family has them."""
    from peft import LoraConfig, get_peft_model

    family = FAMILIES[name]
    if family.parameters:
        target = {"target_modules": ["o_proj"], "target_parameters": list(family.parameters)}
    else:
        target = {"target_modules": "all-linear"}
    return get_peft_model(model, LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **target)).eval()


class ExpertList(torch.nn.Module):
    """A Mixtral block whose experts are modules in a list, as code of a checkpoint's own often has them.

    everywhere: every expert runs on every token, and those that are not chosen are added with weight 0.
    """

    def __init__(self, block: torch.nn.Module, everywhere: bool) -> None:
        super().__init__()
        self.gate, self.everywhere = block.gate, everywhere
        fused = block.experts
        self.experts = torch.nn.ModuleList(
            _expert(gate_up.chunk(2), down, fused.act_fn)
            for gate_up, down in zip(fused.gate_up_proj, fused.down_proj, strict=True)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        _, scores, chosen = self.gate(tokens)
        weights = torch.zeros(len(tokens), len(self.experts)).scatter(1, chosen, scores)
        total = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows = weights[:, number] > -1 if self.everywhere else weights[:, number] > 0
            total[rows] += weights[rows, number, None] * expert(tokens[rows])
        return total.view_as(x)


def _expert(inputs, down: torch.Tensor, act: torch.nn.Module) -> torch.nn.Module:
    linears = {"gate_proj": inputs[0], "up_proj": inputs[1], "down_proj": down}
    expert = transformers.models.llama.modeling_llama.LlamaMLP(
        transformers.LlamaConfig(hidden_size=HIDDEN, intermediate_size=len(inputs[0]))
    )
    expert.act_fn = act
    for name, weight in linears.items():
        getattr(expert, name).weight = torch.nn.Parameter(weight.detach().clone())
    return expert


def with_expert_lists(model: torch.nn.Module, *, everywhere: bool = False) -> torch.nn.Module:
    """A Mixtral model with the same weights, its experts in module lists."""
    for layer in model.model.layers:
        layer.mlp = ExpertList(layer.mlp, everywhere)
    return model

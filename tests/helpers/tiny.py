"""Tiny random causal language models of several families, built from their config classes; weights depend on the seed.

All have hidden size 32, 3 layers, FFN size 48 and 64 tokens; id 1 is bos, 2 is eos, 0 is padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers

from macdrop.weights import Confidence, MassiveWeights

VOCAB, HIDDEN, FFN, LAYERS = 64, 32, 48, 3
ROWS = (5, 17, 40, 33, 11)  # taken as massive where a test does not scan
EXPERTS = ("mixtral", "gpt_oss")
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GATED = {**_COMMON, "intermediate_size": FFN, "num_key_value_heads": 2}
# name -> config class, its arguments, module path of the FFN of layer 1, names of the modules LoRA is put on
FAMILIES = {
    "llama": ("LlamaConfig", _GATED, "model.layers.1.mlp"),
    "phi3": ("Phi3Config", _GATED, "model.layers.1.mlp"),
    "opt": (
        "OPTConfig",
        {**_COMMON, "ffn_dim": FFN, "word_embed_proj_dim": HIDDEN, "dropout": 0.0},
        "model.decoder.layers.1",
    ),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCAB,
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": 4,
            "n_positions": 64,
            "n_inner": FFN,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
        "transformer.h.1.mlp",
    ),
    "mixtral": (
        "MixtralConfig",
        {**_GATED, "num_local_experts": 4, "num_experts_per_tok": 2},
        "model.layers.1.mlp.experts",
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            **_GATED,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "layer_types": ["full_attention"] * LAYERS,
        },
        "model.layers.1.mlp.experts",
    ),
}


def build(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    """A model in eval mode whose weights are random enough for every part to matter; those of its FFNs are frozen."""
    config_class, arguments, _ = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**arguments, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.dim() > 1:
                parameter.mul_(4)
            parameter.requires_grad_(not any(part in name for part in ("mlp", "fc1", "fc2")))
    return model.to(dtype).eval()


def massive_weights(family: str = "llama", rows: Sequence[int] = ROWS, **changes) -> MassiveWeights:
    """A scan result that names `rows` of layer 1, in this order, before all others (expert 2 where there are some)."""
    values = {
        "model": family,
        "fingerprint": "0" * 64,
        "layer": 1,
        "path": FAMILIES[family][2],
        "kind": "gated",
        "expert": 2 if family in EXPERTS else None,
        "indices": (*rows, *(i for i in range(FFN) if i not in rows)),
        "magnitudes": tuple(float(FFN - i) for i in range(FFN)),
        "intermediate_size": FFN,
        "hidden_size": HIDDEN,
        "bos_token_id": 1,
        "bos_rule": "bos",
        "layers": (),
        "confidence": Confidence("strong", 1.0, 1.0, 1.0, 1.0, ""),
    }
    return MassiveWeights(**{**values, **changes})


def lora(model: torch.nn.Module, *, seed: int = 1, targets="all-linear", **settings):
    """The model with a LoRA (or DoRA) adapter whose B is not zero, in training mode."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, **settings)
    return get_peft_model(model, config).train()


@torch.no_grad()
def zero_b(model: torch.nn.Module) -> None:
    """Make an adapter one that training starts with: its B is zero."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.zero_()


def batch(seed: int, rows: int = 2, length: int = 12) -> dict[str, torch.Tensor]:
    """Token ids that start with bos, (rows, length), and labels equal to them."""
    ids = torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 1
    return {"input_ids": ids, "labels": ids.clone()}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Words w3 ... w63, with bos put in front of every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCAB))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )

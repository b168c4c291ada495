"""A Llama of 1.2 billion random weights, built from a config without a download: enough to measure speed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from macdrop import MassiveWeights

NAME = "random-llama-1b"
#: Layer of `stand_in`.
LAYER = 1
#: The sizes of Llama-3.2-1B.
SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128_256,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}


def write(folder: Path, tokenizer: str, **sizes: int) -> Path:
    """Write the model in bf16 and the files of a tokenizer into a folder.

    tokenizer: a folder or `zoo:NAME`; its ids must be below the vocabulary's size.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from tune.zoo.catalog import resolve

    torch.manual_seed(0)
    files = AutoTokenizer.from_pretrained(str(resolve(tokenizer)))
    ends = {"bos_token_id": files.bos_token_id, "eos_token_id": files.eos_token_id, "pad_token_id": files.pad_token_id}
    config = LlamaConfig(**SIZES | sizes | ends, dtype=torch.bfloat16)
    if len(files) > config.vocab_size:
        raise ValueError(f"{tokenizer} has {len(files)} tokens, the model {config.vocab_size}")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    files.save_pretrained(folder)
    return folder


def stand_in(config: PreTrainedConfig, model: str) -> MassiveWeights:
    """Return rows of a model's second layer in place of massive weights: a step takes the same time for all rows."""
    from macdrop.weights import Confidence, MassiveWeights

    rows = config.intermediate_size
    return MassiveWeights(
        model=model,
        fingerprint="random",
        layer=LAYER,
        path=f"model.layers.{LAYER}.mlp",
        kind="gated",
        expert=None,
        indices=tuple(range(rows)),
        magnitudes=(1.0,) * rows,
        intermediate_size=rows,
        hidden_size=config.hidden_size,
        bos_token_id=0,
        bos_rule="none",
        layers=(),
        confidence=Confidence("weak", 1.0, 1.0, 1.0, 1.0, "rows of a random model"),
    )

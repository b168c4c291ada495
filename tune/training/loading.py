"""Loading the base model that a spec names."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from macdrop.load import open_model
from tune.config.run_spec import TrainSpec
from tune.zoo.catalog import resolve


def open_base(spec: TrainSpec) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open the base model and tokenizer of a spec, on the CPU and in the precision that the spec trains in.

    Raises:
        ConfigError: there is no such model, or it cannot be used.
    """
    return open_model(
        resolve(spec.model_name_or_path),
        revision=spec.model_revision,
        dtype="bfloat16" if spec.bf16 else "float32",
        attn_implementation=spec.attn_implementation,
        trust_remote_code=spec.trust_remote_code,
    )

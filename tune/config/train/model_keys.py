"""Keys of the base model, and the name of a model in files."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from tune.config.sections import Strict, UserPath


class ModelKeys(Strict):
    """The base model and how it is loaded."""

    model_name_or_path: UserPath = Field(
        description="Base model: a Hub id, folder, GGUF file, or `zoo:NAME`. In a sweep, set `sweep.models` instead."
    )
    model_revision: str | None = Field(
        default=None, description="Branch, tag or commit of a Hub model; `null` is its default branch."
    )
    trust_remote_code: bool = Field(default=False, description="Run Python code that ships with the model.")
    attn_implementation: str | None = Field(
        default=None,
        description=(
            "Attention implementation, as in transformers: `sdpa`, `eager`, `flash_attention_2`; `null` lets "
            "transformers choose."
        ),
    )
    bf16: bool = Field(
        default=False,
        description="Base model and adapter in bfloat16, with fp32 master weights; otherwise everything is fp32.",
    )
    quantization_bit: Literal[4, 8] | None = Field(
        default=None,
        description=(
            "Quantise the linear layers of the base by bitsandbytes (extra `bnb`): `4` (NF4, double quantisation), `8` "
            "(LLM.int8), `null` not at all. Needs `zero_stage` 0, 1 or 2; in a sweep a key of each model."
        ),
    )

    @field_validator("model_name_or_path")
    @classmethod
    def _has_a_name(cls, value: str) -> str:
        """Folders of trials and findings are named after the model."""
        if value and (not slug(value) or slug(value).startswith(".")):
            raise ValueError(
                f"{value!r} gives no name to call the model by: its last part must not be empty or begin with a dot. "
                f"Write the folder's own name, as in ../NAME, or rename it."
            )
        return value


def slug(model_name_or_path: str) -> str:
    """Return the last part of a model's name, made fit for a folder's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", re.split(r"[/:]", model_name_or_path.rstrip("/"))[-1])

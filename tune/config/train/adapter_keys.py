"""Keys of the adapter."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from tune.config.sections import Strict


class AdapterKeys(Strict):
    """The adapter that is trained."""

    finetuning_type: Literal["lora"] = Field(
        default="lora", description="Only `lora` is supported; `use_dora` and `use_rslora` select its variants."
    )
    lora_rank: int = Field(default=16, ge=1, description="Rank r of the adapter.")
    lora_alpha: float = Field(
        default=16.0, gt=0, description="Scales the adapter by alpha / r (with rsLoRA, by alpha / sqrt(r))."
    )
    lora_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Dropout on the adapter's input, at least 0 and below 1."
    )
    lora_target: Literal["all"] | list[str] = Field(
        default="all",
        description=(
            "`all` for every linear layer except embeddings, lm_head and routers of experts, or a list of module names."
        ),
    )
    use_dora: bool = Field(default=False, description="Train DoRA instead of plain LoRA.")
    use_rslora: bool = Field(default=False, description="Scale the adapter as rsLoRA does.")

    @field_validator("lora_target")
    @classmethod
    def _targets(cls, value: str | list[str]) -> str | list[str]:
        if value == []:
            raise ValueError("names no layer; write 'all' or a list of module names such as [q_proj, v_proj]")
        return value

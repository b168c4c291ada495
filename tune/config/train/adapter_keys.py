"""Keys of the adapter."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from tune.config.sections import Strict

InitLoraWeights = Literal[True, "gaussian", "orthogonal"]
_NEEDS_DATA = "it needs passes over the data before training, and gives layers ranks of their own"
_CHANGES_BASE = "it changes the base weights, which are scanned, masked, and shared by other fine-tunings"
#: Values of PEFT that are refused -> why.
REFUSED_INITS = {
    "pissa": _CHANGES_BASE,
    "olora": _CHANGES_BASE,
    "corda": _CHANGES_BASE,
    "loftq": _CHANGES_BASE,
    "lora_ga": _CHANGES_BASE,
    "mica": "it freezes one of the two factors",
    "eva": _NEEDS_DATA,
    "False": "the adapter would change the model before its first step",
}


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
    init_lora_weights: InitLoraWeights = Field(
        default=True,
        description=(
            "Step-0 values of the factors, as in PEFT: `true` (A uniform, B zero), `gaussian` (A normal with deviation "
            "1 / r, B zero) or `orthogonal` (A and B drawn with B A = 0; linear layers and even ranks only)."
        ),
    )

    @field_validator("init_lora_weights", mode="before")
    @classmethod
    def _possible_init(cls, value: Any) -> Any:
        """Say why PEFT's other values are refused."""
        why = REFUSED_INITS.get(str(value).partition("_niter_")[0])
        if why is not None:
            raise ValueError(f"{value!r} is refused: {why}. Choose true, gaussian or orthogonal.")
        return value

    @model_validator(mode="after")
    def _check_init(self) -> AdapterKeys:
        if self.init_lora_weights == "orthogonal" and self.lora_rank % 2:
            raise ValueError(
                f"init_lora_weights: orthogonal needs an even lora_rank, not {self.lora_rank}. "
                "Choose an even one, or another initialisation."
            )
        return self

    @field_validator("lora_target")
    @classmethod
    def _targets(cls, value: str | list[str]) -> str | list[str]:
        if value == []:
            raise ValueError("names no layer; write 'all' or a list of module names such as [q_proj, v_proj]")
        return value

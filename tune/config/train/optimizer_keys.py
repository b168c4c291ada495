"""Keys of the optimizer and of its steps."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tune.config.sections import Strict
from tune.config.train.optimizer_rules import Measured, Optimizer, SlimRule


class OptimizerKeys(Strict):
    """Batches, steps, learning rate and optimizer."""

    per_device_train_batch_size: int = Field(default=8, ge=1, description="Examples per worker and micro-batch.")
    per_device_eval_batch_size: int = Field(
        default=8, ge=1, description="Examples per worker and micro-batch during validation."
    )
    gradient_accumulation_steps: int = Field(default=1, ge=1, description="Micro-batches per optimizer step.")
    packing: Literal["auto", "on", "off"] = Field(
        default="auto",
        description=(
            "Spread the examples of an optimizer step over micro-batches by tokens, each one row without padding in "
            "which no example sees another: `auto` where the model can, `on` refuses a model that cannot, `off` pads."
        ),
    )
    max_tokens_per_micro_batch: int | None = Field(
        default=None,
        ge=2,
        description="Tokens per packed micro-batch at most; `null`: `per_device_train_batch_size` x `cutoff_len`.",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass to save memory."
    )
    num_train_epochs: float = Field(
        default=3.0, gt=0, description="Passes over the training data; ignored if `max_steps` is set."
    )
    max_steps: int | None = Field(
        default=None, ge=1, description="Number of optimizer steps; overrides `num_train_epochs`."
    )
    optimizer: Optimizer = Field(
        default="adamw",
        description=(
            "`adamw` (torch); `slimadam` (AdamW with fewer second moments, see `slimadam_rules`); `adamw_8bit` and "
            "`lion` (bitsandbytes); `muon` (torch 2.9; the adapter's matrices on linear layers, AdamW for the rest); "
            "`schedule_free_adamw` (schedulefree; needs `lr_scheduler_type` `constant` or `constant_with_warmup`). "
            "`slimadam`, `adamw_8bit` and `muon` need `zero_stage: 0`."
        ),
    )
    learning_rate: float = Field(default=1e-4, gt=0, description="Peak learning rate.")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"] = (
        Field(
            default="linear",
            description=(
                "Learning-rate schedule: `linear`, `cosine`, `constant`, `constant_with_warmup`, `polynomial` or "
                "`inverse_sqrt`."
            ),
        )
    )
    warmup_ratio: float = Field(
        default=0.05, ge=0, le=1, description="Fraction of the optimizer steps used for warm-up, from 0 to 1."
    )
    slimadam_rules: Measured | dict[str, SlimRule] | None = Field(
        default=None,
        description=(
            "For `slimadam`: kind of tensor -> what its second moments are means over: `none`, `fan_in`, `fan_out` or "
            "`both`. A kind is a layer and a part of its adapter (`q_proj/A`), or a part alone (`A`, `B`, "
            "`magnitude`); kinds that are not listed are AdamW's. `auto` measures the rules in a short plain "
            "fine-tuning, once for all trials of a model and kind of adapter."
        ),
    )
    loraplus_lr_ratio: float | None = Field(
        default=None,
        ge=1,
        description=(
            "LoRA+: the learning rate of B (except on embeddings) and of DoRA's magnitudes over that of A; `null`, as "
            "1, trains all alike."
        ),
    )
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay.")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="Beta 1 of AdamW and Lion.")
    adam_beta2: float = Field(
        default=0.999, ge=0, lt=1, description="Beta 2 of AdamW and Lion (whose paper uses 0.99)."
    )
    adam_epsilon: float = Field(default=1e-8, gt=0, description="Epsilon of AdamW.")
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="Gradient-norm clipping threshold; `0` disables clipping."
    )
    seed: int = Field(
        default=0, ge=0, lt=2**31, description="Seed of the adapter's initialisation, the data order and the masks."
    )

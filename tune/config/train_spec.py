"""One fine-tuning: its settings, with the flat names of Hugging Face and LLaMA-Factory, and its identity."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from macdrop.schedules import SCHEDULES
from tune.config.messages import build
from tune.config.parse import merge, undot
from tune.config.sections import MacDropSpec
from tune.config.train.adapter_keys import AdapterKeys
from tune.config.train.data_keys import DataKeys, is_weight_key, with_weights
from tune.config.train.model_keys import ModelKeys, slug
from tune.config.train.optimizer_keys import OptimizerKeys
from tune.config.train.optimizer_rules import check_optimizer

#: Keys that decide how an engine is built; tasks that agree on them can share one engine.
ENGINE_KEYS = (
    "model_name_or_path",
    "model_revision",
    "trust_remote_code",
    "attn_implementation",
    "bf16",
    "quantization_bit",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "lora_target",
    "use_dora",
    "use_rslora",
    "optimizer",
    "slimadam_rules",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "max_grad_norm",
    "zero_stage",
    "offload",
)

#: Keys that no bit of an adapter depends on.
WITHOUT_EFFECT = ("logging_steps", "save_steps", "max_dropped_share", "max_skipped_share")
#: Keys that count for a trial's name only where they differ from their defaults: run files without them keep the names.
UNNAMED_DEFAULTS = (
    "bad_rows",
    "system",
    "train_on_roles",
    "early_stopping_patience",
    "init_lora_weights",
    "loraplus_lr_ratio",
    "max_tokens_per_micro_batch",
    "optimizer",
    "packing",
    "quantization_bit",
    "slimadam_rules",
)

#: Keys that say what kind of adapter is trained; arms are compared where these are equal.
CELL_KEYS = ("use_dora", "use_rslora")


# Bases in reverse: pydantic lists the fields of the last one first.
class TrainSpec(OptimizerKeys, DataKeys, AdapterKeys, ModelKeys):
    """One fine-tuning. Every key can be searched by its dotted name, except the model (see `sweep.models`)."""

    zero_stage: Literal[0, 1, 2, 3] = Field(default=2, description="DeepSpeed ZeRO stage: 0, 1, 2 or 3.")
    offload: Literal["none", "cpu"] = Field(
        default="none",
        description=(
            "`cpu` keeps optimizer state (with ZeRO-3 also base weights) in host memory; needs `zero_stage` 1 or "
            "higher."
        ),
    )

    logging_steps: int = Field(default=1, ge=1, description="Optimizer steps between log lines.")
    eval_steps: int | None = Field(
        default=None,
        ge=1,
        description=(
            "Optimizer steps between validations, starting at step 0; `null` validates only after the last step, "
            "which always has a validation."
        ),
    )
    save_steps: int | None = Field(
        default=None,
        ge=0,
        description=(
            "Optimizer steps between resumable checkpoints; `null` is a tenth of the fine-tuning, `0` is none. "
            "Checkpoints of a finished fine-tuning are deleted."
        ),
    )

    early_stopping_patience: int | None = Field(
        default=None,
        ge=1,
        description=(
            "End a fine-tuning once so many validations in a row have not improved on the best, with the adapter of "
            "the last step taken. Validations count once p is at most a tenth of p0; `null` trains to the end."
        ),
    )

    macdrop: MacDropSpec = Field(default=MacDropSpec(), description="Settings of MacDrop itself.")

    @model_validator(mode="after")
    def _check(self) -> TrainSpec:
        if self.offload == "cpu" and self.zero_stage < 1:
            raise ValueError(
                f"offload: cpu needs zero_stage 1, 2 or 3, not {self.zero_stage}. "
                "Set zero_stage to 2, or offload to none."
            )
        if self.quantization_bit is not None and self.zero_stage == 3:
            raise ValueError(
                f"zero_stage: 3 cannot be used with quantization_bit: {self.quantization_bit}, as it partitions "
                "weights that bitsandbytes needs whole. Set zero_stage to 2: a quantised base takes a quarter or half "
                "of the memory on each GPU. Or set quantization_bit to null."
            )
        if self.packing == "off" and self.max_tokens_per_micro_batch is not None:
            raise ValueError(
                f"max_tokens_per_micro_batch: {self.max_tokens_per_micro_batch} has no effect with packing: off. "
                "Set it to null, or packing to auto or on."
            )
        if self.early_stopping_patience is not None and (self.eval_steps is None or self.val_size == 0):
            missing = "eval_steps is not set" if self.eval_steps is None else "val_size is 0"
            raise ValueError(
                f"early_stopping_patience: {self.early_stopping_patience} counts validations while training, and "
                f"{missing}. Set eval_steps (optimizer steps between two validations) and val_size, or "
                "early_stopping_patience to null."
            )
        check_optimizer(self)
        return self

    @property
    def arm(self) -> str:
        """`plain`, `macdrop`, or the placebo arm; see `tune.config.sections.Arm`."""
        return self.macdrop.arm

    def engine_key(self) -> str:
        """Return a key that is equal for specs that one engine can train one after the other."""
        content = {key: getattr(self, key) for key in ENGINE_KEYS}
        return _digest({**content, "loraplus": self.canonical().loraplus_lr_ratio is not None})

    def canonical(self) -> TrainSpec:
        """Return the spec with equal settings written alike (k = 0 and p0 = 0 are one baseline)."""
        roles = sorted(self.train_on_roles)
        ratio = None if self.loraplus_lr_ratio == 1 else self.loraplus_lr_ratio
        same = {"macdrop": self.macdrop.canonical(), "train_on_roles": roles, "loraplus_lr_ratio": ratio}
        return self.model_copy(update=same)

    def trial_id(self) -> str:
        """Return a name made of the canonical content: equal settings are never trained twice."""
        return f"{slug(self.model_name_or_path)}-{self.arm}-{self._identity()}"

    def setting_id(self) -> str:
        """Return 8 hex digits that are equal for fine-tunings that differ in their seed only (replicates)."""
        return self._identity("seed")

    def _identity(self, *without: str) -> str:
        spec = self.canonical()
        unnamed = {key for key in UNNAMED_DEFAULTS if getattr(spec, key) == type(self).model_fields[key].default}
        content = spec.model_dump(mode="json", exclude={*WITHOUT_EFFECT, *unnamed, *without})
        return _digest(content)[:8]


def points(axes: Mapping[str, Iterable[Any]]) -> list[dict[str, Any]]:
    """List every combination of the values of the axes."""
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def with_values(spec: TrainSpec, values: dict[str, Any], *, partial: bool = False) -> TrainSpec:
    """Return `spec` with dotted keys set, validated again.

    A schedule without alpha leaves a searched or configured alpha unused, which lets schedule and alpha be searched
    together; so does an optimizer other than slimadam with its rules. With `partial`, values are checked without their
    companions (exp without alpha is accepted).

    Raises:
        ConfigError: a value is not allowed.
    """
    weights = {key: value for key, value in values.items() if is_weight_key(key)}
    raw = merge(spec.model_dump(), undot({key: value for key, value in values.items() if key not in weights}))
    if weights:
        raw["dataset"] = with_weights(raw["dataset"], weights)
    if values.get("optimizer", "slimadam") != "slimadam":
        raw["slimadam_rules"] = None  # which lets it be searched beside others
    block = raw["macdrop"]
    if isinstance(block["schedule"], str) and block["schedule"] in SCHEDULES:
        if block["schedule"] != "exp":
            unused, block["alpha"] = block["alpha"], None
            if partial and values.get("macdrop.alpha") is not None:
                # The value is for trials with the schedule exp: check it under that.
                block |= {"schedule": "exp", "alpha": unused}
        elif partial and block["alpha"] is None:
            block["alpha"] = 0.05
    return build(TrainSpec, raw)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

"""One fine-tuning: its settings, with the flat names of Hugging Face and LLaMA-Factory, and its identity."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from macdrop.errors import ConfigError
from macdrop.schedules import SCHEDULES
from tune.config.messages import build
from tune.config.parse import merge, undot
from tune.config.sections import MacDropSpec, Strict, Text, UserPath
from tune.config.syntax.yaml_core import brief

#: Keys that decide how an engine is built; tasks that agree on them can share one engine.
ENGINE_KEYS = (
    "model_name_or_path",
    "model_revision",
    "trust_remote_code",
    "attn_implementation",
    "bf16",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "lora_target",
    "use_dora",
    "use_rslora",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "max_grad_norm",
    "zero_stage",
    "offload",
)

#: Keys that no bit of an adapter depends on.
WITHOUT_EFFECT = ("logging_steps", "save_steps", "max_dropped_share")
#: Keys that count for a trial's name only where they differ from their defaults: run files without them keep the names.
UNNAMED_DEFAULTS = ("bad_rows", "packing", "max_tokens_per_micro_batch")

#: Keys that say what kind of adapter is trained; arms are compared where these are equal.
CELL_KEYS = ("use_dora", "use_rslora")


Format = Literal["auto", "alpaca", "sharegpt", "messages", "text"]


class DatasetEntry(Strict):
    """One data set of a list; `format` and `max_samples` are the run's where they are left out."""

    path: UserPath = Field(description="A Hub id, a local file, a folder, a pattern, or `zoo:train`.")
    format: Format | None = Field(default=None, description="Row format; `null` is the run's `format`.")
    split: Text = Field(default="train", description="Split of a Hub data set or a folder.")
    name: Text | None = Field(default=None, description="Configuration of a Hub data set or a folder that has several.")
    max_samples: int | None = Field(
        default=None,
        ge=1,
        description="Maximum number of its examples; `null` is the run's `max_samples`.",
    )

    @model_serializer(mode="wrap")
    def _as_given(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if key in self.model_fields_set}


class TrainSpec(Strict):
    """One fine-tuning. Every key can be searched by its dotted name, except the model (see `sweep.models`)."""

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

    dataset: UserPath | list[UserPath | DatasetEntry] = Field(
        default="zoo:train",
        description=(
            "A Hub id, a local file, a folder, a pattern such as `data/*.jsonl`, or `zoo:train`; or a list of these "
            "or of `{path, format, split, name, max_samples}`."
        ),
    )
    format: Format = Field(
        default="auto",
        description="Row format: `alpaca`, `sharegpt`, `messages` or `text`; `auto` detects it from the columns.",
    )
    template: Literal["auto", "alpaca", "chat"] = Field(
        default="auto",
        description=(
            "Prompt template: `alpaca`, `chat` (the tokenizer's chat template), or `auto` (the chat template if "
            "there is one, else alpaca)."
        ),
    )
    cutoff_len: int = Field(default=1024, ge=2, description="Maximum number of tokens per example.")
    max_dropped_share: float | None = Field(
        default=0.1,
        ge=0,
        le=1,
        description=(
            "Refuse data of which a larger share is dropped, because no answer token is within `cutoff_len`; `null` "
            "never refuses."
        ),
    )
    train_on_prompt: bool = Field(default=False, description="Compute the loss on the prompt as well as the answer.")
    bad_rows: Literal["refuse", "skip"] = Field(
        default="refuse",
        description=(
            "Rows that cannot be trained on as they are written (no question first, tool calls, a text that the chat "
            "template leaves out): `refuse` ends with the first one, `skip` leaves them out and reports their number."
        ),
    )
    val_size: float = Field(
        default=0.05, ge=0, description="Validation split: a fraction if below 1, otherwise a number of examples."
    )
    max_samples: int | None = Field(
        default=None, ge=1, description="Maximum number of examples taken from each data set; `null` takes all."
    )
    data_seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of the validation split.")

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
    weight_decay: float = Field(default=0.0, ge=0, description="Weight decay of AdamW.")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="Beta 1 of AdamW.")
    adam_beta2: float = Field(default=0.999, ge=0, lt=1, description="Beta 2 of AdamW.")
    adam_epsilon: float = Field(default=1e-8, gt=0, description="Epsilon of AdamW.")
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="Gradient-norm clipping threshold; `0` disables clipping."
    )
    seed: int = Field(
        default=0, ge=0, lt=2**31, description="Seed of the adapter's initialisation, the data order and the masks."
    )

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

    macdrop: MacDropSpec = Field(default=MacDropSpec(), description="Settings of MacDrop itself.")

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

    @field_validator("dataset", mode="before")
    @classmethod
    def _entries(cls, value: Any) -> Any:
        """Validate the entries one by one: messages of a union would name all of its branches."""
        if not isinstance(value, list):
            return value
        entries = []
        for number, item in enumerate(value, 1):
            if not isinstance(item, (str, dict, DatasetEntry)):
                raise ValueError(f"entry {number} must be a text or a block of keys, not {brief(item)}")
            try:
                entries.append(build(DatasetEntry, item) if isinstance(item, dict) else item)
            except ConfigError as error:
                raise ConfigError(f"entry {number}: {error}") from None
        return entries

    @field_validator("lora_target")
    @classmethod
    def _targets(cls, value: str | list[str]) -> str | list[str]:
        if value == []:
            raise ValueError("names no layer; write 'all' or a list of module names such as [q_proj, v_proj]")
        return value

    @model_validator(mode="after")
    def _check(self) -> TrainSpec:
        if self.offload == "cpu" and self.zero_stage < 1:
            raise ValueError(
                f"offload: cpu needs zero_stage 1, 2 or 3, not {self.zero_stage}. "
                "Set zero_stage to 2, or offload to none."
            )
        if self.packing == "off" and self.max_tokens_per_micro_batch is not None:
            raise ValueError(
                f"max_tokens_per_micro_batch: {self.max_tokens_per_micro_batch} has no effect with packing: off. "
                "Set it to null, or packing to auto or on."
            )
        return self

    @property
    def arm(self) -> str:
        """`plain`, `macdrop`, or the placebo arm; see `tune.config.sections.Arm`."""
        return self.macdrop.arm

    def engine_key(self) -> str:
        """Return a key that is equal for specs that one engine can train one after the other."""
        return _digest({key: getattr(self, key) for key in ENGINE_KEYS})

    def canonical(self) -> TrainSpec:
        """Return the spec with MacDrop settings that have no effect normalised (k = 0 and p0 = 0 are one baseline)."""
        return self.model_copy(update={"macdrop": self.macdrop.canonical()})

    def trial_id(self) -> str:
        """Return a name made of the canonical content: equal settings are never trained twice."""
        return f"{slug(self.model_name_or_path)}-{self.arm}-{self._identity()}"

    def setting_id(self) -> str:
        """Return 8 hex digits that are equal for fine-tunings that differ in their seed only (replicates)."""
        return self._identity("seed")

    def _identity(self, *without: str) -> str:
        unnamed = {key for key in UNNAMED_DEFAULTS if getattr(self, key) == type(self).model_fields[key].default}
        content = self.canonical().model_dump(mode="json", exclude={*WITHOUT_EFFECT, *unnamed, *without})
        return _digest(content)[:8]


def slug(model_name_or_path: str) -> str:
    """Return the last part of a model's name, made fit for a folder's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", re.split(r"[/:]", model_name_or_path.rstrip("/"))[-1])


def points(axes: Mapping[str, Iterable[Any]]) -> list[dict[str, Any]]:
    """List every combination of the values of the axes."""
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def with_values(spec: TrainSpec, values: dict[str, Any], *, partial: bool = False) -> TrainSpec:
    """Return `spec` with dotted keys set, validated again.

    A schedule without alpha leaves a searched or configured alpha unused, which lets schedule and alpha be searched
    together. With `partial`, values are checked without their companions (exp without alpha is accepted).

    Raises:
        ConfigError: a value is not allowed.
    """
    raw = merge(spec.model_dump(), undot(values))
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

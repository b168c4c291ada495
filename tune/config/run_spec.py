"""What a user may write: one YAML file plus `key=value` overrides, validated before anything starts.

`TrainSpec` describes one fine-tuning with the flat names of Hugging Face and LLaMA-Factory. `RunSpec` adds the blocks
`sweep`, `eval` and `ray`. Unknown keys are refused with the nearest known name; no value is ever repaired.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from macdrop.errors import ConfigError, nearest
from macdrop.schedules import SCHEDULES
from tune.config.eval_spec import EvalSpec
from tune.config.messages import ELSEWHERE, build
from tune.config.objectives import check_apart, check_early_stops, check_metrics
from tune.config.parse import merge, normalise, override, read_override, read_yaml, undot
from tune.config.sections import MacDropSpec, Metric, RaySpec, Space, SweepSpec
from tune.config.strict import Strict

__all__ = [
    "CELL_KEYS",
    "ENGINE_KEYS",
    "MacDropSpec",
    "Metric",
    "RaySpec",
    "RunSpec",
    "Space",
    "SweepSpec",
    "TrainSpec",
    "dump",
    "load",
    "slug",
    "with_values",
]

#: Keys that decide how an engine is built; two orders that agree on them can share one engine.
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

#: Keys that say what kind of adapter is trained; arms are compared where these are equal.
CELL_KEYS = ("use_dora", "use_rslora")


class TrainSpec(Strict):
    """One fine-tuning. Every field may be searched by its dotted name, but for the model (see `sweep.models`)."""

    model_name_or_path: str
    model_revision: str | None = None
    trust_remote_code: bool = False
    attn_implementation: str | None = None
    bf16: bool = False

    finetuning_type: Literal["lora"] = "lora"
    lora_rank: int = Field(16, ge=1)
    lora_alpha: float = Field(16.0, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    lora_target: Literal["all"] | list[str] = "all"
    use_dora: bool = False
    use_rslora: bool = False

    dataset: str | list[str | dict[str, Any]] = "zoo:train"
    format: Literal["auto", "alpaca", "sharegpt", "messages", "text"] = "auto"
    template: Literal["auto", "alpaca", "chat"] = "auto"
    cutoff_len: int = Field(1024, ge=2)
    train_on_prompt: bool = False
    val_size: float = Field(0.05, ge=0)
    max_samples: int | None = Field(None, ge=1)
    data_seed: int = Field(0, ge=0, lt=2**31)

    per_device_train_batch_size: int = Field(8, ge=1)
    per_device_eval_batch_size: int = Field(8, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    gradient_checkpointing: bool = False
    num_train_epochs: float = Field(3.0, gt=0)
    max_steps: int | None = Field(None, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"] = (
        "linear"
    )
    warmup_ratio: float = Field(0.05, ge=0, le=1)
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, ge=0)
    seed: int = Field(0, ge=0, lt=2**31)

    zero_stage: Literal[0, 1, 2, 3] = 2
    offload: Literal["none", "cpu"] = "none"

    logging_steps: int = Field(1, ge=1)
    eval_steps: int | None = Field(None, ge=1)
    save_steps: int | None = Field(None, ge=0)

    macdrop: MacDropSpec = MacDropSpec()

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
        return self

    @property
    def arm(self) -> str:
        """`plain` (nothing is ever dropped), `macdrop`, or one of its placebos; see `tune.config.sections.ARMS`."""
        return self.macdrop.arm

    def engine_key(self) -> str:
        """Equal for two specs that one engine can train one after the other."""
        return _digest({key: getattr(self, key) for key in ENGINE_KEYS})

    def canonical(self) -> TrainSpec:
        """The same fine-tuning with MacDrop's irrelevant settings normalised (k = 0 and p0 = 0 are one baseline)."""
        return self.model_copy(update={"macdrop": self.macdrop.canonical()})

    def trial_id(self) -> str:
        """A name for this fine-tuning made of its canonical content: equal settings are never trained twice."""
        return f"{slug(self.model_name_or_path)}-{self.arm}-{self._identity()}"

    def setting_id(self) -> str:
        """Equal for fine-tunings that differ in nothing but their seed: replicates of one setting; 8 hex digits."""
        return self._identity("seed")

    def _identity(self, *without: str) -> str:
        content = self.canonical().model_dump(mode="json", exclude={"logging_steps", "save_steps", *without})
        return _digest(content)[:8]


def slug(model_name_or_path: str) -> str:
    """The last part of a model's name, fit for a folder's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", re.split(r"[/:]", model_name_or_path.rstrip("/"))[-1])


#: Keys that say what the base model is; another value is another model, to be listed under sweep.models.
MODEL_KEYS = ("model_name_or_path", "model_revision", "trust_remote_code")
#: Keys of which single values may be fine and their combination not.
COUPLED_KEYS = ("zero_stage", "offload")


class RunSpec(TrainSpec):
    """A whole run: the flat keys are the defaults of every trial.

    `eval` are the test benchmarks, for the base and the final stage; `validation`, of the same shape, is scored in the
    search and may be its objective.
    """

    model_name_or_path: str = ""
    output_dir: str | None = None
    report_to: list[Literal["tensorboard", "wandb", "mlflow"]] = []
    sweep: SweepSpec = SweepSpec()
    eval: EvalSpec = EvalSpec()
    validation: EvalSpec = EvalSpec()
    ray: RaySpec = RaySpec()

    @field_validator("report_to", mode="before")
    @classmethod
    def _trackers(cls, value: Any) -> Any:
        """As in transformers, one name and `none` may stand for a list."""
        return ([] if value == "none" else [value]) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_run(self) -> RunSpec:
        if self.model_name_or_path and self.sweep.models:
            raise ValueError(
                "both model_name_or_path and sweep.models are given. Write one of them; to run a recipe on another "
                f"model: sweep.models=[{self.model_name_or_path}]"
            )
        if not self.model_name_or_path and not self.sweep.models:
            raise ValueError(
                "there is no model. Give model_name_or_path (one) or sweep.models (a list): a hub id, a folder, or "
                "zoo:planted-llama"
            )
        for key in self.sweep.parameters:
            _check_searchable(key)
        studies = self.studies()
        for study in studies:
            _check_space(study, self.sweep.parameters)
        check_apart(self.eval, self.validation)
        check_metrics(self.sweep, self.eval, self.validation)
        check_early_stops(self.sweep, [study.eval_steps for study in studies])
        return self

    def studies(self) -> list[TrainSpec]:
        """One fine-tuning spec per model: the flat keys with that model's own overrides."""
        flat = {name: getattr(self, name) for name in TrainSpec.model_fields}
        flat["macdrop"] = self.macdrop.model_dump()
        if not self.sweep.models:
            return [build(TrainSpec, flat)]
        return [self._study(flat, number, entry) for number, entry in enumerate(self.sweep.models, 1)]

    def _study(self, flat: dict[str, Any], number: int, entry: dict[str, Any]) -> TrainSpec:
        entry = undot(entry)
        where = f"sweep.models, entry {number} ({entry.get('model_name_or_path')})"
        if not entry.get("model_name_or_path"):
            raise ConfigError(f"{where}: model_name_or_path is missing.")
        for key in sorted(set(entry) & (set(RunSpec.model_fields) - set(TrainSpec.model_fields))):
            raise ConfigError(f"{where}: {key} is for the whole run; write it outside of sweep.models.")
        try:
            return build(TrainSpec, merge(flat, entry))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None


def _check_searchable(key: str) -> None:
    fixed = {*MODEL_KEYS, "finetuning_type", "macdrop", "seed"}
    allowed = [name for name in TrainSpec.model_fields if name not in fixed]
    allowed += [f"macdrop.{name}" for name in MacDropSpec.model_fields if name != "scope"]
    if key in allowed:
        return
    if key in MODEL_KEYS:
        raise ValueError(
            f"sweep.parameters: {key} belongs to the model. List models, each with its own keys, under sweep.models."
        )
    hint = f" {ELSEWHERE[key]}" if key in ELSEWHERE else nearest(key, allowed)
    raise ValueError(f"sweep.parameters: {key!r} is no key that can be searched.{hint}")


def _check_space(study: TrainSpec, parameters: dict[str, Space]) -> None:
    """Refuse a value, or a combination of values, that the search could draw and that is not allowed."""
    for key, space in parameters.items():
        for value in space.bounds():
            try:
                with_values(study, {key: value}, partial=True)
            except ConfigError as error:
                whole = space.values is None and space.distribution != "int_uniform" and "whole number" in str(error)
                remedy = " Write distribution: int_uniform." if whole else ""
                raise ValueError(f"sweep.parameters.{key}: {error}{remedy}") from None
    coupled = {key: parameters[key].bounds() for key in COUPLED_KEYS if key in parameters}
    for point in points(coupled):
        try:
            with_values(study, point, partial=True)
        except ConfigError as error:
            raise ValueError(f"sweep.parameters would draw {point}: {error}") from None
    schedules = [study.macdrop.schedule]
    if "macdrop.schedule" in parameters:
        schedules = parameters["macdrop.schedule"].bounds()
    if "macdrop.alpha" in parameters:
        if "exp" not in schedules:
            raise ValueError(
                f"sweep.parameters.macdrop.alpha has no effect: of the schedules only exp has an alpha, and the search "
                f"has {', '.join(schedules)}. Leave alpha out, or add exp to macdrop.schedule."
            )
    elif "exp" in schedules and study.macdrop.alpha is None:
        raise ValueError(
            "sweep.parameters.macdrop.schedule has exp, which needs an alpha. Search it as well: "
            "macdrop.alpha: [0.01, 0.05, 0.1] (the paper's values; the other schedules leave it unused)."
        )


def points(axes: dict[str, Iterable[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values of the axes."""
    return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]


def with_values(spec: TrainSpec, values: dict[str, Any], *, partial: bool = False) -> TrainSpec:
    """Return `spec` with dotted keys set, validated anew.

    A schedule without alpha leaves a searched or configured alpha unused, so that schedule and alpha can be searched
    side by side; with `partial` a missing companion (exp without alpha) is not held against one value alone.

    Raises:
        ConfigError: a value is not allowed.
    """
    raw = merge(spec.model_dump(), undot(values))
    block = raw["macdrop"]
    if isinstance(block["schedule"], str) and block["schedule"] in SCHEDULES:
        if block["schedule"] != "exp":
            unused, block["alpha"] = block["alpha"], None
            if partial and values.get("macdrop.alpha") is not None:
                # The value is for trials with the schedule exp: look at it with that.
                block |= {"schedule": "exp", "alpha": unused}
        elif partial and block["alpha"] is None:
            block["alpha"] = 0.05
    return build(TrainSpec, raw)


def load(
    path: str | Path | None,
    overrides: Iterable[str] = (),
    kind: type[TrainSpec] = RunSpec,
    replace: dict[str, Any] | None = None,
) -> Any:
    """Read a YAML file, apply `key=value` overrides in their order, then the dotted keys of `replace`, and validate.

    Keys may be dotted, and have other tools' names (`tune.config.parse.ALIASES`). An override replaces what was there.

    Raises:
        ConfigError: the file is missing or no YAML mapping, a key is unknown or given twice, a value is not allowed.
    """
    raw: dict[str, Any] = {} if path is None else normalise(read_yaml(Path(path)))
    given = [read_override(text) for text in overrides]
    for key, value in [*given, *(replace or {}).items()]:
        raw = override(raw, key, value)
    return build(kind, raw)


def dump(spec: BaseModel) -> dict[str, Any]:
    """Plain data that `load` reads back."""
    content = spec.model_dump(mode="json")
    if content.get("model_name_or_path") == "":  # a run whose models are listed under sweep
        del content["model_name_or_path"]
    return content


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

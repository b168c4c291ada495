"""What a user may write: one YAML file plus `key=value` overrides, validated before anything starts.

`TrainSpec` describes one fine-tuning with the flat names of Hugging Face and LLaMA-Factory. `RunSpec` adds the blocks
`sweep`, `eval` and `ray`. Unknown keys are refused with the nearest known name; no value is ever repaired.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from macdrop.config import MacDropConfig
from macdrop.errors import ConfigError, nearest
from macdrop.schedules import SCHEDULES
from tune.benchmarks.spec import EvalSpec

#: Names of other tools for the same thing, accepted and translated (Axolotl, PEFT, TRL, LLaMA-Factory, Ray).
ALIASES = {
    "base_model": "model_name_or_path",
    "model": "model_name_or_path",
    "datasets": "dataset",
    "dataset_name": "dataset",
    "sequence_len": "cutoff_len",
    "max_length": "cutoff_len",
    "max_seq_length": "cutoff_len",
    "train_on_inputs": "train_on_prompt",
    "lora_r": "lora_rank",
    "lora_target_modules": "lora_target",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "micro_batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
    "lr_scheduler": "lr_scheduler_type",
    "val_set_size": "val_size",
    "ray_num_workers": "ray.num_workers",
}

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


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class MacDropSpec(_Strict):
    """The block `macdrop:`; p0 = 0 or k = 0 means plain fine-tuning."""

    k: int = 5
    p0: float = 0.8
    schedule: str = "step"
    alpha: float | None = None

    @model_validator(mode="after")
    def _check(self) -> MacDropSpec:
        self.config(seed=0)
        return self

    def config(self, seed: int) -> MacDropConfig:
        """The method's own configuration, in canonical form."""
        return MacDropConfig(k=self.k, p0=self.p0, schedule=self.schedule, alpha=self.alpha, seed=seed).canonical()


class TrainSpec(_Strict):
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

    dataset: str | list[dict[str, Any]] = "zoo:train"
    format: Literal["auto", "alpaca", "sharegpt", "messages", "text"] = "auto"
    template: Literal["auto", "alpaca", "chat"] = "auto"
    cutoff_len: int = Field(1024, ge=2)
    train_on_prompt: bool = False
    val_size: float = Field(0.05, ge=0)
    max_samples: int | None = Field(None, ge=1)
    data_seed: int = 0

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
    seed: int = 0

    zero_stage: Literal[0, 1, 2, 3] = 2
    offload: Literal["none", "cpu"] = "none"

    logging_steps: int = Field(1, ge=1)
    eval_steps: int | None = Field(None, ge=1)
    save_steps: int | None = Field(None, ge=1)

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
        """`macdrop` or `plain` (no row is ever dropped)."""
        return "macdrop" if self.macdrop.config(seed=0).enabled else "plain"

    def engine_key(self) -> str:
        """Equal for two specs that one engine can train one after the other."""
        return _digest({key: getattr(self, key) for key in ENGINE_KEYS})

    def canonical(self) -> TrainSpec:
        """The same fine-tuning with MacDrop's irrelevant settings normalised (k = 0 and p0 = 0 are one baseline)."""
        config = self.macdrop.config(seed=0)
        block = MacDropSpec(k=config.k, p0=config.p0, schedule=config.schedule, alpha=config.alpha)
        return self.model_copy(update={"macdrop": block})

    def trial_id(self) -> str:
        """A name for this fine-tuning made of its canonical content: equal settings are never trained twice."""
        content = self.canonical().model_dump(mode="json")
        for how_often in ("logging_steps", "save_steps"):
            content.pop(how_often)
        return f"{slug(self.model_name_or_path)}-{self.arm}-{_digest(content)[:8]}"


def slug(model_name_or_path: str) -> str:
    """The last part of a model's name, fit for a folder's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", re.split(r"[/:]", model_name_or_path.rstrip("/"))[-1])


class Space(_Strict):
    """One searched key: a list of values, or a range with a distribution (the shape of W&B sweeps)."""

    values: list[Any] | None = None
    min: float | None = None
    max: float | None = None
    distribution: Literal["uniform", "log_uniform", "int_uniform"] = "uniform"

    @model_validator(mode="before")
    @classmethod
    def _bare_list(cls, value: Any) -> Any:
        return {"values": value} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _check(self) -> Space:
        if self.values is not None:
            if self.min is not None or self.max is not None:
                raise ValueError("has both values and min/max; write one of them")
            if not self.values:
                raise ValueError("has an empty list of values")
            return self
        if self.min is None or self.max is None:
            raise ValueError("needs a list of values, or min and max")
        if not self.min < self.max:
            raise ValueError(f"needs min < max, not {self.min} and {self.max}")
        if self.distribution == "log_uniform" and self.min <= 0:
            raise ValueError(f"log_uniform needs min > 0, not {self.min}")
        return self

    def bounds(self) -> list[Any]:
        """Values that must be valid for the whole space to be valid."""
        if self.values is not None:
            return self.values
        cast = int if self.distribution == "int_uniform" else float
        return [cast(self.min), cast(self.max)]


class Metric(_Strict):
    """What a search optimises: `eval_loss` (validation loss, masks off) or a score `benchmark/task/metric[@attack]`."""

    name: str = "eval_loss"
    goal: Literal["minimize", "maximize"] = "minimize"


class SweepSpec(_Strict):
    """The block `sweep:`."""

    models: list[dict[str, Any]] = []
    arms: list[Literal["base", "plain", "macdrop"]] = ["base", "plain", "macdrop"]
    parameters: dict[str, Space] = {}
    metric: Metric = Metric()
    search_alg: Literal["grid", "random", "optuna"] = "grid"
    search_seed: int = 0
    scheduler: Literal["none", "asha"] = "none"
    grace_period: int = Field(1, ge=1)
    reduction_factor: int = Field(4, ge=2)
    num_samples: int = Field(8, ge=1)
    max_concurrent_trials: int = Field(4, ge=1)
    time_budget_s: float | None = Field(None, gt=0)

    @field_validator("models", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        entries = value if isinstance(value, list) else [value]
        return [{"model_name_or_path": entry} if isinstance(entry, str) else entry for entry in entries]

    @model_validator(mode="after")
    def _check(self) -> SweepSpec:
        if not self.arms:
            raise ValueError("arms is empty; allowed: base, plain, macdrop")
        if self.search_alg == "grid":
            ranges = [key for key, space in self.parameters.items() if space.values is None]
            if ranges:
                raise ValueError(
                    f"a grid needs lists of values, but {', '.join(ranges)} has min and max. "
                    "Write a list, or set search_alg to random or optuna."
                )
        return self


class RaySpec(_Strict):
    """The block `ray:`; resources are per worker or actor. `None` for GPUs means: 1 if the cluster has any, else 0."""

    address: str | None = None
    num_workers: int = Field(1, ge=1)
    lanes: int = Field(1, ge=1)
    evaluators: int = Field(1, ge=1)
    cpus_per_worker: float = Field(1.0, ge=0)
    gpus_per_worker: float | None = Field(None, ge=0)
    cpus_per_evaluator: float = Field(0.0, ge=0)
    gpus_per_evaluator: float | None = Field(None, ge=0)
    resource_timeout_s: float = Field(120.0, gt=0)
    threads_per_worker: int = Field(1, ge=1)
    dashboard: bool = True


class RunSpec(TrainSpec):
    """A whole run: the flat keys are the defaults of every trial."""

    model_name_or_path: str = ""
    output_dir: str | None = None
    sweep: SweepSpec = SweepSpec()
    eval: EvalSpec = EvalSpec()
    ray: RaySpec = RaySpec()

    @model_validator(mode="after")
    def _check_models(self) -> RunSpec:
        if bool(self.model_name_or_path) == bool(self.sweep.models):
            raise ValueError(
                "needs model_name_or_path (one model) or sweep.models (a list), "
                + ("and not both" if self.model_name_or_path else "and has neither")
            )
        for key in self.sweep.parameters:
            self._check_searchable(key)
        for study in self.studies():
            for key, space in self.sweep.parameters.items():
                for value in space.bounds():
                    try:
                        with_values(study, {key: value}, partial=True)
                    except ConfigError as error:
                        raise ValueError(f"sweep.parameters.{key}: {error}") from None
        return self

    def _check_searchable(self, key: str) -> None:
        fixed = {"model_name_or_path", "finetuning_type"}
        allowed = [name for name in TrainSpec.model_fields if name not in fixed | {"macdrop"}]
        allowed += [f"macdrop.{name}" for name in MacDropSpec.model_fields]
        if key in allowed:
            return
        remedy = " Models are listed under sweep.models." if key in ("model_name_or_path", "models") else ""
        raise ValueError(f"sweep.parameters: {key!r} is no key that can be searched.{nearest(key, allowed)}{remedy}")

    def studies(self) -> list[TrainSpec]:
        """One fine-tuning spec per model: the flat keys with that model's own overrides."""
        flat = {name: getattr(self, name) for name in TrainSpec.model_fields}
        flat["macdrop"] = self.macdrop.model_dump()
        if not self.sweep.models:
            return [_build(TrainSpec, flat)]
        return [_build(TrainSpec, _merge(flat, _undot(entry))) for entry in self.sweep.models]


def with_values(spec: TrainSpec, values: dict[str, Any], *, partial: bool = False) -> TrainSpec:
    """Return `spec` with dotted keys set, validated anew.

    A schedule without alpha leaves a searched or configured alpha unused, so that schedule and alpha can be searched
    side by side; with `partial` a missing companion (exp without alpha) is not held against one value alone.

    Raises:
        ConfigError: a value is not allowed.
    """
    raw = _merge(spec.model_dump(), _undot(values))
    block = raw["macdrop"]
    if block["schedule"] in SCHEDULES:
        if block["schedule"] != "exp":
            block["alpha"] = None
        elif partial and block["alpha"] is None:
            block["alpha"] = 0.05
    return _build(TrainSpec, raw)


def load(path: str | Path | None, overrides: list[str] | None = None, kind: type[TrainSpec] = RunSpec) -> Any:
    """Read a YAML file, apply `key=value` overrides, validate.

    Raises:
        ConfigError: the file is missing or no YAML mapping, a key is unknown, a value is not allowed.
    """
    raw: dict[str, Any] = {}
    if path is not None:
        raw = _read_yaml(Path(path))
    for override in overrides or []:
        key, sign, value = override.partition("=")
        if not sign or not key:
            raise ConfigError(f"{override!r} is no override. Write key=value, for example learning_rate=1e-4.")
        raw = _merge(raw, _undot({key.lstrip("-").replace("-", "_"): yaml.safe_load(value)}))
    return _build(kind, _rename(raw))


def dump(spec: BaseModel) -> dict[str, Any]:
    """Plain data that `load` reads back."""
    return spec.model_dump(mode="json")


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(
            f"{path} is no file. Give the path of a run's YAML file; `macdrop sweep --recipes` lists ours."
        )
    try:
        raw = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold keys and values, for example\n  model_name_or_path: zoo:planted-llama")
    return raw


def _rename(raw: dict[str, Any]) -> dict[str, Any]:
    renamed = dict(raw)
    for alias, name in ALIASES.items():
        if alias not in renamed:
            continue
        if name in renamed:
            raise ConfigError(f"{alias} and {name} mean the same; write only {name}.")
        renamed = _merge(renamed, _undot({name: renamed.pop(alias)}))
    return renamed


def _undot(values: dict[str, Any]) -> dict[str, Any]:
    """{'a.b': 1} -> {'a': {'b': 1}}; the searched keys under sweep.parameters keep their dots."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        head, dot, rest = key.partition(".")
        if dot and key.startswith("sweep.parameters."):
            nested: Any = {"parameters": {key.removeprefix("sweep.parameters."): value}}
            result = _merge(result, {"sweep": nested})
        elif dot:
            result = _merge(result, {head: _undot({rest: value})})
        else:
            result = _merge(result, {key: value})
    return result


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _build(kind: type[BaseModel], raw: dict[str, Any]) -> Any:
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(kind, item) for item in error.errors())) from None


def _explain(kind: type[BaseModel], item: dict[str, Any]) -> str:
    """One line for one pydantic error: what, the value, what is allowed, the nearest name."""
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        allowed = _fields_at(kind, item["loc"][:-1])
        known = f" Allowed: {', '.join(sorted(allowed))}." if 0 < len(allowed) <= 12 else ""
        return f"{where} is no key we know.{nearest(str(item['loc'][-1]), [*allowed, *ALIASES])}{known}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: {message[0].lower()}{message[1:]}, not {item['input']!r}."


def _fields_at(kind: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    for part in location:
        field = kind.model_fields.get(part) if isinstance(part, str) else None
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        kind = field.annotation
    return list(kind.model_fields)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

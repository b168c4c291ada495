"""The whole run file: one YAML file plus `key=value` overrides, validated before anything starts.

`RunSpec` adds the blocks `sweep`, `eval`, `validation` and `ray` to the flat keys of one fine-tuning
(`tune.config.train_spec`). Unknown keys are refused with the nearest known name; no value is ever repaired.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from macdrop.errors import ConfigError, nearest
from tune.config.eval_spec import NO_ATTACK, EvalSpec
from tune.config.messages import ELSEWHERE, build
from tune.config.objectives import check_apart, check_early_stops, check_metrics
from tune.config.parse import merge, normalise, override, read_override, read_yaml, undot
from tune.config.recipes import RECIPES
from tune.config.sections import Location, MacDropSpec, RaySpec, RemoteUrl, UserPath
from tune.config.sweep_spec import Metric, Space, SweepSpec
from tune.config.train.data_keys import is_weight_key
from tune.config.train.model_keys import slug
from tune.config.train_spec import CELL_KEYS, ENGINE_KEYS, TrainSpec, points, with_values

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
    "points",
    "slug",
    "values_of",
    "with_values",
]

#: Keys that say what the base model is; another value is another model, to be listed under sweep.models.
MODEL_KEYS = ("model_name_or_path", "model_revision", "trust_remote_code", "quantization_bit")
#: Keys of the block `ray` that a model in sweep.models may have of its own.
MODEL_RAY_KEYS = (
    *("num_workers", "lanes", "cpus_per_worker", "gpus_per_worker"),
    *("evaluators", "cpus_per_evaluator", "gpus_per_evaluator", "threads_per_worker"),
)
#: Keys whose values may be valid alone and invalid together.
COUPLED_KEYS = (
    "zero_stage",
    "offload",
    "packing",
    "max_tokens_per_micro_batch",
    "early_stopping_patience",
    "eval_steps",
    "val_size",
    "train_on_prompt",
    "train_on_roles",
    "system",
    "optimizer",
    "lr_scheduler_type",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "use_dora",
    "lora_target",
    "init_lora_weights",
    "lora_rank",
)


class RunSpec(TrainSpec):
    """A whole run; its flat keys are the defaults of every trial."""

    model_name_or_path: UserPath = Field(
        default="",
        description="Base model: a Hub id, folder, GGUF file, or `zoo:NAME`. In a sweep, set `sweep.models` instead.",
    )
    output_dir: Location | None = Field(default=None, description="The run folder; `null` is `runs/NAME-TIME`.")
    report_to: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(
        default=[],
        description="Trackers that receive every trial: `tensorboard`, `wandb`, `mlflow`; a name, a list, or `none`.",
    )
    sync_to: RemoteUrl | None = Field(
        default=None,
        description=(
            "Where a sweep is copied while it runs: `s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX` or `file:///FOLDER`; "
            "`--resume` restores it from there."
        ),
    )
    sweep: SweepSpec = Field(default=SweepSpec(), description="What is searched, compared and repeated on fresh seeds.")
    eval: EvalSpec = Field(
        default=EvalSpec(), description="Test benchmarks, scored for the base model and in the final stage."
    )
    validation: EvalSpec = Field(
        default=EvalSpec(),
        description=(
            "Benchmarks scored during the search only, in the same form as `eval`; `sweep.metric` may name them."
        ),
    )
    ray: RaySpec = Field(default=RaySpec(), description="Workers and resources.")

    @field_validator("report_to", mode="before")
    @classmethod
    def _trackers(cls, value: Any) -> Any:
        """Accept one name or `none` in place of a list, as in transformers."""
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
                "no model is given. Write model_name_or_path (one) or sweep.models (a list): a Hub id, a folder, or "
                "zoo:planted-llama"
            )
        for key in self.sweep.parameters:
            _check_searchable(key)
        studies = self.studies()
        self.rays()
        for study in studies:
            _check_space(study, self.sweep.parameters)
        for study in studies:
            check_merging(study, self.eval, "eval")
            check_merging(study, self.validation, "validation")
        check_apart(self.eval, self.validation)
        check_metrics(self.sweep, self.eval, self.validation)
        for block in (self.eval, self.validation):
            _check_served(block, studies, self.sweep.parameters)
        check_early_stops(self.sweep, [study.eval_steps for study in studies])
        return self

    def studies(self) -> list[TrainSpec]:
        """Return one fine-tuning spec per model: the flat keys with that model's own overrides."""
        flat = {name: getattr(self, name) for name in TrainSpec.model_fields}
        flat["macdrop"] = self.macdrop.model_dump()
        if not self.sweep.models:
            return [build(TrainSpec, flat)]
        return [self._study(flat, number, entry) for number, entry in enumerate(self.sweep.models, 1)]

    def rays(self) -> list[RaySpec]:
        """Return the lanes and evaluation actors of each model: the block `ray` with that model's own overrides."""
        if not self.sweep.models:
            return [self.ray]
        return [self._ray(number, entry) for number, entry in enumerate(self.sweep.models, 1)]

    def _ray(self, number: int, entry: dict[str, Any]) -> RaySpec:
        own = undot(entry).get("ray", {})
        where = f"sweep.models, entry {number} ({entry.get('model_name_or_path')})"
        if not isinstance(own, dict):
            raise ConfigError(f"{where}: ray must be a mapping of {', '.join(MODEL_RAY_KEYS)}, not {own!r}.")
        for key in own:
            if key in RaySpec.model_fields and key not in MODEL_RAY_KEYS:
                raise ConfigError(f"{where}: ray.{key} is for the whole run; write it outside of sweep.models.")
        try:
            return build(RaySpec, {**self.ray.model_dump(), **own})
        except ConfigError as error:
            raise ConfigError(f"{where}: ray: {error}") from None

    def _study(self, flat: dict[str, Any], number: int, entry: dict[str, Any]) -> TrainSpec:
        entry = {key: value for key, value in undot(entry).items() if key != "ray"}
        where = f"sweep.models, entry {number} ({entry.get('model_name_or_path')})"
        if not entry.get("model_name_or_path"):
            raise ConfigError(f"{where}: model_name_or_path is missing.")
        for key in sorted(set(entry) & (set(RunSpec.model_fields) - set(TrainSpec.model_fields))):
            raise ConfigError(f"{where}: {key} is for the whole run; write it outside of sweep.models.")
        try:
            return build(TrainSpec, merge(flat, entry))
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None


def check_merging(spec: TrainSpec, block: EvalSpec, name: str) -> None:
    """Refuse attacks on the merged rows of a quantised base: merging would quantise them again, to another model.

    name: of the block, for the message.
    """
    if spec.quantization_bit is None or block.attack_on == "base" or all(each == NO_ATTACK for each in block.attacks):
        return
    raise ConfigError(
        f"{name}.attack_on: {block.attack_on} needs a base that is not quantised, and {spec.model_name_or_path} has "
        f"quantization_bit: {spec.quantization_bit}: rows with an adapter merged into them would have to be quantised "
        "again, and be others. Set attack_on to base, or quantization_bit to null."
    )


def searchable() -> list[str]:
    """List the dotted keys that `sweep.parameters` may have."""
    fixed = {
        *MODEL_KEYS,
        "finetuning_type",
        "macdrop",
        "seed",
        "max_dropped_share",
        "max_skipped_share",
        "slimadam_rules",
    }
    flat = [name for name in TrainSpec.model_fields if name not in fixed]
    return flat + [f"macdrop.{name}" for name in MacDropSpec.model_fields if name != "scope"]


def values_of(spec: TrainSpec, parameters: Mapping[str, Space], key: str) -> list[Any]:
    """Return the values that a dotted key may take: those searched (of a range its ends), else the spec's own."""
    if key in parameters:
        return parameters[key].bounds()
    value: Any = spec
    for part in key.split("."):
        value = value[int(part)] if isinstance(value, list) else getattr(value, part)
    return [value]


def _check_served(block: EvalSpec, studies: list[TrainSpec], parameters: Mapping[str, Space]) -> None:
    """Refuse adapters that the generation server of a block cannot load."""
    server = block.generation_server
    if server is None or server.adapters == "named":
        return
    if any(True in values_of(study, parameters, "use_dora") for study in studies):
        raise ValueError(
            f"generation_server.adapters is {server.adapters!r}, which loads LoRA and no DoRA, and use_dora is true "
            "for some trials. Leave generation_server out, or serve merged models by name (adapters: named)"
        )


def _check_searchable(key: str) -> None:
    allowed = searchable()
    if key in allowed or is_weight_key(key):
        return
    if key in MODEL_KEYS:
        raise ValueError(
            f"sweep.parameters: {key} belongs to the model. List models, each with its own keys, under sweep.models."
        )
    hint = f" {ELSEWHERE[key]}" if key in ELSEWHERE else nearest(key, allowed)
    raise ValueError(f"sweep.parameters: {key!r} cannot be searched.{hint}")


def _check_space(study: TrainSpec, parameters: dict[str, Space]) -> None:
    """Refuse a space from which the search could draw a value, or a combination of values, that is not allowed."""
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


def load(
    path: str | Path | Mapping[str, Any] | None,
    overrides: Iterable[str] = (),
    kind: type[TrainSpec] = RunSpec,
    replace: dict[str, Any] | None = None,
) -> Any:
    """Read a YAML file, apply `key=value` overrides in their order, then the dotted keys of `replace`, and validate.

    path: or what a file would hold. Keys may be dotted, and have other tools' names (`tune.config.parse.ALIASES`). An
    override replaces what was there.

    Raises:
        ConfigError: the file is missing or not a YAML mapping, a key is unknown or given twice, a value is not allowed.
    """
    content = {} if path is None else dict(path) if isinstance(path, Mapping) else read_yaml(Path(path))
    raw: dict[str, Any] = normalise(content)
    given = [read_override(text) for text in overrides]
    for key, value in [*given, *(replace or {}).items()]:
        raw = override(raw, key, value)
    spec = build(kind, raw)
    return _with_code_paths(spec, path) if isinstance(spec, RunSpec) else spec


def _with_code_paths(spec: RunSpec, file: str | Path | Mapping[str, Any] | None) -> RunSpec:
    """Name the folder of the run file where metrics of the user's own have no other; the current one without a file."""
    named_file = Path(file) if isinstance(file, str | Path) else None
    beside = named_file is not None and named_file.parent != RECIPES
    folder = str(named_file.parent.absolute() if named_file and beside else Path.cwd())
    blocks = {name: getattr(spec, name) for name in ("eval", "validation")}
    named = {
        name: block.model_copy(update={"code_path": folder})
        for name, block in blocks.items()
        if block.own_metrics and block.code_path is None
    }
    return spec.model_copy(update=named) if named else spec


def dump(spec: BaseModel) -> dict[str, Any]:
    """Return plain data that `load` reads back."""
    content = spec.model_dump(mode="json")
    if content.get("model_name_or_path") == "":  # a run whose models are listed under sweep
        del content["model_name_or_path"]
    return content

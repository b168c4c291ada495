"""The block `sweep:` of a run file: models, arms, search space, objectives, early stops."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_serializer, field_validator, model_serializer, model_validator

from macdrop.errors import nearest
from macdrop.schedules import DECAYED
from tune.config.sections import ARMS, EVAL_LOSS, Arm, Strict, placebos
from tune.config.syntax.user_paths import expand_path
from tune.config.syntax.yaml_core import brief


class Space(Strict):
    """One searched key: a list of values, or a range with a distribution (the shape of W&B sweeps)."""

    values: list[Any] | None = Field(default=None, description="List of values; a bare list is shorthand for this.")
    min: float | None = Field(default=None, description="Lower bound of a range.")
    max: float | None = Field(default=None, description="Upper bound of a range.")
    distribution: Literal["uniform", "log_uniform", "int_uniform"] = Field(
        default="uniform", description="Distribution over the range: `uniform`, `log_uniform` or `int_uniform`."
    )

    @model_validator(mode="before")
    @classmethod
    def _bare_list(cls, value: Any) -> Any:
        if isinstance(value, list):
            return {"values": value}
        if not isinstance(value, (dict, Space)):
            raise ValueError(f"must be a list of values, or a block with min and max, not {brief(value)}")
        return value

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
            raise ValueError(f"needs min < max, not {self.min:g} and {self.max:g}")
        if self.distribution == "log_uniform" and self.min <= 0:
            raise ValueError(f"log_uniform needs min > 0, not {self.min:g}")
        if self.distribution == "int_uniform" and (self.min % 1 or self.max % 1):
            raise ValueError(f"int_uniform needs whole numbers, not {self.min:g} and {self.max:g}")
        return self

    @model_serializer
    def _short(self) -> Any:
        if self.values is not None:
            return self.values
        return {"min": self.min, "max": self.max, "distribution": self.distribution}

    def bounds(self) -> list[Any]:
        """Return the values that must be valid for the whole space to be valid."""
        if self.values is not None:
            return self.values
        assert self.min is not None and self.max is not None, "checked when the space was made"
        cast = int if self.distribution == "int_uniform" else float
        return [cast(self.min), cast(self.max)]


class Metric(Strict):
    """An objective: `eval_loss` (validation loss, masks off) or a score `benchmark/task/metric[@attack]`.

    Scores come from the block `validation:`; the test benchmarks of `eval:` take no part in selection.
    """

    name: str = Field(
        default=EVAL_LOSS,
        description=(
            "Search objective: `eval_loss` (validation loss), or a score of the `validation` block written "
            "`benchmark/task/metric`, with `@attack` for a score under attack. With `optuna`, `sweep.metric` may "
            "also be a list of `{name, goal}`."
        ),
    )
    goal: Literal["minimize", "maximize"] = Field(default="minimize", description="`minimize` or `maximize`.")


def _known_arm(arm: str) -> str:
    known = [Arm.BASE.value, Arm.PLAIN.value, *ARMS]
    if arm not in known:
        raise ValueError(f"unknown arm {arm!r}.{nearest(arm, known)} Allowed: {', '.join(known)}.")
    return arm


class SweepSpec(Strict):
    """The block `sweep:`.

    The search selects `finalists` MacDrop settings, and the plain setting of each kind of adapter, by `metric`: one
    objective, or several (then the settings of the non-dominated front that are best by the first). These settings and
    the placebo arms are trained again on `seeds` fresh seeds and scored on the test benchmarks; with `seeds: 0` the
    search's own trials are scored. `time_budget_s` limits the searches of all models together; the final stage always
    runs. A scheduler compares validation losses, and never before p has fallen to `decayed` times p0.
    """

    models: list[dict[str, Any]] = Field(
        default=[],
        description=(
            "Models to study, each a name or a mapping of `model_name_or_path` and the keys that differ for it, of "
            "the block `ray` those for lanes and evaluation actors: `{model_name_or_path: ..., ray: {num_workers: 8}}`."
        ),
    )
    arms: list[Annotated[str, AfterValidator(_known_arm)]] = Field(
        default=[Arm.BASE.value, Arm.PLAIN.value, Arm.MACDROP.value],
        description=(
            "What is compared: `base`, `plain`, `macdrop` and the placebos `random_rows`, `all_rows`, "
            "`activations`, which use the settings of the best MacDrop trial."
        ),
    )
    parameters: dict[str, Space] = Field(
        default={}, description="Searched keys by dotted name; each has a list of values, or the mapping below."
    )
    metric: list[Metric] = Field(
        default=[Metric()], description="Search objective; with `optuna` also a list of objectives, for a Pareto front."
    )
    finalists: int = Field(
        default=1,
        ge=1,
        description=(
            "Number of best MacDrop settings per adapter type that advance from the search to the final stage."
        ),
    )
    seeds: int = Field(
        default=3,
        ge=0,
        description=(
            "Number of fresh seeds (`seed` + 1, ...) on which plain, finalists and placebos are trained and "
            "compared; `0` compares the search's own trials instead."
        ),
    )
    search_alg: Literal["grid", "random", "optuna"] = Field(
        default="grid", description="Search algorithm: `grid`, `random` or `optuna` (TPE)."
    )
    search_seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of the search algorithm.")
    scheduler: Literal["none", "asha", "hyperband", "median"] = Field(
        default="none",
        description=(
            "Stops poor trials early by their validation loss: `asha`, `hyperband` (ASHA in several brackets, which "
            "begin to stop trials at different steps) or `median` (worse than the median of the others' means); "
            "`none` runs every trial to the end."
        ),
    )
    grace_period: int = Field(
        default=1, ge=1, description="Minimum number of optimizer steps before a scheduler may stop a trial."
    )
    reduction_factor: int = Field(
        default=4, ge=2, description="`asha` and `hyperband` keep one in this many trials at each rung."
    )
    decayed: float = Field(
        default=DECAYED,
        gt=0,
        lt=1,
        description="A scheduler never stops a trial before its p has fallen to this fraction of p0.",
    )
    num_samples: int = Field(
        default=8,
        ge=1,
        description="MacDrop trials drawn per model by `random` and `optuna`; a grid runs all its points.",
    )
    max_concurrent_trials: int = Field(
        default=4, ge=1, description="Maximum number of trials submitted to the lanes at once."
    )
    max_concurrent_models: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        default=1,
        description=(
            "Maximum number of models under way at once; `auto` starts the next one when a lane is idle and its "
            "evaluation actors fit."
        ),
    )
    time_budget_s: float | None = Field(
        default=None,
        gt=0,
        description=(
            "Time limit in seconds for the searches of all models together, carried over by `--resume`; `null` is "
            "unlimited. The final stage always runs."
        ),
    )

    @field_validator("models", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        entries = value if isinstance(value, list) else [value]
        entries = [{"model_name_or_path": entry} if isinstance(entry, str) else entry for entry in entries]
        named = [entry.get("model_name_or_path") if isinstance(entry, dict) else None for entry in entries]
        pairs = zip(entries, named, strict=True)
        return [e | {"model_name_or_path": expand_path(n)} if isinstance(n, str) else e for e, n in pairs]

    @field_validator("metric", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return value if isinstance(value, list) else [value]

    @field_serializer("metric")
    def _as_written(self, metric: list[Metric]) -> Any:
        written = [each.model_dump() for each in metric]
        return written[0] if len(written) == 1 else written

    @model_validator(mode="after")
    def _check(self) -> SweepSpec:
        self._check_arms()
        self._check_metrics()
        factor = type(self).model_fields["reduction_factor"].default
        if self.scheduler == "median" and self.reduction_factor != factor:
            raise ValueError(
                f"reduction_factor {self.reduction_factor} has no effect with scheduler median, which has no rungs. "
                "Leave it out, or set scheduler to asha or hyperband."
            )
        if self.time_budget_s is not None and self.max_concurrent_models != 1:
            raise ValueError(
                f"max_concurrent_models {self.max_concurrent_models} cannot be combined with time_budget_s: a search "
                "would spend its time waiting for the lanes of another model. Set max_concurrent_models to 1, or "
                "time_budget_s to null."
            )
        if self.search_alg == "grid":
            ranges = [key for key, space in self.parameters.items() if space.values is None]
            if ranges:
                raise ValueError(
                    f"a grid needs lists of values, but {', '.join(ranges)} has min and max. "
                    "Write a list, or set search_alg to random or optuna."
                )
        elif not self.parameters and "macdrop" in self.arms:
            raise ValueError(
                f"search_alg {self.search_alg} has nothing to draw: parameters is empty.\n"
                "List what to search, for example macdrop.p0: {min: 0.2, max: 1.0}, or set search_alg to grid."
            )
        return self

    def _check_arms(self) -> None:
        if not self.arms:
            raise ValueError("arms is empty; allowed: base, plain, macdrop")
        listed = [arm for arm in self.arms if arm in placebos()]
        if listed and Arm.MACDROP not in self.arms:
            raise ValueError(
                f"arms has {', '.join(listed)}, which take k, p0 and schedule from the best MacDrop setting, but no "
                "macdrop. Add macdrop to sweep.arms."
            )

    def _check_metrics(self) -> None:
        names = [metric.name for metric in self.metric]
        if not names:
            raise ValueError(f"metric is an empty list; leave it out for {EVAL_LOSS}")
        if len(set(names)) < len(names):
            raise ValueError(f"metric lists {max(names, key=names.count)} more than once")
        if len(names) > 1 and self.search_alg != "optuna":
            raise ValueError(
                f"metric lists {len(names)} objectives, which only optuna searches, and search_alg is "
                f"{self.search_alg}. Set search_alg to optuna, or write one metric."
            )

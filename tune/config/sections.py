"""The blocks `macdrop:`, `sweep:` and `ray:` of a run file; `eval:` is in `tune.config.eval_spec`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    Field,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)

from macdrop.config import MacDropConfig
from tune.config.strict import Strict

#: The arm, and the trial name, of an untrained model's scores.
BASE = "base"
#: Arms in which something is dropped -> what.
ARMS = {"macdrop": "massive", "random_rows": "random", "all_rows": "all", "activations": "activations"}
#: Those that drop something else than massive weights, with the settings of the best MacDrop trial.
PLACEBOS = tuple(arm for arm in ARMS if arm != "macdrop")


class MacDropSpec(Strict):
    """The block `macdrop:`; p0 = 0 or k = 0 means plain fine-tuning."""

    k: int = 5
    p0: float = 0.8
    schedule: str = "step"
    alpha: float | None = None
    scope: str = "massive"

    @model_validator(mode="after")
    def _check(self) -> MacDropSpec:
        self.config(seed=0)
        return self

    def config(self, seed: int) -> MacDropConfig:
        """The method's own configuration, in canonical form."""
        return MacDropConfig(**self.model_dump(), seed=seed).canonical()

    def canonical(self) -> MacDropSpec:
        """The same with what has no effect normalised."""
        config = self.config(seed=0)
        return MacDropSpec(**{name: getattr(config, name) for name in type(self).model_fields})

    @property
    def arm(self) -> str:
        """`plain` (nothing is ever dropped), `macdrop`, or the placebo that this is."""
        scopes = {scope: arm for arm, scope in ARMS.items()}
        return scopes[self.scope] if self.config(seed=0).enabled else "plain"


#: The validation loss with masks off, the metric that every trial has.
EVAL_LOSS = "eval_loss"


class Space(Strict):
    """One searched key: a list of values, or a range with a distribution (the shape of W&B sweeps)."""

    values: list[Any] | None = None
    min: float | None = None
    max: float | None = None
    distribution: Literal["uniform", "log_uniform", "int_uniform"] = "uniform"

    @model_validator(mode="before")
    @classmethod
    def _bare_list(cls, value: Any) -> Any:
        if isinstance(value, list):
            return {"values": value}
        if not isinstance(value, (dict, Space)):
            raise ValueError(f"must be a list of values, or a block with min and max, not {value!r}")
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
        """Values that must be valid for the whole space to be valid."""
        if self.values is not None:
            return self.values
        cast = int if self.distribution == "int_uniform" else float
        return [cast(self.min), cast(self.max)]


class Metric(Strict):
    """What a search optimises: `eval_loss` (validation loss, masks off) or a score `benchmark/task/metric[@attack]`.

    Scores are those of the block `validation:`; the test benchmarks of `eval:` select nothing.
    """

    name: str = EVAL_LOSS
    goal: Literal["minimize", "maximize"] = "minimize"


class SweepSpec(Strict):
    """The block `sweep:`.

    A search selects `finalists` MacDrop settings and the plain setting of each kind of adapter by `metric` (one, or
    several: then those of the non-dominated front that are best by the first). On `seeds` fresh seeds these and the
    placebos among `arms` are trained once more, and scored on the test benchmarks; with `seeds: 0` the search's own
    trials are. `time_budget_s` is for the searches of all models together: the final stage always runs.
    ASHA cuts on the validation loss, and not before p has fallen to `decayed` times p0.
    """

    models: list[dict[str, Any]] = []
    arms: list[Literal["base", "plain", "macdrop", "random_rows", "all_rows", "activations"]] = [
        *("base", "plain", "macdrop")
    ]
    parameters: dict[str, Space] = {}
    metric: list[Metric] = [Metric()]
    finalists: int = Field(1, ge=1)
    seeds: int = Field(3, ge=0)
    search_alg: Literal["grid", "random", "optuna"] = "grid"
    search_seed: int = Field(0, ge=0, lt=2**31)
    scheduler: Literal["none", "asha"] = "none"
    grace_period: int = Field(1, ge=1)
    reduction_factor: int = Field(4, ge=2)
    decayed: float = Field(0.1, gt=0, lt=1)
    num_samples: int = Field(8, ge=1)
    max_concurrent_trials: int = Field(4, ge=1)
    time_budget_s: float | None = Field(None, gt=0)

    @field_validator("models", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        entries = value if isinstance(value, list) else [value]
        return [{"model_name_or_path": entry} if isinstance(entry, str) else entry for entry in entries]

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
        placebos = [arm for arm in self.arms if arm in PLACEBOS]
        if placebos and "macdrop" not in self.arms:
            raise ValueError(
                f"arms has {', '.join(placebos)}, which take k, p0 and schedule from the best MacDrop setting, but no "
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


class RaySpec(Strict):
    """The block `ray:`; resources are per worker or actor. `None` for GPUs means: 1 if the cluster has any, else 0."""

    address: str | None = None
    num_workers: int = Field(1, ge=1)
    lanes: int = Field(1, ge=1)
    evaluators: int = Field(1, ge=1)
    cpus_per_worker: float = Field(1.0, ge=0)
    gpus_per_worker: float | None = Field(None, ge=0)
    cpus_per_evaluator: float = Field(0.0, ge=0)
    gpus_per_evaluator: float | None = Field(None, ge=0)
    resource_timeout_s: float | None = Field(None, gt=0)
    step_timeout_s: float = Field(1800.0, gt=0)
    threads_per_worker: int = Field(1, ge=1)
    dashboard: bool = True

    @property
    def patience_s(self) -> float:
        """`resource_timeout_s`; without it a cluster gets the time in which it replaces a machine that was lost."""
        return self.resource_timeout_s or (120.0 if self.address is None else 3600.0)

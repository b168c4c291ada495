"""The strict base of every model of the configuration, the arms of a sweep, and the blocks `macdrop:` and `ray:`."""

from __future__ import annotations

import dataclasses
import re
from enum import StrEnum
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from macdrop.config import SCOPES, MacDropConfig
from tune.config.syntax.remote_urls import check_url
from tune.config.syntax.user_paths import expand_path

#: The validation loss with masks off, the metric that every trial has.
EVAL_LOSS = "eval_loss"

#: A text that is not empty.
Text = Annotated[str, Field(min_length=1)]


def shown(value: str) -> str:
    """Return a name or path as it is.

    Raises:
        ValueError: it has characters that cannot be seen: no file system or terminal is safe with all of them.
    """
    hidden = [character for character in value if not character.isprintable()]
    if hidden:
        raise ValueError(f"{value!r:.80} has the control character {hidden[0]!r}; leave it out")
    return value


#: A path, or a name that may be one (of a model, a data set); ``~`` is expanded here, and nowhere else.
UserPath = Annotated[str, AfterValidator(shown), AfterValidator(expand_path)]
#: The same, and never empty.
Location = Annotated[UserPath, Field(min_length=1)]
#: An address of an object store or folder, without secrets.
RemoteUrl = Annotated[str, AfterValidator(shown), AfterValidator(check_url)]


class Strict(BaseModel):
    """A model without unknown keys, in which no value of another type passes: true is not 1, "8" is not 8."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=(), validate_default=True
    )


class Arm(StrEnum):
    """Arms that a sweep compares; further placebo arms are registered by `register_placebo`."""

    #: The untrained model; also the trial name of its scores.
    BASE = "base"
    #: Fine-tuning in which nothing is dropped.
    PLAIN = "plain"
    MACDROP = "macdrop"
    RANDOM_ROWS = "random_rows"
    ALL_ROWS = "all_rows"
    ACTIVATIONS = "activations"


BASE = Arm.BASE.value
#: Arms in which something is dropped -> what: a name of `macdrop.config.SCOPES`. All but the first are placebos.
ARMS: dict[str, str] = {Arm.MACDROP.value: "massive"}


def placebos() -> list[str]:
    """List the arms that drop something other than massive weights, with the settings of the best MacDrop trial."""
    return [arm for arm in ARMS if arm != Arm.MACDROP]


def register_placebo(arm: str, scope: str) -> None:
    """Register an arm that drops `scope`, one of `SCOPES`; every process that plans, trains or reports has to do it.

    Raises:
        ValueError: the scope is unknown, or the arm's name is taken or cannot be part of a folder's name.
    """
    if scope not in SCOPES:
        raise ValueError(f"unknown scope {scope!r}; add it to macdrop.config.SCOPES first")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", arm) or arm in (Arm.BASE, Arm.PLAIN, *ARMS):
        raise ValueError(f"{arm!r} cannot name an arm: use letters a to z, digits and _, and a name that is not taken")
    ARMS[arm] = scope


register_placebo(Arm.RANDOM_ROWS.value, "random")
register_placebo(Arm.ALL_ROWS.value, "all")
register_placebo(Arm.ACTIVATIONS.value, "activations")

#: Defaults of the block `macdrop:`, stated once, by the method.
_DEFAULTS: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(MacDropConfig)}


class MacDropSpec(Strict):
    """The block `macdrop:`; p0 = 0 or k = 0 means plain fine-tuning."""

    k: int = Field(
        default=_DEFAULTS["k"], description="Number of massive rows masked per matrix; `0` is plain fine-tuning."
    )
    p0: float = Field(
        default=_DEFAULTS["p0"],
        description="Drop probability at the start of training, from 0 to 1; `0` is plain fine-tuning.",
    )
    schedule: str = Field(
        default=_DEFAULTS["schedule"],
        description=(
            "Decay of p over T steps or E epochs: `step` p0(1 - t/T), `epoch_before` p0(1 - (e-1)/E), `epoch_after`"
            " p0(1 - e/E) (always 0 in a one-epoch run), `exp` p0 exp(-alpha t), `constant`."
        ),
    )
    alpha: float | None = Field(
        default=_DEFAULTS["alpha"],
        description="Decay rate per optimizer step; required by `exp`, refused by the other schedules.",
    )
    scope: str = Field(
        default=_DEFAULTS["scope"],
        description=(
            "What `macdrop train` drops: `massive` rows, or a placebo: `random` rows of the same layer, `all` of "
            "its rows, or `activations` (ordinary dropout on its intermediate state). In a sweep, use `sweep.arms`."
        ),
    )

    @model_validator(mode="after")
    def _check(self) -> MacDropSpec:
        self.config(seed=0)
        return self

    def config(self, seed: int) -> MacDropConfig:
        """Return the method's own configuration, in canonical form."""
        return MacDropConfig(**self.model_dump(), seed=seed).canonical()

    def canonical(self) -> MacDropSpec:
        """Return the block with settings that have no effect normalised."""
        config = self.config(seed=0)
        return MacDropSpec(**{name: getattr(config, name) for name in type(self).model_fields})

    @property
    def arm(self) -> str:
        """`plain` (nothing is ever dropped), `macdrop`, or the placebo arm."""
        scopes = {scope: arm for arm, scope in ARMS.items()}
        return scopes[self.scope] if self.config(seed=0).enabled else Arm.PLAIN.value


class RaySpec(Strict):
    """The block `ray:`; resources are per worker or actor."""

    address: str | None = Field(
        default=None, description="`auto`, or the address of a running cluster; `null` starts Ray on this machine."
    )
    num_workers: int = Field(
        default=1, ge=1, description="Data-parallel workers per lane; a resumed run may have others."
    )
    lanes: int = Field(default=1, ge=1, description="Number of lanes that train at the same time.")
    evaluators: int = Field(default=1, ge=1, description="Number of evaluation actors.")
    cpus_per_worker: float = Field(default=1.0, ge=0, description="CPUs reserved per worker.")
    gpus_per_worker: float | None = Field(
        default=None, ge=0, description="GPUs reserved per worker; `null` is 1 if the cluster has any, else 0."
    )
    cpus_per_evaluator: float = Field(default=0.0, ge=0, description="CPUs reserved per evaluation actor.")
    gpus_per_evaluator: float | None = Field(
        default=None,
        ge=0,
        description="GPUs reserved per evaluation actor; `null` is 1 if the cluster has any, else 0.",
    )
    resource_timeout_s: float | None = Field(
        default=None,
        gt=0,
        description=(
            "Seconds to wait for resources before giving up with exit code 3; `null` is 600 on this machine, "
            "where processes may start slowly, and 3600 on a cluster, which may need to replace machines."
        ),
    )
    step_timeout_s: float = Field(
        default=1800.0,
        gt=0,
        description=(
            "Seconds without a finished micro-step (worker) or a new forward pass (evaluation or judge actor) after"
            " which the process writes its stacks and is restarted."
        ),
    )
    threads_per_worker: int = Field(default=1, ge=1, description="torch threads per worker.")
    dashboard: bool = Field(default=True, description="Start Ray's web dashboard.")

    @property
    def patience_s(self) -> float:
        """Seconds to wait for resources; by default longer on a cluster, which may have to replace a lost machine."""
        return self.resource_timeout_s or (600.0 if self.address is None else 3600.0)

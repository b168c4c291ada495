"""Plan of a run, worked out before anything starts: studies, stages, arms, trials, resources. Pure; no Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from macdrop.errors import ConfigError
from tune.config.eval_spec import jobs
from tune.config.run_spec import (
    CELL_KEYS,
    MacDropSpec,
    RaySpec,
    RunSpec,
    Space,
    TrainSpec,
    points,
    slug,
    values_of,
    with_values,
)
from tune.config.sections import Arm, placebos
from tune.config.train.optimizer_rules import SlimRule
from tune.scheduling.resources import check_local
from tune.storage.states import Stage
from tune.training.optimizers.snr_record import KIND_KEYS, STEPS, is_auto, with_rules


@dataclass(frozen=True)
class Study:
    """One model's part of a run: a search on validation data, then the comparison of what it selects.

    `spec` is the default fine-tuning; `plain` the baselines, one for each distinct setting of the keys that are not
    MacDrop's; `trials` the searched values (dotted keys) of a grid, None when a searcher draws them from `parameters`.
    `twins` plain adapters at most are added for finalists whose other keys no baseline has (see `selection`).
    Without `search` there is one setting of each arm and cell, and nothing to select. `seeds` are those of the final
    stage, of each cell of which the plain adapter, at most `finalists` MacDrop settings and the `placebos` are trained.
    `ray` are the model's own lanes and evaluation actors.
    """

    name: str
    spec: TrainSpec
    base: bool
    plain: tuple[TrainSpec, ...]
    trials: tuple[dict[str, Any], ...] | None
    samples: int
    parameters: dict[str, Space]
    twins: int
    search: bool
    seeds: tuple[int, ...]
    finalists: int
    placebos: tuple[str, ...]
    cells: int
    ray: RaySpec
    #: SlimAdam's rules by kind of adapter, once they are measured.
    rules: Mapping[str, dict[str, SlimRule]] = field(default_factory=dict)

    def searched(self, values: dict[str, Any]) -> TrainSpec:
        """The canonical fine-tuning for a point of the search space."""
        return with_rules(with_values(self.spec, values).canonical(), self.rules)

    @property
    def unruled(self) -> tuple[TrainSpec, ...]:
        """Return a fine-tuning of each kind of adapter that needs measured rules; empty where no trial can."""
        wanted = "slimadam" in values_of(self.spec, self.parameters, "optimizer") and self.count
        if not (wanted and is_auto(self.spec)):
            return ()
        kinds = points({key: values_of(self.spec, self.parameters, key) for key in KIND_KEYS})
        return tuple(with_values(self.spec, kind) for kind in kinds)

    def with_measured(self, rules: Mapping[str, dict[str, SlimRule]]) -> Study:
        """Return the study with measured rules for the trials that need them, whose names are those of the rules."""
        return replace(self, plain=tuple(with_rules(spec, rules) for spec in self.plain), rules=rules)

    def cell(self, spec: TrainSpec) -> dict[str, Any]:
        """The searched kind of adapter of a fine-tuning; empty where one kind is trained."""
        return {key: getattr(spec, key) for key in CELL_KEYS if key in self.parameters}

    @property
    def drops(self) -> bool:
        """Return whether any trial of the search, or of the final stage, drops weights."""
        if self.trials is None:
            return self.spec.arm != Arm.PLAIN or any(key.startswith("macdrop.") for key in self.parameters)
        return any(self.searched(values).arm == Arm.MACDROP for values in self.trials)

    @property
    def reseeded(self) -> bool:
        """Return whether the final stage has seeds of its own; else the search's own trials are compared."""
        return self.seeds != (self.spec.seed,)

    @property
    def searched_count(self) -> int:
        """Fine-tunings of the search at most (a searcher may draw the same one twice)."""
        return len(self.plain) + self.samples + self.twins if self.search else 0

    @property
    def final_count(self) -> int:
        """Fine-tunings of the final stage at most, those that the search has trained already left out."""
        plain, macdrop = bool(self.plain), min(self.finalists, -(-self.samples // self.cells))
        trained = self.search and not self.reseeded
        arms = len(self.placebos) + (0 if trained else plain + macdrop)
        return self.cells * len(self.seeds) * arms

    @property
    def count(self) -> int:
        """Fine-tunings at most."""
        return self.searched_count + self.final_count


def studies(run: RunSpec) -> list[Study]:
    """The studies of a run, in the order of its models.

    Raises:
        ConfigError: two models share a name, or a grid holds a point that its model refuses.
    """
    for spec in run.studies():
        if spec.macdrop.scope != "massive":
            raise ConfigError(
                f"macdrop.scope is {spec.macdrop.scope!r}, which is for one fine-tuning (macdrop train).\n"
                f"A sweep trains placebos alongside MacDrop: list them under sweep.arms ({', '.join(placebos())})."
            )
    planned = [_study(run, spec, ray) for spec, ray in zip(run.studies(), run.rays(), strict=True)]
    for study in planned:
        if study.placebos and not study.drops:
            raise ConfigError(
                f"sweep.arms has {', '.join(study.placebos)}, but no trial of {study.name} drops anything to compare "
                "with: macdrop.p0 or macdrop.k is 0.\nSet both above 0, or search them."
            )
    by_name: dict[str, str] = {}
    for study in planned:
        model = study.spec.model_name_or_path
        if by_name.setdefault(study.name, model) != model:
            raise ConfigError(
                f"sweep.models lists {by_name[study.name]} and {model}: both would be called {study.name} in the run's "
                "folder and tables. Give one of the folders another name (a link will do)."
            )
    models = [study.spec.model_name_or_path for study in planned]
    twice = sorted({model for model in models if models.count(model) > 1})
    if twice:
        raise ConfigError(
            f"sweep.models lists {', '.join(twice)} more than once. Give each model one entry; what should vary "
            "within a model goes under sweep.parameters. To compare one model at several quantization_bit, sweep each\n"
            "into a run of its own: macdrop compare RUN RUN."
        )
    return planned


def _study(run: RunSpec, spec: TrainSpec, ray: RaySpec) -> Study:
    """Plan one model.

    The plain arm: in a grid one baseline for each point of the other keys; with a searcher one for each combination of
    their listed values where these are no more than the trials to be drawn, else the default setting alone.
    """
    sweep = run.sweep
    arms = set(sweep.arms)
    others = {key: space for key, space in sweep.parameters.items() if not key.startswith("macdrop.")}
    parameters = sweep.parameters if Arm.MACDROP in arms else others
    if Arm.MACDROP not in arms:
        spec = as_plain(spec)
    plain: list[TrainSpec] = []
    covered = True
    if Arm.PLAIN in arms:
        listed = points({key: space.values for key, space in others.items() if space.values is not None})
        covered = all(space.values is not None for space in others.values()) and len(listed) <= sweep.num_samples
        if sweep.search_alg != "grid" and len(listed) > sweep.num_samples:
            listed = [{}]
        plain = [as_plain(with_values(spec, point)).canonical() for point in listed]
        plain = list({baseline.trial_id(): baseline for baseline in plain}.values())
    trials: tuple[dict[str, Any], ...] | None = ()
    if arms != {"base"} and sweep.search_alg == "grid":
        trials = _grid(spec, parameters, {baseline.trial_id() for baseline in plain}, arms)
    elif parameters and arms != {"base"}:
        trials = None
    cells = points({key: parameters[key].bounds() for key in CELL_KEYS if key in parameters})
    if trials is None:
        search = True
    else:
        settings = {with_values(spec, point).canonical().trial_id() for point in trials}
        search = len(plain) > len(cells) or len(settings) > len(cells)
    last = with_values(spec, {"seed": spec.seed + sweep.seeds}).seed
    return Study(
        name=slug(spec.model_name_or_path),
        spec=spec,
        base=Arm.BASE in arms,
        plain=tuple(plain),
        trials=trials,
        samples=sweep.num_samples if trials is None else len(trials),
        parameters=parameters,
        twins=0 if covered or trials is not None or Arm.MACDROP not in arms else sweep.finalists * len(cells),
        search=search,
        seeds=tuple(range(spec.seed + 1, last + 1)) or (spec.seed,),
        finalists=sweep.finalists,
        placebos=tuple(arm for arm in sweep.arms if arm in placebos()),
        cells=len(cells),
        ray=ray,
    )


def _grid(
    spec: TrainSpec, parameters: dict[str, Space], baselines: set[str], arms: set[str]
) -> tuple[dict[str, Any], ...]:
    """The points of a grid, without those that are a baseline, equal to another point, or of no arm."""
    seen = set(baselines)
    kept = []
    for point in points({key: space.values or [] for key, space in parameters.items()}):
        trial = with_values(spec, point).canonical()
        if trial.arm in arms and trial.trial_id() not in seen:
            seen.add(trial.trial_id())
            kept.append(point)
    return tuple(kept)


def as_plain(spec: TrainSpec) -> TrainSpec:
    return spec.model_copy(update={"macdrop": MacDropSpec(k=0, p0=0.0)})


def check_local_lanes(planned: Sequence[Study], *, skip: bool = False) -> None:
    """Refuse models that the CPUs here can never hold, as `check_local` does; one of several is passed by if `skip`."""
    for study in planned:
        try:
            check_local(study.ray)
        except ConfigError as error:
            if len(planned) == 1:
                raise
            if skip:
                continue
            raise ConfigError(f"{study.name}: {error}\nOr run the others with --skip-unplaceable.") from None


def outline(run: RunSpec, study: Study) -> list[tuple[str, str]]:
    """Describe the work for one model, as lines of a label and a text."""
    tests, validations = len(jobs(run.eval)), len(jobs(run.validation))
    lines = []
    if study.base:
        more = f" and {validations} for validation" if study.search and validations else ""
        lines.append(("base", f"scored on {tests} benchmark(s){more}"))
    if study.unruled:
        kinds = f" for each of {len(study.unruled)} kinds of adapter" if len(study.unruled) > 1 else ""
        first = f"of slimadam measured first, in {STEPS} plain steps{kinds}; its trials are named after them"
        lines.append(("rules", first))
    lines += [("plain", baseline.trial_id()) for baseline in study.plain]
    for values in study.trials or ():
        settings = ", ".join(f"{key}={value}" for key, value in values.items())
        trial = study.searched(values)
        lines.append((trial.arm, f"{trial.trial_id()}  {settings}".rstrip()))
    if study.trials is None:
        drawn = f"{study.samples} trials drawn by {run.sweep.search_alg}: {', '.join(study.parameters)}"
        lines.append(("searched", drawn))
    if not study.count:
        return lines
    if study.search:
        by = ", ".join(f"{metric.name} ({metric.goal})" for metric in run.sweep.metric)
        lines.append(
            (Stage.SEARCH, f"{study.searched_count} fine-tunings on seed {study.spec.seed}; the best by {by} advance")
        )
    arms = [f"the {study.finalists} best macdrop" if study.finalists > 1 else "the best macdrop"] if study.drops else []
    arms = ["plain"] * bool(study.plain) + arms + list(study.placebos)
    cells = f" in each of {study.cells} cells ({', '.join(k for k in CELL_KEYS if k in study.parameters)})"
    seeds = f"seed{'s' * (len(study.seeds) > 1)} {', '.join(map(str, study.seeds))}"
    trained = f"{study.final_count} fine-tunings{'' if study.reseeded else ' in addition to those of the search'}"
    lines.append((Stage.FINAL, f"{', '.join(arms)}{cells if study.cells > 1 else ''} on {seeds}: {trained}"))
    return lines


def benchmark_runs(run: RunSpec, planned: list[Study]) -> int:
    """Benchmarks scored in all, at most."""
    tests, validations = len(jobs(run.eval)), len(jobs(run.validation))
    total = 0
    for study in planned:
        compared = study.final_count
        if study.search and not study.reseeded:
            compared += study.cells * (bool(study.plain) + study.finalists * study.drops)
        total += (compared + study.base) * tests
        total += (study.searched_count + study.base) * validations if study.search else 0
    return total

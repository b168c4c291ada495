"""Selection for the final comparison of a search: pure functions of its trials and their validation results.

Plain and MacDrop are compared within a *cell*, a kind of adapter (LoRA, DoRA, rsLoRA). Of each cell the best plain
setting and the best MacDrop settings are selected, each with the values of the other searched keys that suit it best,
and placebos with the settings of the best MacDrop one. With several objectives a setting is selected for being on the
front of those that no other beats in all of them, then for its first objective.

The content of finalists.json:

    tried        MacDrop settings of the search; statuses: how they ended
    objectives   [{name, goal}]
    seeds        of the final stage
    pareto       trials of the search (MacDrop, best first) that none of their cell beats in every objective
    cells        [{cell, plain: setting, macdrop: [settings, best first], placebos: {arm: setting}}]
    settings     setting -> the fine-tuning it stands for; the final stage trains it on each of the seeds
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tune.config.run_spec import TrainSpec, dump
from tune.config.sections import ARMS, EVAL_LOSS, Arm, MacDropSpec
from tune.config.sweep_spec import Metric
from tune.scheduling.study import Study, as_plain
from tune.storage.records import TrialRecord
from tune.storage.states import TaskState


@dataclass(frozen=True)
class Candidate:
    """A trial of the search; `values` are its objectives as they were measured, None where one is missing."""

    trial: str
    status: TaskState
    spec: TrainSpec
    values: tuple[float | None, ...]
    begun: bool = True

    @property
    def selectable(self) -> bool:
        """Return whether it was trained to its end and has every objective."""
        done = self.status == TaskState.DONE
        return done and all(value is not None and math.isfinite(value) for value in self.values)


def candidate(record: TrialRecord, scores: Mapping[str, float], objectives: Sequence[Metric]) -> Candidate:
    """Return a trial as the run folder has it; `scores` are its validation scores by their names in `sweep.metric`."""
    known = {**scores, EVAL_LOSS: record.eval_loss}
    return Candidate(
        trial=record.trial,
        status=record.status,
        spec=TrainSpec.model_validate(record.config),
        values=tuple(known.get(metric.name) for metric in objectives),
        begun=record.status != TaskState.STOPPED or record.step is not None,
    )


def select(study: Study, found: Iterable[Candidate], objectives: Sequence[Metric]) -> tuple[dict[str, Any], list[str]]:
    """The content of finalists.json, and notes on cells from which nothing can be selected."""
    found = [candidate for candidate in found if candidate.begun]
    macdrop = [candidate for candidate in found if candidate.spec.arm == Arm.MACDROP]
    cells, notes, pareto = [], [], []
    settings: dict[str, TrainSpec] = {}
    for cell in _cells(study, found) or [{}]:
        mine = [candidate for candidate in found if study.cell(candidate.spec) == cell]
        ranked = {arm: ranking([c for c in mine if c.spec.arm == arm], objectives) for arm in ("plain", "macdrop")}
        pareto += [candidate.trial for front, candidate in ranked["macdrop"] if front == 0]
        wanted = [arm for arm, asked in (("plain", study.plain), ("macdrop", study.drops)) if asked]
        without = [arm for arm in wanted if not ranked[arm]]
        if without:
            where = f" of {_words(cell)}" if cell else ""
            notes.append(f"no {' and no '.join(without)} trial{where} was finished and scored: no final stage for it")
            continue
        best = {arm: [candidate.spec for _, candidate in of_arm] for arm, of_arm in ranked.items()}
        row = _row(study, cell, best["plain"][:1], best["macdrop"][: study.finalists], settings)
        cells.append(row)
    content = _content(study, objectives, cells, settings)
    content["tried"] = len(macdrop)
    content["statuses"] = dict(Counter(candidate.status for candidate in macdrop))
    content["pareto"] = pareto
    return content, notes


def planned(study: Study, objectives: Sequence[Metric]) -> dict[str, Any]:
    """The same for a study without a search: each cell's one setting is selected."""
    assert not study.search and study.trials is not None
    macdrop = [study.searched(values) for values in study.trials]
    settings: dict[str, TrainSpec] = {}
    cells = []
    for cell in _unique(study.cell(spec) for spec in (*study.plain, *macdrop)):
        plain = [spec for spec in study.plain if study.cell(spec) == cell]
        dropping = [spec for spec in macdrop if study.cell(spec) == cell]
        cells.append(_row(study, cell, plain, dropping, settings))
    content = _content(study, objectives, cells, settings)
    return content | {"tried": sum(spec.arm == Arm.MACDROP for spec in macdrop), "statuses": {}, "pareto": []}


def twins(study: Study, found: Iterable[Candidate], objectives: Sequence[Metric]) -> list[TrainSpec]:
    """Plain adapters that no baseline is yet: those that differ from a finalist in nothing but MacDrop.

    A searcher draws values of the other keys (a learning rate, say) for MacDrop trials; with a twin the plain arm has
    the same chance to profit from what was found.
    """
    if not study.plain or not study.drops:
        return []
    found = list(found)
    trained = {candidate.trial for candidate in found}
    wanted = []
    for cell in _cells(study, found):
        mine = [c for c in found if c.spec.arm == Arm.MACDROP and study.cell(c.spec) == cell]
        wanted += [as_plain(best.spec).canonical() for _, best in ranking(mine, objectives)[: study.finalists]]
    return [spec for spec in {spec.trial_id(): spec for spec in wanted}.values() if spec.trial_id() not in trained]


def final_specs(content: Mapping[str, Any]) -> list[TrainSpec]:
    """The fine-tunings of the final stage, all arms of a seed one after the other."""
    settings = {name: TrainSpec.model_validate(spec) for name, spec in content["settings"].items()}
    names = []
    for cell in content["cells"]:
        names += [cell["plain"]] * (cell["plain"] is not None) + cell["macdrop"] + list(cell["placebos"].values())
    return [settings[name].model_copy(update={"seed": seed}) for seed in content["seeds"] for name in names]


def ranking(found: Sequence[Candidate], objectives: Sequence[Metric]) -> list[tuple[int, Candidate]]:
    """Selectable candidates, best first, each with the number of its front (0: no other beats it).

    A front are those that no other of what is left beats; it is taken away and the next one looked for. Within a front
    the first objective decides, then the name.
    """
    signs = [1 if metric.goal == "minimize" else -1 for metric in objectives]
    equal: dict[tuple[float, ...], list[Candidate]] = {}
    for each in found:
        if each.selectable:
            equal.setdefault(tuple(s * (v or 0.0) for s, v in zip(signs, each.values, strict=True)), []).append(each)
    ranked: list[tuple[int, Candidate]] = []
    for number, front in enumerate(_fronts(equal)):
        there = [(costs[0], candidate) for costs in front for candidate in equal[costs]]
        best_first = sorted(there, key=lambda pair: (pair[0], pair[1].trial))
        ranked += [(number, candidate) for _, candidate in best_first]
    return ranked


def _fronts(distinct: Iterable[tuple[float, ...]]) -> list[list[tuple[float, ...]]]:
    """Return the fronts of costs without equal ones, each in ascending order.

    Costs are beaten by smaller ones only, so each goes, in ascending order, into the first front that does not beat it:
    found by bisection, as what beats one of a front is beaten by one of each front before (efficient non-dominated
    sort, Zhang et al. 2015).
    """
    fronts: list[list[tuple[float, ...]]] = []
    for costs in sorted(distinct):

        def beaten_by(front: Sequence[tuple[float, ...]], costs: tuple[float, ...] = costs) -> bool:
            # Of two costs the second falls along a front: the last one is the least.
            return any(beats(other, costs) for other in (front[-1:] if len(costs) <= 2 else reversed(front)))

        place = bisect_left(fronts, True, key=lambda front: not beaten_by(front))
        if place == len(fronts):
            fronts.append([])
        fronts[place].append(costs)
    return fronts


def beats(one: Sequence[float], other: Sequence[float]) -> bool:
    """Pareto dominance of costs: nowhere worse, somewhere better."""
    pairs = list(zip(one, other, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def placebo(spec: TrainSpec, arm: str) -> TrainSpec:
    """The placebo of a MacDrop fine-tuning: the same p0 and decay, and k where the arm has one, elsewhere."""
    block = MacDropSpec(**{**spec.macdrop.model_dump(), "scope": ARMS[arm]})
    return spec.model_copy(update={"macdrop": block}).canonical()


def _row(
    study: Study,
    cell: dict[str, Any],
    plain: Sequence[TrainSpec],
    macdrop: Sequence[TrainSpec],
    settings: dict[str, TrainSpec],
) -> dict[str, Any]:
    """A cell of finalists.json; enters its fine-tunings into `settings`."""
    placebos = {arm: placebo(macdrop[0], arm) for arm in study.placebos} if macdrop else {}
    for spec in (*plain, *macdrop, *placebos.values()):
        settings[spec.setting_id()] = spec
    return {
        "cell": cell,
        "plain": plain[0].setting_id() if plain else None,
        "macdrop": [spec.setting_id() for spec in macdrop],
        "placebos": {arm: spec.setting_id() for arm, spec in placebos.items()},
    }


def _content(
    study: Study, objectives: Sequence[Metric], cells: list[dict[str, Any]], settings: dict[str, TrainSpec]
) -> dict[str, Any]:
    return {
        "tried": 0,
        "statuses": {},
        "objectives": [metric.model_dump() for metric in objectives],
        "seeds": list(study.seeds),
        "pareto": [],
        "cells": cells,
        "settings": {name: dump(spec) for name, spec in settings.items()},
    }


def _cells(study: Study, found: Iterable[Candidate]) -> list[dict[str, Any]]:
    return _unique(study.cell(candidate.spec) for candidate in found)


def _unique(cells: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    by_text = {json.dumps(cell, sort_keys=True): cell for cell in cells}
    return [by_text[text] for text in sorted(by_text)]


def _words(cell: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={json.dumps(value)}" for key, value in cell.items())

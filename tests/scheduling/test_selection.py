"""Selection of a search: fronts against their definition, cells, placebos, twins, and what cannot be selected."""

from __future__ import annotations

import itertools
import random

import pytest

from tune.config.run_spec import Metric, TrainSpec, load
from tune.scheduling.selection import (
    Candidate,
    beats,
    candidate,
    final_specs,
    placebo,
    planned,
    ranking,
    select,
    twins,
)
from tune.scheduling.study import Study, studies
from tune.storage.records import TrialRecord
from tune.storage.states import TaskState

DOWN, UP = Metric(name="eval_loss"), Metric(name="zero_shot/a/acc", goal="maximize")


def study(*overrides: str) -> Study:
    searched = ["sweep.parameters.macdrop.p0=[0.2, 0.5, 0.8]", "validation.zero_shot=[a]"]
    (found,) = studies(load(None, ["model=zoo:planted-llama", *searched, *overrides]))
    return found


def found(of: Study, *values: tuple[float | None, ...], status: str = "done", **settings) -> list[Candidate]:
    """MacDrop trials with these objectives, one for each p0, and the plain trial with an objective of 5 before them."""
    specs = [spec.model_copy(update=settings) for spec in of.plain[:1]]
    specs += [of.searched({"macdrop.p0": p0, **settings}) for p0 in (0.2, 0.5, 0.8)[: len(values)]]
    every = [tuple(5.0 for _ in values[0]), *values]
    return [
        Candidate(spec.trial_id(), "done" if spec.arm == "plain" else status, spec, v)
        for spec, v in zip(specs, every, strict=True)
    ]


def p0s(content: dict, cell: int = 0) -> list[float]:
    return [content["settings"][name]["macdrop"]["p0"] for name in content["cells"][cell]["macdrop"]]


# --- fronts ---


def test_fronts_equal_their_definition():
    """Slow reference: a point's front is the length of the longest chain of points, each beaten by the next."""
    draws = random.Random(0)
    base = study().searched({"macdrop.p0": 0.5})

    def depth(point: tuple, points: list[tuple]) -> int:
        better = [q for q in points if q != point and all(a <= b for a, b in zip(q, point, strict=True))]
        return 1 + max((depth(q, points) for q in better), default=-1)

    for objectives in ([DOWN], [DOWN, UP], [DOWN, UP, UP]):
        points = [tuple(draws.randrange(6) for _ in objectives) for _ in range(25)]  # some are equal
        values = [tuple(v if m is DOWN else -v for v, m in zip(p, objectives, strict=True)) for p in points]
        ranked = ranking([Candidate(f"{i:02}", "done", base, v) for i, v in enumerate(values)], objectives)
        assert {c.trial: front for front, c in ranked} == {f"{i:02}": depth(p, points) for i, p in enumerate(points)}
        order = [(front, points[int(c.trial)][0], c.trial) for front, c in ranked]
        assert order == sorted(order)


def test_beats_is_a_strict_partial_order():
    points = list(itertools.product(range(3), repeat=2))
    for a, b, c in itertools.product(points, repeat=3):
        assert not beats(a, a) and not (beats(a, b) and beats(b, a))
        assert beats(a, c) or not (beats(a, b) and beats(b, c))


def test_one_objective_is_a_plain_ranking():
    of = study("sweep.finalists=2")
    content, notes = select(of, found(of, (0.3,), (0.1,), (0.2,)), [DOWN])
    assert p0s(content) == [0.5, 0.8] and not notes
    assert len(content["pareto"]) == 1 and content["tried"] == 3 and content["statuses"] == {"done": 3}
    content, _ = select(of, found(of, (0.3,), (0.1,), (0.2,)), [UP])
    assert p0s(content) == [0.2, 0.8]


def test_several_objectives_take_the_front_by_the_first():
    of = study("sweep.finalists=3")
    trials = found(of, (0.1, 0.2), (0.3, 0.9), (0.4, 0.8))
    content, _ = select(of, trials, [DOWN, UP])
    assert p0s(content) == [0.2, 0.5, 0.8]
    assert content["pareto"] == [trials[1].trial, trials[2].trial]
    assert [each["name"] for each in content["objectives"]] == ["eval_loss", "zero_shot/a/acc"]


# --- what can be selected ---


@pytest.mark.parametrize("status", ["diverged", "failed", "stopped"])
def test_what_did_not_end_well_is_counted_and_goes_nowhere(status):
    of = study()
    content, notes = select(of, found(of, (0.1,), (0.2,), status=status), [DOWN])
    assert content["cells"] == [] and content["statuses"] == {status: 2} and content["tried"] == 2
    assert notes == ["no macdrop trial was finished and scored: no final stage for it"]
    assert final_specs(content) == []


def test_a_missing_or_infinite_objective_is_no_objective():
    of = study()
    content, _ = select(of, found(of, (0.1, None), (float("nan"), 0.9), (0.9, 0.1)), [DOWN, UP])
    assert p0s(content) == [0.8]


def test_a_trial_stopped_before_it_began_was_not_tried():
    of = study()
    spec = of.searched({"macdrop.p0": 0.2})
    known = {"trial": "t", "model": "m", "arm": "macdrop", "seed": 0, "config": spec.model_dump()}
    record = TrialRecord(**known, status=TaskState.STOPPED)
    assert not candidate(record, {}, [DOWN]).begun
    assert candidate(record.model_copy(update={"step": 3}), {}, [DOWN]).begun
    assert candidate(record.model_copy(update={"eval_loss": 0.5}), {UP.name: 0.25}, [UP, DOWN]).values == (0.25, 0.5)
    content, _ = select(of, [*found(of, (0.1,)), candidate(record, {}, [DOWN])], [DOWN])
    assert content["tried"] == 1
    content, (note,) = select(of, [candidate(record, {}, [DOWN])], [DOWN])
    assert content["cells"] == [] and "no macdrop trial was finished" in note


def test_each_cell_has_its_own_best_and_one_without_is_told():
    of = study("sweep.parameters.use_dora=[false, true]")
    lora, dora = found(of, (0.3,), (0.1,)), found(of, (0.1,), (0.3,), use_dora=True)
    content, notes = select(of, lora + dora, [DOWN])
    assert [cell["cell"] for cell in content["cells"]] == [{"use_dora": False}, {"use_dora": True}] and not notes
    assert p0s(content, 0) == [0.5] and p0s(content, 1) == [0.2]
    lost = found(of, (0.1,), status="failed", use_dora=True)
    content, notes = select(of, lora + lost, [DOWN])
    assert len(content["cells"]) == 1 and "use_dora=true" in notes[0] and "no macdrop trial" in notes[0]


def test_selection_is_a_function_of_the_trials_and_not_of_their_order():
    of = study("sweep.parameters.use_dora=[false, true]", "sweep.arms=[plain, macdrop, random_rows]")
    trials = found(of, (0.3,), (0.3,)) + found(of, (0.1,), (0.1,), use_dora=True)
    contents = [select(of, task, [DOWN])[0] for task in itertools.permutations(trials, len(trials))]
    assert all(content == contents[0] for content in contents)


# --- what the final stage trains ---


def test_every_arm_on_every_fresh_seed_and_never_the_searchs():
    of = study("sweep.arms=[base, plain, macdrop, random_rows, all_rows, activations]", "seed=7", "sweep.seeds=2")
    content, _ = select(of, found(of, (0.3,), (0.1,)), [DOWN])
    specs = final_specs(content)
    arms = ["plain", "macdrop", "random_rows", "all_rows", "activations"]
    assert [(spec.seed, spec.arm) for spec in specs] == [(seed, arm) for seed in (8, 9) for arm in arms]
    assert {spec.setting_id() for spec in specs} == set(content["settings"])
    for spec in specs[1:5]:
        assert spec.macdrop.p0 == 0.5 and spec.canonical() == spec
    assert len({spec.model_copy(update={"macdrop": specs[0].macdrop, "seed": 0}).trial_id() for spec in specs}) == 1


def test_a_placebo_has_the_settings_of_the_finalist_but_for_an_unused_k():
    spec = load(None, ["model=m", "macdrop={k: 3, p0: 0.4, schedule: exp, alpha: 0.05}"]).studies()[0]
    random_rows, rows, activations = (placebo(spec, arm) for arm in ("random_rows", "all_rows", "activations"))
    assert (random_rows.arm, random_rows.macdrop.k) == ("random_rows", 3)
    assert (rows.arm, rows.macdrop.k, activations.macdrop.k) == ("all_rows", 0, 0)
    for found in (random_rows, rows, activations):
        assert (found.macdrop.p0, found.macdrop.schedule, found.macdrop.alpha) == (0.4, "exp", 0.05)


def test_nothing_searched_is_planned_at_once():
    (of,) = studies(load(None, ["model=m", "sweep.parameters.use_dora=[false, true]", "sweep.seeds=1"]))
    content = planned(of, [DOWN])
    assert not of.search and content["tried"] == 2 and len(content["cells"]) == 2
    specs = final_specs(content)
    assert [(spec.use_dora, spec.arm) for spec in specs] == list(itertools.product((False, True), ("plain", "macdrop")))
    assert of.final_count == len(specs) == of.count and {spec.seed for spec in specs} == {1}


def test_twins_give_the_plain_arm_the_values_found_for_macdrop():
    of = study("sweep.search_alg=random", "sweep.parameters.learning_rate={min: 0.001, max: 0.1}")
    trials = found(of, (0.3,), (0.1,), learning_rate=0.05)
    (twin,) = twins(of, [trials[1], trials[2]], [DOWN])
    assert twin.arm == "plain" and twin.learning_rate == 0.05 and of.twins == 1
    assert twins(of, trials, [DOWN]) == []  # a baseline has it
    assert twins(study("sweep.arms=[macdrop]"), trials[1:], [DOWN]) == []


def test_finalists_read_back_from_json_train_the_same():
    import json

    of = study("sweep.arms=[plain, macdrop, activations]")
    content, _ = select(of, found(of, (0.3,), (0.1,)), [DOWN])
    assert final_specs(json.loads(json.dumps(content))) == final_specs(content)
    assert all(isinstance(spec, TrainSpec) for spec in final_specs(content))

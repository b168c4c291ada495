"""tune.results and tune.report: what is said of a run, and that it is said no louder than the numbers allow."""

from __future__ import annotations

import math

import pytest

from tune.journal import Journal
from tune.report import make_report
from tune.results import collect, value_of

MODEL = "zoo:planted-llama"
OFF = {"k": 0, "p0": 0.0, "schedule": "step", "alpha": None}
CONFIG = {
    "sweep": {
        "models": [{"model_name_or_path": MODEL}, {"model_name_or_path": "org/other"}],
        "metric": {"name": "eval_loss", "goal": "minimize"},
        "parameters": {"macdrop.p0": {"values": [0.2, 0.8]}},
    }
}
TASKS = ("arc_easy", "arc_challenge", "piqa")


def scores(trial: str, arm: str, acc: float, tasks: tuple[str, ...] = TASKS) -> list[dict]:
    rows = []
    for attack in ("none", "zeroing@3"):
        where = None if attack == "none" else "base"
        common = dict(model=MODEL, trial=trial, arm=arm, attack=attack, attack_on=where, seed=0, version="1")
        for task in tasks:
            for metric, shift in (("acc", 0.0), ("acc_norm", 0.01)):
                value = acc + shift - (0.3 if where else 0)
                rows.append({**common, "benchmark": "zero_shot", "task": task, "metric": metric, "value": value})
                rows[-1] |= {"stderr": 0.02, "n": 400, "higher_is_better": True}
        rows.append({**common, "benchmark": "perplexity", "task": "wiki", "metric": "word_perplexity"})
        rows[-1] |= {"value": 9 - acc, "stderr": None, "n": 100, "higher_is_better": False}
    return rows


def add_trial(
    journal: Journal, trial: str, macdrop: dict, loss: float | None, *, model: str = MODEL, **settings
) -> None:
    arm = "macdrop" if macdrop["k"] else "plain"
    record = journal.trial(trial)
    spec = {"model_name_or_path": model, "learning_rate": 1e-4, "seed": 0, "logging_steps": len(trial), **settings}
    record.start({**spec, "macdrop": macdrop}, model=model, arm=arm, seed=spec["seed"])
    if loss is not None:
        record.finish("done", eval_loss=loss, step=20, seconds=1.234)


@pytest.fixture
def journal(tmp_path) -> Journal:
    """Two models; of the first a base, a plain and three MacDrop trials (one failed); of the second nothing yet."""
    journal = Journal.create(tmp_path / "run", CONFIG, command="macdrop sweep demo")
    add_trial(journal, "plain-1", OFF, 2.0)
    add_trial(journal, "macdrop-1", {"k": 5, "p0": 0.2, "schedule": "step", "alpha": None}, 1.9)
    add_trial(journal, "macdrop-2", {"k": 5, "p0": 0.8, "schedule": "exp", "alpha": 0.05}, 1.8)
    add_trial(journal, "macdrop-3", {"k": 5, "p0": 0.9, "schedule": "step", "alpha": None}, None)
    journal.trial("macdrop-3").finish("diverged", "loss is nan at step 3\n" + "x" * 1000)
    journal.add_scores(scores("base", "base", 0.4) + scores("plain-1", "plain", 0.5))
    journal.add_scores(scores("macdrop-1", "macdrop", 0.48))
    journal.add_scores(scores("macdrop-2", "macdrop", 0.62))
    return journal


# --- results ---


def test_lines_are_ordered_and_the_best_is_marked(journal):
    model = collect(journal)[0]
    assert [(line.label, line.trial) for line in model.lines] == [
        ("base", "base"), ("plain", "plain-1"), ("M1", "macdrop-2"), ("M2", "macdrop-1"), ("M3", "macdrop-3")
    ]  # fmt: skip
    assert model.best.trial == "macdrop-2" and model.display == MODEL and model.planted
    assert model.keys[:4] == ["macdrop.k", "macdrop.p0", "macdrop.schedule", "macdrop.alpha"] and len(model.keys) == 4
    assert model.lines[1].setting("macdrop.p0") is None


def test_the_objective_may_be_a_score(journal):
    model = collect(journal)[0]
    assert value_of(model.lines[2], "zero_shot/arc_easy/acc@zeroing@3") == pytest.approx(0.32)
    assert value_of(model.lines[2], "zero_shot/nothing/acc") is None
    metric = {"name": "perplexity/wiki/word_perplexity", "goal": "maximize"}
    config = {"sweep": {**CONFIG["sweep"], "metric": metric}}
    other = Journal.create(journal.run_dir.parent / "other", config)
    add_trial(other, "a", {"k": 5, "p0": 0.2}, 1.0)
    add_trial(other, "b", {"k": 5, "p0": 0.4}, 2.0)
    other.add_scores(scores("a", "macdrop", 0.5) + scores("b", "macdrop", 0.4))
    assert collect(other)[0].best.trial == "b"


def test_the_mean_over_tasks_equals_a_slow_reference(journal):
    model = collect(journal)[0]
    (mean,) = [c for c in model.columns if c.task == "mean of 3" and c.attack == "none"]
    found = model.lines[2].scores[mean]
    assert found.value == pytest.approx((0.62 + 0.62 + 0.62) / 3)
    assert found.stderr == pytest.approx(math.sqrt(3 * 0.02**2) / 3) and found.n == 1200


def test_every_part_is_there_in_order(journal):
    report = make_report(journal.run_dir)
    keys = "verdict weights paper comparisons placebos search attacks pareto generations cost reproduce trials"
    assert list(report.parts(report.models[0])) == keys.split()

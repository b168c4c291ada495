"""Early stopping by the validation loss: against a slow reference, after the decay, over checkpoints, in training."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest
from helpers.small import SMALL

from macdrop.errors import ConfigError
from macdrop.schedules import decayed_step
from tune.config.messages import build
from tune.config.run_spec import TrainSpec
from tune.scheduling.early_stopping import check_patience
from tune.training.observer import Patience

SETTINGS = {**SMALL, "zero_stage": 0, "max_steps": 10, "eval_steps": 1, "macdrop": {"p0": 0.0, "k": 0}}


def end(patience: Patience, losses: list[float]) -> int | None:
    return next((step for step, loss in enumerate(losses, 1) if patience.ends(step, loss)), None)


def reference(losses: list[float], limit: int, first: int) -> int | None:
    """The same by looking back from every step: none of the last `limit` validations is below all before them."""
    for step in range(first + limit, len(losses) + 1):
        before, last = losses[first - 1 : step - limit], losses[step - limit : step]
        if all(loss >= min(before) for loss in last):
            return step
    return None


def test_it_ends_where_a_search_from_every_step_would():
    draws = random.Random(0)
    for _ in range(500):
        losses = [draws.randint(0, 9) / 10 for _ in range(draws.randint(1, 20))]
        limit, first = draws.randint(1, 4), draws.randint(1, 6)
        assert end(Patience(limit, first), losses) == reference(losses, limit, first)
    assert end(Patience(None, 1), [1.0] * 9) is None and end(Patience(1, None), [1.0] * 9) is None
    assert not Patience(1, 1).ends(1, None)


def test_a_checkpoint_between_two_validations_changes_nothing():
    losses = [5.0, 3.0, 4.0, 3.5, 3.2, 1.0]
    for cut in range(5):
        before, after = Patience(3, 1), Patience(3, 1)
        for step, loss in enumerate(losses[:cut], 1):
            before.ends(step, loss)
        after.resume(json.loads(json.dumps(before.state())))
        assert next(step for step in range(cut + 1, 7) if after.ends(step, losses[step - 1])) == 5
    assert Patience(None, 1).state() == {}


def test_a_validation_that_the_machine_did_not_live_to_see_is_made_up_for():
    patience = Patience(2, 4)
    assert not patience.missed(2, 2), "it would not count"
    assert patience.missed(4, 2) and not patience.missed(5, 2)
    patience.ends(4, 1.0)
    assert not patience.missed(4, 2) and not Patience(None, 4).missed(4, 2)


@pytest.mark.parametrize(
    "block, first",
    [
        ({"p0": 0.0}, 1),
        ({"schedule": "step"}, 90),
        ({"schedule": "exp", "alpha": 0.1}, 24),
        ({"schedule": "constant"}, None),
    ],
)
def test_validations_count_once_p_is_at_most_a_tenth_of_p0(block, first):
    spec = TrainSpec(**{**SETTINGS, "early_stopping_patience": 1, "macdrop": {"p0": 0.8, "k": 3, **block}})
    assert end(Patience.of(spec, 100, 50), [1.0] * 100) == (None if first is None else first + 1)
    if first not in (1, None):
        assert decayed_step(spec.macdrop.schedule, spec.macdrop.alpha, 0.1, 100, 50) == first


@pytest.mark.parametrize(
    "changes, said", [({"eval_steps": None}, "eval_steps is not set"), ({"val_size": 0}, "val_size is 0")]
)
def test_without_validations_it_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        build(TrainSpec, {**SETTINGS, "early_stopping_patience": 2, **changes})


def test_what_could_never_end_anything_is_refused_and_the_rest_says_from_when():
    def check(patience, **block):
        macdrop = {"p0": 0.8, "k": 3, **block}
        spec = TrainSpec(**{**SETTINGS, "eval_steps": 3, "early_stopping_patience": patience, "macdrop": macdrop})
        return check_patience(spec, {}, 100, 50)

    with pytest.raises(ConfigError, match="with constant"):
        check(1, schedule="constant")
    with pytest.raises(ConfigError, match="5 of them, 3 steps apart, do not come before step 100"):
        check(4, schedule="step")
    assert check(2, schedule="step") == ["early_stopping_patience counts validations from step 90 (step) of 100"]
    assert check(32, p0=0.0)[0].endswith("from step 1 (nothing dropped) of 100")
    assert check(None, schedule="constant") == []


def test_its_default_changes_no_name_and_another_value_does():
    plain = TrainSpec(**SETTINGS)
    assert plain.trial_id() == TrainSpec(**{**SETTINGS, "early_stopping_patience": None}).trial_id()
    names = {TrainSpec(**{**SETTINGS, "early_stopping_patience": n}).trial_id() for n in (1, 2)}
    assert len(names) == 2 and plain.trial_id() not in names


# --- in training ---

LOSSES = {0: 9.0, 1: 5.0, 2: 3.0, 3: 4.0, 4: 3.5, 5: 3.2, 6: 1.0}


def train(folder: Path, word=lambda metrics: "go_on", **changes):
    """The validations, and the outcome, of a fine-tuning whose validation losses are given."""
    from tune.training.single import train_here

    rows: list[dict] = []

    def watch(metrics: dict) -> str:
        rows.append(metrics)
        return word(metrics)

    outcome = train_here(TrainSpec(**{**SETTINGS, **changes}), folder, observe=watch, threads=1)
    return [row["step"] for row in rows if "eval_loss" in row], outcome


def adapter(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.mark.zero
def test_training_ends_with_the_adapter_of_its_last_step_also_over_a_lost_machine(tmp_path, monkeypatch):
    from tune.training.step import Training

    monkeypatch.setenv("MACDROP_CACHE", str(tmp_path / "cache"))
    current = {"step": 0}
    step = Training.step

    def counted(self, number, wish):
        current["step"] = number
        return step(self, number, wish)

    monkeypatch.setattr(Training, "step", counted)
    monkeypatch.setattr(Training, "validate", lambda self: LOSSES.get(current["step"], 0.5))
    seen, done = train(tmp_path / "early", early_stopping_patience=3)
    assert (done.status, done.step, done.total_steps, done.eval_loss) == ("done", 5, 10, 3.2)
    assert seen == [0, 1, 2, 3, 4, 5] and not (tmp_path / "early" / "checkpoints").exists()
    assert train(tmp_path / "early", early_stopping_patience=3)[1] == done, "a finished one is not repeated"

    stopped = train(tmp_path / "stopped", lambda metrics: "stop" if metrics["step"] == 4 else "go_on")[1]
    assert (stopped.status, stopped.step) == ("stopped", 5)
    assert adapter(tmp_path / "stopped") == adapter(tmp_path / "early"), "the adapter of the last step, not the best"
    whole = train(tmp_path / "whole")[1]
    assert whole.step == 10 and adapter(tmp_path / "whole") != adapter(tmp_path / "early"), "the key has an effect"

    left = train(
        tmp_path / "lost", lambda metrics: "leave" if metrics["step"] == 4 else "go_on", early_stopping_patience=3
    )
    assert (left[1].status, left[1].step) == ("left", 5)
    current["step"] = 5
    seen, resumed = train(tmp_path / "lost", early_stopping_patience=3)
    assert (resumed.status, resumed.step, seen) == ("done", 5, [5]), "its validation is made up for"
    assert adapter(tmp_path / "lost") == adapter(tmp_path / "early")

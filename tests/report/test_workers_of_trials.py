"""Trials that other workers trained than those that the run began with: in the report and the model card."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tune.config.train_spec import TrainSpec
from tune.report.model_card import Exported, model_card
from tune.report.sections.cost import _on_workers, other_workers

TWO = {"step": 0, "seconds": 0.0, "workers": 2, "masks": True}
THEN_ONE = {"step": 8, "seconds": 60.0, "workers": 1, "masks": True}


def line(name: str, *segments: dict) -> SimpleNamespace:
    return SimpleNamespace(trial=name, info={"seconds": 100.0, "segments": list(segments)})


def test_the_report_names_trials_and_the_step_from_which_bits_may_differ():
    said = other_workers([line("a", TWO), line("b", TWO, THEN_ONE), line("c", TWO, THEN_ONE), line("d")], 2)
    (sentence,) = said
    assert sentence.startswith(
        "Trials b, c: 2 workers up to step 8, 1 worker from there: bits may differ from step 8 (sums have another order"
    )
    assert other_workers([line("a", TWO)], 1)[0].startswith("Trial a: 2 workers in a run that began with 1: bits may")


def test_device_hours_count_the_workers_there_were():
    total, counts = _on_workers([line("a", TWO), line("b", TWO, THEN_ONE), line("old")], 3)
    assert (total, counts) == (100 * 2 + 60 * 2 + 40 + 100 * 3, [1, 2, 3])


@pytest.mark.parametrize("segments", [[TWO, THEN_ONE], [TWO]])
def test_the_model_card_says_it(tmp_path, segments):
    info = {"status": "done", "step": 10, "total_steps": 10, "segments": segments}
    text = model_card(Exported(tmp_path, "one", TrainSpec(model_name_or_path="a/b"), info, 2), merged=None, place="p")
    assert ("bits may differ from step 8" in text) is (len(segments) == 2)
    assert "x 2 worker(s)" in text

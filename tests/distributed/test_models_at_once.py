"""Models of different structure at once, and one after the other: the same adapters and scores, and lanes overlap."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.python_sweep import in_a_thread
from helpers.small import SMALL

from tune.config.run_spec import RunSpec
from tune.report.report import make_report
from tune.storage.run_folder import RunFolder
from tune.storage.states import TaskState

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.usefixtures("local_ray")]

MODELS = ["zoo:planted-llama", "zoo:planted-phi3", "zoo:insensitive-llama"]


def run(folder: Path, at_once: int) -> RunFolder:
    settings = {key: value for key, value in SMALL.items() if key not in ("model_name_or_path", "lora_target")}
    spec = RunSpec.model_validate(
        {
            **settings,
            "output_dir": str(folder),
            "max_steps": 6,
            "sweep": {
                "models": MODELS,
                "arms": ["base", "plain", "macdrop"],
                "parameters": {"macdrop.p0": [0.4, 0.8]},
                "seeds": 1,
                "max_concurrent_models": at_once,
            },
            "eval": {
                "batch_size": 32,
                "limit": 12,
                "attacks": ["none", "zeroing@3"],
                "zero_shot": {"qa": {"data": "zoo:qa"}},
            },
            "ray": {"dashboard": False, "lanes": 2},
        }
    )
    failures, printed = in_a_thread(spec)
    assert failures == 0, printed
    return RunFolder.open(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[RunFolder, RunFolder]:
    place = tmp_path_factory.mktemp("runs")
    return run(place / "alone", 1), run(place / "together", 3)


def test_adapters_and_scores_are_those_of_one_after_the_other(runs):
    alone, together = runs
    names = [sorted(record.trial for record in each.trials()) for each in runs]
    assert names[0] == names[1] and len(names[0]) >= 3 * 4
    assert {record.status for record in together.trials()} == {TaskState.DONE}
    for name in names[0]:
        files = [each.trial(name).adapter_dir / "adapter_model.safetensors" for each in runs]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    scores = [
        sorted(
            (row["model"], row["trial"], row["task"], row["metric"], row["attack"], row["value"])
            for row in each.score_rows()
        )
        for each in (alone, together)
    ]
    assert scores[0] == scores[1] and scores[0]


def test_the_report_shows_that_they_overlapped(runs):
    alone, together = (make_report(each.run_dir) for each in runs)
    beside = [together.parts(model)["timeline"].lines[-1] for model in together.models]
    assert any(", beside " in line for line in beside), beside
    for model in alone.models:
        lines = alone.parts(model)["timeline"].lines
        assert lines and not any("beside" in line for line in lines)

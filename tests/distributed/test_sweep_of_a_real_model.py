"""A tiny sweep of SmolLM2 on a local Ray: plain and MacDrop, an attack that breaks the base, and a report of it."""

from __future__ import annotations

import json
from pathlib import Path

import pandas
import pytest
from helpers.benchmark_fixtures import hub_rows, write_jsonl
from helpers.real_models import smollm2

pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.real, pytest.mark.usefixtures("local_ray")]

ROWS = [
    {"instruction": f"Name a thing that is like {thing}.", "input": "", "output": f"A {thing} is like a stone."}
    for thing in ("river", "tree", "boat", "house", "field", "road", "bridge", "lamp", "hill", "cloud", "door", "bell")
]


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Path:
    from tune.cli.progress import Progress
    from tune.config.run_spec import RunSpec
    from tune.distributed.sweep.runtime import run

    folder = tmp_path_factory.mktemp("real")
    (folder / "rows.json").write_text(json.dumps(ROWS))
    spec = RunSpec.model_validate(
        {
            "dataset": str(folder / "rows.json"),
            "cutoff_len": 48,
            "per_device_train_batch_size": 2,
            "max_steps": 3,
            "lora_rank": 2,
            "zero_stage": 2,
            "output_dir": str(folder / "run"),
            "sweep": {
                "models": [str(smollm2())],
                "arms": ["base", "plain", "macdrop"],
                "parameters": {"macdrop.k": [2], "macdrop.p0": [0.8]},
                "seeds": 1,
                "max_concurrent_trials": 1,
            },
            "eval": {
                "batch_size": 4,
                "limit": 4,
                "attacks": ["none", "zeroing@2"],
                "zero_shot": {"arc_easy": {"data": write_jsonl(folder / "arc.jsonl", hub_rows("arc_easy"))}},
            },
            "ray": {"dashboard": False, "lanes": 1},
        }
    )
    assert run(spec, resume=False, progress=Progress()) == 0
    return folder / "run"


def test_the_scan_is_that_of_the_model(swept):
    (found,) = (json.loads(path.read_text()) for path in swept.glob("models/*/massive_weights.json"))
    assert (found["layer"], found["indices"][:2]) == (11, [1229, 1487])


def test_macdrop_drops_and_plain_does_not(swept):
    dropped = {}
    for path in swept.glob("trials/*/trial.json"):
        trial = json.loads(path.read_text())
        assert trial["status"] == "done"
        steps = [json.loads(line) for line in (path.parent / "metrics.jsonl").open()]
        dropped[trial["arm"]] = sum(row.get("entries_dropped", 0) for row in steps)
    assert dropped["macdrop"] > 0 and dropped["plain"] == 0 and len(dropped) == 2


def test_every_arm_is_scored_plain_and_under_attack(swept):
    scores = pandas.read_json(swept / "scores.jsonl", lines=True)
    kept = scores[scores["metric"] == "acc"]
    assert set(zip(kept["arm"], kept["attack"], strict=True)) == {
        (arm, attack) for arm in ("base", "plain", "macdrop") for attack in ("none", "zeroing@2")
    }
    assert kept["n"].eq(4).all()


def test_the_report_compares_the_arms(swept):
    from tune.report.report import make_report

    text = make_report(swept).markdown()
    assert "Layer 11" in text and "arc_easy" in text and "zeroing@2" in text

"""The fine-tunings that continue on another number of workers, and a leg of one on those of this process group."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from helpers.small import SMALL
from tune.config.run_spec import TrainSpec
from tune.data import dataset as data
from tune.training.engine import Engine
from tune.training.finetune import finetune
from tune.training.massive_weights import scanned
from tune.training.observer import Word

STEPS = 6
#: name -> settings
CASES = {
    "zero0": {"zero_stage": 0},
    "zero2 padded": {"zero_stage": 2, "packing": "off"},
    "zero3 dora": {"zero_stage": 3, "use_dora": True},
}


def spec(case: str) -> TrainSpec:
    settings = {
        **SMALL,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "save_steps": 2,
        "macdrop": {"k": 5, "p0": 0.8},
    }
    return TrainSpec(**{**settings, **CASES[case]})


def leg(engine: Engine, case: str, root: Path, folder: str, *, stop_after: int = STEPS) -> dict:
    """Train in a folder up to the step after `stop_after`; the next leg starts at the checkpoint before."""
    seen = []

    def observe(metrics: dict) -> Word:
        seen.append([metrics["step"], metrics["loss"], metrics["entries_dropped"]])
        return Word.STOP if metrics["step"] >= stop_after else Word.GO_ON

    wanted = spec(case)
    prepared = data.load(data.prepare(wanted, engine.tokenizer, root / "data"))
    outcome = finetune(
        engine, wanted, prepared, root / case / folder, weights=scanned(wanted), observe=observe, workers=1
    )
    return {"seen": seen, "outcome": asdict(outcome)}

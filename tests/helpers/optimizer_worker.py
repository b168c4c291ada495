"""One rank that trains with every optimizer of `CASES`: ``python -m helpers.optimizer_worker OUT``."""

from __future__ import annotations

import sys
from pathlib import Path

from helpers.small import SMALL
from tune.config.run_spec import TrainSpec

WORLD = 2
CASES = {
    "slimadam": {"optimizer": "slimadam", "slimadam_rules": {"A": "fan_out", "B": "fan_in"}},
    "slimadam measured": {"optimizer": "slimadam", "slimadam_rules": "auto", "lora_rank": 8},
    "lion": {"optimizer": "lion", "learning_rate": 2e-4},
    "lion under ZeRO-1": {"optimizer": "lion", "learning_rate": 2e-4, "zero_stage": 1},
    "schedule-free": {"optimizer": "schedule_free_adamw"},
    "schedule-free under ZeRO-1": {"optimizer": "schedule_free_adamw", "zero_stage": 1},
}


def spec(case: str, world: int) -> TrainSpec:
    """A short fine-tuning whose steps have the same examples on any number of ranks that divides 4."""
    common = {"zero_stage": 0, "max_steps": 4, "lr_scheduler_type": "constant_with_warmup", "macdrop": {"p0": 0.0}}
    batch = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4 // world, "save_steps": 0}
    return TrainSpec(**{**SMALL, **common, **batch, **CASES[case]})


if __name__ == "__main__":
    from tune.training.single import train_here

    for name in CASES:
        train_here(spec(name, WORLD), Path(sys.argv[1]) / name, observe=None, threads=1)

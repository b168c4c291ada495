"""The settings under which `engine_worker.py` proves that engines can be reused and runs resumed."""

from __future__ import annotations

from itertools import product

from helpers.small import SMALL
from tune.config.run_spec import TrainSpec

STEPS = 4
INTERRUPTED_AFTER = 2
WORLD = 2

#: name -> (ZeRO stage, DoRA, bf16)
CASES = {
    f"zero{stage}-{'dora' if dora else 'lora'}-{'bf16' if bf16 else 'fp32'}": (stage, dora, bf16)
    for stage, dora, bf16 in product(range(4), (False, True), (False, True))
}
#: Every stage, both kinds of adapter and both types are run by default; the other half of their product is slow.
QUICK = [name for name, (_, dora, bf16) in CASES.items() if dora == bf16]
REST = [name for name in CASES if name not in QUICK]


def spec(case: str, *, seed: int, p0: float, **others) -> TrainSpec:
    """A fine-tuning of the built-in model under the case's settings."""
    stage, dora, bf16 = CASES[case]
    settings = {
        **SMALL,
        "val_size": 4,
        "lora_dropout": 0.1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": STEPS,
        "save_steps": INTERRUPTED_AFTER,
        "zero_stage": stage,
        "use_dora": dora,
        "bf16": bf16,
        "seed": seed,
        "macdrop": {"k": 5, "p0": p0},
    }
    return TrainSpec(**{**settings, **others})

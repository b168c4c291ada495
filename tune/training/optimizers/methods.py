"""Every optimizer by its name."""

from __future__ import annotations

from tune.config.run_spec import TrainSpec
from tune.training.optimizers.adamw import AdamW
from tune.training.optimizers.bitsandbytes_methods import AdamW8bit, Lion
from tune.training.optimizers.method import Method
from tune.training.optimizers.muon import Muon
from tune.training.optimizers.schedule_free import ScheduleFreeAdamW
from tune.training.optimizers.slim_adam import SlimAdam

METHODS: dict[str, type[Method]] = {
    "adamw": AdamW,
    "adamw_8bit": AdamW8bit,
    "lion": Lion,
    "muon": Muon,
    "schedule_free_adamw": ScheduleFreeAdamW,
    "slimadam": SlimAdam,
}


def method_of(spec: TrainSpec) -> Method:
    """Return the optimizer of a spec."""
    return METHODS[spec.optimizer](spec)

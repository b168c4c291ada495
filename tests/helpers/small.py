"""Settings of a fine-tuning of the built-in model that takes seconds; a test writes over what it is about."""

from __future__ import annotations

from typing import Any

SMALL: dict[str, Any] = {
    "model_name_or_path": "zoo:planted-llama",
    "dataset": "zoo:train",
    "cutoff_len": 64,
    "val_size": 8,
    "lora_rank": 2,
    "lora_alpha": 4,
    "lora_target": ["q_proj", "gate_proj", "up_proj"],
    "per_device_train_batch_size": 4,
    "learning_rate": 2e-3,
}

"""Checks of packed micro-batches before anything starts: models that cannot, examples too long, too little memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from macdrop.errors import ConfigError
from tune.config.run_spec import Space, TrainSpec, values_of
from tune.data.packing import check_budget, token_budget
from tune.data.padding import padding_of
from tune.preflight.step_memory import Room, StepMemory, step_memory

#: What a search may draw that takes the most memory: the largest of these, the smallest of those.
_LARGEST = (
    "use_dora",
    "lora_rank",
    "lora_dropout",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "cutoff_len",
)
_SMALLEST = ("bf16", "gradient_checkpointing")


def check_packable(outline: PreTrainedModel, spec: TrainSpec, parameters: Mapping[str, Space]) -> None:
    """Refuse `packing: on` for a model that carries a state from token to token.

    Raises:
        ConfigError: names the model and the remedy.
    """
    if "on" in values_of(spec, parameters, "packing") and getattr(outline, "_is_stateful", False):
        raise ConfigError(
            f"packing: on cannot be done on {spec.model_name_or_path} ({type(outline).__name__}): it carries a state "
            "from token to token, which the examples of a packed row would share.\nSet packing to auto or off."
        )


def check_longest(spec: TrainSpec, parameters: Mapping[str, Space], info: Mapping[str, Any]) -> None:
    """Refuse a budget of tokens into which the longest example does not fit.

    info: `Prepared.info`.

    Raises:
        ConfigError: names the example, its tokens and the values that would do.
    """
    for budget in values_of(spec, parameters, "max_tokens_per_micro_batch"):
        if budget is not None:
            check_budget(info["longest_example"], budget, info["longest_at"])


def check_fits(
    spec: TrainSpec, parameters: Mapping[str, Space], lengths: np.ndarray, workers: int, room: Room | None
) -> list[str]:
    """Refuse a budget of tokens that a worker surely has too little memory for; return a note where it is doubtful.

    lengths: tokens of each training example, int64 (n,). room: None where it is unknown: nothing is refused.

    Raises:
        ConfigError: names the budget, the estimate, the memory and the budget that would fit.
    """
    if room is None or values_of(spec, parameters, "packing") == ["off"]:
        return []
    drawn = {key: max(values_of(spec, parameters, key)) for key in _LARGEST}
    drawn |= {key: min(values_of(spec, parameters, key)) for key in _SMALLEST}
    budgets = values_of(spec, parameters, "max_tokens_per_micro_batch")
    drawn_with = [spec.model_copy(update={**drawn, "max_tokens_per_micro_batch": budget}) for budget in budgets]
    most = max(drawn_with, key=token_budget)
    tokens = padding_of(lengths, most, workers).largest
    memory = step_memory(most, gpu=room.gpu)
    if memory is None or memory.of(tokens) <= room.size:
        return []
    words = _too_large(most, tokens, memory, room, int(lengths.max()))
    if memory.least(tokens) > room.size:
        raise ConfigError(words)
    return [words.replace("\n", " ")]


def _too_large(spec: TrainSpec, tokens: int, memory: StepMemory, room: Room, longest: int) -> str:
    """Return a sentence on a micro-batch that takes more than there is, and its remedy."""
    named = f"max_tokens_per_micro_batch is {spec.max_tokens_per_micro_batch}"
    if spec.max_tokens_per_micro_batch is None:
        named = (
            f"per_device_train_batch_size {spec.per_device_train_batch_size} x cutoff_len {spec.cutoff_len} allows "
            f"micro-batches of {token_budget(spec)} tokens"
        )
    fitting = memory.tokens(room.size)
    remedy = f"Set max_tokens_per_micro_batch to {fitting} or less"
    if fitting < longest:
        remedy = f"The longest example alone has {longest} tokens, and {max(fitting, 0)} would fit: lower cutoff_len"
    others = [key for key in _SMALLEST if not getattr(spec, key)]
    remedy += f", or set {' or '.join(others)} to true" if others else ""
    return (
        f"{named}. One of {tokens} tokens takes an estimated {memory.of(tokens) / 2**30:.1f} GiB in training "
        f"{spec.model_name_or_path}, and a worker has {room.size / 2**30:.1f} GiB here.\n{remedy}."
    )

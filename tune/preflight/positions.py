"""Number of positions that a model has, by its config, and examples that are longer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from macdrop.errors import DataError
from tune.evaluation.scorer import config_positions

#: Kinds of RoPE scaling whose `factor` multiplies the positions; with others `max_position_embeddings` counts it in.
EXTENDING = ("linear", "dynamic", "yarn")


def positions_of(config: PreTrainedConfig) -> int | None:
    """Return the positions of a model, those that RoPE scaling adds included; None where its config names no limit."""
    positions = config_positions(config)
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    if positions is None or not isinstance(rope, Mapping):
        return positions
    kind, factor = rope.get("rope_type") or rope.get("type"), rope.get("factor")
    if kind not in EXTENDING or not isinstance(factor, (int, float)):
        return positions
    return max(positions, int(factor * (rope.get("original_max_position_embeddings") or positions)))


def check_positions(config: PreTrainedConfig, info: Mapping[str, Any], model: str) -> None:
    """Refuse data with an example, cut to `cutoff_len`, that is longer than the model has positions.

    info: `Prepared.info`.

    Raises:
        DataError: names the longest example and the remedy.
    """
    positions = positions_of(config)
    if positions is None or info["longest_example"] <= positions:
        return
    raise DataError(
        f"{info['longest_at']}: this example has {info['longest_example']} tokens, and {model} has {positions} "
        f"positions.\nSet cutoff_len to {positions} or less, or take a model with more positions (RoPE scaling in its "
        "config.json counts)."
    )

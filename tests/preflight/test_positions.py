"""Examples longer than a model's positions are refused before training."""

from __future__ import annotations

import json

import pytest
from transformers import GPT2Config, LlamaConfig, MambaConfig, MptConfig, OPTConfig

from macdrop.errors import DataError
from tune.preflight.positions import check_positions, positions_of

SMALL = {"hidden_size": 8, "num_attention_heads": 2, "max_position_embeddings": 256}


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (GPT2Config(n_positions=256), 256),
        (OPTConfig(max_position_embeddings=256), 256),
        (MptConfig(max_seq_len=256), 256),
        (MambaConfig(), None),
        (LlamaConfig(**SMALL), 256),
        (LlamaConfig(**SMALL, rope_scaling={"rope_type": "linear", "factor": 2.0}), 512),
        (LlamaConfig(**SMALL, rope_scaling={"rope_type": "dynamic", "factor": 2.0}), 512),
        (
            LlamaConfig(
                **SMALL, rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
            ),
            1024,
        ),
        (  # max_position_embeddings of these counts the scaling in
            LlamaConfig(
                **SMALL,
                rope_scaling={
                    "rope_type": "llama3",
                    "factor": 32.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            ),
            256,
        ),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_positions_are_those_that_the_config_names(config, positions):
    assert positions_of(config) == positions
    info = {"longest_example": (positions or 10**6), "longest_at": "rows.jsonl, line 3"}
    check_positions(config, info, "m")
    if positions is not None:
        with pytest.raises(DataError, match=f"line 3: this example has {positions + 1} tokens, and m has {positions}"):
            check_positions(config, {**info, "longest_example": positions + 1}, "m")


@pytest.mark.parametrize("verb", [("train",), ("sweep", "--dry-run"), ("plan",)])
def test_long_examples_are_refused_before_anything_starts(shell, verb):
    row = json.dumps({"instruction": "name", "output": "a " * 200}) + "\n"
    (shell.folder / "rows.jsonl").write_text(2 * row)
    words = ("dataset=rows.jsonl", "val_size=1", "macdrop.p0=0", "max_steps=2")
    model = "model_name_or_path" if verb == ("train",) else "sweep.models"
    ended = shell(verb[0], f"{model}=zoo:planted-llama", *words, "cutoff_len=1024", *verb[1:])
    assert ended.code == 2 and "rows.jsonl, line 1: this example has 2" in ended.err
    assert "zoo:planted-llama has 128 positions.\nSet cutoff_len to 128 or less" in ended.err

"""Loading the base model that a spec names."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from macdrop.errors import ConfigError
from macdrop.fingerprint import (
    checkpoint_fingerprint,
    format_name,
    is_checkpoint,
    quantised_fingerprint,
    split_fingerprint,
)
from macdrop.load import open_model
from tune.config.run_spec import TrainSpec
from tune.storage.converted import DIGESTS
from tune.storage.places import cache_dir
from tune.training.process_group import device
from tune.zoo.model_source import model_source, source_note


def open_base(spec: TrainSpec) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open the base model and tokenizer of a spec, in the precision that the spec trains in.

    On the CPU; a base that is quantised, on this rank's device.

    Raises:
        ConfigError: there is no such model, or it cannot be used.
    """
    place: AbstractContextManager[Any] = torch.cuda.device(device()) if torch.cuda.is_available() else nullcontext()
    with place:
        return open_model(
            model_source(spec.model_name_or_path),
            revision=spec.model_revision,
            dtype="bfloat16" if spec.bf16 else "float32",
            attn_implementation=spec.attn_implementation,
            trust_remote_code=spec.trust_remote_code,
            quantization_bit=spec.quantization_bit,
        )


def base_fingerprint(spec: TrainSpec) -> str:
    """Return the fingerprint of a spec's base: that of its files, and the format it is quantised to."""
    return quantised_fingerprint(fingerprint(spec.model_name_or_path, spec.model_revision), spec.quantization_bit)


def fingerprint(model: str, revision: str | None = None) -> str:
    """Return the fingerprint of a model as a spec names it (`macdrop.fingerprint.checkpoint_fingerprint`)."""
    return checkpoint_fingerprint(model_source(model), revision, memory=cache_dir() / DIGESTS)


def _quantised_as(name: str | None) -> str:
    return f"quantised to {name}" if name else "not quantised"


def require_base(spec: TrainSpec, recorded: str) -> None:
    """Refuse a base whose files, or whose quantisation, are not those of a recorded fingerprint (`base_fingerprint`).

    Raises:
        ConfigError: they have changed, or are those of another model.
    """
    source = model_source(spec.model_name_or_path)
    files, there = split_fingerprint(recorded)
    here = format_name(spec.quantization_bit)
    if there != here:
        raise ConfigError(
            f"This run began with {spec.model_name_or_path} {_quantised_as(there)}, and it is {_quantised_as(here)} "
            "here.\nSet quantization_bit as it was, or start a new run."
        )
    if not is_checkpoint(files, source, spec.model_revision, memory=cache_dir() / DIGESTS):
        note = source_note(spec.model_name_or_path)
        raise ConfigError(
            f"The files of {spec.model_name_or_path} are not those that this run began with: weights, config.json or "
            f"code have changed{f' ({note})' if note else ''}.\nPut the files back as they were, or start a new run."
        )

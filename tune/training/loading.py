"""Loading the base model that a spec names."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from macdrop.errors import ConfigError
from macdrop.fingerprint import checkpoint_fingerprint, is_checkpoint
from macdrop.load import open_model
from tune.config.run_spec import TrainSpec
from tune.storage.converted import DIGESTS
from tune.storage.places import cache_dir
from tune.zoo.model_source import model_source, source_note


def open_base(spec: TrainSpec) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open the base model and tokenizer of a spec, on the CPU and in the precision that the spec trains in.

    Raises:
        ConfigError: there is no such model, or it cannot be used.
    """
    return open_model(
        model_source(spec.model_name_or_path),
        revision=spec.model_revision,
        dtype="bfloat16" if spec.bf16 else "float32",
        attn_implementation=spec.attn_implementation,
        trust_remote_code=spec.trust_remote_code,
    )


def fingerprint(model: str, revision: str | None = None) -> str:
    """Return the fingerprint of a model as a spec names it (`macdrop.fingerprint.checkpoint_fingerprint`)."""
    return checkpoint_fingerprint(model_source(model), revision, memory=cache_dir() / DIGESTS)


def require_base(spec: TrainSpec, recorded: str) -> None:
    """Refuse a base whose files are not those of a recorded fingerprint.

    Raises:
        ConfigError: they have changed, or are those of another model.
    """
    source = model_source(spec.model_name_or_path)
    if not is_checkpoint(recorded, source, spec.model_revision, memory=cache_dir() / DIGESTS):
        note = source_note(spec.model_name_or_path)
        raise ConfigError(
            f"The files of {spec.model_name_or_path} are not those that this run began with: weights, config.json or "
            f"code have changed{f' ({note})' if note else ''}.\nPut the files back as they were, or start a new run."
        )

"""Massive weights of a checkpoint: scanned once, then cached under the checkpoint's fingerprint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from macdrop.errors import DataError, NoMassiveWeights
from macdrop.fingerprint import checkpoint_fingerprint
from macdrop.proof import Proof, prove, text_blocks
from macdrop.scan import find_massive_weights
from macdrop.weights import MassiveWeights
from tune.config.run_spec import TrainSpec, slug
from tune.storage.atomic import writing
from tune.storage.cache import cache_dir
from tune.training.loading import open_base
from tune.zoo.catalog import PREFIX, resolve

#: A short story of our own: the text of a proof when none is given.
STORY = Path(__file__).with_name("prose.txt")
#: Text blocks of a proof: tokens in each, bos included, and how many at most.
BLOCK_TOKENS, MAX_BLOCKS = 256, 16


def known_weights(spec: TrainSpec, *, bos_token_id: int | None = None) -> MassiveWeights | None:
    """Return the cached massive weights, under the name that `spec` gives the model.

    None if this checkpoint was never scanned or the cached file is damaged (a new scan replaces it).
    """
    path, fingerprint = _cached(spec, bos_token_id)
    if not path.is_file():
        return None
    try:
        known = MassiveWeights.load(path)
        known.check(fingerprint)
    except NoMassiveWeights:
        return None
    return replace(known, model=spec.model_name_or_path)


def massive_weights(
    spec: TrainSpec,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    bos_token_id: int | None = None,
    fresh: bool = False,
) -> MassiveWeights:
    """Return the massive weights of a loaded base model, scanning it unless they are cached (or with `fresh`).

    Raises:
        NoMassiveWeights: the scan finds none.
        ResourceError: the cache cannot be written.
    """
    known = None if fresh else known_weights(spec, bos_token_id=bos_token_id)
    if known is not None:
        return known
    path, fingerprint = _cached(spec, bos_token_id)
    found = find_massive_weights(
        model, tokenizer, source=spec.model_name_or_path, fingerprint=fingerprint, bos_token_id=bos_token_id
    )
    with writing(path):
        found.save(path)
    return found


def proof(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: MassiveWeights,
    *,
    k: int,
    text: Path | None = None,
    source: str = "",
) -> Proof:
    """Prove massive weights on a text file; by default on our story, or on the zoo's text for a zoo model.

    Raises:
        DataError: the text is missing or too short.
    """
    blocks = proof_blocks(model, tokenizer, weights.bos_token_id, text=text, source=source)
    return prove(model, blocks, weights, k=k)


def proof_blocks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    bos_token_id: int,
    *,
    text: Path | None,
    source: str,
) -> torch.Tensor:
    """Return token ids (n, T) of the text of a proof, bos first in every block; see `proof_text`."""
    content = proof_text(text, source)
    positions = getattr(model.config, "max_position_embeddings", None) or BLOCK_TOKENS
    # The zoo's models were trained on blocks of 64 tokens and cannot handle longer ones.
    length = min(64 if source.startswith(PREFIX) else BLOCK_TOKENS, positions)
    return text_blocks(tokenizer, content, length, bos_token_id)[:MAX_BLOCKS]


def proof_text(text: Path | None, source: str) -> str:
    """Read the text of a proof: the given file, else our story, or the zoo's text for a zoo model.

    Raises:
        DataError: the file is missing, empty, or not text.
    """
    file = text or (Path(resolve("zoo:text")) if source.startswith(PREFIX) else STORY)
    if not file.is_file():
        raise DataError(f"{file} is not a text file. Give a text with --text, or omit it for a built-in one.")
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 text ({error.reason} at byte {error.start}). Give a plain text."
        ) from None
    if not content.strip():
        raise DataError(f"{file} is empty. Give a text of some thousand words, or leave --text out.")
    return content


def _cached(spec: TrainSpec, bos_token_id: int | None) -> tuple[Path, str]:
    """Return the file of this checkpoint's scan, and the checkpoint's fingerprint.

    The precision is part of the name: a bf16 forward may order nearly equal rows differently than an fp32 one.
    """
    fingerprint = checkpoint_fingerprint(resolve(spec.model_name_or_path), spec.model_revision)
    precision = "bf16" if spec.bf16 else "fp32"
    bos = "" if bos_token_id is None else f"-bos{bos_token_id}"
    name = f"{slug(spec.model_name_or_path)}-{fingerprint[:16]}-{precision}{bos}.json"
    return cache_dir() / "scans" / name, fingerprint


def scanned(spec: TrainSpec) -> MassiveWeights:
    """Return the model's massive weights, from the cache or by scanning a whole (not partitioned) copy of it."""
    known = known_weights(spec)
    if known is not None:
        return known
    return massive_weights(spec, *open_base(spec))

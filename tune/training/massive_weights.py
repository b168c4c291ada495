"""Massive weights of a checkpoint, scanned once and kept in the user's cache by the checkpoint's fingerprint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from macdrop.errors import DataError, NoMassiveWeights
from tune.config.run_spec import TrainSpec, slug
from tune.storage.atomic import writing
from tune.storage.cache import cache_dir
from tune.zoo.catalog import PREFIX, resolve

if TYPE_CHECKING:
    from macdrop import MassiveWeights
    from macdrop.proof import Proof

#: A short story of our own, to prove massive weights on when no text is given.
STORY = Path(__file__).with_name("prose.txt")
#: Text blocks of a proof: tokens in each, bos included, and how many at most.
BLOCK_TOKENS, MAX_BLOCKS = 256, 16


def known_weights(spec: TrainSpec, *, bos_token_id: int | None = None) -> MassiveWeights | None:
    """The massive weights from the cache, under the name that `spec` has for the model.

    None if this checkpoint was never scanned, or the cached file is damaged (a new scan replaces it).
    """
    from macdrop import MassiveWeights

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
    spec: TrainSpec, model: Any, tokenizer: Any, *, bos_token_id: int | None = None, fresh: bool = False
) -> MassiveWeights:
    """The massive weights of a loaded base model, scanned unless the cache has them (or with `fresh`).

    Raises:
        NoMassiveWeights: the scan finds none.
        ResourceError: the cache cannot be written.
    """
    from macdrop import find_massive_weights

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
    model: Any, tokenizer: Any, weights: MassiveWeights, *, k: int, text: Path | None = None, source: str = ""
) -> Proof:
    """Prove massive weights on a text file; without one on our story, or on the zoo's text for a model of the zoo.

    Raises:
        DataError: the text is missing or too short.
    """
    from macdrop import prove

    blocks = proof_blocks(model, tokenizer, weights.bos_token_id, text=text, source=source)
    return prove(model, blocks, weights, k=k)


def proof_blocks(model: Any, tokenizer: Any, bos_token_id: int, *, text: Path | None, source: str) -> Any:
    """Token ids (n, T) of the text of a proof, bos first in every block; see `proof_text`."""
    from macdrop.proof import text_blocks

    content = proof_text(text, source)
    positions = getattr(model.config, "max_position_embeddings", None) or BLOCK_TOKENS
    # The zoo's models were trained on blocks of 64 tokens and know nothing of longer ones.
    length = min(64 if source.startswith(PREFIX) else BLOCK_TOKENS, positions)
    return text_blocks(tokenizer, content, length, bos_token_id)[:MAX_BLOCKS]


def proof_text(text: Path | None, source: str) -> str:
    """The text of a proof: a file's, our story's, or the zoo's for a model of the zoo.

    Raises:
        DataError: the file is missing, empty, or no text.
    """
    file = text or (Path(resolve("zoo:text")) if source.startswith(PREFIX) else STORY)
    if not file.is_file():
        raise DataError(f"{file} is no text file. Give a plain text with --text, or leave it out for a built-in one.")
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is no UTF-8 text ({error.reason} at byte {error.start}). Give a plain text.") from None
    if not content.strip():
        raise DataError(f"{file} is empty. Give a text of some thousand words, or leave --text out.")
    return content


def _cached(spec: TrainSpec, bos_token_id: int | None) -> tuple[Path, str]:
    """Where the scan of this checkpoint lies, and the checkpoint's fingerprint.

    The precision is part of the name: a bf16 forward may order nearly equal rows differently than an fp32 one.
    """
    from macdrop.fingerprint import checkpoint_fingerprint

    fingerprint = checkpoint_fingerprint(resolve(spec.model_name_or_path), spec.model_revision)
    precision = "bf16" if spec.bf16 else "fp32"
    bos = "" if bos_token_id is None else f"-bos{bos_token_id}"
    name = f"{slug(spec.model_name_or_path)}-{fingerprint[:16]}-{precision}{bos}.json"
    return cache_dir() / "scans" / name, fingerprint


def scanned(spec: TrainSpec) -> Any:
    """The model's massive weights, from the cache or by a scan of a whole (not partitioned) copy of it."""
    from macdrop import load_model, load_tokenizer
    from tune.zoo.catalog import resolve

    known = known_weights(spec)
    if known is not None:
        return known
    source = resolve(spec.model_name_or_path)
    loading = {"revision": spec.model_revision, "trust_remote_code": spec.trust_remote_code}
    model = load_model(
        source,
        dtype="bfloat16" if spec.bf16 else "float32",
        attn_implementation=spec.attn_implementation,
        **loading,
    )
    return massive_weights(spec, model, load_tokenizer(source, **loading))

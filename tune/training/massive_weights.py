"""Massive weights of a checkpoint: scanned once, then cached under all that a scan depends on."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from macdrop.errors import ConfigError, DataError, NoMassiveWeights
from macdrop.fingerprint import SHOWN, shown
from macdrop.load import check_model, load_tokenizer
from macdrop.proof import Proof, prove, require_blocks, text_blocks
from macdrop.scan import RULE, choose_bos, find_massive_weights
from macdrop.weights import MassiveWeights
from tune.config.run_spec import TrainSpec, slug
from tune.storage.atomic import writing
from tune.storage.places import cache_dir
from tune.training.loading import base_fingerprint, open_base, require_base
from tune.zoo.catalog import is_planted, resolve
from tune.zoo.model_source import model_source

#: Short texts of our own, one of each kind: what a proof is made on when no text is given.
TEXTS, KINDS = Path(__file__).with_name("texts"), ("story", "encyclopaedia", "dialogue", "code", "news")
#: Tokens of a text block, bos included, and how many blocks are taken: of each built-in text, and of a file.
BLOCK_TOKENS, OF_EACH_KIND, OF_A_FILE = 128, 4, 32
#: The same for the zoo's text: its models were trained on blocks of 64 tokens and cannot handle longer ones.
ZOO_TOKENS, OF_ZOO = 64, 16


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
    token, rule = choose_bos(tokenizer, model.config, bos_token_id)
    path, identity = _cached(spec, token)
    known = None if fresh else _known(path, identity)
    if known is not None:
        return replace(known, model=spec.model_name_or_path, bos_rule=rule)
    found = find_massive_weights(
        model, tokenizer, source=spec.model_name_or_path, fingerprint=identity, bos_token_id=bos_token_id
    )
    with writing(path):
        found.save(path)
    return found


def recorded_weights(
    spec: TrainSpec, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path
) -> MassiveWeights:
    """Return the massive weights that a run has recorded in `file`; in a new run find and record them.

    Raises:
        ConfigError: the base, its tokenizer's first token or the massive layer is not the one that the run began with.
    """
    found = massive_weights(spec, model, tokenizer)
    if not file.is_file():
        found.save(file)
        return found
    recorded = MassiveWeights.load(file)
    require_base(spec, recorded.fingerprint)
    for what, there, here in (
        ("first token", recorded.bos_token_id, found.bos_token_id),
        ("massive layer", (recorded.path, recorded.expert), (found.path, found.expert)),
    ):
        if there != here:
            raise ConfigError(
                f"The {what} of {spec.model_name_or_path} was {there} when this run began, and is {here} now.\n"
                "Its trials would not belong together. Put the model's files back as they were, resume with the "
                "version of macdrop that the run began with, or start a new run."
            )
    return recorded


def scanned(spec: TrainSpec) -> MassiveWeights:
    """Return the model's massive weights, from the cache or by scanning a whole (not partitioned) copy of it."""
    source = model_source(spec.model_name_or_path)
    options: dict[str, Any] = {"revision": spec.model_revision, "trust_remote_code": spec.trust_remote_code}
    tokenizer = load_tokenizer(source, **options)
    config = check_model(source, **options)
    token, rule = choose_bos(tokenizer, config)
    known = _known(*_cached(spec, token))
    if known is not None:
        return replace(known, model=spec.model_name_or_path, bos_rule=rule)
    return massive_weights(spec, *open_base(spec))


def _known(path: Path, identity: str) -> MassiveWeights | None:
    """Return a cached scan; None if there is none or its file is damaged (a new scan replaces it)."""
    if not path.is_file():
        return None
    try:
        known = MassiveWeights.load(path)
        known.check(identity)
    except NoMassiveWeights:
        return None
    return known


def _cached(spec: TrainSpec, bos_token_id: int) -> tuple[Path, str]:
    """Return the file of a checkpoint's scan, and the checkpoint's fingerprint.

    All that a scan depends on is part of the name: the bytes of the checkpoint, what it is quantised to, the token that
    stands for bos, the rule of the scan, and the precision, since a bf16 forward may order nearly equal rows
    differently than an fp32 one.
    """
    identity = base_fingerprint(spec)
    return scan_file(spec, identity, bos_token_id), identity


def scan_file(spec: TrainSpec, identity: str, bos_token_id: int) -> Path:
    """Return the file in the cache that holds the scan of a checkpoint with this fingerprint and first token."""
    precision = "bf16" if spec.bf16 else "fp32"
    name = f"{slug(spec.model_name_or_path)}-{shown(identity)}-{precision}-bos{bos_token_id}-rule{RULE}.json"
    return cache_dir() / "scans" / name


def check_text(spec: TrainSpec, text: Path | None, bos_token_id: int | None = None) -> None:
    """Refuse the text of a proof that is missing or too short, before any weights are read.

    Raises:
        DataError: the text is missing, shorter than a block, or fills too few blocks for an interval.
        ConfigError: the model has no usable bos.
    """
    proof_text(text, spec.model_name_or_path)
    source = model_source(spec.model_name_or_path)
    options: dict[str, Any] = {"revision": spec.model_revision, "trust_remote_code": spec.trust_remote_code}
    tokenizer, config = load_tokenizer(source, **options), check_model(source, **options)
    token, _ = choose_bos(tokenizer, config, bos_token_id)
    blocks, _ = labelled_blocks(tokenizer, config, token, text=text, source=spec.model_name_or_path)
    require_blocks(blocks)


def proof(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: MassiveWeights,
    *,
    k: int,
    text: Path | None = None,
    source: str = "",
) -> Proof:
    """Prove massive weights on a text file; by default on our short texts, or on the zoo's text for a built-in model.

    Raises:
        DataError: the text is missing or too short.
    """
    blocks, kinds = labelled_blocks(tokenizer, model.config, weights.bos_token_id, text=text, source=source)
    return prove(model, blocks, weights, k=k, kinds=kinds)


def proof_blocks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    bos_token_id: int,
    *,
    text: Path | None,
    source: str,
) -> torch.Tensor:
    """Return token ids (n, T) of the texts of a proof, bos first in every block; see `proof_text`."""
    return labelled_blocks(tokenizer, model.config, bos_token_id, text=text, source=source)[0]


def labelled_blocks(
    tokenizer: PreTrainedTokenizerBase,
    config: PreTrainedConfig,
    bos_token_id: int,
    *,
    text: Path | None,
    source: str,
) -> tuple[torch.Tensor, list[str]]:
    """Return the blocks of `proof_blocks`, and the kind of text that each of them is of.

    Raises:
        DataError: a text is missing, or shorter than a block.
    """
    texts, zoo = proof_text(text, source), is_planted(source)
    tokens = ZOO_TOKENS if zoo else BLOCK_TOKENS
    length = min(tokens, getattr(config, "max_position_embeddings", None) or tokens)
    most = OF_EACH_KIND if len(texts) > 1 else OF_ZOO if zoo else OF_A_FILE
    blocks = {kind: text_blocks(tokenizer, content, length, bos_token_id)[:most] for kind, content in texts.items()}
    return torch.cat(list(blocks.values())), [kind for kind, found in blocks.items() for _ in found]


def proof_text(text: Path | None, source: str) -> dict[str, str]:
    """Read the texts of a proof by kind: the given file, else our short texts, or the zoo's text for a built-in model.

    Raises:
        DataError: the file is missing, empty, or not text.
    """
    if text is not None:
        return {text.name: _content(text)}
    if is_planted(source):
        return {"zoo:text": _content(Path(resolve("zoo:text")))}
    return {kind: _content(TEXTS / f"{kind}.txt") for kind in KINDS}


def text_name(text: Path | None, source: str) -> str:
    """Name the text of a proof for people: a file by its name and the start of its SHA-256, else the built-in texts."""
    if text is not None:
        return f"{text.name}, SHA-256 {hashlib.sha256(text.read_bytes()).hexdigest()[:SHOWN]}"
    return "zoo:text" if is_planted(source) else f"built-in texts ({', '.join(KINDS)})"


def _content(file: Path) -> str:
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

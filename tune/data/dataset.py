"""Training data, tokenised once and memory-mapped.

`prepare` writes a folder of flat arrays, keyed by a hash of tokenizer, data and settings; `load` maps it. Several
processes may call `prepare` at once: one builds, the others wait and reuse its result. A damaged folder is rebuilt.

    tokens.npy   int32 (N,)    all examples, one after the other
    labels.npy   int32 (N,)    the token, or -100 where it carries no loss
    offsets.npy  int64 (n+1,)  example i is tokens[offsets[i]:offsets[i+1]]
    train.npy, validation.npy  int64, the examples of each part, ascending
    info.json    counts, format, template, settings, checksums of the arrays
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from macdrop.errors import DataError
from tune.config.train_spec import TrainSpec
from tune.data.formats import BadRows, converter, detect_format
from tune.data.readers import Row
from tune.data.sources import Source, find_sources, open_source
from tune.data.templates import IGNORE, Encoded, Encoder, choose_template
from tune.storage.atomic import atomic_write_json, sync_folder, writing
from tune.storage.sealed_folder import sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Reader = Callable[[], Iterator[Row]]

LAYOUT = 2
"""Part of the cache key: raise it whenever the same input would give different arrays."""
_ARRAYS = ("tokens", "labels", "offsets", "train", "validation")
_BATCH = 1000


class Examples:
    """A part of a prepared data set, memory-mapped: `examples[i]` -> (input_ids, labels), both int64 (T,)."""

    def __init__(self, tokens: np.ndarray, labels: np.ndarray, offsets: np.ndarray, index: np.ndarray) -> None:
        self.tokens, self.labels, self.offsets, self.index = tokens, labels, offsets, index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        at = self.index[i]
        part = slice(self.offsets[at], self.offsets[at + 1])
        return self.tokens[part].astype(np.int64), self.labels[part].astype(np.int64)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 (n,)."""
        return np.diff(self.offsets)[self.index]

    @cached_property
    def label_counts(self) -> np.ndarray:
        """Tokens of each example that carry loss after the shift (labels[1:] != -100), int64 (n,)."""
        return _label_counts(self.labels, self.offsets)[self.index]


@dataclass(frozen=True)
class Prepared:
    """A prepared data set; `info` is the content of info.json."""

    train: Examples
    validation: Examples | None
    info: dict[str, Any]


def prepare(spec: TrainSpec, tokenizer: PreTrainedTokenizerBase, cache_dir: str | os.PathLike) -> Path:
    """Tokenise the data of `spec` into a folder below `cache_dir`, unless it is there already, and return the folder.

    Args:
        spec: its keys dataset, format, template, cutoff_len, train_on_prompt, bad_rows, val_size, data_seed and
            max_samples, which limits each data set of a list, in rows from its start.
        tokenizer: the tokenizer of the model.

    Raises:
        DataError: the data are missing, empty or unusable, no answer token is within cutoff_len, or a split is empty.
        ConfigError: the template does not suit the tokenizer.
        ResourceError: `cache_dir` cannot be written.
    """
    from filelock import FileLock

    template = choose_template(spec.template, tokenizer)
    sources = find_sources(spec.dataset, format=spec.format, max_samples=spec.max_samples)
    opened = [open_source(source) for source in sources]
    settings = {
        "template": template,
        "cutoff_len": spec.cutoff_len,
        "train_on_prompt": bool(spec.train_on_prompt),
        "bad_rows": spec.bad_rows,
        "val_size": spec.val_size or 0,
        "data_seed": spec.data_seed,
    }
    key = _key(
        LAYOUT,
        settings,
        tokenizer_hash(tokenizer),
        [(identity, source.format, source.max_samples) for source, (identity, _) in zip(sources, opened, strict=True)],
    )
    cache_dir = Path(cache_dir)
    folder = cache_dir / key[:16]
    if _intact(folder):  # also in a cache that may only be read
        return folder
    with writing(folder):
        cache_dir.mkdir(parents=True, exist_ok=True)
        lock = cache_dir / f"{key[:16]}.lock"
        with FileLock(lock):
            if not _intact(folder):
                try:
                    _build(folder, key, tokenizer, sources, [rows for _, rows in opened], settings)
                except BaseException:
                    lock.unlink(missing_ok=True)  # refused data leave nothing behind
                    raise
    return folder


def load(path: str | os.PathLike) -> Prepared:
    """Map a folder made by `prepare`.

    Raises:
        DataError: the folder is missing or damaged.
    """
    path = Path(path)
    info = _read_info(path)
    if info is None:
        raise DataError(f"{path} holds no prepared data, or they are damaged. Run the command again: it rebuilds them.")
    tokens, labels, offsets = (np.load(path / f"{name}.npy", mmap_mode="r") for name in _ARRAYS[:3])
    train, validation = (Examples(tokens, labels, offsets, np.load(path / f"{name}.npy")) for name in _ARRAYS[3:])
    return Prepared(train, validation if len(validation) else None, info)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash everything that decides which ids a text gets: vocabulary, merges, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        content.pop("truncation", None)  # state of the last call, not of the tokenizer
        content.pop("padding", None)
    else:
        content = sorted(tokenizer.get_vocab().items())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    lead = list(tokenizer("a")["input_ids"])
    return _key(type(tokenizer).__name__, content, special, lead, str(getattr(tokenizer, "chat_template", None)))


# --- building ---


def _build(
    folder: Path,
    key: str,
    tokenizer: PreTrainedTokenizerBase,
    sources: list[Source],
    readers: list[Reader],
    settings: dict[str, Any],
) -> None:
    encoder = Encoder(tokenizer, settings["template"], settings["train_on_prompt"])
    cutoff = settings["cutoff_len"]
    tokens: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    counts = {"rows": 0, "dropped": 0, "truncated": 0, "tokenised_by_pieces": 0}
    bad = BadRows(settings["bad_rows"] == "skip")
    shortest, parts = None, []
    for source, rows in zip(sources, readers, strict=True):
        format, encoded = _encode_source(source, rows, encoder, bad)
        before = counts["rows"] + bad.count
        for example in encoded:
            counts["rows"] += 1
            prompt = example.prompt_length
            shortest = prompt if shortest is None else min(shortest, prompt)
            if all(label == IGNORE for label in example.labels[1:cutoff]):
                counts["dropped"] += 1
                continue
            counts["truncated"] += len(example.input_ids) > cutoff
            counts["tokenised_by_pieces"] += example.split
            tokens.append(np.asarray(example.input_ids[:cutoff], np.int32))
            labels.append(np.asarray(example.labels[:cutoff], np.int32))
        rows_read = counts["rows"] + bad.count - before
        parts.append({**asdict(source), "format": format, "detected": source.format == "auto", "rows": rows_read})
    counts["rows"] += bad.count
    _require_some(len(tokens), counts["rows"], bad, cutoff, shortest)
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in tokens], dtype=np.int64)])
    train, validation = split(len(tokens), settings["val_size"], settings["data_seed"])
    built = {
        "tokens": np.concatenate(tokens),
        "labels": np.concatenate(labels),
        "offsets": offsets,
        "train": train,
        "validation": validation,
    }
    info = {
        "key": key,
        "sources": parts,
        "format": ", ".join(dict.fromkeys(part["format"] for part in parts)),
        **settings,
        **counts,
        "skipped": bad.count,
        "first_skipped": bad.first,
        "examples": len(offsets) - 1,
        "train": len(train),
        "validation": len(validation),
        "tokens": int(offsets[-1]),
        "label_tokens": int(_label_counts(built["labels"], offsets).sum()),
        "shortest_prompt": shortest,
        "longest_example": int(np.diff(offsets).max()),
        "tokens_before_every_text": encoder.lead,
    }
    _write(folder, built, info)


def _require_some(examples: int, rows: int, bad: BadRows, cutoff: int, shortest: int | None) -> None:
    """Refuse data without any usable example."""
    if rows == bad.count:
        raise DataError(f"bad_rows: skip leaves none of the {rows} rows. The first: {bad.first}")
    if not examples:
        raise DataError(
            f"cutoff_len {cutoff} leaves no answer token in any of the {rows - bad.count} examples: "
            f"the shortest prompt has {shortest} tokens.\nRaise cutoff_len above {shortest}, or shorten the prompts."
        )


def _encode_source(source: Source, rows: Reader, encoder: Encoder, bad: BadRows) -> tuple[str, Iterator[Encoded]]:
    """Return the format and the examples, not yet cut; few rows are held at a time."""
    limit = source.max_samples
    if limit is not None and limit < 1:
        raise DataError(f"max_samples must be at least 1, got {limit}. Leave it out to use all rows.")
    stream = islice(rows(), limit)
    batch = list(islice(stream, _BATCH))
    if not batch:
        raise DataError(f"dataset {source.path!r} is empty: it holds no rows.")
    format = detect_format(batch[0], batch[1:]) if source.format == "auto" else source.format
    convert = converter(format)

    def examples(batch: list[Row]) -> Iterator[Encoded]:
        while batch:
            conversations, places = [], []
            for row in batch:
                try:
                    conversations.append(convert(row))
                    places.append(row.place)
                except DataError as error:
                    bad.add(error)
            yield from encoder.encode(conversations, places, bad.add)
            batch = list(islice(stream, _BATCH))

    return format, examples(batch)


def split(n: int, val_size: float, data_seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the indices of training and validation examples, ascending and below `n`, by `data_seed`.

    Args:
        val_size: 0 for no validation, a fraction below 1 (rounded to the nearest count), or a whole number of examples.

    Raises:
        DataError: val_size is not such a number, or a part would be empty.
    """
    if not 0 <= val_size or (val_size >= 1 and val_size != int(val_size)):
        raise DataError(f"val_size must be 0, a fraction below 1, or a whole number of examples; got {val_size}.")
    count = int(val_size) if val_size >= 1 else round(n * val_size)
    if (val_size > 0 and count == 0) or count >= n:
        part = "validation" if count == 0 else "training"
        raise DataError(
            f"val_size {val_size} of {n} usable examples leaves the {part} part empty. "
            f"Allowed: 0, or {1 / n:.3g} to {(n - 1) / n:.3g}, or 1 to {n - 1} examples."
        )
    order = np.random.default_rng(data_seed).permutation(n)
    return np.sort(order[count:]).astype(np.int64), np.sort(order[:count]).astype(np.int64)


# --- the folder ---


def _write(folder: Path, arrays: dict[str, np.ndarray], info: dict[str, Any]) -> None:
    """Write to a temporary folder and rename it: a crash leaves either nothing or everything."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir()
    try:
        for name, array in arrays.items():
            with open(temporary / f"{name}.npy", "wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
        files = {f"{name}.npy": temporary / f"{name}.npy" for name in _ARRAYS}
        info["files"] = {name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for name, p in files.items()}
        atomic_write_json(temporary / "info.json", info)
        if folder.exists():  # damaged, or it would not be rebuilt
            shutil.rmtree(folder)
        os.rename(temporary, folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _read_info(folder: Path) -> dict[str, Any] | None:
    """Return info.json if it and the sizes of all files are as they were written, else None."""
    try:
        info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        sizes = [(folder / name).stat().st_size == file["bytes"] for name, file in info["files"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return info if len(sizes) == len(_ARRAYS) and all(sizes) else None


def _intact(folder: Path) -> bool:
    info = _read_info(folder)
    return info is not None and all(sha256(folder / name) == file["sha256"] for name, file in info["files"].items())


def _label_counts(labels: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Count the labels != -100 of each example, except on its first token, which nothing predicts; int64 (n,)."""
    carries = np.asarray(labels) != IGNORE  # (N,)
    total = np.concatenate([[0], np.cumsum(carries, dtype=np.int64)])
    return total[offsets[1:]] - total[offsets[:-1]] - carries[offsets[:-1]]


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

"""Training data, tokenised once and memory-mapped.

`prepare` writes a folder of flat arrays, keyed by a hash of tokenizer, data and settings; `load` maps it. Several
processes may call `prepare` at once: one builds, the others wait and reuse its result. A damaged folder is rebuilt.

    tokens.npy   int32 (N,)    all examples, one after the other
    labels.npy   int32 (N,)    the token, or -100 where it carries no loss
    offsets.npy  int64 (n+1,)  example i is tokens[offsets[i]:offsets[i+1]]
    train.npy, validation.npy  int64, the examples of each part, ascending
    info.json    counts, format, template, settings, checksums of the arrays
    mixtures/    a folder for each list of weights: its own train.npy, with repetitions, and info.json
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from macdrop.errors import DataError
from tune.config.train.data_keys import weights_of
from tune.config.train_spec import TrainSpec
from tune.data.batching import MIXTURE, mix
from tune.data.lost_rows import check_dropped, check_skipped
from tune.data.sources import find_sources, open_source
from tune.data.templates import Encoder, choose_template
from tune.data.tokenising import label_counts, tokenise
from tune.storage.atomic import atomic_write_json, sync_folder, writing
from tune.storage.sealed_folder import sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LAYOUT = 3
"""Part of the cache key: raise it whenever the same input would give different arrays, or info.json other keys."""
MIXTURES = "mixtures"
_BAD_ROWS = 2
"""The same for data with `bad_rows: skip`: raise it whenever other rows are bad than before."""
_UNNAMED = (("train_on_roles", ["assistant"]), ("system", "as_system"))
_ARRAYS = ("tokens", "labels", "offsets", "train", "validation")


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
        return label_counts(self.labels, self.offsets)[self.index]


@dataclass(frozen=True)
class Prepared:
    """A prepared data set; `info` is the content of info.json."""

    train: Examples
    validation: Examples | None
    info: dict[str, Any]


def prepare(spec: TrainSpec, tokenizer: PreTrainedTokenizerBase, cache_dir: str | os.PathLike) -> Path:
    """Tokenise the data of `spec` into a folder below `cache_dir`, unless it is there already, and return the folder.

    Args:
        spec: its keys of the training data (`tune.config.train.data_keys`); max_samples limits each data set of a
            list, in rows from its start.
        tokenizer: the tokenizer of the model.

    Raises:
        DataError: the data are missing, empty or unusable, a split is empty, too many rows have no answer token
            within cutoff_len, or too many are bad.
        ConfigError: the template does not suit the tokenizer.
        ResourceError: `cache_dir` cannot be written.
    """
    from filelock import FileLock

    template, tokenizer = choose_template(spec.template, tokenizer)
    sources = find_sources(spec.dataset, format=spec.format, max_samples=spec.max_samples)
    opened = [open_source(source) for source in sources]
    settings = _settings(spec, template)
    key = _key(
        LAYOUT,
        _named(settings),
        tokenizer_hash(tokenizer),
        [(identity, source.format, source.max_samples) for source, (identity, _) in zip(sources, opened, strict=True)],
    )
    cache_dir = Path(cache_dir)
    folder = cache_dir / key[:16]
    weights = list(weights_of(spec.dataset).values())
    if _intact(folder):  # also in a cache that may only be read
        _check_lost(load(folder).info, spec)
        return _mixed(folder, weights) if weights else folder
    with writing(folder):
        cache_dir.mkdir(parents=True, exist_ok=True)
        lock = cache_dir / f"{key[:16]}.lock"
        with FileLock(lock):
            if not _intact(folder):
                try:
                    as_user = settings["system"] == "as_user"
                    roles = settings["train_on_roles"]
                    encoder = Encoder(tokenizer, template, settings["train_on_prompt"], roles, as_user)
                    arrays, info = tokenise(encoder, sources, [rows for _, rows in opened], settings)
                    _check_lost(info, spec)
                    _write(folder, arrays, {"key": key, **info})
                except BaseException:
                    lock.unlink(missing_ok=True)  # refused data leave nothing behind
                    raise
    return _mixed(folder, weights) if weights else folder


def _mixed(folder: Path, weights: list[float]) -> Path:
    """Choose the training examples of an epoch by the weights of the data sets; return a folder inside of `folder`.

    It holds its own train.npy and info.json: the tokens are written once, however many weights are tried.
    """
    from filelock import FileLock

    place = folder / MIXTURES / _key(weights)[:16]
    if _intact(place):
        return place
    data = load(folder)
    info, parts = data.info, data.info["sources"]
    available = [part["rows"] - part["dropped"] - part.get("skipped", 0) for part in parts]
    ends = np.cumsum(available).tolist()
    train = mix(np.asarray(data.train.index), ends, weights, info["data_seed"])
    counts = np.histogram(train, bins=[0, *ends])[0].tolist()
    own = np.histogram(data.train.index, bins=[0, *ends])[0].tolist()
    mixture = [
        {"path": part["path"], "weight": weight, "available": left, "examples": count}
        for part, weight, left, count in zip(parts, weights, own, counts, strict=True)
    ]
    with writing(place):
        place.parent.mkdir(exist_ok=True)
        with FileLock(place.with_suffix(".lock")):
            if not _intact(place):
                _write(place, {"train": train}, {**info, "key": _key(info["key"], weights), MIXTURE: mixture})
    return place


def _settings(spec: TrainSpec, template: str) -> dict[str, Any]:
    """Return the settings that info.json records."""
    return {
        "template": template,
        "cutoff_len": spec.cutoff_len,
        "train_on_prompt": bool(spec.train_on_prompt),
        "train_on_roles": sorted(spec.train_on_roles),
        "system": spec.system,
        "bad_rows": spec.bad_rows,
        "val_size": spec.val_size or 0,
        "data_seed": spec.data_seed,
    }


def _named(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that are part of the cache key: data of earlier versions keep theirs where they are equal."""
    named = {key: value for key, value in settings.items() if (key, value) not in _UNNAMED}
    return named | ({"bad": _BAD_ROWS} if settings["bad_rows"] == "skip" else {})


def _check_lost(info: dict[str, Any], spec: TrainSpec) -> None:
    check_skipped(info, spec.max_skipped_share)
    check_dropped(info, spec.max_dropped_share)


def load(path: str | os.PathLike) -> Prepared:
    """Map a folder made by `prepare`.

    Raises:
        DataError: the folder is missing or damaged.
    """
    path = Path(path)
    info = _read_info(path)
    if info is None:
        raise DataError(f"{path} holds no prepared data, or they are damaged. Run the command again: it rebuilds them.")
    base = path.parent.parent if MIXTURE in info else path
    if _read_info(base) is None:
        raise DataError(f"{base} holds no prepared data, or they are damaged. Run the command again: it rebuilds them.")
    tokens, labels, offsets = (np.load(base / f"{name}.npy", mmap_mode="r") for name in _ARRAYS[:3])
    train = Examples(tokens, labels, offsets, np.load(path / "train.npy"))
    validation = Examples(tokens, labels, offsets, np.load(base / "validation.npy"))
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
        files = {f"{name}.npy": temporary / f"{name}.npy" for name in arrays}
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
    return info if len(sizes) == (1 if MIXTURE in info else len(_ARRAYS)) and all(sizes) else None


def _intact(folder: Path) -> bool:
    info = _read_info(folder)
    return info is not None and all(sha256(folder / name) == file["sha256"] for name, file in info["files"].items())


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

"""Fingerprint of a checkpoint: a hash of every byte that its function depends on.

Hashing hundreds of gigabytes takes minutes, so that the digest of a weight file can be remembered in a folder, under
the file's path, size, times and inode: a file that is not touched is read once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from macdrop.errors import ConfigError

log = logging.getLogger(__name__)

#: What a fingerprint begins with; one without was made by `_sampled`.
SCHEME = "2-"
SHOWN = len(SCHEME) + 12  # characters of a fingerprint that people are shown
#: Bits of a weight -> the format that a base is quantised to while it is loaded, with which its fingerprint ends.
FORMATS = {4: "nf4", 8: "int8"}
_ANNOUNCED_BYTES = 8 * 2**30  # more than this is announced before it is read
_THREADS = 4
# A file that changed just before it was read may change again without a new time.
_SETTLED_NS = 2 * 10**9
_SAMPLES = 16  # per weight file
_SAMPLE_BYTES = 4096
_LFS = b"version https://git-lfs"
_MAX_HEADER = 100_000_000  # as in the safetensors format

#: Path, size, times of contents and of metadata, inode. The last two change when a file is replaced by one of its age.
_Stamp = tuple[str, int, int, int, int]
_digests: dict[_Stamp, str] = {}


def checkpoint_folder(model_name_or_path: str | os.PathLike, revision: str | None = None) -> Path:
    """The local folder of a checkpoint: the path itself, or where the Hugging Face cache keeps a hub id.

    Raises `ConfigError` when it is neither; nothing is downloaded.
    """
    path = Path(os.path.expanduser(model_name_or_path))
    if os.path.isdir(path):
        return path
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(str(model_name_or_path), "config.json", revision=revision)
    except HFValidationError:
        config = None
    if not isinstance(config, str):
        at = f" at revision {revision!r}" if revision else ""
        raise ConfigError(
            f"{str(model_name_or_path)!r}{at} is neither a folder here nor in the Hugging Face cache.\n"
            "Give the path of a model folder, or the id of a model that is downloaded."
        )
    return Path(config).parent


def checkpoint_fingerprint(
    model_name_or_path: str | os.PathLike, revision: str | None = None, *, memory: Path | None = None
) -> str:
    """`SCHEME` and the SHA-256 (hex) of a checkpoint: config.json, code of its own, and weight files, all whole.

    The same for a folder wherever it is, and for a hub id and a copy of its files. Weight files are those that
    ``model.safetensors.index.json`` names, else all ``*.safetensors``, else all ``pytorch_model*.bin``. memory: a
    folder for the digests of weight files, made if needed; one that cannot be written is no error.

    Raises `ConfigError` when there is no config or no weight file, or a file changes while it is read.
    """
    folder = checkpoint_folder(model_name_or_path, revision)
    files = _model_files(folder)
    stamps = [_stamp(file) for file in files]
    size = sum(stamp[1] for stamp in stamps if _known(stamp, memory) is None)
    if size > _ANNOUNCED_BYTES:
        log.warning("Reading the %.0f GB of weights in %s, to recognise them later.", size / 1e9, folder)
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(lambda stamp: _read(stamp, memory), stamps))
    digest = hashlib.sha256()
    for file in [folder / "config.json", *sorted(folder.glob("*.py"))]:
        _add(digest, file.name.encode())
        _add(digest, file.read_bytes())
    for file, found in zip(files, digests, strict=True):
        _add(digest, file.name.encode())
        _add(digest, found.encode())
    return SCHEME + digest.hexdigest()


def quantised_fingerprint(fingerprint: str, quantization_bit: int | None) -> str:
    """The fingerprint of a checkpoint that is quantised while it is loaded, which is another model: its format added.

    Raises `ConfigError` for numbers of bits that there is no format of.
    """
    name = format_name(quantization_bit)
    return fingerprint if name is None else f"{fingerprint}-{name}"


def format_name(quantization_bit: int | None) -> str | None:
    """Return `nf4` or `int8`; None for a model that is not quantised. `ConfigError` for other numbers of bits."""
    if quantization_bit is not None and (isinstance(quantization_bit, bool) or quantization_bit not in FORMATS):
        raise ConfigError(f"quantization_bit is {quantization_bit!r}; allowed are 4 (NF4), 8 (LLM.int8) and null.")
    return None if quantization_bit is None else FORMATS[quantization_bit]


def split_fingerprint(fingerprint: str) -> tuple[str, str | None]:
    """Return the fingerprint of the files, and the format that they were quantised to; None without."""
    files, _, last = fingerprint.rpartition("-")
    return (files, last) if last in FORMATS.values() else (fingerprint, None)


def shown(fingerprint: str) -> str:
    """Return what people are shown of a fingerprint."""
    files, format_ = split_fingerprint(fingerprint)
    return files[:SHOWN] + (f"-{format_}" if format_ else "")


def is_checkpoint(
    recorded: str, model_name_or_path: str | os.PathLike, revision: str | None = None, *, memory: Path | None = None
) -> bool:
    """Return whether a checkpoint is the one of a recorded fingerprint, as far as the scheme of that can tell."""
    if recorded.startswith(SCHEME):
        return recorded == checkpoint_fingerprint(model_name_or_path, revision, memory=memory)
    folder = checkpoint_folder(model_name_or_path, revision)
    return recorded == _sampled(folder, _model_files(folder))


def file_digest(file: str | os.PathLike, *, memory: Path | None = None) -> str:
    """The SHA-256 (hex) of a file; memory: as in `checkpoint_fingerprint`.

    Raises `ConfigError` when it changes while it is read, and `OSError` when it cannot be read.
    """
    return _read(_stamp(Path(file)), memory)


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder by name, safetensors if it has any. `ConfigError` when some are missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"{index} cannot be read: {type(error).__name__}: {error}.") from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ConfigError(
                f"{folder} is incomplete: {len(missing)} of {len(names)} weight files miss: {missing[0]} ..."
            )
        return [folder / name for name in names]
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def _model_files(folder: Path) -> list[Path]:
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} is not a model folder: it has no config.json.")
    files = weight_files(folder)
    if not files:
        raise ConfigError(f"{folder} is not a model folder: it has no weight file (*.safetensors).")
    return files


def _add(digest: hashlib._Hash, data: bytes) -> None:
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)


# --- digests of weight files, and where they are remembered ---


def _stamp(file: Path) -> _Stamp:
    """A file of the hub's cache is a link; what it leads to is named by a hash, but its bytes may have been edited."""
    path = file.resolve()
    info = path.stat()
    return str(path), info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino


def _note(stamp: _Stamp, memory: Path) -> Path:
    return memory / f"{hashlib.sha256(os.fsencode(stamp[0])).hexdigest()[:32]}.json"


def _known(stamp: _Stamp, memory: Path | None) -> str | None:
    """The SHA-256 of a file that was read before; None when it, or the note of it, is not what it was."""
    if stamp not in _digests and memory is not None:
        with suppress(OSError, ValueError, KeyError, TypeError):
            noted = json.loads(_note(stamp, memory).read_text(encoding="utf-8"))
            if tuple(noted["file"]) == stamp and re.fullmatch("[0-9a-f]{64}", noted["sha256"]):
                _digests[stamp] = noted["sha256"]
    return _digests.get(stamp)


def _read(stamp: _Stamp, memory: Path | None) -> str:
    """The SHA-256 of a file, from memory or read whole."""
    known = _known(stamp, memory)
    if known is not None:
        return known
    settled = time.time_ns() - max(stamp[2], stamp[3]) > _SETTLED_NS
    path = Path(stamp[0])
    with path.open("rb") as data:
        found = hashlib.file_digest(data, "sha256").hexdigest()
    if _stamp(path) != stamp:
        raise ConfigError(f"{path} changes while it is read. Wait until it is written, then try again.")
    if settled:
        _digests[stamp] = found
        if memory is not None:
            _remember(stamp, found, memory)
    return found


def _remember(stamp: _Stamp, found: str, memory: Path) -> None:
    with suppress(OSError):
        memory.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=memory, prefix=".")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump({"file": stamp, "sha256": found}, file)
            os.replace(temporary, _note(stamp, memory))
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


# --- fingerprints of older runs ---


def _sampled(folder: Path, files: list[Path]) -> str:
    """SHA-256 (hex) of config.json whole, and of each weight file's name, size, header and 16 samples."""
    digest = hashlib.sha256()
    _add(digest, (folder / "config.json").read_bytes())
    for file in files:
        _add(digest, file.name.encode())
        _add_samples(digest, file)
    return digest.hexdigest()


def _add_samples(digest: hashlib._Hash, file: Path) -> None:
    size = file.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with file.open("rb") as data:
        start = 0
        if file.suffix == ".safetensors":
            length = int.from_bytes(data.read(8), "little")
            start = 8 + min(length, _MAX_HEADER)
            _add(digest, data.read(start - 8))
        for sample in range(_SAMPLES):
            data.seek(start + (max(size - start - _SAMPLE_BYTES, 0) * sample) // (_SAMPLES - 1))
            _add(digest, data.read(_SAMPLE_BYTES))


def is_lfs_pointer(file: Path) -> bool:
    """Return whether a file is the few lines that Git LFS leaves in place of a file that was not fetched."""
    try:
        with open(file, "rb") as opened:
            return opened.read(len(_LFS)) == _LFS
    except OSError:  # whoever reads the file reports why it cannot be read
        return False

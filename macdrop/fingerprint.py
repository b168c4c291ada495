"""Fingerprint of a checkpoint: a hash of a model folder that is fast for hundreds of gigabytes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from macdrop.errors import ConfigError

_SAMPLES = 16  # per weight file
_SAMPLE_BYTES = 4096
_MAX_HEADER = 100_000_000  # as in the safetensors format


def checkpoint_folder(model_name_or_path: str | os.PathLike, revision: str | None = None) -> Path:
    """The local folder of a checkpoint: the path itself, or where the Hugging Face cache keeps a hub id.

    Raises `ConfigError` when it is neither; nothing is downloaded.
    """
    path = Path(model_name_or_path).expanduser()
    if path.is_dir():
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


def checkpoint_fingerprint(model_name_or_path: str | os.PathLike, revision: str | None = None) -> str:
    """SHA-256 (hex) of a checkpoint: config.json whole, and of each weight file its name, size, header and 16 samples.

    The same for a folder wherever it is, and for a hub id and a copy of its files. Weight files are those that
    ``model.safetensors.index.json`` names, else all ``*.safetensors``, else all ``pytorch_model*.bin``. Raises
    `ConfigError` when there is no config or no weight file.
    """
    folder = checkpoint_folder(model_name_or_path, revision)
    config = folder / "config.json"
    if not config.is_file():
        raise ConfigError(f"{folder} is not a model folder: it has no config.json.")
    files = weight_files(folder)
    if not files:
        raise ConfigError(f"{folder} is not a model folder: it has no weight file (*.safetensors).")
    digest = hashlib.sha256()
    _add(digest, config.read_bytes())
    for file in files:
        _add(digest, file.name.encode())
        _add_file(digest, file)
    return digest.hexdigest()


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


def _add(digest: hashlib._Hash, data: bytes) -> None:
    digest.update(len(data).to_bytes(8, "little"))
    digest.update(data)


def _add_file(digest: hashlib._Hash, file: Path) -> None:
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

"""The head of a GGUF file, and the refusal of files that transformers cannot read."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from macdrop.errors import ConfigError, UnsupportedModel, nearest
from macdrop.fingerprint import is_lfs_pointer

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
#: Names in transformers' table that stand for no model, or for encoders with a decoder.
_NOT_DECODERS = {"general", "tokenizer", "t5", "umt5"}


@dataclass(frozen=True)
class Header:
    """Metadata of a GGUF file. `kinds` counts its tensors by storage type, such as Q4_1."""

    architecture: str
    kinds: dict[str, int]

    @property
    def kind(self) -> str:
        """The storage type of most tensors with two dimensions or more; F32 if there are none."""
        return max(self.kinds, key=lambda kind: self.kinds[kind], default="F32")


def is_gguf(path: str | os.PathLike) -> bool:
    """Return whether a name means a GGUF file: by its ending, or an existing file by its first bytes."""
    if os.fspath(path).lower().endswith(SUFFIX):
        return not os.path.isdir(path)
    try:
        with open(path, "rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def require_package(file: str | os.PathLike) -> None:
    """Raise `ConfigError` unless the package `gguf` is installed."""
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            f"{os.fspath(file)} is in the GGUF format, which needs the package gguf, and it is not installed.\n"
            "Run: pip install 'macdrop[gguf]'"
        )


def read_header(file: Path) -> Header:
    """Read the head of a GGUF file, and check that all the tensors that it lists lie within the file.

    Raises:
        ConfigError: the file is missing, not GGUF, damaged, cut off or one of several parts, or the package gguf is not
            installed.
        UnsupportedModel: transformers cannot read this architecture from GGUF.
    """
    require_file(file)
    require_package(file)
    import gguf

    try:
        reader = gguf.GGUFReader(file)
        architecture = _text(reader, "general.architecture")
        parts = reader.get_field("split.count")
        count = int(parts.contents()) if parts is not None else 1
    except Exception as error:  # an index or a shape beyond the end, a number that is no type, text that is not UTF-8
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(
            f"{file} is cut off or damaged: what its head lists is not all there ({reason:.160}).\n"
            "Copy or download the file again, and compare its size or checksum with the original's."
        ) from None
    if count > 1:
        raise ConfigError(
            f"{file} is one of {count} parts of a model.\nJoin them: llama-gguf-split --merge {file.name} joined.gguf"
        )
    _require_architecture(file, architecture)
    matrices = [tensor for tensor in reader.tensors if len(tensor.shape) > 1]
    return Header(architecture, dict(Counter(tensor.tensor_type.name for tensor in matrices)))


def require_file(file: Path) -> None:
    """Raise `ConfigError` unless this is a file that begins as GGUF files do."""
    if not file.is_file():
        what = "is a folder, not a file" if file.is_dir() else "does not exist"
        raise ConfigError(f"The GGUF file {str(file)!r:.200} {what}.\nGive the path of a .gguf file.")
    if is_lfs_pointer(file):
        raise ConfigError(f"{file} is a Git LFS pointer, not the file itself.\nRun: git lfs pull   (in its folder)")
    try:
        with open(file, "rb") as opened:
            start = opened.read(len(_MAGIC))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from None
    if start != _MAGIC:
        what = "is empty" if not start else f"is not a GGUF file: it begins with {start!r}, not {_MAGIC!r}"
        raise ConfigError(f"{file} {what}.\nCopy or download the file again.")


def _text(reader: Any, key: str) -> str:
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"no {key}")
    return str(field.contents())


def _require_architecture(file: Path, name: str) -> None:
    """Raise `UnsupportedModel` for an architecture that transformers does not read from GGUF."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    known = sorted(set(GGUF_SUPPORTED_ARCHITECTURES) - _NOT_DECODERS)
    # In a file, some names have hyphens or no underscore: gpt-oss, qwen2moe.
    if name.replace("-", "").replace("_", "") in {each.replace("-", "").replace("_", "") for each in known}:
        return
    raise UnsupportedModel(
        f"{file} holds a model of the architecture {name!r:.60}, which this release of transformers does not read from "
        f"GGUF.{nearest(name, known)}\nIt reads: {', '.join(known)}.\n"
        "Give the model's safetensors folder or its hub id."
    )

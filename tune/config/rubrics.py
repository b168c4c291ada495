"""Rubrics: versioned YAML that says what each score from 1 to 5 means; shipped ones are in `tune/config/rubrics`.

name: mine
version: 1
default: {criteria: "Is it short?", scores: [endless, long, medium, short, one line]}
categories: {writing: {criteria: ..., scores: [...]}}     # optional: others for questions of these categories
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from macdrop.errors import ConfigError, nearest
from tune.config.messages import build
from tune.config.parse import read_yaml
from tune.config.sections import Strict, Text

FOLDER = Path(__file__).with_name("rubrics")


class Scale(Strict):
    """A question to the judge and the meaning of each score."""

    criteria: Text = Field(description="Question to the judge.")
    scores: Annotated[list[Text], Field(min_length=5, max_length=5)] = Field(
        description="What the scores 1, 2, 3, 4 and 5 stand for, in this order."
    )

    def text(self) -> str:
        """Return the scale in the form that Prometheus was trained on."""
        lines = [f"Score {number}: {meaning}" for number, meaning in enumerate(self.scores, 1)]
        return "\n".join([f"[{self.criteria}]", *lines])


class Rubric(Strict):
    """A default scale, and scales for some categories of questions."""

    name: Text = Field(description="Name of the rubric.")
    version: Text | int | float = Field(description="Version, part of the rubric's identity.")
    about: str = Field(default="", description="What the rubric is for.")
    default: Scale = Field(description="Scale of every question without a scale of its own.")
    categories: dict[str, Scale] = Field(default={}, description="Scales of questions of these categories.")

    @property
    def id(self) -> str:
        """NAME@VERSION and six digits of a hash of the content, as a file may change under the same name."""
        content = json.dumps(self.model_dump(include={"default", "categories"}), sort_keys=True)
        return f"{self.name}@{self.version}#{hashlib.sha256(content.encode()).hexdigest()[:6]}"

    def scale(self, category: str) -> Scale:
        return self.categories.get(category, self.default)


def load(name: str) -> Rubric:
    """Load a shipped rubric by name, or the one in a YAML file.

    Raises:
        ConfigError: there is no such rubric, or the file does not hold one.
    """
    shipped = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    path = FOLDER / f"{name}.yaml" if name in shipped else Path(name)
    if not os.path.isfile(path):
        raise ConfigError(
            f"eval.judge.rubric {name!r} is neither a shipped rubric nor a YAML file.{nearest(name, shipped)} "
            f"Rubrics: {', '.join(shipped)}."
        )
    raw: dict[str, Any] = read_yaml(path)
    try:
        return build(Rubric, raw)
    except ConfigError as error:
        raise ConfigError(f"{path} is not a rubric: {error}") from None

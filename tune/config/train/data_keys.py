"""Keys of the training data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from macdrop.errors import ConfigError, nearest
from tune.config.messages import build
from tune.config.sections import Strict, Text, UserPath
from tune.config.syntax.yaml_core import brief

Format = Literal["auto", "alpaca", "sharegpt", "messages", "text"]
Role = Literal["system", "user", "assistant", "tool"]

#: Keys that the tokenised data depend on.
DATA_KEYS = (
    "dataset",
    "format",
    "template",
    "system",
    "cutoff_len",
    "train_on_prompt",
    "train_on_roles",
    "bad_rows",
    "val_size",
    "max_samples",
    "data_seed",
)
#: Names of prompt templates, and the endings of files that hold one.
TEMPLATES, TEMPLATE_FILES = ("auto", "alpaca", "chat"), (".jinja", ".jinja2", ".j2")
#: Names of templates of generation benchmarks.
ASKING_TEMPLATES = ("auto", "chat", "alpaca", "plain")


def is_template_file(template: str) -> bool:
    """Return whether a value of `template` names a file."""
    return template.endswith(TEMPLATE_FILES)


def check_template(template: str, names: Iterable[str]) -> str:
    """Return a value of `template`, one of `names` or a file.

    Raises:
        ValueError: it is neither.
    """
    names = list(names)
    if template not in names and not is_template_file(template):
        raise ValueError(
            f"{template!r:.80} is not a template.{nearest(template, names)} Allowed: {', '.join(names)}, or a file "
            f"that ends in {', '.join(TEMPLATE_FILES)}"
        )
    return template


#: The dotted key of an entry's weight under `sweep.parameters`, entries counted from 0; as a regular expression.
WEIGHT_KEY = r"dataset\.(0|[1-9][0-9]*)\.weight"


class DatasetEntry(Strict):
    """One data set of a list; `format` and `max_samples` are the run's where they are left out."""

    path: UserPath = Field(description="A Hub id, a local file, a folder, a pattern, or `zoo:train`.")
    format: Format | None = Field(default=None, description="Row format; `null` is the run's `format`.")
    split: Text = Field(default="train", description="Split of a Hub data set or a folder.")
    name: Text | None = Field(default=None, description="Configuration of a Hub data set or a folder that has several.")
    max_samples: int | None = Field(
        default=None,
        ge=1,
        description="Maximum number of its examples; `null` is the run's `max_samples`.",
    )
    weight: float | None = Field(
        default=None,
        gt=0,
        description="Its share of an epoch is its weight over the sum of all; every entry has one, or none has.",
    )

    @model_serializer(mode="wrap")
    def _as_given(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if key in self.model_fields_set}


class DataKeys(Strict):
    """The training data, and how rows become tokens."""

    dataset: UserPath | list[UserPath | DatasetEntry] = Field(
        default="zoo:train",
        description=(
            "A Hub id, a local file, a folder, a pattern such as `data/*.jsonl`, or `zoo:train`; or a list of these "
            "or of `{path, format, split, name, max_samples, weight}`. With weights an epoch holds each set by its "
            "share; `dataset.N.weight` (N from 0) can be searched."
        ),
    )
    format: Format = Field(
        default="auto",
        description="Row format: `alpaca`, `sharegpt`, `messages` or `text`; `auto` detects it from the columns.",
    )
    template: UserPath = Field(
        default="auto",
        description=(
            "Prompt template: `alpaca`, `chat` (the tokenizer's chat template), `auto` (the chat template if there is "
            "one, else alpaca), or a chat template in a file `FILE.jinja`."
        ),
    )
    system: Literal["as_system", "as_user"] = Field(
        default="as_system",
        description=(
            "`as_user` puts the text of a system turn before that of the next question, a blank line between: for "
            "templates that refuse system turns."
        ),
    )
    cutoff_len: int = Field(default=1024, ge=2, description="Maximum number of tokens per example.")
    max_dropped_share: float | None = Field(
        default=0.1,
        ge=0,
        le=1,
        description=(
            "Refuse data of which a larger share is dropped, because no answer token is within `cutoff_len`; `null` "
            "never refuses."
        ),
    )
    train_on_prompt: bool = Field(default=False, description="Compute the loss on the prompt as well as the answer.")
    train_on_roles: list[Role] = Field(
        default=["assistant"],
        min_length=1,
        description=(
            "Roles whose turns carry loss: `assistant`, `user`, `system`, `tool`. Of other turns than answers their "
            "text carries it, and the template's end mark if there is one."
        ),
    )
    bad_rows: Literal["refuse", "skip"] = Field(
        default="refuse",
        description=(
            "Rows that cannot be trained on as they are written (no answer, a text that is missing, a turn that the "
            "chat template leaves out): `refuse` ends with the first one, `skip` leaves them out and reports them by "
            "reason. Also written `on_bad_row`."
        ),
    )
    max_skipped_share: float | None = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Refuse data of which a larger share is skipped by `bad_rows: skip`; `null` never refuses.",
    )
    val_size: float = Field(
        default=0.05, ge=0, description="Validation split: a fraction if below 1, otherwise a number of examples."
    )
    max_samples: int | None = Field(
        default=None, ge=1, description="Maximum number of examples taken from each data set; `null` takes all."
    )
    data_seed: int = Field(default=0, ge=0, lt=2**31, description="Seed of the validation split.")

    @field_validator("dataset", mode="before")
    @classmethod
    def _entries(cls, value: Any) -> Any:
        """Validate the entries one by one: messages of a union would name all of its branches."""
        if not isinstance(value, list):
            return value
        entries = []
        for number, item in enumerate(value, 1):
            if not isinstance(item, (str, dict, DatasetEntry)):
                raise ValueError(f"entry {number} must be a text or a block of keys, not {brief(item)}")
            try:
                entries.append(build(DatasetEntry, item) if isinstance(item, dict) else item)
            except ConfigError as error:
                raise ConfigError(f"entry {number}: {error}") from None
        return entries

    @field_validator("dataset")
    @classmethod
    def _weights(cls, value: str | list[str | DatasetEntry]) -> str | list[str | DatasetEntry]:
        entries = [value] if isinstance(value, str) else value
        without = [at for at, entry in enumerate(entries, 1) if isinstance(entry, str) or entry.weight is None]
        if without and len(without) < len(entries):
            raise ValueError(
                f"entry {without[0]} has no weight, and others have one. Give every data set a weight, or none"
            )
        if not without and len(entries) == 1:
            raise ValueError("has one data set, of which a weight has no effect. Leave it out, or add another data set")
        return value

    @field_validator("template")
    @classmethod
    def _known_template(cls, value: str) -> str:
        return check_template(value, TEMPLATES)

    @field_validator("train_on_roles")
    @classmethod
    def _roles_once(cls, value: list[str]) -> list[str]:
        twice = sorted({role for role in value if value.count(role) > 1})
        if twice:
            raise ValueError(f"names {', '.join(twice)} twice")
        return value

    @model_validator(mode="after")
    def _roles_have_an_effect(self) -> DataKeys:
        others = [role for role in self.train_on_roles if role != "assistant"]
        if self.train_on_prompt and self.train_on_roles != ["assistant"]:
            raise ValueError(
                f"train_on_roles: {self.train_on_roles} has no effect with train_on_prompt: true, by which every turn "
                "carries loss. Leave one of them out."
            )
        if "system" in others and self.system == "as_user":
            raise ValueError(
                "train_on_roles names system, and system: as_user makes every system turn a part of the question. "
                "Leave one of them out."
            )
        return self


def is_weight_key(key: str) -> bool:
    """Return whether a dotted key is that of the weight of a data set."""
    return re.fullmatch(WEIGHT_KEY, key) is not None


def weights_of(dataset: Any) -> dict[str, float]:
    """Return the weights of the data sets of a spec, or of a recorded run file, by dotted key; empty without any."""
    entries = dataset if isinstance(dataset, list) else []
    found = [entry.get("weight") if isinstance(entry, Mapping) else getattr(entry, "weight", None) for entry in entries]
    return {f"dataset.{at}.weight": weight for at, weight in enumerate(found) if weight is not None}


def with_weights(dataset: Any, weights: Mapping[str, Any]) -> Any:
    """Return a dumped `dataset` with weights set by dotted key.

    Raises:
        ConfigError: an entry does not exist, or has no weight.
    """
    known = weights_of(dataset)
    for key in weights:
        if key not in known:
            there = f"Those with a weight: {', '.join(known)}." if known else "No data set has a weight."
            raise ConfigError(f"{key}: there is no such weight. {there} Entries are counted from 0.")
    return [
        {**entry, "weight": weights.get(f"dataset.{at}.weight", entry["weight"])}  # all have one, or none has
        for at, entry in enumerate(dataset)
    ]

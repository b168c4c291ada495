"""Keys of the training data."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer

from macdrop.errors import ConfigError
from tune.config.messages import build
from tune.config.sections import Strict, Text, UserPath
from tune.config.syntax.yaml_core import brief

Format = Literal["auto", "alpaca", "sharegpt", "messages", "text"]


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

    @model_serializer(mode="wrap")
    def _as_given(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in dump(self).items() if key in self.model_fields_set}


class DataKeys(Strict):
    """The training data, and how rows become tokens."""

    dataset: UserPath | list[UserPath | DatasetEntry] = Field(
        default="zoo:train",
        description=(
            "A Hub id, a local file, a folder, a pattern such as `data/*.jsonl`, or `zoo:train`; or a list of these "
            "or of `{path, format, split, name, max_samples}`."
        ),
    )
    format: Format = Field(
        default="auto",
        description="Row format: `alpaca`, `sharegpt`, `messages` or `text`; `auto` detects it from the columns.",
    )
    template: Literal["auto", "alpaca", "chat"] = Field(
        default="auto",
        description=(
            "Prompt template: `alpaca`, `chat` (the tokenizer's chat template), or `auto` (the chat template if "
            "there is one, else alpaca)."
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
    bad_rows: Literal["refuse", "skip"] = Field(
        default="refuse",
        description=(
            "Rows that cannot be trained on as they are written (no question first, tool calls, a text that the chat "
            "template leaves out): `refuse` ends with the first one, `skip` leaves them out and reports their number."
        ),
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

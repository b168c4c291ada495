"""The strict base of every model of the configuration, and field types that several of them share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Strict(BaseModel):
    """A model without unknown keys, in which no value of another type passes: true is not 1, "8" is not 8."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=(), validate_default=True
    )


#: A text that is not empty.
Text = Annotated[str, Field(min_length=1)]

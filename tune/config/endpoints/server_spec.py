"""The block `eval.generation_server:`: the server that decodes the answers of `generation`."""

from __future__ import annotations

import string
from typing import Any, Literal

from pydantic import Field, model_validator

from tune.config.endpoints.address import Address, KeyName, without_key
from tune.config.sections import Strict, Text

#: What the name of an adapter may be made of.
PLACEHOLDERS = ("model", "trial")


class GenerationServer(Strict):
    """An OpenAI-compatible server with the base model of the run, which adapters are named to in each request."""

    base_url: Address = Field(description="Address of the server, for example http://127.0.0.1:8000/v1.")
    model: Text = Field(description="The server's name for the base model.")
    adapters: Literal["vllm", "sglang", "named"] = Field(
        default="vllm",
        description=(
            "How an adapter gets there: `vllm` and `sglang` load its folder, which the server has to see, at run time "
            "(LoRA only); `named` requests what is served under `adapter_name`, such as a merged DoRA model."
        ),
    )
    adapter_name: Text | None = Field(
        default=None,
        description="For `named`: the name to request for an adapter; may hold `{model}` and `{trial}`.",
    )
    api_key_env: KeyName = Field(
        default="OPENAI_API_KEY", description="Name of the environment variable that holds the server's key."
    )
    request_retries: int = Field(
        default=5,
        ge=0,
        description="Retries, with backoff, of failed requests: 429, 5xx, connection errors, time-outs.",
    )
    timeout_s: float = Field(default=600.0, gt=0, description="Time limit of one request in seconds.")
    max_concurrent: int = Field(default=32, ge=1, description="Maximum number of concurrent requests per actor.")
    compared: int = Field(
        default=1,
        ge=0,
        description=(
            "Answers per benchmark and adapter that the evaluation actor decodes as well; a note tells of those that "
            "differ. `0` compares none."
        ),
    )

    @model_validator(mode="before")
    @classmethod
    def _no_key(cls, value: Any) -> Any:
        return without_key(value)

    @model_validator(mode="after")
    def _names_fit(self) -> GenerationServer:
        if (self.adapters == "named") != (self.adapter_name is not None):
            raise ValueError(
                "adapter_name and adapters: named belong together: it is the name to request for an adapter, for "
                "example '{trial}'"
            )
        try:
            found = [name for _, name, _, _ in string.Formatter().parse(self.adapter_name or "") if name is not None]
        except ValueError as error:
            raise ValueError(f"adapter_name {self.adapter_name!r}: {error}") from None
        if wrong := next((name for name in found if name not in PLACEHOLDERS), None):
            allowed = " and ".join(f"{{{name}}}" for name in PLACEHOLDERS)
            raise ValueError(f"adapter_name has {{{wrong}}}; allowed are {allowed}")
        return self

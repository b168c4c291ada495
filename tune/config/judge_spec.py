"""The block `eval.judge:`: the model that scores generated answers from 1 to 5, its rubric, and its settings."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from tune.config.endpoints.address import Address, KeyName, without_key
from tune.config.sections import Location, Strict

#: Keys that apply to a local model only, or to an endpoint only.
LOCAL_KEYS = ("batch_size", "bf16", "trust_remote_code", "long_prompts")
ENDPOINT_KEYS = ("api_key_env", "request_retries", "timeout_s", "max_concurrent", "token_limit")


class JudgeSpec(Strict):
    """A local causal language model, or with `base_url` a model behind an OpenAI-compatible endpoint."""

    model: Location = Field(description="Hub id or folder of a local model, or the endpoint's name for its model.")
    base_url: Address | None = Field(
        default=None, description="Address of an OpenAI-compatible endpoint; `null` loads the model locally."
    )
    api_key_env: KeyName = Field(
        default="OPENAI_API_KEY", description="Name of the environment variable that holds the endpoint's key."
    )
    revision: str | None = Field(default=None, description="Branch, tag or commit of a Hub model.")
    rubric: Location = Field(
        default="spec_bench",
        description="Scoring rubric: `spec_bench`, `helpfulness`, `correctness`, or the path of a YAML file.",
    )
    reference: bool = Field(default=True, description="Show the judge the reference answer if the row has one.")
    max_new_tokens: int = Field(default=512, ge=1, description="Maximum number of tokens of feedback and score.")
    temperature: float | None = Field(
        default=0.0,
        ge=0,
        description="Sampling temperature of the first attempt; `null` (endpoints only) uses the endpoint's default.",
    )
    retries: int = Field(default=2, ge=0, description="Further attempts for an answer whose score cannot be parsed.")
    retry_temperature: float = Field(default=1.0, gt=0, description="Sampling temperature of these attempts, above 0.")
    seed: int = Field(default=0, ge=0, lt=2**31, description="Sampling seed.")
    request_retries: int = Field(
        default=5,
        ge=0,
        description="Retries, with backoff, of failed requests: 429, 5xx, connection errors, time-outs.",
    )
    timeout_s: float = Field(default=120.0, gt=0, description="Time limit of one request in seconds.")
    max_concurrent: int = Field(default=8, ge=1, description="Maximum number of concurrent requests.")
    token_limit: Literal["max_tokens", "max_completion_tokens"] = Field(
        default="max_tokens",
        description="The endpoint's name for the token limit: `max_tokens` or `max_completion_tokens`.",
    )
    batch_size: int = Field(default=8, ge=1, description="Prompts per batch of a local model.")
    bf16: bool = Field(default=False, description="Load a local model in bfloat16.")
    trust_remote_code: bool = Field(default=False, description="Run Python code that ships with a local model.")
    long_prompts: Literal["refuse", "cut"] = Field(
        default="refuse",
        description="Prompts longer than a local model's context: `refuse` them, or `cut` them on the left.",
    )

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"model": value}
        return without_key(value)

    @model_validator(mode="after")
    def _keys_fit(self) -> JudgeSpec:
        foreign, where = (LOCAL_KEYS, "a local model") if self.base_url else (ENDPOINT_KEYS, "an endpoint (base_url)")
        set_ = [key for key in foreign if getattr(self, key) != type(self).model_fields[key].default]
        if set_:
            raise ValueError(f"{', '.join(set_)}: of use for {where} only; leave it out")
        if self.base_url is None and self.temperature is None:
            raise ValueError("temperature null is for an endpoint only (base_url); give a number, 0 for greedy")
        return self

"""Greedy answers by a server that holds the base model, with adapters named in each request.

Prompts are sent as token ids and come back as token ids, so that the server's tokenizer and chat template play no part;
where an answer ends is decided here, by the rules of our own decoding.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from macdrop.errors import ConfigError, nearest
from tune.config.endpoints.server_spec import GenerationServer
from tune.config.train_spec import slug
from tune.errors import BenchmarkError
from tune.evaluation.decode import Answer, Ends
from tune.evaluation.endpoints.endpoint_client import EndpointClient

#: Requests that load and unload an adapter, below the address (vLLM) or beside its /v1 (SGLang).
LOAD, UNLOAD = "load_lora_adapter", "unload_lora_adapter"


@dataclass(frozen=True)
class Decoding:
    """The limits of an answer: `max_new_tokens`, and its ends."""

    ends: Ends
    max_new_tokens: int

    @property
    def stop(self) -> list[str]:
        """Texts at which the server may stop; inside a thought they mean nothing, so an opened one has none."""
        return [] if self.ends.opened else [*([self.ends.mark] if self.ends.mark else []), *self.ends.stop]


class ServedModel:
    """The server's model, with one adapter at a time.

    The name of a loaded adapter is the client's own, so that actors which score the same one do not meet.
    """

    def __init__(self, spec: GenerationServer) -> None:
        self.spec = spec
        self._client = EndpointClient(spec, who="server", block="eval.generation_server", path="/completions")
        self._id = uuid.uuid4().hex[:8]
        self._name = spec.model
        self._loaded: str | None = None

    def check(self) -> None:
        """Ask the server for its models.

        Raises:
            ConfigError: it does not serve the base model, or refuses the key. BenchmarkError: it does not answer.
        """
        self._client.stopped.clear()
        reply, error = self._client.request(lambda client: client.models.with_raw_response.list())
        if reply is None:
            raise BenchmarkError(f"{self._client.title} does not list its models: {error}.")
        try:
            names = [model["id"] for model in json.loads(reply.http_response.text)["data"]]
        except (ValueError, KeyError, TypeError):
            raise BenchmarkError(f"{self._client.title} does not list its models as OpenAI's does.") from None
        if self.spec.model not in names:
            raise ConfigError(
                f"{self._client.title} serves no model {self.spec.model!r}.{nearest(self.spec.model, names)} It has "
                f"{', '.join(names) or 'none'}. Set eval.generation_server.model."
            )

    @contextmanager
    def adapter(self, folder: str | Path | None) -> Iterator[None]:
        """Let requests inside the block be answered with the adapter of a folder, None for the base.

        Raises:
            ConfigError: the server cannot have it. BenchmarkError: the server does not load it.
        """
        try:
            if folder is not None:
                self._name = self._named(Path(folder).absolute())
            yield
        finally:
            if self._loaded is not None:
                with suppress(BenchmarkError):  # the server is gone, and the adapter with it
                    self._post(UNLOAD, {"lora_name": self._loaded})
            self._loaded, self._name = None, self.spec.model

    def _named(self, folder: Path) -> str:
        trial = folder.parent.name if folder.name == "adapter" else folder.name
        if self.spec.adapters == "named":
            return str(self.spec.adapter_name).format(model=self.spec.model, trial=trial)
        try:
            settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as unread:
            raise ConfigError(f"{folder} holds no adapter that can be read: {unread}") from None
        if settings.get("use_dora"):
            raise ConfigError(
                f"The adapter in {folder} is DoRA, which {self.spec.adapters} does not load. Serve the merged model "
                "(macdrop export --merged) with adapters: named, or leave generation_server out."
            )
        name = f"{slug(trial)}-{self._id}"
        error = self._post(LOAD, {"lora_name": name, "lora_path": str(folder)})
        if error and "already" not in error:
            raise BenchmarkError(
                f"{self._client.title} does not load the adapter in {folder}: {error}.\nThe server has to see this "
                f"folder, and to allow adapters at run time ({_ALLOWED[self.spec.adapters]})."
            )
        self._loaded = name
        return name if self.spec.adapters == "vllm" else f"{self.spec.model}:{name}"

    def _post(self, what: str, body: dict[str, str]) -> str:
        """Send a request on adapters; return the error, empty without one."""
        self._client.stopped.clear()
        root = self.spec.base_url.removesuffix("/v1") if self.spec.adapters == "sglang" else self.spec.base_url
        try:
            return self._client.request(lambda client: client.post(f"{root}/{what}", cast_to=str, body=body))[1]
        except ConfigError as error:
            return str(error).partition("\n")[0].rstrip(".")

    def answers(self, prompts: Sequence[Sequence[int]], decoding: Decoding) -> list[Answer]:
        """Answer prompts of token ids greedily, in their order.

        Raises:
            ConfigError: the server lacks the model, or refuses the key.
            BenchmarkError: the server cannot be reached, or a request fails for good.
        """
        found: dict[int, Answer] = {}
        for number, answer in self._client.each(
            range(len(prompts)), lambda number: (number, self._answer(prompts[number], decoding))
        ):
            found[number] = answer
        return [found[number] for number in range(len(prompts))]

    def _answer(self, prompt: Sequence[int], decoding: Decoding) -> Answer:
        extra: dict[str, Any] = {
            "stop_token_ids": sorted(decoding.ends.ids),
            "return_token_ids": True,
            "skip_special_tokens": False,
        }
        options: dict[str, Any] = {"max_tokens": decoding.max_new_tokens, "temperature": 0.0, "extra_body": extra}
        options |= {"stop": decoding.stop} if decoding.stop else {}
        reply, error = self._client.request(
            lambda client: client.completions.with_raw_response.create(model=self._name, prompt=list(prompt), **options)
        )
        if reply is None:
            raise BenchmarkError(f"{self._client.title} did not answer: {error}.")
        return self._read(reply.http_response.text, decoding)

    def _read(self, body: str, decoding: Decoding) -> Answer:
        try:
            choice = json.loads(body)["choices"][0]
            reason, tokens = choice["finish_reason"], choice.get("token_ids")
            stopped_by = choice.get("stop_reason", choice.get("matched_stop"))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise BenchmarkError(f"{self._client.title} sent no completion: {body[:80]!r}.") from None
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise ConfigError(
                f"{self._client.title} sent no token_ids, which return_token_ids asks for. vLLM from 0.10.2 and "
                "current SGLang have them; other servers cannot be used."
            )
        answer = decoding.ends.answer(tokens)
        if reason == "stop" and answer.ended == "length" and decoding.ends.ids:
            # A server may leave the token out that ended the answer.
            last = stopped_by if stopped_by in decoding.ends.ids else min(decoding.ends.ids)
            answer = decoding.ends.answer([*tokens, last])
        return answer


_ALLOWED = {
    "vllm": "vllm serve --enable-lora with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, and --max-lora-rank",
    "sglang": "--enable-lora with --max-lora-rank and --lora-target-modules",
}

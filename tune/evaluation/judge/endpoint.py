"""A judge behind an OpenAI-compatible endpoint: bounded concurrency, retries with backoff, no answer lost."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

from tune.config.judge_spec import JudgeSpec
from tune.errors import BenchmarkError
from tune.evaluation.endpoints.endpoint_client import EndpointClient
from tune.evaluation.judge.prompt import Judgement, Question, Reply, assess

#: Judging ends after this many failed answers in a row.
GIVE_UP_AFTER = 10
#: Seconds before an unreadable reply is requested again: doubled each time, up to the second number.
BACKOFF_S = (0.5, 8.0)


class EndpointJudge:
    """A judge that asks `spec.model` at `spec.base_url`.

    Raises:
        ConfigError: the environment variable named for the key is not set.
    """

    def __init__(self, spec: JudgeSpec) -> None:
        self.spec = spec
        self.revision = spec.revision
        self._client = EndpointClient(spec, who="judge", block="eval.judge", path="/chat/completions")

    def judge(self, asked: Sequence[Question]) -> Iterator[Judgement]:
        """Yield judgements in the order they come; a failed answer is a judgement with an error.

        Raises:
            ConfigError: the endpoint refuses the key, or does not know the model.
            BenchmarkError: the endpoint cannot be reached, or fails repeatedly.
        """
        failed = 0
        with closing(self._client.each(asked, self._one)) as judgements:
            for judgement in judgements:
                failed = failed + 1 if judgement.error else 0
                yield judgement
                if failed >= GIVE_UP_AFTER:
                    raise BenchmarkError(
                        f"{self._client.title} gave no answer {failed} times in a row; the last time: "
                        f"{judgement.error}."
                    )

    def _one(self, question: Question) -> Judgement:
        return assess([question], self._ask, self.spec.retries)[0]

    def _ask(self, asked: Sequence[Question], attempt: int) -> list[Reply]:
        return [self._reply(question, attempt) for question in asked]

    def _reply(self, question: Question, attempt: int) -> Reply:
        """Return one answer; unreadable replies are retried like failed requests, and the last error is reported."""
        wrong = ""
        for again in range(self.spec.request_retries + 1):
            pause = min(BACKOFF_S[0] * 2 ** (again - 1), BACKOFF_S[1]) * random.uniform(0.75, 1)
            if again and self._client.stopped.wait(pause):
                break
            body, error = self._request(question, attempt)
            if error:
                return Reply(error=error)
            try:
                return _answer(body)
            except (KeyError, IndexError, TypeError, ValueError) as unreadable:
                wrong = f"no chat completion came back ({type(unreadable).__name__}: {unreadable}): {body[:80]!r}"
        return Reply(error=wrong or "stopped")

    def _request(self, question: Question, attempt: int) -> tuple[str, str]:
        """Return the body of the reply, and an error of this question alone.

        Raises:
            ConfigError, BenchmarkError: an error that every question would meet.
        """
        spec = self.spec
        temperature = spec.retry_temperature if attempt else spec.temperature
        options: dict[str, Any] = {spec.token_limit: spec.max_new_tokens}
        options |= {} if temperature is None else {"temperature": temperature}
        options |= {"seed": spec.seed + attempt} if attempt else {}
        reply, error = self._client.request(
            lambda client: client.chat.completions.with_raw_response.create(
                model=spec.model, messages=[{"role": "user", "content": question.prompt}], **options
            )
        )
        return ("" if reply is None else reply.http_response.text), error

    def close(self) -> None:
        self._client.close()


def _answer(body: str) -> Reply:
    """Return the first choice of a chat completion; raise if the body is not one. An empty answer is valid."""
    completion = json.loads(body)
    text = completion["choices"][0]["message"]["content"]
    if not isinstance(text, str | None):
        raise TypeError(f"content is a {type(text).__name__}")
    usage = completion.get("usage") or {}
    tokens = (int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))
    served = {key: str(completion[key]) for key in ("model", "system_fingerprint") if completion.get(key)}
    return Reply(text or "", tokens=tokens, served=served)

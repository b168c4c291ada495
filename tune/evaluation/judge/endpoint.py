"""A judge behind an OpenAI-compatible endpoint: bounded concurrency, retries with backoff, no answer lost."""

from __future__ import annotations

import json
import logging
import os
import random
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from macdrop.errors import ConfigError, MacDropError
from tune.config.judge_spec import JudgeSpec
from tune.errors import BenchmarkError
from tune.evaluation.judge.prompt import Judgement, Question, Reply, assess
from tune.storage.places import direct_loopback, without_password

#: Judging ends after this many failed answers in a row.
GIVE_UP_AFTER = 10
#: Seconds before an unreadable reply is requested again: doubled each time, up to the second number.
BACKOFF_S = (0.5, 8.0)
_CLIENT_LOGGERS = ("openai", "httpx", "httpx2", "httpcore")


class EndpointJudge:
    """A judge that asks `spec.model` at `spec.base_url`.

    The `openai` client retries 408, 409, 429, 5xx, lost connections and timeouts; it honours Retry-After and otherwise
    backs off exponentially.

    Raises:
        ConfigError: the environment variable named for the key is not set.
    """

    def __init__(self, spec: JudgeSpec) -> None:
        import openai

        self.spec = spec
        self.revision = spec.revision
        key = os.environ.get(spec.api_key_env)
        if key is None and spec.api_key_env != JudgeSpec.model_fields["api_key_env"].default:
            raise ConfigError(
                f"eval.judge.api_key_env names {spec.api_key_env}, and this environment variable is not set."
            )
        self._has_key = key is not None
        self._stop = threading.Event()
        for name in _CLIENT_LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)
        direct_loopback()
        # Self-hosted endpoints need no key, but the client requires one.
        self._client = openai.OpenAI(
            base_url=spec.base_url, api_key=key or "none", timeout=spec.timeout_s, max_retries=spec.request_retries
        )

    def judge(self, asked: Sequence[Question]) -> Iterator[Judgement]:
        """Yield judgements in the order they come; a failed answer is a judgement with an error.

        Raises:
            ConfigError: the endpoint refuses the key, or does not know the model.
            BenchmarkError: the endpoint cannot be reached, or fails repeatedly.
        """
        waiting = iter(asked)
        failed = 0
        self._stop.clear()
        pool = ThreadPoolExecutor(self.spec.max_concurrent, thread_name_prefix="judge")
        running: set[Future[Judgement]] = set()
        try:
            while True:
                # More than there are threads, so that none of them is idle.
                while len(running) < 2 * self.spec.max_concurrent and (question := next(waiting, None)):
                    running.add(pool.submit(self._one, question))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                # Finished judgements are yielded before an error of another request ends the judging.
                for future in sorted(done, key=lambda future: future.exception() is not None):
                    judgement = future.result()
                    failed = failed + 1 if judgement.error else 0
                    yield judgement
                    if failed >= GIVE_UP_AFTER:
                        raise BenchmarkError(
                            f"The judge at {self.spec.base_url} gave no answer {failed} times in a row; the last time: "
                            f"{judgement.error}."
                        )
        finally:
            self._stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _one(self, question: Question) -> Judgement:
        return assess([question], self._ask, self.spec.retries)[0]

    def _ask(self, asked: Sequence[Question], attempt: int) -> list[Reply]:
        return [self._reply(question, attempt) for question in asked]

    def _reply(self, question: Question, attempt: int) -> Reply:
        """Return one answer; unreadable replies are retried like failed requests, and the last error is reported."""
        wrong = ""
        for again in range(self.spec.request_retries + 1):
            if again and self._stop.wait(min(BACKOFF_S[0] * 2 ** (again - 1), BACKOFF_S[1]) * random.uniform(0.75, 1)):
                break
            body, error = self._request(question, attempt)
            if error:
                return Reply(error=error)
            try:
                return _answer(body)
            except (KeyError, IndexError, TypeError, ValueError) as unreadable:
                wrong = f"no chat completion came back ({type(unreadable).__name__}: {unreadable}): {body[:80]!r}"
        return Reply(error=wrong or "stopped")

    def _request(self, question: Question, attempt: int) -> tuple[str, str | None]:
        """Return the body of the reply, or an error of this question alone.

        Raises:
            ConfigError, BenchmarkError: an error that every question would meet.
        """
        import openai

        spec = self.spec
        temperature = spec.retry_temperature if attempt else spec.temperature
        options: dict[str, Any] = {spec.token_limit: spec.max_new_tokens}
        options |= {} if temperature is None else {"temperature": temperature}
        options |= {"seed": spec.seed + attempt} if attempt else {}
        if self._stop.is_set():
            return "", "stopped"
        started = time.monotonic()
        try:
            raw = self._client.chat.completions.with_raw_response.create(
                model=spec.model, messages=[{"role": "user", "content": question.prompt}], **options
            )
            return raw.http_response.text, None
        except openai.APITimeoutError:
            return "", f"no answer in {spec.timeout_s:g} s, {spec.request_retries + 1} times"
        except openai.APIConnectionError as error:
            raise BenchmarkError(
                f"The judge at {spec.base_url} cannot be reached ({error.__cause__ or error}); tried "
                f"{spec.request_retries + 1} times in {time.monotonic() - started:.0f} s. {_remedy(spec.base_url)}"
            ) from None
        except openai.APIStatusError as error:
            fatal = self._fatal(error)
            if fatal:
                raise fatal from None
            return "", f"HTTP {error.status_code}: {_server_message(error)}"

    def _fatal(self, error: Any) -> MacDropError | None:
        """Return the error that ends the judging, for a status that every request would get."""
        status, spec = error.status_code, self.spec
        if status in (401, 403):
            given = f"in {spec.api_key_env}" if self._has_key else f"({spec.api_key_env} is not set)"
            return ConfigError(
                f"The judge at {spec.base_url} refuses the key {given}: HTTP {status}, {_server_message(error)}.\n"
                "Export the right key, or name another environment variable by eval.judge.api_key_env."
            )
        if status == 404:
            return ConfigError(
                f"The judge at {spec.base_url} has no model {spec.model!r}, or no chat completions there: HTTP 404, "
                f"{_server_message(error)}.\nbase_url ends where /chat/completions follows, most often in /v1."
            )
        if status == 429 and getattr(error, "code", None) == "insufficient_quota":
            return BenchmarkError(
                f"The judge at {spec.base_url} has no quota left for this key: {_server_message(error)}."
            )
        return None

    def close(self) -> None:
        self._stop.set()
        self._client.close()


def _remedy(address: str | None) -> str:
    """Return what to do about an endpoint that does not answer; a proxy that requests to it go through is named."""
    parts = urllib.parse.urlsplit(address or "")
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy or urllib.request.proxy_bypass(parts.hostname or ""):
        return "Is the server up?"
    return (
        f"Requests go through the proxy {without_password(proxy)}. If it does not serve this address: "
        f"export NO_PROXY={parts.hostname}"
    )


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


def _server_message(error: Any) -> str:
    """Return the server's message on one line."""
    body = error.body
    message = body.get("message") if isinstance(body, dict) else None
    return " ".join(str(message or error.message).split())[:200].rstrip(".")

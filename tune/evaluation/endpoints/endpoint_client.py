"""Client of an OpenAI-compatible endpoint: bounded concurrency, retries with backoff, errors that say what to do."""

from __future__ import annotations

import logging
import os
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from macdrop.errors import ConfigError, MacDropError
from tune.errors import BenchmarkError
from tune.storage.places import direct_loopback, without_password

if TYPE_CHECKING:
    import openai

T = TypeVar("T")
R = TypeVar("R")
DEFAULT_KEY = "OPENAI_API_KEY"
_CLIENT_LOGGERS = ("openai", "httpx", "httpx2", "httpcore")


class Endpoint(Protocol):
    """Settings of an endpoint."""

    @property
    def base_url(self) -> str | None: ...
    @property
    def model(self) -> str: ...
    @property
    def api_key_env(self) -> str: ...
    @property
    def request_retries(self) -> int: ...
    @property
    def timeout_s(self) -> float: ...
    @property
    def max_concurrent(self) -> int: ...


class EndpointClient:
    """A client of one endpoint.

    The `openai` client retries 408, 409, 429, 5xx, lost connections and timeouts; it honours Retry-After and otherwise
    backs off exponentially.

    Args:
        spec: its settings.
        who: its name in messages, such as "judge".
        block: its block in a run file, such as "eval.judge".
        path: of its requests below the address.

    Raises:
        ConfigError: the environment variable named for the key is not set.
    """

    def __init__(self, spec: Endpoint, *, who: str, block: str, path: str) -> None:
        import openai

        self.spec, self._block, self._path = spec, block, path
        #: The endpoint in messages.
        self.title = f"The {who} at {spec.base_url}"
        key = os.environ.get(spec.api_key_env)
        if key is None and spec.api_key_env != DEFAULT_KEY:
            raise ConfigError(
                f"{block}.api_key_env names {spec.api_key_env}, and this environment variable is not set."
            )
        self._has_key = key is not None
        self._who = who
        self.stopped = threading.Event()
        for name in _CLIENT_LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)
        direct_loopback()
        # Self-hosted endpoints need no key, but the client requires one.
        self._client = openai.OpenAI(
            base_url=spec.base_url, api_key=key or "none", timeout=spec.timeout_s, max_retries=spec.request_retries
        )

    def each(self, work: Iterable[T], do: Callable[[T], R]) -> Generator[R, None, None]:
        """Yield the results of `do` in the order they come, `max_concurrent` at a time; an error of one ends all."""
        waiting = iter(work)
        self.stopped.clear()
        pool = ThreadPoolExecutor(self.spec.max_concurrent, thread_name_prefix=self._who.replace(" ", "-"))
        running: set[Future[R]] = set()
        try:
            while True:
                # More than there are threads, so that none of them is idle.
                while len(running) < 2 * self.spec.max_concurrent:
                    try:
                        running.add(pool.submit(do, next(waiting)))
                    except StopIteration:
                        break
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                # Finished results are yielded before an error of another request ends the work.
                for future in sorted(done, key=lambda future: future.exception() is not None):
                    yield future.result()
        finally:
            self.stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def request(self, call: Callable[[openai.OpenAI], T]) -> tuple[T | None, str]:
        """Return the reply to one request, or None and an error of this request alone.

        Raises:
            ConfigError, BenchmarkError: an error that every request would meet.
        """
        import openai

        spec = self.spec
        if self.stopped.is_set():
            return None, "stopped"
        started = time.monotonic()
        try:
            return call(self._client), ""
        except openai.APITimeoutError:
            return None, f"no answer in {spec.timeout_s:g} s, {spec.request_retries + 1} times"
        except openai.APIConnectionError as error:
            raise BenchmarkError(
                f"{self.title} cannot be reached ({error.__cause__ or error}); tried "
                f"{spec.request_retries + 1} times in {time.monotonic() - started:.0f} s. {_remedy(spec.base_url)}"
            ) from None
        except openai.APIStatusError as error:
            fatal = self._fatal(error)
            if fatal:
                raise fatal from None
            return None, f"HTTP {error.status_code}: {_server_message(error)}"

    def _fatal(self, error: Any) -> MacDropError | None:
        """Return the error that ends the work, for a status that every request would get."""
        status, spec = error.status_code, self.spec
        if status in (401, 403):
            given = f"in {spec.api_key_env}" if self._has_key else f"({spec.api_key_env} is not set)"
            return ConfigError(
                f"{self.title} refuses the key {given}: HTTP {status}, {_server_message(error)}.\n"
                f"Export the right key, or name another environment variable by {self._block}.api_key_env."
            )
        if status == 404:
            return ConfigError(
                f"{self.title} has no model {spec.model!r}, or no {self._path.strip('/').replace('/', ' ')} there: "
                f"HTTP 404, {_server_message(error)}.\nbase_url ends where {self._path} follows, most often in /v1."
            )
        if status == 429 and getattr(error, "code", None) == "insufficient_quota":
            return BenchmarkError(f"{self.title} has no quota left for this key: {_server_message(error)}.")
        return None

    def close(self) -> None:
        self.stopped.set()
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


def _server_message(error: Any) -> str:
    """Return the server's message on one line."""
    body = error.body
    message = body.get("message") if isinstance(body, dict) else None
    return " ".join(str(message or error.message).split())[:200].rstrip(".")

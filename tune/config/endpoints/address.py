"""Addresses of OpenAI-compatible endpoints, and names of the variables with their keys; neither may hold a secret."""

from __future__ import annotations

import re
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator


def endpoint_address(given: str) -> str:
    """Return the address of an endpoint as it is kept: without a slash at the end, and without the path of requests."""
    return given.rstrip("/").removesuffix("/chat/completions").removesuffix("/completions")


def _address(value: str) -> str:
    parts = urlsplit(value)
    if parts.username or parts.password:
        raise ValueError("has a password in it, and would be kept with every score; use api_key_env")
    if "?" in value or "#" in value:  # never shows the value: it may hold a key
        raise ValueError("has a query in it, which would be kept with every score; for a key use api_key_env")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"must be an address such as http://127.0.0.1:8000/v1, not {value!r}")
    return endpoint_address(value)


def _key_name(value: str) -> str:
    secret = any(len(part) > 20 or (len(part) > 11 and re.search(r"\d", part)) for part in value.split("_"))
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value) and not secret:
        return value
    raise ValueError(  # never shows the value: it may be a key
        "must be the name of an environment variable, such as OPENAI_API_KEY; the value is not such a name, and "
        "looks like a key. If it is one, take it out of the file."
    )


def without_key(value: Any) -> Any:
    """Return the keys of an endpoint as they are.

    Raises:
        ValueError: there is a key itself among them.
    """
    if isinstance(value, dict) and "api_key" in value:
        raise ValueError(
            "unknown key api_key: a secret does not belong in a run file, which is copied into every run folder.\n"
            "Put it into an environment variable and name that: api_key_env: OPENAI_API_KEY."
        )
    return value


#: The address of an endpoint, as `endpoint_address` returns it.
Address = Annotated[str, AfterValidator(_address)]
#: The name of an environment variable that holds a key.
KeyName = Annotated[str, AfterValidator(_key_name)]

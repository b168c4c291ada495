"""Findings about a launch file, and the checks that all formats share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.core.launch_file import LaunchFile
from cluster.errors import nearest

ERROR, NOTE = "error", "note"

#: Milliseconds of Ray's keepalive above which an unreachable host costs minutes.
KEEPALIVE_MS = 60_000
KEEPALIVE = ("RAY_grpc_client_keepalive_time_ms", "RAY_grpc_client_keepalive_timeout_ms")


@dataclass(frozen=True)
class Finding:
    """One fault. `where`: keys with dots, list indices in brackets, or a line. It never holds the value of a secret."""

    severity: str
    where: str
    what: str
    why: str
    remedy: str


def error(where: str, what: str, why: str, remedy: str) -> Finding:
    return Finding(ERROR, where, what, why, remedy)


def note(where: str, what: str, why: str, remedy: str) -> Finding:
    return Finding(NOTE, where, what, why, remedy)


def place(*parts: str | int) -> str:
    """("a", "b", 0) -> "a.b[0]"; long keys are cut."""
    found = "".join(f"[{part}]" if isinstance(part, int) else f".{str(part)[:60]}" for part in parts)
    return found.removeprefix(".") or "the file"


def unknown_keys(given: Any, known: Iterable[str], where: str, of: str) -> Iterator[Finding]:
    """Keys that nothing reads: mostly typos."""
    known = sorted(known)
    for key in given if isinstance(given, dict) else ():
        if key not in known:
            hint = nearest(key, known).strip()
            yield error(
                f"{where}.{place(key)}".removeprefix("."),
                f"{of} has no key {str(key)[:60]!r}",
                "Ray ignores it silently, or the launch fails late",
                hint or f"one of {', '.join(known[:12])}{', ...' if len(known) > 12 else ''}",
            )


def environment_findings(env: Mapping[str, str], where: str, role: str) -> Iterator[Finding]:
    """Variables that Ray must be started with on every host: keepalive and storage."""
    for name in KEEPALIVE:
        value = env.get(name, "")
        if not value.isdigit() or not 0 < int(value) <= KEEPALIVE_MS:
            yield error(
                where,
                f"{name} is not set low on the {role}",
                "a host that drops off the network would stall a sweep for seven minutes",
                f"export {name}=15000",
            )
    storage = env.get("MACDROP_STORAGE")
    if storage is None:
        yield error(
            where,
            f"MACDROP_STORAGE is not set on the {role}",
            "runs must be in a folder that all hosts share, or no other host can resume them",
            "export MACDROP_STORAGE=/shared",
        )
    elif not storage.startswith("/") or re.match(r"/(tmp|root|home|dev/shm|var/tmp)(/|$)", storage):
        yield error(
            where,
            f"MACDROP_STORAGE on the {role} is not a folder that hosts share",
            "temporary and home folders belong to one host only, and ~ and relative paths differ between users",
            "an absolute path on a file system that all hosts mount",
        )


# --- secrets ---

#: What tokens and keys look like, whatever they are called.
_TOKENS = re.compile(
    r"hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[A-Za-z0-9_-]{20,}|xox[bp]-[\w-]{10,}"
    r"|A(?:KIA|SIA)[0-9A-Z]{16}|AIza[0-9A-Za-z_-]{30,}|-----BEGIN [A-Z ]*PRIVATE KEY-----|eyJ[\w-]{10,}\.eyJ[\w-]{10,}"
)
_NAMES = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY)$", re.IGNORECASE)
#: What a variable with such a name may hold in plain text: another variable, or a path to the value.
_REFERENCE = re.compile(r"|\$.*|[~/].*|true|false|token|disabled|none|null", re.IGNORECASE | re.DOTALL)


def masked(text: str) -> str:
    """Foreign text for a message, without anything that looks like a secret."""
    return _TOKENS.sub("...", text)


def secret_findings(file: LaunchFile) -> Iterator[Finding]:
    """Tokens, keys and passwords in plain text, by what they look like or by the name of their variable."""
    remedy = "remove it, revoke it, and list its NAME in MACDROP_SECRETS: `up` takes the value from your environment"
    why = "the file is copied to hosts and printed in logs: not a place for secrets"
    for number, line in enumerate(file.text.splitlines(), 1):
        if _TOKENS.search(line):
            yield error(f"line {number}", "holds what looks like a token or a private key", why, remedy)
    for name, value in sorted(_named_values(file)):
        if _NAMES.search(name) and not _REFERENCE.fullmatch(value):
            yield error(place(name), f"{name[:60]} has its value in plain text", why, remedy)


def _named_values(file: LaunchFile) -> set[tuple[str, str]]:
    found = set(file.assigned())
    waiting: list[Any] = list(file.documents)
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
            found |= {(str(key), str(inner)) for key, inner in value.items() if isinstance(inner, str | int)}
            if isinstance(value.get("name"), str) and isinstance(value.get("value"), str | int):
                found.add((value["name"], str(value["value"])))
    return found

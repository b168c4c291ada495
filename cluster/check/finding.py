"""What a check finds in a launch file, and where: shared by the checks of all kinds of files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.core.launch_file import ClusterFile, assignments
from cluster.errors import nearest

ERROR, NOTE = "error", "note"

#: Milliseconds of Ray's keepalive beyond which a host that is cut off costs minutes.
KEEPALIVE_MS = 60_000
KEEPALIVE = ("RAY_grpc_client_keepalive_time_ms", "RAY_grpc_client_keepalive_timeout_ms")


@dataclass(frozen=True)
class Finding:
    """`where`: keys with dots, list places in brackets, or a line. Nowhere does a secret's value stand in it."""

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
    """("a", "b", 0) -> "a.b[0]"; what comes from the file is cut, so that it cannot fill a terminal."""
    found = "".join(f"[{part}]" if isinstance(part, int) else f".{str(part)[:60]}" for part in parts)
    return found.removeprefix(".") or "the file"


def unknown_keys(given: Any, known: Iterable[str], where: str, of: str) -> Iterator[Finding]:
    """Keys that nothing reads: typos, most of all."""
    known = sorted(known)
    for key in given if isinstance(given, dict) else ():
        if key not in known:
            hint = nearest(key, known).strip()
            yield error(
                f"{where}.{place(key)}".removeprefix("."),
                f"{of} has no key {str(key)[:60]!r}",
                "Ray passes over it in silence, or the launch fails late",
                hint or f"one of {', '.join(known[:12])}{', ...' if len(known) > 12 else ''}",
            )


def environment_findings(env: Mapping[str, str], where: str, role: str) -> Iterator[Finding]:
    """What the variables that Ray is started with must hold, on every host: keepalive and storage."""
    for name in KEEPALIVE:
        value = env.get(name, "")
        if not value.isdigit() or not 0 < int(value) <= KEEPALIVE_MS:
            yield error(
                where,
                f"{name} is not set low on the {role}",
                "a host that drops off the network would cost a sweep seven minutes",
                f"export {name}=15000",
            )
    storage = env.get("MACDROP_STORAGE")
    if storage is None:
        yield error(
            where,
            f"MACDROP_STORAGE is not set on the {role}",
            "runs must lie in a folder that all hosts share, or no other host can go on with them",
            "export MACDROP_STORAGE=/shared",
        )
    elif not storage.startswith("/") or re.match(r"/(tmp|root|home|dev/shm|var/tmp)(/|$)", storage):
        yield error(
            where,
            f"MACDROP_STORAGE on the {role} is no folder that hosts share",
            "temporary and home folders belong to one host alone, and ~ and relative paths differ between users",
            "an absolute path on a file system that all hosts mount",
        )


# --- secrets ---

#: What tokens and keys look like, whatever their name.
_TOKENS = re.compile(
    r"hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|sk-[A-Za-z0-9_-]{20,}|xox[bp]-[\w-]{10,}"
    r"|A(?:KIA|SIA)[0-9A-Z]{16}|AIza[0-9A-Za-z_-]{30,}|-----BEGIN [A-Z ]*PRIVATE KEY-----|eyJ[\w-]{10,}\.eyJ[\w-]{10,}"
)
_NAMES = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY)$", re.IGNORECASE)
#: What a variable with such a name may hold in the clear: another variable, or a path to the value.
_REFERENCE = re.compile(r"|\$.*|[~/].*|true|false|token|disabled|none|null", re.IGNORECASE | re.DOTALL)


def masked(text: str) -> str:
    """Text of others, for a message, without what looks like a secret."""
    return _TOKENS.sub("...", text)


def secret_findings(file: ClusterFile) -> Iterator[Finding]:
    """Tokens, keys and passwords in the clear, by what they look like or by the name they are given to."""
    remedy = "take it out, revoke it, and list its NAME in MACDROP_SECRETS: `up` takes the value from your environment"
    why = "the file is copied to hosts and printed in logs; it is no place for secrets"
    for number, line in enumerate(file.text.splitlines(), 1):
        if _TOKENS.search(line):
            yield error(f"line {number}", "holds what looks like a token or a private key", why, remedy)
    for name, value in sorted(_named_values(file)):
        if _NAMES.search(name) and not _REFERENCE.fullmatch(value):
            yield error(place(name), f"{name[:60]} has its value in the clear", why, remedy)


def _named_values(file: ClusterFile) -> set[tuple[str, str]]:
    found = set(assignments(file.shell).items()) if file.kind != "kuberay" else set()
    found |= {(name, value) for name, value in _export_directives(file)}
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


def _export_directives(file: ClusterFile) -> Iterator[tuple[str, str]]:
    for word in file.directives.get("export", "").split(","):
        name, equals, value = word.partition("=")
        if equals:
            yield name, value

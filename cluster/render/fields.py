"""Answers that a launch file is made from: what each may be, and reading key=value words into checked values."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import BadLaunchFile, nearest

#: No answer is longer: everything beyond is a slip or an attack.
LONGEST = 1000


class Required:
    """Default of an answer that must be given."""


@dataclass(frozen=True)
class Like:
    """Default of an answer that is the same as another answer."""

    name: str


@dataclass(frozen=True)
class Answer:
    """One question. `kind`: key of KINDS; `many`: a list with commas; `allowed`: the only values, if any."""

    name: str
    kind: str
    help: str
    default: Any = Required
    example: str = ""
    many: bool = False
    allowed: tuple[str, ...] = ()

    def read(self, text: str) -> Any:
        """The value that `text` means. Raises BadLaunchFile: what is allowed, and the nearest of it."""
        if self.many:
            found = tuple(self._one(word.strip()) for word in text.split(",") if word.strip())
            if len(set(found)) < len(found):
                raise BadLaunchFile(f"{self.name}={_shown(text)} names one twice.")
            return found
        return self._one(text)

    def _one(self, text: str) -> Any:
        if self.allowed:
            if text not in self.allowed:
                hint = nearest(text, self.allowed)
                raise BadLaunchFile(f"{self.name}={_shown(text)}: must be one of {', '.join(self.allowed)}.{hint}")
            return text
        kind = KINDS[self.kind]
        try:
            if len(text) <= LONGEST and text.isprintable():
                return kind.read(text)
        except ValueError:
            pass
        example = f", for example {self.name}={self.example}" if self.example else ""
        raise BadLaunchFile(f"{self.name}={_shown(text)}: must be {kind.says}{example}.")


@dataclass(frozen=True)
class Kind:
    """What a value looks like: `read` raises ValueError for what is none, `says` completes "must be ..."."""

    says: str
    read: Callable[[str], Any]


def read(answers: Sequence[Answer], words: Sequence[str], what: str) -> dict[str, Any]:
    """Checked values of all answers from key=value words, defaults filled in; an optional one without value is None.

    Raises BadLaunchFile: no key=value, unknown, given twice, missing, or a value that is none.
    """
    known = {answer.name: answer for answer in answers}
    given: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise BadLaunchFile(f"{_shown(word)} is no answer: write key=value, such as {answers[0].name}=...")
        if name not in known:
            hint = nearest(name, known) or f" `macdrop cluster render {what}` lists them."
            raise BadLaunchFile(f"{what} has no answer {_shown(name)}.{hint}")
        if name in given:
            raise BadLaunchFile(f"{name}= is given twice.")
        answer = known[name]
        if not text and answer.default not in (None, ()):
            remedy = "" if answer.default is Required else " Leave it out for the default."
            raise BadLaunchFile(f"{name}= has no value. {answer.help}.{remedy}")
        given[name] = answer.read(text) if text else answer.default
    missing = [answer for answer in answers if answer.default is Required and answer.name not in given]
    if missing:
        lines = [f"  {f'{answer.name}={answer.example}':<38} {answer.help}" for answer in missing]
        raise BadLaunchFile("\n".join([f"{what} cannot be rendered without:", *lines]))
    values = {answer.name: given.get(answer.name, answer.default) for answer in answers}
    return {name: values[value.name] if isinstance(value, Like) else value for name, value in values.items()}


def _shown(text: str) -> str:
    """For messages: quoted, one line, not endless."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _matching(pattern: str) -> Callable[[str], str]:
    whole = re.compile(pattern)

    def match(text: str) -> str:
        if not whole.fullmatch(text):
            raise ValueError(text)
        return text

    return match


def _whole(low: int, high: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
            raise ValueError(text)
        return int(text)

    return whole


def _host(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        if re.fullmatch(r"[0-9.:]+", text) or len(text) > 253:
            raise
    label = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
    return _matching(rf"{label}(\.{label})*")(text)


def _remote(text: str) -> str:
    if not re.fullmatch(r"(/[A-Za-z0-9_][A-Za-z0-9._-]*)+", text):
        raise ValueError(text)
    return text


def _local(text: str) -> str:
    if not re.match(r"(/|~/)", text) or "/../" in f"{text}/":
        raise ValueError(text)
    return text


def _export(text: str) -> str:
    host, _, path = text.rpartition(":")
    return f"{_host(host)}:{_remote(path)}"


KINDS: Mapping[str, Kind] = {
    "name": Kind("a name of 1 to 40 lower-case letters, digits and -", _matching(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")),
    "k8s name": Kind(
        "a Kubernetes name: lower-case letters, digits and -", _matching(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
    ),
    "word": Kind("one word of letters, digits and . _ -", _matching(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")),
    "user": Kind("a user's login name", _matching(r"[a-z_][a-z0-9_-]{0,31}")),
    "host": Kind("an IP address or a host name", _host),
    "count": Kind("a whole number from 0 to 10000", _whole(0, 10_000)),
    "positive": Kind("a whole number from 1 to 100000", _whole(1, 100_000)),
    "folder": Kind("an absolute path of letters, digits and / . _ -", _remote),
    "local path": Kind("a path on this machine that begins with / or ~/", _local),
    "export": Kind("HOST:/PATH of an NFS server", _export),
    "variable": Kind(
        "the name of an environment variable, never its value (capitals, digits, _)",
        _matching(r"[A-Z_][A-Z0-9_]{0,63}"),
    ),
    "image": Kind(
        "a container image",
        _matching(
            r"[a-z0-9][a-z0-9.:-]*(/[a-z0-9][a-z0-9._-]*)*(:[A-Za-z0-9_][A-Za-z0-9._-]*)?(@sha256:[0-9a-f]{64})?"
        ),
    ),
    "quantity": Kind("an amount such as 8, 64Gi or 500Gi", _matching(r"[1-9][0-9]{0,5}(Ki|Mi|Gi|Ti)?")),
    "aws region": Kind("an AWS region", _matching(r"[a-z]{2}(-gov|-iso[a-z]?)?-[a-z]+-[0-9]")),
    "aws zone": Kind("availability zones", _matching(r"[a-z]{2}(-gov|-iso[a-z]?)?-[a-z]+-[0-9][a-z]")),
    "aws machine": Kind("an EC2 instance type", _matching(r"[a-z][a-z0-9-]*\.[a-z0-9-]+")),
    "ami": Kind("the id of a machine image", _matching(r"ami-[0-9a-f]{8,17}")),
    "efs": Kind("the id of an EFS file system", _matching(r"fs-[0-9a-f]{8,17}")),
    "security group": Kind("the id of a security group", _matching(r"sg-[0-9a-f]{8,17}")),
    "subnet": Kind("the id of a subnet", _matching(r"subnet-[0-9a-f]{8,17}")),
    "gcp project": Kind("a GCP project's id", _matching(r"[a-z][a-z0-9-]{4,28}[a-z0-9]")),
    "gcp zone": Kind("a GCP zone", _matching(r"[a-z]+-[a-z]+[0-9]{1,2}-[a-z]")),
    "azure location": Kind("an Azure location", _matching(r"[a-z]{3,}[0-9]?")),
    "resource group": Kind("an Azure resource group", _matching(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,88}[A-Za-z0-9_-]")),
    "azure account": Kind("the name of a storage account", _matching(r"[a-z0-9]{3,24}")),
    "slurm time": Kind("a time limit: minutes, H:MM:SS or D-HH:MM:SS", _matching(r"([0-9]+-)?[0-9]+(:[0-9]{2}){0,2}")),
    "recipe": Kind("a recipe's name or a file's absolute path", _matching(r"/?[A-Za-z0-9_][A-Za-z0-9._/-]*")),
    "override": Kind("KEY=VALUE without a comma", _matching(r"[A-Za-z0-9_][A-Za-z0-9_.-]*=[^,]*")),
    "version": Kind("a version", _matching(r"[0-9]+(\.[0-9]+){1,2}")),
}

"""Fields of a launch file: what each may be, and parsing key=value words into checked values."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import BadLaunchFile, nearest

#: Anything longer is a slip or an attack.
MAX_LENGTH = 1000


class Required:
    """Default of a required field."""


@dataclass(frozen=True)
class Like:
    """Default of a field that takes the value of another field."""

    name: str


@dataclass(frozen=True)
class Field:
    """One field. `type`: key of FIELD_TYPES; `many`: a comma-separated list; `allowed`: the only values, if any."""

    name: str
    type: str
    help: str
    default: Any = Required
    example: str = ""
    many: bool = False
    allowed: tuple[str, ...] = ()

    def read(self, text: str) -> Any:
        """Parse a value. Raises BadLaunchFile: says what is allowed, and the nearest allowed value."""
        if self.many:
            found = tuple(self._one(word.strip()) for word in text.split(",") if word.strip())
            if len(set(found)) < len(found):
                raise BadLaunchFile(f"{self.name}={_shown(text)} repeats a value.")
            return found
        return self._one(text)

    def _one(self, text: str) -> Any:
        if self.allowed:
            if text not in self.allowed:
                hint = nearest(text, self.allowed)
                raise BadLaunchFile(f"{self.name}={_shown(text)}: must be one of {', '.join(self.allowed)}.{hint}")
            return text
        field_type = FIELD_TYPES[self.type]
        try:
            if len(text) <= MAX_LENGTH and text.isprintable():
                return field_type.read(text)
        except ValueError:
            pass
        example = f", for example {self.name}={self.example}" if self.example else ""
        raise BadLaunchFile(f"{self.name}={_shown(text)}: must be {field_type.says}{example}.")


@dataclass(frozen=True)
class FieldType:
    """The form of a value: `read` raises ValueError for an invalid one, `says` completes "must be ..."."""

    says: str
    read: Callable[[str], Any]


def read(fields: Sequence[Field], words: Sequence[str], target: str) -> dict[str, Any]:
    """Parse key=value words into the values of all fields, with defaults; an optional field without a value is None.

    Raises BadLaunchFile: not key=value, unknown, repeated, missing, or an invalid value.
    """
    known = {field.name: field for field in fields}
    given: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise BadLaunchFile(f"not key=value: {_shown(word)}. Write, for example, {fields[0].name}=...")
        if name not in known:
            hint = nearest(name, known) or f" `macdrop cluster render {target}` lists the fields."
            raise BadLaunchFile(f"{target}: unknown field {_shown(name)}.{hint}")
        if name in given:
            raise BadLaunchFile(f"{name}= is given twice.")
        field = known[name]
        if not text and field.default not in (None, ()):
            remedy = "" if field.default is Required else " Omit it to use the default."
            raise BadLaunchFile(f"{name}= has no value. {field.help}.{remedy}")
        given[name] = field.read(text) if text else field.default
    missing = [field for field in fields if field.default is Required and field.name not in given]
    if missing:
        lines = [f"  {f'{field.name}={field.example}':<38} {field.help}" for field in missing]
        raise BadLaunchFile("\n".join([f"{target} cannot be rendered without:", *lines]))
    values = {field.name: given.get(field.name, field.default) for field in fields}
    return {name: values[value.name] if isinstance(value, Like) else value for name, value in values.items()}


def _shown(text: str) -> str:
    """Text for a message: quoted, on one line, cut."""
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


FIELD_TYPES: Mapping[str, FieldType] = {
    "name": FieldType(
        "a name of 1 to 40 lower-case letters, digits and -", _matching(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
    ),
    "k8s name": FieldType(
        "a Kubernetes name: lower-case letters, digits and -", _matching(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
    ),
    "word": FieldType("one word of letters, digits and . _ -", _matching(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")),
    "user": FieldType("a user's login name", _matching(r"[a-z_][a-z0-9_-]{0,31}")),
    "host": FieldType("an IP address or a host name", _host),
    "count": FieldType("a whole number from 0 to 10000", _whole(0, 10_000)),
    "positive": FieldType("a whole number from 1 to 100000", _whole(1, 100_000)),
    "folder": FieldType("an absolute path of letters, digits and / . _ -", _remote),
    "local path": FieldType("a path on this machine that starts with / or ~/", _local),
    "export": FieldType("HOST:/PATH of an NFS server", _export),
    "variable": FieldType(
        "the name of an environment variable, never its value (capitals, digits, _)",
        _matching(r"[A-Z_][A-Z0-9_]{0,63}"),
    ),
    "image": FieldType(
        "a container image",
        _matching(
            r"[a-z0-9][a-z0-9.:-]*(/[a-z0-9][a-z0-9._-]*)*(:[A-Za-z0-9_][A-Za-z0-9._-]*)?(@sha256:[0-9a-f]{64})?"
        ),
    ),
    "quantity": FieldType("an amount such as 8, 64Gi or 500Gi", _matching(r"[1-9][0-9]{0,5}(Ki|Mi|Gi|Ti)?")),
    "aws region": FieldType("an AWS region", _matching(r"[a-z]{2}(-gov|-iso[a-z]?)?-[a-z]+-[0-9]")),
    "aws zone": FieldType("availability zones", _matching(r"[a-z]{2}(-gov|-iso[a-z]?)?-[a-z]+-[0-9][a-z]")),
    "aws machine": FieldType("an EC2 instance type", _matching(r"[a-z][a-z0-9-]*\.[a-z0-9-]+")),
    "ami": FieldType("the ID of a machine image", _matching(r"ami-[0-9a-f]{8,17}")),
    "efs": FieldType("the ID of an EFS file system", _matching(r"fs-[0-9a-f]{8,17}")),
    "security group": FieldType("the ID of a security group", _matching(r"sg-[0-9a-f]{8,17}")),
    "subnet": FieldType("the ID of a subnet", _matching(r"subnet-[0-9a-f]{8,17}")),
    "gcp project": FieldType("the ID of a GCP project", _matching(r"[a-z][a-z0-9-]{4,28}[a-z0-9]")),
    "gcp zone": FieldType("a GCP zone", _matching(r"[a-z]+-[a-z]+[0-9]{1,2}-[a-z]")),
    "azure location": FieldType("an Azure location", _matching(r"[a-z]{3,}[0-9]?")),
    "resource group": FieldType("an Azure resource group", _matching(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,88}[A-Za-z0-9_-]")),
    "azure account": FieldType("the name of a storage account", _matching(r"[a-z0-9]{3,24}")),
    "infra": FieldType(
        "a cloud, or CLOUD/REGION, or CLOUD/REGION/ZONE", _matching(r"[a-z0-9]+(/[A-Za-z0-9*][A-Za-z0-9_.:*-]*){0,2}")
    ),
    "accelerators": FieldType(
        "a GPU's name and how many, such as H100:8", _matching(r"[A-Za-z][A-Za-z0-9-]{0,40}(:[1-9][0-9]?)?")
    ),
    "bucket": FieldType(
        "s3://BUCKET/PREFIX or gs://BUCKET/PREFIX",
        _matching(r"(s3|gs)://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9_][A-Za-z0-9._-]*)+"),
    ),
    "slurm time": FieldType(
        "a time limit: minutes, H:MM:SS or D-HH:MM:SS", _matching(r"([0-9]+-)?[0-9]+(:[0-9]{2}){0,2}")
    ),
    "recipe": FieldType("a recipe's name or a file's absolute path", _matching(r"/?[A-Za-z0-9_][A-Za-z0-9._/-]*")),
    "override": FieldType("KEY=VALUE without a comma", _matching(r"[A-Za-z0-9_][A-Za-z0-9_.-]*=[^,]*")),
    "version": FieldType("a version", _matching(r"[0-9]+(\.[0-9]+){1,2}")),
}

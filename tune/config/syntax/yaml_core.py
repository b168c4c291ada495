"""YAML as every file of ours is read and written: the core schema of YAML 1.2, without surprises.

PyYAML follows YAML 1.1, where `010` is eight, `1:30` is ninety and `no` is false: values that nobody meant.
"""

from __future__ import annotations

import ast
import functools
import math
import re
import reprlib
from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

import yaml

from macdrop.errors import ConfigError

#: Plain scalars of YAML 1.2's core schema, by tag: `010` is ten, and `1:30`, `yes`, `off` and dates are texts.
_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["", *"~nN"]),
    "bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", [*"-+0123456789"]),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        [*"-+.0123456789"],
    ),
    "merge": (r"<<", ["<"]),
}
_TAG = "tag:yaml.org,2002:"
#: The first line of a top-level key as `write_yaml` has it, and the others; anything else is read as one document.
_FIRST, _INNER = re.compile(r"(?!(?i:null|true|false):)[A-Za-z_]\w*:(?: |$)"), (" ", "- ")
#: A block that is a number, as `write_yaml` has it, of no more digits than are sure to fit.
_NUMBER = re.compile(r"(\w+): (-?\d{1,18})(\.\d+(?:e[-+]\d+)?)?\n", re.ASCII)
#: Values that aliases may make of a file: a few lines of them can stand for billions.
_MOST_VALUES = 100_000


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxlist, _SHORT.maxtuple = 4, 8, 12, 12
_SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 160, 160, 60


class _Loader(yaml.SafeLoader):
    """Loader of YAML 1.2's core schema that refuses duplicate keys, keys that are not texts, and alias bombs."""

    yaml_implicit_resolvers: dict = {}
    yaml_constructors: ClassVar[dict] = {
        tag: yaml.SafeLoader.yaml_constructors[tag] for tag in (f"{_TAG}null", f"{_TAG}seq", f"{_TAG}map", None)
    }

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and self.anchors_used and _size(node, {}) > _MOST_VALUES:
            self._refuse(f"its aliases stand for more than {_MOST_VALUES} values", node)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == f"{_TAG}merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                self._refuse(f"the key {brief(key)} is not a text; put it in quotes", key_node)
            if key in seen:
                self._refuse(f"{key:.100} is written twice", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
        text: str = super().construct_scalar(node)
        if any("\ud800" <= character <= "\udfff" for character in text):
            self._refuse("half of a surrogate pair is not a character", node)
        return text

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        text = self.construct_scalar(node)
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        try:
            if node.tag == f"{_TAG}int":
                number = int(text[2:] if base != 10 else text, base)
                if abs(number) < 2**63:
                    return number
                raise ValueError
            return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
        except ValueError:
            large = re.fullmatch(_SCALARS["int"][0], text)
            self._refuse(f"{text:.60} is {'too large' if large else 'not'} a number", node)

    def construct_bool(self, node: yaml.ScalarNode) -> bool:
        text = self.construct_scalar(node).lower()
        if text not in ("true", "false"):
            self._refuse(f"{text!r:.100} is neither true nor false", node)
        return text == "true"

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.anchors_used = getattr(self, "anchors_used", False) or self.check_event(yaml.AliasEvent)
        return super().compose_node(parent, index)

    def _refuse(self, what: str, node: yaml.Node) -> NoReturn:
        raise yaml.constructor.ConstructorError(None, None, what, node.start_mark)


for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"(?:{_pattern})\\Z"), _first)
for _name, _constructor in (
    ("int", _Loader.construct_number),
    ("float", _Loader.construct_number),
    ("bool", _Loader.construct_bool),
    ("str", _Loader.construct_scalar),
):
    _Loader.add_constructor(f"{_TAG}{_name}", _constructor)


class _Dumper(yaml.SafeDumper):
    """Writer that quotes each text which this loader, or one of YAML 1.1, would take for another kind of value."""


_Dumper.add_implicit_resolver(
    f"{_TAG}float", re.compile(f"(?:{_SCALARS['float'][0]}|{_SCALARS['int'][0]})\\Z"), _SCALARS["float"][1]
)


def _size(node: yaml.Node, known: dict[int, float]) -> float:
    """Count the values of a node with its aliases written out; infinite where one holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(_size(part, known) for part in inner))
    return known[id(node)]


def parse_yaml(text: str) -> Any:
    """Read one YAML document by the rules of `_Loader`.

    Raises:
        ConfigError: it is not valid YAML; the message says what, and where.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
        where = f"{problem} (line {mark.line + 1}, column {mark.column + 1})" if problem and mark else str(error)
        raise ConfigError(where) from None
    except RecursionError:
        raise ConfigError("it is nested too deeply") from None


def parse_blocks(text: str) -> Any:
    """`parse_yaml` of one of many files that share most of their keys: each key's text is parsed once.

    Raises:
        ConfigError: as `parse_yaml`.
    """
    found = _mapping(text.removesuffix("\n").split("\n"))
    return parse_yaml(text) if found is None else _copied(found)


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    return [_copied(part) for part in value] if isinstance(value, list) else value


def _mapping(lines: list[str]) -> dict[str, Any] | None:
    """Return the mapping that lines stand for, key by key; None where they must be read as a whole."""
    blocks: list[list[str]] = []
    for line in lines:
        if _FIRST.match(line):
            blocks.append([line])
        elif blocks and (not line or line.startswith(_INNER)):
            blocks[-1].append(line)
        else:
            return None
    try:
        pairs = [_block("\n".join([*block, ""])) for block in blocks]
    except ConfigError:  # an alias of another block, or a mistake: the whole text says where
        return None
    found = dict(pairs)
    return found if found and len(found) == len(pairs) else None


@functools.lru_cache(maxsize=16384)
def _block(text: str) -> tuple[str, Any]:
    """Key and value of a block; the value is shared, and never to be changed."""
    if number := _NUMBER.fullmatch(text):
        key, whole, fraction = number.groups()
        return key, int(whole) if fraction is None else float(whole + fraction)
    first, *inner, end = text.split("\n")
    if first.endswith(":") and inner and all(line.startswith("  ") for line in inner):
        if (value := _mapping([line[2:] for line in inner])) is not None:
            return first[:-1], value
    ((key, value),) = parse_yaml(text).items()
    return key, value


def write_yaml(value: Any, *, width: int = 80) -> str:
    """Return plain data as YAML that every loader reads back as the same values."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=width)


def write_blocks(value: Mapping[str, Any]) -> str:
    """`write_yaml` of one of many mappings of plain data that share most of their values: each is written once."""
    return "".join(_written(key, repr(part)) for key, part in value.items()) if value else write_yaml(value)


@functools.lru_cache(maxsize=16384)
def _written(key: str, text: str) -> str:
    return write_yaml({key: ast.literal_eval(text)})


def brief(value: Any) -> str:
    """Return a value for a message, in 200 characters at most."""
    return f"{_SHORT.repr(value):.200}"

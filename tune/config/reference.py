"""The tables of all keys in `tune/docs/configuration.md`, made from the fields.

python -m tune.config.reference     # writes them below the marker line of that file
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tune.config.endpoints.server_spec import GenerationServer
from tune.config.judge_spec import JudgeSpec
from tune.config.run_spec import RunSpec
from tune.config.schema import json_schema
from tune.config.sweep_spec import Metric, Space

FILE = Path(__file__).parents[1] / "docs" / "configuration.md"
#: The tables stand below this line.
MARKER = "<!-- fields -->"
NOTE = "<!-- Generated from the fields: python -m tune.config.reference -->"
#: Title of a table by the prefix of its keys.
_TITLES = {"": "One fine-tuning and the run", "eval.": "`eval` and `validation`"}
_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}
_TYPES = {
    "integer": "whole number",
    "number": "number",
    "boolean": "`true`, `false`",
    "string": "text",
    "array": "list",
    "object": "mapping",
    "null": "`null`",
}


@dataclass(frozen=True)
class Row:
    """One key: its dotted name with KEY and NAME for names of the user's choice, default, values and description."""

    prefix: str
    name: str
    default: str
    values: str
    description: str

    def markdown(self) -> str:
        return f"| `{self.prefix}{self.name}` | {self.default} | {self.values} | {self.description} |"


def configuration_reference() -> str:
    """Return Markdown tables of every key of a run file, one table per block."""
    blocks: dict[str, list[Row]] = {}
    for row in _rows(RunSpec, "", json_schema()):
        blocks.setdefault(row.prefix, []).append(row)
    parts = []
    for prefix, rows in blocks.items():
        title = _TITLES.get(prefix, f"`{prefix.removesuffix('.')}`")
        head = ["| key | default | values | meaning |", "| --- | --- | --- | --- |"]
        parts.append("\n".join([f"### {title}", "", *head, *(row.markdown() for row in rows)]))
    return "\n\n".join(parts) + "\n"


def _rows(kind: type[BaseModel], prefix: str, schema: dict[str, Any]) -> Iterator[Row]:
    """Yield the keys of a model, each with the keys below it; `validation` has the keys of `eval` and is one row."""
    for name, field in kind.model_fields.items():
        inner = _inner(field)
        below = prefix + name == "validation"
        single = inner is Metric or inner == field.annotation
        if inner is not None and single and not below:
            yield from _rows(inner, f"{prefix}{name}.", schema)
            continue
        properties = schema["properties"] if kind is RunSpec else schema["$defs"][kind.__name__]["properties"]
        default = "required" if field.is_required() else "`{}`" if below else f"`{_default(field)}`"
        yield Row(prefix, name, default, _values(properties[name]), field.description or "")
        if inner and not below:
            named = "" if inner in (JudgeSpec, GenerationServer) else "KEY." if inner is Space else "NAME."
            yield from _rows(inner, f"{prefix}{name}.{named}", schema)


def _inner(field: FieldInfo) -> type[BaseModel] | None:
    """Return the model that a field holds: one, an optional one, or several in a list or a mapping."""
    for part in (field.annotation, *get_args(field.annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def _default(field: FieldInfo) -> str:
    """Return a default as YAML on one line."""
    value = field.get_default(call_default_factory=True)
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value)
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()


def _values(schema: dict[str, Any]) -> str:
    """Return the allowed values of a key, from its JSON Schema: types, bounds and names."""
    words: dict[str, None] = {}
    for option in schema.get("anyOf", [schema]):
        for choice in option.get("enum", [option["const"]] if "const" in option else []):
            words[f"`{json.dumps(choice) if isinstance(choice, bool) else choice}`"] = None
        if "enum" in option or "const" in option:
            continue
        bounds = [f"{word} {option[key]}" for key, word in _BOUNDS.items() if key in option]
        words[", ".join([_TYPES[option.get("type", "object")], *bounds])] = None
    if len(words) > 1 and "`null`" in words:
        words["`null`"] = words.pop("`null`")  # last
    return "; ".join(words) if any("," in word for word in words) else ", ".join(words)


def regenerate() -> None:
    """Write the tables below the marker line of the file."""
    text, marker, _ = FILE.read_text(encoding="utf-8").partition(MARKER)
    assert marker, f"{FILE} has no line {MARKER}"
    FILE.write_text(f"{text}{MARKER}\n{NOTE}\n\n{configuration_reference()}", encoding="utf-8")


if __name__ == "__main__":
    regenerate()

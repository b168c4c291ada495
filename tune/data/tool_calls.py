"""Calls of tools in conversations: read from rows, and looked for in what a chat template writes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tune.data.lost_rows import BadRow
from tune.data.thoughts import CLOSE, OPEN

Call = dict[str, Any]
"""A call in OpenAI's form, as chat templates take it: {type: function, function: {name, arguments}}, perhaps an id."""


def read_calls(entry: Mapping[str, Any], where: str) -> tuple[Call, ...]:
    """Return the calls of a turn: its `tool_calls`, a list or its JSON text, or the older `function_call`.

    Raises:
        BadRow: a call has no name, or its arguments are not a JSON object.
    """
    given = entry.get("tool_calls") or entry.get("function_call")
    found = _parsed(given, f"{where} has calls of tools") if isinstance(given, str) else given
    listed = [] if not found else found if isinstance(found, list) else [found]
    return tuple(_call(call, where) for call in listed)


def read_tools(given: Any, place: str) -> tuple[dict[str, Any], ...]:
    """Return the tools that a row offers: a list, or its JSON text, of JSON schemas of functions.

    Raises:
        BadRow: it is not, or a tool has no name.
    """
    found = _parsed(given, f"{place}: tools") if isinstance(given, str) and given.strip() else given or []
    if not isinstance(found, list):
        raise _unreadable(f"{place}: tools must be a list, found a {type(found).__name__}.")
    tools = []
    for tool in found:
        inner = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise _unreadable(f"{place}: a tool needs a name; found {tool!r:.80}.")
        tools.append({"type": "function", "function": dict(inner)})
    return tuple(tools)


def _call(call: Any, where: str) -> Call:
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
        raise _unreadable(f"{where} has a call without a name: {call!r:.80}.")
    arguments = inner.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = _parsed(arguments, f"{where} has arguments of {inner['name']!r:.40}")
    if arguments is None or arguments == "":
        arguments = {}
    if not isinstance(arguments, Mapping):
        raise _unreadable(f"{where} has arguments of {inner['name']!r:.40} that are not a JSON object.")
    named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**named, "type": "function", "function": {"name": inner["name"], "arguments": dict(arguments)}}


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unreadable(f"{what} that are not valid JSON: {text!r:.60}.") from error


def _unreadable(message: str) -> BadRow:
    return BadRow.because("calls of tools that cannot be read", message)


# --- in a rendering ---


def tools_left_out(tools: Iterable[Mapping[str, Any]], text: str) -> str | None:
    """Return the name of a tool on offer that a prompt does not mention, if there is one."""
    names = [str(tool["function"]["name"]) for tool in tools]
    return next((name for name in names if name not in text), None)


def unshown(content: str, calls: Iterable[Call], text: str) -> str | None:
    """Return a name, an argument or the words of an answer with calls that are not in its rendering, if any is not."""
    if _bare(content) not in _bare(text):
        return content
    for call in calls:
        for value in (call["function"]["name"], *_leaves(call["function"]["arguments"])):
            if not any(form in text for form in _spellings(value)):
                return str(value)
    return None


def _bare(text: str) -> str:
    return "".join(text.replace(OPEN, "").replace(CLOSE, "").split())


def _leaves(value: Any) -> Iterator[Any]:
    """Yield keys and values of JSON, without those that hold others."""
    if isinstance(value, Mapping):
        yield from value
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else None
    if inner is None:
        yield value
        return
    for each in inner:
        yield from _leaves(each)


def _spellings(value: Any) -> tuple[str, ...]:
    """Return a value as templates may write it: as Python does, or as JSON, without quotation marks."""
    return (str(value), *(json.dumps(value, ensure_ascii=flag).strip('"') for flag in (True, False)))

"""Conversion of rows to conversations.

| format | columns |
| --- | --- |
| alpaca | instruction, output; optional input, system, history (list of [question, answer]) |
| sharegpt | conversations: list of {from: human / gpt / system, value}; optional system |
| messages | messages (or conversations): list of {role: system / user / assistant, content} |
| text | text: one document, loss on all of it |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from macdrop.errors import DataError, nearest
from tune.data.readers import Row


@dataclass(frozen=True)
class Turn:
    """One turn; `role` is system, user, assistant, or document (plain text). `context` is alpaca's `input` field."""

    role: str
    content: str
    context: str = ""


Conversation = list[Turn]


def detect_format(row: Row) -> str:
    """Detect the format of a data set from the columns of its first row.

    Raises:
        DataError: no format has these columns.
    """
    columns = row.values
    if "messages" in columns:
        return "messages"
    if "conversations" in columns:
        turns = columns["conversations"]
        first = turns[0] if isinstance(turns, list) and turns else {}
        return "messages" if isinstance(first, dict) and "role" in first else "sharegpt"
    if "instruction" in columns and "output" in columns:
        return "alpaca"
    if "text" in columns:
        return "text"
    needs = "\n".join(f"  {name}: {', '.join(required)}" for name, (required, _) in FORMATS.items())
    found = _columns(row)
    raise DataError(f"{row.place}: no known format has the columns {found}.\nColumns needed, by format:\n{needs}")


def converter(format: str) -> Callable[[Row], Conversation]:
    """Return the function that turns rows of `format` into conversations; it raises `DataError` on a bad row."""
    if format not in FORMATS:
        allowed = ("auto", *FORMATS)
        raise DataError(f"Unknown format {format!r}.{nearest(format, allowed)} Allowed: {', '.join(allowed)}.")
    required, convert = FORMATS[format]

    def checked(row: Row) -> Conversation:
        missing = [column for column in required if column not in row.values]
        if missing == ["messages"] and "conversations" in row.values:
            missing = []
        if missing:
            raise DataError(
                f"{row.place}: format {format} needs the columns {', '.join(required)}.\n"
                f"Missing: {', '.join(missing)}. Columns found: {_columns(row)}."
            )
        return convert(row)

    return checked


def _alpaca(row: Row) -> Conversation:
    turns = _system(row)
    history = row.values.get("history") or []
    for pair in history if isinstance(history, (list, tuple)) else [history]:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise DataError(f"{row.place}: history must be a list of [question, answer] pairs, found {str(pair):.60}.")
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    question = Turn("user", _text(row, "instruction"), _text(row, "input", optional=True))
    return [*turns, question, Turn("assistant", _text(row, "output"))]


def _sharegpt(row: Row) -> Conversation:
    roles = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}
    return _system(row) + _turns(row, "conversations", "from", "value", roles)


def _messages(row: Row) -> Conversation:
    column = "messages" if "messages" in row.values else "conversations"
    return _turns(row, column, "role", "content", {role: role for role in ("system", "user", "assistant")})


def _document(row: Row) -> Conversation:
    return [Turn("document", _text(row, "text"))]


FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Row], Conversation]]] = {
    "alpaca": (("instruction", "output"), _alpaca),
    "sharegpt": (("conversations",), _sharegpt),
    "messages": (("messages",), _messages),
    "text": (("text",), _document),
}


def _turns(row: Row, column: str, role_key: str, text_key: str, roles: dict[str, str]) -> Conversation:
    entries = row.values[column]
    if not isinstance(entries, list):
        raise DataError(f"{row.place}: {column} must be a list of turns, found a {type(entries).__name__}.")
    turns = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or role_key not in entry or text_key not in entry:
            found = ", ".join(map(str, entry)) if isinstance(entry, dict) else repr(entry)[:60]
            raise DataError(f"{row.place}: turn {number} of {column} needs {role_key} and {text_key}; found {found}.")
        role, text = entry[role_key], entry[text_key]
        if not isinstance(role, str) or role not in roles:
            raise DataError(f"{row.place}: turn {number} has {role_key} {role!r}; allowed are {', '.join(roles)}.")
        if not isinstance(text, str):
            raise DataError(f"{row.place}: {text_key} of turn {number} must be text, found a {type(text).__name__}.")
        turns.append(Turn(roles[role], text))
    spoken = [turn.role for turn in turns if turn.role != "system"]
    if "assistant" not in spoken or spoken[0] != "user":
        raise DataError(
            f"{row.place}: {column} must start with a question of the user and hold an answer; "
            f"found the roles {', '.join(turn.role for turn in turns) or '(none)'}."
        )
    return turns


def _system(row: Row) -> Conversation:
    system = _text(row, "system", optional=True)
    return [Turn("system", system)] if system else []


def _text(row: Row, column: str, optional: bool = False) -> str:
    value = row.values.get(column)
    if optional and value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{row.place}: {column} must be text, found {value!r:.60} ({type(value).__name__}).")
    return value


def _columns(row: Row) -> str:
    return ", ".join(map(str, row.values)) or "(none)"

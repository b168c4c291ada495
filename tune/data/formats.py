"""Conversion of rows to conversations.

| format | columns |
| --- | --- |
| alpaca | instruction, output; optional input, system, history (list of [question, answer]) |
| sharegpt | conversations: list of {from: human / gpt / system, value}; optional system |
| messages | messages (or conversations): list of {role: system / user / assistant, content}; optional system |
| text | text: one document, loss on all of it |

A text may be a list of parts of type text, as OpenAI and Hugging Face write it. `weight: 0` on an answer leaves it out
of the loss. `reasoning_content` of an answer is its thought, in `<think>` before the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from macdrop.errors import DataError, nearest
from tune.data.readers import Row, rows_inside
from tune.data.thoughts import joined


@dataclass(frozen=True)
class Turn:
    """One turn; `role` is system, user, assistant, or document (plain text). `context` is alpaca's `input` field.

    trained: whether an answer carries loss.
    """

    role: str
    content: str
    context: str = ""
    trained: bool = True


Conversation = list[Turn]


class BadRows:
    """Rows that cannot be trained on as they are written: skipped and counted, or the first one raised."""

    def __init__(self, skip: bool) -> None:
        self._skip = skip
        self.count = 0
        self.first: str | None = None
        """What is wrong with the first of them, with its place."""

    def add(self, error: DataError) -> None:
        """Count a row that is refused with `error`; raise it unless rows are skipped."""
        if not self._skip:
            raise error
        self.count += 1
        self.first = self.first or str(error)


def detect_format(row: Row, following: Iterable[Row] = ()) -> str:
    """Detect the format of a data set from the columns of its first row.

    following: rows to look at if the conversation of the first is empty or not a list.

    Raises:
        DataError: no format has these columns.
    """
    columns = row.values
    if "messages" in columns:
        return "messages"
    if "conversations" in columns:
        lists = (each.values.get("conversations") for each in (row, *following))
        first = next((turns[0] for turns in lists if isinstance(turns, list) and turns), None)
        return "messages" if isinstance(first, dict) and "role" in first else "sharegpt"
    if "instruction" in columns and "output" in columns:
        return "alpaca"
    if "text" in columns:
        return "text"
    needs = "\n".join(f"  {name}: {', '.join(required)}" for name, (required, _) in FORMATS.items())
    found = _columns(row)
    hint = rows_inside(columns)
    raise DataError(f"{row.place}: no known format has the columns {found}.{hint}\nColumns needed, by format:\n{needs}")


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
    roles = {role: role for role in ("system", "user", "assistant")}
    return _system(row) + _turns(row, column, "role", "content", roles)


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
    if row.values.get("tools") not in (None, "", "[]", []):
        raise DataError(f"{row.place}: the row has tools, and calls of tools cannot be trained on. Remove them.")
    turns = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict) or role_key not in entry or text_key not in entry:
            found = ", ".join(map(str, entry))[:200] if isinstance(entry, dict) else repr(entry)[:60]
            raise DataError(f"{row.place}: turn {number} of {column} needs {role_key} and {text_key}; found {found}.")
        role = entry[role_key]
        if not isinstance(role, str) or role not in roles:
            raise DataError(f"{row.place}: turn {number} has {role_key} {role!r:.60}; allowed are {', '.join(roles)}.")
        called = next((key for key in ("tool_calls", "function_call") if entry.get(key)), None)
        if called:
            raise DataError(f"{row.place}: turn {number} has {called}, and calls of tools cannot be trained on.")
        where = f"{row.place}: {text_key} of turn {number}"
        text = joined(_optional(entry, "reasoning_content", row.place, number), _content(entry[text_key], where))
        turns.append(Turn(roles[role], text, trained=_weight(entry.get("weight"), roles[role], row.place, number)))
    spoken = [turn.role for turn in turns if turn.role != "system"]
    if "assistant" not in spoken or spoken[0] != "user":
        raise DataError(
            f"{row.place}: {column} must start with a question of the user and hold an answer; "
            f"found the roles {', '.join(turn.role for turn in turns[:12]) or '(none)'}."
        )
    if not any(turn.role == "assistant" and turn.trained for turn in turns):
        raise DataError(f"{row.place}: every answer of {column} has weight 0, so the row holds nothing to learn.")
    return turns


def _content(value: Any, where: str) -> str:
    """Return a text, or the texts of a list of parts, joined as chat templates join them."""
    if isinstance(value, list) and value:
        kinds = [part.get("type") if isinstance(part, dict) else type(part).__name__ for part in value]
        if all(kind == "text" for kind in kinds) and all(isinstance(part.get("text"), str) for part in value):
            return "".join(part["text"] for part in value)
        raise DataError(f"{where} has parts of type {', '.join(map(str, kinds))}; only text can be trained on.")
    if not isinstance(value, str):
        raise DataError(f"{where} must be text, found a {type(value).__name__}.")
    return value


def _optional(entry: dict[str, Any], key: str, place: str, number: int) -> str:
    value = entry.get(key)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{place}: {key} of turn {number} must be text, found a {type(value).__name__}.")
    return value or ""


def _weight(value: Any, role: str, place: str, number: int) -> bool:
    """Return whether a turn carries loss by its `weight`, 0 or 1 (OpenAI's fine-tuning format); absent is 1."""
    if value is None:
        return True
    if isinstance(value, bool) or value not in (0, 1):
        raise DataError(f"{place}: weight of turn {number} is {value!r:.40}; allowed are 0 (no loss) and 1.")
    if value and role != "assistant":
        raise DataError(
            f"{place}: weight of turn {number} is 1, but it is a {role} turn, and only answers carry loss.\n"
            "Remove the weight; train_on_prompt: true trains on every token."
        )
    return bool(value)


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
    return ", ".join(f"{column:.60}" for column in list(row.values)[:20]) or "(none)"

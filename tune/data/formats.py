"""Conversion of rows to conversations.

| format | columns |
| --- | --- |
| alpaca | instruction, output; optional input, system, history (list of [question, answer]) |
| sharegpt | conversations: list of {from: human / gpt / system / function_call / observation, value} |
| messages | messages (or conversations): list of {role: system / user / assistant / tool, content} |
| text | text: one document, loss on all of it |

Conversations may have columns system and tools. A text may be a list of parts of type text, as OpenAI and Hugging Face
write it, and the turns may be a mapping of lists, as `datasets` stores them. An answer may call tools (`tool_calls`),
and then have no text (`content: null`). `weight: 0` leaves a turn out of the loss. `reasoning_content` of an answer is
its thought, in `<think>` before the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from macdrop.errors import DataError, nearest
from tune.data.lost_rows import BadRow
from tune.data.readers import Row, rows_inside
from tune.data.thoughts import joined
from tune.data.tool_calls import read_calls, read_tools

ANSWERS = ("assistant",)
"""Roles whose turns carry loss by default."""
# Reasons by which bad rows are counted.
NO_TEXT, NO_TURNS = "a text is missing, or is not text", "no turns that can be read"
NO_ANSWER, WEIGHTS = "no answer, or none that carries loss", "a weight that has no meaning"


@dataclass(frozen=True)
class Turn:
    """One turn; `role` is system, user, assistant, tool, or document (plain text). `context` is alpaca's `input` field.

    trained: whether it carries loss, if its role does. calls: an answer's calls of tools, in OpenAI's form. about: a
    tool's name and the id of the call that it answers. tools: those on offer, of the first turn of a conversation.
    """

    role: str
    content: str
    context: str = ""
    trained: bool = True
    calls: tuple[dict[str, Any], ...] = ()
    about: tuple[tuple[str, str], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()


Conversation = list[Turn]


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


def converter(format: str, roles: Sequence[str] = ANSWERS) -> Callable[[Row], Conversation]:
    """Return the function that turns rows of `format` into conversations; it raises `BadRow` on a bad row.

    roles: those whose turns carry loss (`train_on_roles`).
    """
    if format not in FORMATS:
        allowed = ("auto", *FORMATS)
        raise DataError(f"Unknown format {format!r}.{nearest(format, allowed)} Allowed: {', '.join(allowed)}.")
    required, convert = FORMATS[format]

    def checked(row: Row) -> Conversation:
        missing = [column for column in required if column not in row.values]
        if missing == ["messages"] and "conversations" in row.values:
            missing = []
        if missing:
            raise BadRow.because(
                "a column is missing",
                f"{row.place}: format {format} needs the columns {', '.join(required)}.\n"
                f"Missing: {', '.join(missing)}. Columns found: {_columns(row)}.",
            )
        conversation = convert(row, roles)
        _check_trained(conversation, roles, row.place)
        return conversation

    return checked


def _alpaca(row: Row, roles: Sequence[str]) -> Conversation:
    turns = _system(row)
    history = row.values.get("history") or []
    for pair in history if isinstance(history, (list, tuple)) else [history]:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise BadRow.because(
                NO_TURNS,
                f"{row.place}: history must be a list of [question, answer] pairs, found {str(pair):.60}.",
            )
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    question = Turn("user", _text(row, "instruction"), _text(row, "input", optional=True))
    return [*turns, question, Turn("assistant", _text(row, "output"))]


def _sharegpt(row: Row, roles: Sequence[str]) -> Conversation:
    return _system(row) + _turns(row, ("conversations", "from", "value"), _SHAREGPT, roles)


def _messages(row: Row, roles: Sequence[str]) -> Conversation:
    column = "messages" if "messages" in row.values else "conversations"
    return _system(row) + _turns(row, (column, "role", "content"), _OPENAI, roles)


def _document(row: Row, roles: Sequence[str]) -> Conversation:
    return [Turn("document", _text(row, "text"))]


_OPENAI = {role: role for role in ("system", "user", "assistant", "tool")} | {"function": "tool"}
_SHAREGPT = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool", **_OPENAI}
FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Row, Sequence[str]], Conversation]]] = {
    "alpaca": (("instruction", "output"), _alpaca),
    "sharegpt": (("conversations",), _sharegpt),
    "messages": (("messages",), _messages),
    "text": (("text",), _document),
}


def _turns(row: Row, keys: tuple[str, str, str], known: dict[str, str], trained: Sequence[str]) -> Conversation:
    """Return the turns of a row.

    keys: the column with the turns, and of each the keys of role and text. known: role in the row -> ours. trained:
        roles whose turns carry loss.
    """
    column, role_key, text_key = keys
    entries = _entries(row, column)
    turns = []
    for number, entry in enumerate(entries):
        calls = read_calls(entry, f"{row.place}: turn {number}") if isinstance(entry, dict) else ()
        if not isinstance(entry, dict) or role_key not in entry or (text_key not in entry and not calls):
            found = ", ".join(map(str, entry))[:200] if isinstance(entry, dict) else repr(entry)[:60]
            raise BadRow.because(
                NO_TURNS, f"{row.place}: turn {number} of {column} needs {role_key} and {text_key}; found {found}."
            )
        given = entry[role_key]
        if not isinstance(given, str) or given not in known:
            allowed = ", ".join(known)
            raise BadRow.because(
                "an unknown role", f"{row.place}: turn {number} has {role_key} {given!r:.60}; allowed are {allowed}."
            )
        role, value = known[given], entry.get(text_key)
        if calls and role != "assistant":
            raise BadRow.because(
                "calls of tools that cannot be read", f"{row.place}: turn {number} of the {role} calls a tool."
            )
        if given == "function_call":
            calls, value = read_calls({"tool_calls": value}, f"{row.place}: turn {number}"), None
        content = "" if calls and value is None else _content(value, f"{row.place}: {text_key} of turn {number}")
        text = joined(_optional(entry, "reasoning_content", row.place, number), content)
        named = {key: entry[key] for key in ("name", "tool_call_id") if role == "tool" and entry.get(key) is not None}
        about = tuple((key, str(name)) for key, name in named.items())
        carries = _weight(entry.get("weight"), role, trained, f"{row.place}: weight of turn {number}")
        turns.append(Turn(role, text, "", carries, calls, about))
    if turns and (tools := read_tools(row.values.get("tools"), row.place)):
        turns[0] = replace(turns[0], tools=tools)
    return turns


def _entries(row: Row, column: str) -> list[Any]:
    """Return the turns of a conversation as a list; `datasets` stores a list of mappings as a mapping of lists."""
    entries = row.values[column]
    if isinstance(entries, dict) and entries and all(isinstance(each, list) for each in entries.values()):
        lengths = {key: len(each) for key, each in entries.items()}
        if len(set(lengths.values())) > 1:
            raise BadRow.because(
                NO_TURNS, f"{row.place}: the lists of {column} differ in length: {str(lengths)[1:-1]:.200}."
            )
        return [dict(zip(entries, values, strict=True)) for values in zip(*entries.values(), strict=True)]
    if not isinstance(entries, list):
        raise BadRow.because(
            NO_TURNS, f"{row.place}: {column} must be a list of turns, found a {type(entries).__name__}."
        )
    return entries


def _check_trained(conversation: Conversation, roles: Sequence[str], place: str) -> None:
    """Refuse a conversation in which no turn carries loss, or one that begins with the result of a tool."""
    spoken = [turn for turn in conversation if turn.role != "system"]
    if spoken and spoken[0].role == "document":
        return
    found = ", ".join(turn.role for turn in conversation[:12]) or "(none)"
    if spoken and spoken[0].role == "tool":
        raise BadRow.because(NO_TURNS, f"{place}: the turns begin with the result of a tool; found the roles {found}.")
    mine = [turn for turn in conversation if turn.role in roles]
    if not mine:
        wanted = "an answer" if tuple(roles) == ANSWERS else f"a turn of train_on_roles ({', '.join(roles)})"
        raise BadRow.because(NO_ANSWER, f"{place}: the turns must hold {wanted}; found the roles {found}.")
    if not any(turn.trained for turn in mine):
        what = "every answer" if tuple(roles) == ANSWERS else f"every turn of {', '.join(roles)}"
        raise BadRow.because(NO_ANSWER, f"{place}: {what} has weight 0, so the row holds nothing to learn.")


def with_system_as_user(conversation: Conversation) -> Conversation:
    """Return a conversation with the text of each system turn before that of the next question, a blank line between.

    Raises:
        BadRow: no question follows a system turn.
    """
    turns: Conversation = []
    pending: list[str] = []
    for turn in conversation:
        if turn.role == "system":
            pending.append(turn.content)
        elif turn.role == "user" and pending:
            turns.append(replace(turn, content="\n\n".join([*pending, turn.content])))
            pending = []
        else:
            turns.append(turn)
    if pending:
        raise BadRow.because(
            "a system turn that no question follows",
            f"no question follows the system turn {pending[0][:40]!r}, so system: as_user has no place for it.",
        )
    return [replace(turns[0], tools=conversation[0].tools), *turns[1:]]


def _content(value: Any, where: str) -> str:
    """Return a text, or the texts of a list of parts, joined as chat templates join them."""
    if isinstance(value, list) and value:
        kinds = [part.get("type") if isinstance(part, dict) else type(part).__name__ for part in value]
        if all(kind == "text" for kind in kinds) and all(isinstance(part.get("text"), str) for part in value):
            return "".join(part["text"] for part in value)
        raise BadRow.because(
            "parts that are not text",
            f"{where} has parts of type {', '.join(map(str, kinds))}; only text can be trained on.",
        )
    if not isinstance(value, str):
        raise BadRow.because(NO_TEXT, f"{where} must be text, found a {type(value).__name__}.")
    return value


def _optional(entry: dict[str, Any], key: str, place: str, number: int) -> str:
    value = entry.get(key)
    if value is not None and not isinstance(value, str):
        raise BadRow.because(NO_TEXT, f"{place}: {key} of turn {number} must be text, found a {type(value).__name__}.")
    return value or ""


def _weight(value: Any, role: str, trained: Sequence[str], where: str) -> bool:
    """Return whether a turn carries loss by its `weight`, 0 or 1 (OpenAI's fine-tuning format); absent is 1."""
    if value is None:
        return True
    if isinstance(value, bool) or value not in (0, 1):
        raise BadRow.because(WEIGHTS, f"{where} is {value!r:.40}; allowed are 0 (no loss) and 1.")
    if value and role not in trained:
        carry = "only answers carry loss" if tuple(trained) == ANSWERS else f"train_on_roles is {', '.join(trained)}"
        raise BadRow.because(
            WEIGHTS,
            f"{where} is 1, but it is a {role} turn, and {carry}.\nRemove the weight, or add {role} to train_on_roles; "
            "train_on_prompt: true trains on every token.",
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
        raise BadRow.because(
            NO_TEXT, f"{row.place}: {column} must be text, found {value!r:.60} ({type(value).__name__})."
        )
    return value


def _columns(row: Row) -> str:
    return ", ".join(f"{column:.60}" for column in list(row.values)[:20]) or "(none)"

"""Renderings of a chat template taken apart: its own text, the places of turns in it, and what carries loss."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tune.data.lost_rows import BadRow

Message = Mapping[str, Any]
"""A turn as templates take it: `role` and `content`, and where there are any `tool_calls`, `name`, `tool_call_id`."""
PLACEHOLDER = re.compile(r"macdrop-text-(\d+)-goes-here")

# Reasons by which bad rows are counted.
REFUSED = "the chat template refuses the conversation"
CHANGED = "the chat template leaves out or changes a turn"
OTHERWISE = "the chat template writes the answer otherwise than inference does"


@dataclass(frozen=True)
class Skeleton:
    """The template's own text around that of the turns: `literals[0]`, turn `order[0]`, `literals[1]`, and so on."""

    literals: tuple[str, ...]
    order: tuple[int, ...]

    def around(self, turn: int) -> tuple[str, str]:
        """Return what stands before and after the only occurrence of a turn.

        Raises:
            BadRow: the turn occurs not at all, or several times.
        """
        if self.order.count(turn) != 1:
            raise BadRow.because(
                CHANGED, "the chat template changes, omits or repeats an answer. Use template: alpaca."
            )
        at = self.order.index(turn)
        return self.literals[at], self.literals[at + 1]


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a turn and its end mark in a rendering; `trained`: it carries loss.

    answer: it is an answer, behind which an end-of-sequence token goes where the template has no mark.
    """

    start: int
    end: int
    trained: bool
    answer: bool = True


@dataclass(frozen=True)
class Rendered:
    """A conversation as text; `spans` are its answers, and other turns that carry loss, in order.

    closed: the end marks of the answers are in the text.
    """

    text: str
    spans: list[Span]
    closed: bool


@dataclass(frozen=True)
class Prompt:
    """The `text` that inference sends for an answer; it ends inside a thought if it is `opened`.

    places: characters [start, end) of each turn's text. lead: what the answer begins with in this template: a blank, or
    the end of an empty thought. around: what the template writes before and after a last answer.
    """

    text: str
    opened: bool
    places: dict[int, tuple[int, int]]
    lead: str
    around: tuple[str, str]


def marked(messages: Sequence[Message]) -> list[Message]:
    """Return turns with a placeholder for each text; an answer of calls alone has no text, and templates look at it."""
    texts = [f"macdrop-text-{index}-goes-here" for index in range(len(messages))]
    silent = [bool(message.get("tool_calls")) and not message["content"].strip() for message in messages]
    return [{**each, "content": "" if no else text} for each, text, no in zip(messages, texts, silent, strict=True)]


def forms(content: str) -> Iterable[str]:
    """Yield a text as templates write it: whole, and trimmed in all ways."""
    trims = [(trim, what) for what in (None, "\n") for trim in (str.strip, str.lstrip, str.rstrip)]
    return dict.fromkeys((content, *(trim(content, what) for trim, what in trims)))


def written(text: str, at: int, literal: str, contents: Sequence[str]) -> str | None:
    """Return which of `contents` stands in `text` between `at` and `literal`, as it is written there."""
    for content in contents:
        for form in forms(content):
            if text.startswith(form + literal, at):
                return form
    end = text.find(literal, at) if literal else len(text)
    found = text[at : max(end, at)]
    return found if any(squeezed(found) == squeezed(content) for content in contents) else None


def squeezed(text: str, *marks: str) -> str:
    """Return a text without white space, and without `marks`."""
    for mark in marks:
        text = text.replace(mark, "")
    return "".join(text.split())


def lost(message: Message, text: str) -> BadRow:
    """Return the error of a turn that is not in a rendering as it is in the row."""
    role, content = message["role"], message["content"].strip()
    how = "rewrites" if content in text else "leaves out or changes"
    merge = " or system: as_user" if role == "system" else ""
    return BadRow.because(
        CHANGED,
        f"the chat template {how} the {role} turn {content[:40]!r}, so the model would not see this row as it is "
        f"written. Use template: alpaca{merge}, or change or remove that turn.",
    )

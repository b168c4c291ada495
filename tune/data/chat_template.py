"""Rendering of conversations by a tokenizer's chat template, cut where answers begin and end.

A conversation is trained on as inference would send it: the rendering of everything before its last answer with the
generation prompt, then that answer and the template's end mark. Where the turns stand in a rendering is found by
rendering the same roles with a placeholder for each text; a rendering that is not the placeholders' with the texts in
their place has left out or rewritten a turn.

A thought (`tune.data.thoughts`) that the template itself writes before an answer belongs to the prompt; one that the
row holds belongs to the answer. Rows without thoughts are rendered with `enable_thinking=False`, which templates with a
thinking mode know. Where the generation prompt opens a thought, an answer without one begins by closing it.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from macdrop.errors import DataError
from tune.data import thoughts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
"""A turn: `role` and `content`."""
_PLACEHOLDER = re.compile(r"macdrop-text-(\d+)-goes-here")


@dataclass(frozen=True)
class Skeleton:
    """The template's own text around that of the turns: `literals[0]`, turn `order[0]`, `literals[1]`, and so on."""

    literals: tuple[str, ...]
    order: tuple[int, ...]

    def around(self, turn: int) -> tuple[str, str]:
        """Return what stands before and after the only occurrence of a turn.

        Raises:
            DataError: the turn occurs not at all, or several times.
        """
        if self.order.count(turn) != 1:
            raise DataError("the chat template changes, omits or repeats an answer. Use template: alpaca.")
        at = self.order.index(turn)
        return self.literals[at], self.literals[at + 1]


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of an answer and its end mark in a rendering; `trained`: it carries loss."""

    start: int
    end: int
    trained: bool


@dataclass(frozen=True)
class Rendered:
    """A conversation as text; `spans` are its answers in order. `closed`: their end marks are in the text."""

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


class ChatTemplate:
    """The chat template of one tokenizer.

    Raises (all methods):
        DataError: the template refuses a conversation, leaves out or changes a text, or mixes answer and prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._skeletons: dict[tuple[tuple[str, ...], bool, bool], Skeleton] = {}

    @cached_property
    def end(self) -> str:
        """The template's mark after every answer, without white space behind it; empty if there is none.

        Templates that render the last turn otherwise (Phi-3 adds eos, the first Llama 3 a generation prompt) show the
        mark where another question follows: it ends where that question's header begins.
        """
        last = self._skeleton(("user", "assistant")).around(1)[1]
        more = self._skeleton(("user", "assistant", "user"))
        between, opening = more.around(1)[1], more.literals[0]
        if last.strip() and between.startswith(last.rstrip()):
            return last.rstrip()
        header = self._common_end(opening, between)
        if header != between:
            return between.removesuffix(header).rstrip()
        if os.path.commonprefix([last, between]).strip():
            raise DataError("the chat template does not show where an answer ends. Use template: alpaca.")
        return ""

    def prompt(self, messages: Sequence[Message], thinking: bool = False) -> Prompt:
        """Render `messages` up to the place where an answer begins.

        The text ends with the template's own header and empty thought of an answer, if the generation prompt lacks
        them.

        thinking: the answer is to begin with a thought.
        """
        text, places = self._located(messages, generate=True, thinking=thinking)
        roles = tuple(message["role"] for message in messages)
        prompted = self._skeleton(roles, generate=True, thinking=thinking).literals[-1]
        header, after = self._skeleton((*roles, "assistant"), thinking=thinking).around(len(roles))
        opened = thoughts.opens_thought(prompted)
        if header.startswith(prompted):
            gap = header[len(prompted) :]
        elif _squeezed(header, thoughts.OPEN, thoughts.CLOSE) == _squeezed(prompted, thoughts.OPEN, thoughts.CLOSE):
            gap = thoughts.CLOSING if opened else ""
        else:
            raise DataError(
                f"the chat template's generation prompt ends with {prompted[-40:]!r}, but it writes answers after "
                f"{header[-40:]!r}, so training would not see what inference sends. Use template: alpaca."
            )
        if opened:
            return Prompt(text, True, places, "" if thinking else gap, (header, after))
        if thinking and thoughts.has_thought(gap):
            gap = gap[: gap.find(thoughts.OPEN)]
        blank = "" if gap.strip() else gap  # a blank belongs to the word that follows
        blank = blank or gap[len(gap.rstrip(" ")) :]
        return Prompt(text + gap.removesuffix(blank), False, places, blank, (header, after))

    def render(self, messages: Sequence[Message], trained: Sequence[bool]) -> Rendered:
        """Render a conversation for training.

        Args:
            messages: N turns.
            trained: N flags: answers that carry loss, at least one.
        """
        last = max(index for index, flag in enumerate(trained) if flag)
        thinking = thoughts.has_thought(messages[last]["content"])
        prompt = self.prompt(messages[:last], thinking)
        text, spans = prompt.text, []
        for index, (start, end) in sorted(prompt.places.items()):
            if messages[index]["role"] == "assistant":
                self._check_whole(messages[index], text[start:end], trained[index])
                spans.append(self._span(text, start, end, prompt.lead, trained[index]))
        answer = self._answer(prompt, messages[: last + 1], thinking)
        spans.append(Span(len(text), len(text + answer + self.end), True))
        text += answer + self.end
        if last + 1 < len(messages):
            whole, places = self._located(messages, thinking=thinking, since=last)
            tail = self._span(whole, *places[last], "", True).end
            for index in range(last + 1, len(messages)):
                if messages[index]["role"] == "assistant":
                    span = self._span(whole, *places[index], prompt.lead, False)
                    spans.append(Span(span.start - tail + len(text), span.end - tail + len(text), False))
            text += whole[tail:].rstrip()
        return Rendered(text, spans, bool(self.end))

    # --- answers ---

    def _answer(self, prompt: Prompt, messages: Sequence[Message], thinking: bool) -> str:
        """Return the last of `messages` as the template writes it after its prompt, without the end mark."""
        content, (header, after) = messages[-1]["content"], prompt.around
        whole = self._rendering(messages, thinking=thinking)
        if thinking:
            body = whole.removeprefix(prompt.text).removesuffix(after)
            same = _squeezed(body).removeprefix(thoughts.OPEN) == _squeezed(content).removeprefix(thoughts.OPEN)
            if whole.startswith(prompt.text) and same:
                return body
            if prompt.opened:
                thought = content.lstrip().removeprefix(thoughts.OPEN)
                return thought.lstrip("\n") if prompt.text.endswith("\n") else thought
        for form in _forms(content):
            if whole.endswith(header + form + after):
                return prompt.lead + form
        body = whole.removesuffix(after).rpartition(header)[2]
        if _squeezed(body) == _squeezed(content):
            return prompt.lead + body
        if thinking:  # the template leaves thoughts out; inference lets the model write them
            return prompt.lead + content
        raise _lost(messages[-1], whole)

    def _span(self, text: str, start: int, end: int, lead: str, trained: bool) -> Span:
        """Return an answer at [start, end) with the blank before it and the end mark behind it."""
        closed = text.startswith(self.end, end)
        if trained and not closed:
            raise DataError(
                f"the chat template leaves out the end mark {self.end!r} of an answer. Use template: alpaca."
            )
        before = len(lead) if lead and text.endswith(lead, 0, start) else 0
        return Span(start - before, end + (len(self.end) if closed else 0), trained)

    def _common_end(self, first: str, second: str) -> str:
        """Return what both texts end with in whole tags: `<s><user>` and `</s><user>` share `<user>`, not `><user>`."""
        added = sorted(map(re.escape, self._tokenizer.get_added_vocab()), key=len, reverse=True)
        tags = re.compile("|".join([*added, r"<[^<>]*>", r"\[[^\[\]]*\]", "."]), re.DOTALL)
        parts = zip(reversed(tags.findall(first)), reversed(tags.findall(second)), strict=False)
        return "".join(reversed([one for one, other in itertools.takewhile(lambda pair: pair[0] == pair[1], parts)]))

    def _check_whole(self, message: Message, found: str, trained: bool) -> None:
        """Refuse an earlier answer whose thought the template has stripped, unless it is context only."""
        if trained and _squeezed(found) != _squeezed(message["content"]):
            raise DataError(
                "the chat template leaves the thoughts of earlier answers out, so they cannot be trained on in one "
                "row.\nWrite one row per answer, with weight: 0 on the answers before it, or use template: alpaca."
            )

    # --- renderings ---

    def _located(
        self, messages: Sequence[Message], *, generate: bool = False, thinking: bool = False, since: int = 0
    ) -> tuple[str, dict[int, tuple[int, int]]]:
        """Render, and find the characters [start, end) of each turn's text; those before `since` may be left out."""
        text = self._rendering(messages, generate=generate, thinking=thinking)
        skeleton = self._skeleton(tuple(message["role"] for message in messages), generate, thinking)
        for index, message in enumerate(messages):
            if index >= since and index not in skeleton.order and message["content"].strip():
                raise _lost(message, text)
        at, places = len(skeleton.literals[0]), {}
        for index, literal in zip(skeleton.order, skeleton.literals[1:], strict=True):
            contents = [messages[index]["content"]]
            if messages[index]["role"] == "assistant":
                contents.append(contents[0].rpartition(thoughts.CLOSE)[2])
            written = _written(text, at, literal, contents)
            if written is None:
                raise _lost(messages[index], text)
            places[index] = (at, at + len(written))
            at += len(written) + len(literal)
        if at != len(text) or not text.startswith(skeleton.literals[0]):
            raise DataError("the chat template writes these turns otherwise than others. Use template: alpaca.")
        return text, places

    def _skeleton(self, roles: tuple[str, ...], generate: bool = False, thinking: bool = False) -> Skeleton:
        key = (roles, generate, thinking)
        if key not in self._skeletons:
            turns = [{"role": role, "content": f"macdrop-text-{i}-goes-here"} for i, role in enumerate(roles)]
            parts = _PLACEHOLDER.split(self._rendering(turns, generate=generate, thinking=thinking))
            self._skeletons[key] = Skeleton(tuple(parts[::2]), tuple(map(int, parts[1::2])))
        return self._skeletons[key]

    def _rendering(self, messages: Sequence[Message], *, generate: bool = False, thinking: bool = False) -> str:
        turns = [dict(message) for message in messages]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    turns, tokenize=False, add_generation_prompt=generate, enable_thinking=thinking
                )
            )
        except Exception as error:  # templates raise what they like
            raise DataError(f"the chat template refuses this conversation: {error}. Use template: alpaca.") from error


def end_of_answers(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the tokenizer's chat template writes after an answer; empty without a template or a mark."""
    if not tokenizer.chat_template:
        return ""
    try:
        return ChatTemplate(tokenizer).end.strip()
    except DataError:  # such a template is refused where it is used
        return ""


def _forms(content: str) -> Iterable[str]:
    """Yield a text as templates write it: whole, and trimmed in all ways."""
    trims = [(trim, what) for what in (None, "\n") for trim in (str.strip, str.lstrip, str.rstrip)]
    return dict.fromkeys((content, *(trim(content, what) for trim, what in trims)))


def _written(text: str, at: int, literal: str, contents: Sequence[str]) -> str | None:
    """Return which of `contents` stands in `text` between `at` and `literal`, as it is written there."""
    for content in contents:
        for form in _forms(content):
            if text.startswith(form + literal, at):
                return form
    end = text.find(literal, at) if literal else len(text)
    found = text[at : max(end, at)]
    return found if any(_squeezed(found) == _squeezed(content) for content in contents) else None


def _squeezed(text: str, *marks: str) -> str:
    """Return a text without white space, and without `marks`."""
    for mark in marks:
        text = text.replace(mark, "")
    return "".join(text.split())


def _lost(message: Message, text: str) -> DataError:
    role, content = message["role"], message["content"].strip()
    how = "rewrites" if content in text else "leaves out or changes"
    return DataError(
        f"the chat template {how} the {role} turn {content[:40]!r}, so the model would not see this row as it is "
        "written. Use template: alpaca, or change or remove that turn."
    )

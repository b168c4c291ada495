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
import json
import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from macdrop.errors import DataError
from tune.data import thoughts
from tune.data.lost_rows import BadRow
from tune.data.skeleton import (
    CHANGED,
    OTHERWISE,
    PLACEHOLDER,
    REFUSED,
    Message,
    Prompt,
    Rendered,
    Skeleton,
    Span,
    forms,
    lost,
    marked,
    squeezed,
    written,
)
from tune.data.tool_calls import tools_left_out, unshown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ASKED, _SAID = {"role": "user", "content": "?"}, {"role": "assistant", "content": "."}


class ChatTemplate:
    """The chat template of one tokenizer.

    Raises (all methods):
        DataError: the template refuses a conversation, leaves out or changes a text, or mixes answer and prompt.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tools: Sequence[Any] = ()) -> None:
        """tools: JSON schemas of the functions that the model is offered."""
        self._tokenizer, self._tools = tokenizer, list(tools)
        self._skeletons: dict[tuple[tuple[str, ...], bool, bool], Skeleton] = {}
        self._offering: tuple[list[Any], ChatTemplate] | None = None

    def offering(self, tools: Sequence[Any]) -> ChatTemplate:
        """Return the template with tools on offer; that of the last call is kept, as rows tend to share them."""
        if not tools:
            return self
        if self._offering is None or self._offering[0] != list(tools):
            self._offering = (list(tools), ChatTemplate(self._tokenizer, tools))
        return self._offering[1]

    @cached_property
    def end(self) -> str:
        """The template's mark after every answer, without white space behind it; empty if there is none.

        Templates that render the last turn otherwise (Phi-3 adds eos, the first Llama 3 a generation prompt) show the
        mark where another question follows: it ends where that question's header begins.
        """
        last = self._skeleton([_ASKED, _SAID]).around(1)[1]
        more = self._skeleton([_ASKED, _SAID, _ASKED])
        between, opening = more.around(1)[1], more.literals[0]
        if last.strip() and between.startswith(last.rstrip()):
            return last.rstrip()
        header = self._common_end(opening, between)
        if header != between:
            return between.removesuffix(header).rstrip()
        if os.path.commonprefix([last, between]).strip():
            raise BadRow.because(
                OTHERWISE, "the chat template does not show where an answer ends. Use template: alpaca."
            )
        return ""

    def prompt(self, messages: Sequence[Message], thinking: bool = False) -> Prompt:
        """Render `messages` up to the place where an answer begins.

        The text ends with the template's own header and empty thought of an answer, if the generation prompt lacks
        them.

        thinking: the answer is to begin with a thought.
        """
        text, places = self._located(messages, generate=True, thinking=thinking)
        if missing := tools_left_out(self._tools, text):
            raise BadRow.because(
                REFUSED, f"the chat template leaves out the tool {missing!r:.60}. Use a template that shows tools."
            )
        prompted = self._skeleton(messages, generate=True, thinking=thinking).literals[-1]
        header, after = self._skeleton([*messages, _SAID], thinking=thinking).around(len(messages))
        opened = thoughts.opens_thought(prompted)
        if header.startswith(prompted):
            gap = header[len(prompted) :]
        elif squeezed(header, thoughts.OPEN, thoughts.CLOSE) == squeezed(prompted, thoughts.OPEN, thoughts.CLOSE):
            gap = thoughts.CLOSING if opened else ""
        else:
            raise BadRow.because(
                OTHERWISE,
                f"the chat template's generation prompt ends with {prompted[-40:]!r}, but it writes answers after "
                f"{header[-40:]!r}, so training would not see what inference sends. Use template: alpaca.",
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
            trained: N flags: turns that carry loss, at least one.
        """
        answers = [index for index, flag in enumerate(trained) if flag and messages[index]["role"] == "assistant"]
        if not answers:
            return self._context(messages, trained)
        last = answers[-1]
        thinking = thoughts.has_thought(messages[last]["content"])
        prompt = self.prompt(messages[:last], thinking)
        if messages[last].get("tool_calls"):
            text, answer = self._called(messages[: last + 1], thinking)
        else:
            text, answer = prompt.text, self._answer(prompt, messages[: last + 1], thinking)
        spans = list(self._spans(messages[:last], trained, text, prompt.places, prompt.lead))
        spans.append(Span(len(text), len(text + answer + self.end), True))
        text += answer + self.end
        if last + 1 < len(messages):
            whole, places = self._located(messages, thinking=thinking, since=last)
            if last not in places and not messages[last].get("tool_calls"):
                raise lost(messages[last], whole)
            first, *others = self._spans(messages, trained, whole, places, prompt.lead, since=last)
            by = len(text) - first.end
            text += whole[first.end :].rstrip()
            spans += [Span(each.start + by, min(each.end + by, len(text)), *_kind(each)) for each in others]
        return Rendered(text, sorted(spans, key=lambda span: span.start), bool(self.end))

    def _context(self, messages: Sequence[Message], trained: Sequence[bool]) -> Rendered:
        """Render a conversation of which no answer carries loss, up to the last turn that does."""
        messages = messages[: max(index for index, flag in enumerate(trained) if flag) + 1]
        text, places = self._located(messages)
        spans = sorted(self._spans(messages, trained, text, places, ""), key=lambda span: span.start)
        end = max([len(text.rstrip()), *(span.end for span in spans)])
        return Rendered(text[:end], spans, bool(self.end))

    # --- turns in a rendering ---

    def _spans(
        self,
        messages: Sequence[Message],
        trained: Sequence[bool],
        text: str,
        places: dict[int, tuple[int, int]],
        lead: str,
        since: int | None = None,
    ) -> Iterator[Span]:
        """Yield the answers, and the other turns that carry loss; those from the last answer on with `since`."""
        for index in range(since or 0, len(messages)):
            message = messages[index]
            if message["role"] == "assistant" and message.get("tool_calls"):
                yield self._call_span(messages[: index + 1], text, places, lead, trained[index])
            elif message["role"] == "assistant" and index in places:
                start, end = places[index]
                if since is None:
                    self._check_whole(message, text[start:end], trained[index])
                yield self._span(text, start, end, lead, trained[index])
            elif trained[index] and index in places:
                start, end = places[index]
                yield Span(start, end + (len(self.end) if text.startswith(self.end, end) else 0), True, answer=False)

    def _called(self, messages: Sequence[Message], thinking: bool) -> tuple[str, str]:
        """Return the prompt of an answer with calls, the last of `messages`, and the answer without its end mark."""
        prompt = self.prompt(messages[:-1], thinking)
        whole = self._rendering(messages, thinking=thinking)
        bare = self._rendering(messages[:-1], generate=True, thinking=thinking)
        for start in (prompt.text, bare):
            rest, after = whole.removeprefix(start), prompt.around[1]
            if whole.startswith(start) and (rest.endswith(after) or rest.rstrip().endswith(self.end)):
                answer = rest.removesuffix(after) if rest.endswith(after) else rest.rstrip().removesuffix(self.end)
                if missing := unshown(messages[-1]["content"], messages[-1]["tool_calls"], answer):
                    raise BadRow.because(CHANGED, f"the chat template leaves out {missing!r:.60} of a tool call.")
                return start, answer
        raise BadRow.because(
            OTHERWISE, "the chat template writes calls of tools where inference would not: not after its prompt."
        )

    def _call_span(
        self, messages: Sequence[Message], text: str, places: dict[int, tuple[int, int]], lead: str, trained: bool
    ) -> Span:
        """Return an answer with calls, the last of `messages`, in the rendering `text` of more turns."""
        at = len(messages) - 1
        _, answer = self._called(messages, thoughts.has_thought(messages[-1]["content"]))
        begin = max((end for index, (_, end) in places.items() if index < at), default=0)
        stop = min((start for index, (start, _) in places.items() if index > at), default=len(text))
        needle = answer.strip() + self.end
        if text.count(needle, begin, stop) != 1:
            raise BadRow.because(
                OTHERWISE,
                "the chat template rewrites an answer with calls once other turns follow. Write one row per answer, "
                "with weight: 0 on the answers before it.",
            )
        start = text.index(needle, begin)
        before = len(lead) if lead and text.endswith(lead, 0, start) else 0
        return Span(start - before, start + len(needle), trained)

    # --- answers ---

    def _answer(self, prompt: Prompt, messages: Sequence[Message], thinking: bool) -> str:
        """Return the last of `messages` as the template writes it after its prompt, without the end mark."""
        content, (header, after) = messages[-1]["content"], prompt.around
        whole = self._rendering(messages, thinking=thinking)
        if thinking:
            body = whole.removeprefix(prompt.text).removesuffix(after)
            same = squeezed(body).removeprefix(thoughts.OPEN) == squeezed(content).removeprefix(thoughts.OPEN)
            if whole.startswith(prompt.text) and same:
                return body
            if prompt.opened:
                thought = content.lstrip().removeprefix(thoughts.OPEN)
                return thought.lstrip("\n") if prompt.text.endswith("\n") else thought
        for form in forms(content):
            if whole.endswith(header + form + after):
                return prompt.lead + form
        body = whole.removesuffix(after).rpartition(header)[2]
        if squeezed(body) == squeezed(content):
            return prompt.lead + body
        if thinking:  # the template leaves thoughts out; inference lets the model write them
            return prompt.lead + content
        raise lost(messages[-1], whole)

    def _span(self, text: str, start: int, end: int, lead: str, trained: bool) -> Span:
        """Return an answer at [start, end) with the blank before it and the end mark behind it."""
        closed = text.startswith(self.end, end)
        if trained and not closed:
            raise BadRow.because(
                CHANGED, f"the chat template leaves out the end mark {self.end!r} of an answer. Use template: alpaca."
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
        if trained and squeezed(found) != squeezed(message["content"]):
            raise BadRow.because(
                "the chat template leaves out thoughts of earlier answers",
                "the chat template leaves the thoughts of earlier answers out, so they cannot be trained on in one "
                "row.\nWrite one row per answer, with weight: 0 on the answers before it, or use template: alpaca.",
            )

    # --- renderings ---

    def _located(
        self, messages: Sequence[Message], *, generate: bool = False, thinking: bool = False, since: int = 0
    ) -> tuple[str, dict[int, tuple[int, int]]]:
        """Render, and find the characters [start, end) of each turn's text; those before `since` may be left out."""
        text = self._rendering(messages, generate=generate, thinking=thinking)
        skeleton = self._skeleton(messages, generate, thinking)
        for index, message in enumerate(messages):
            if index >= since and index not in skeleton.order and message["content"].strip():
                raise lost(message, text)
        at, places = len(skeleton.literals[0]), {}
        for index, literal in zip(skeleton.order, skeleton.literals[1:], strict=True):
            contents = [messages[index]["content"]]
            if messages[index]["role"] == "assistant":
                contents.append(contents[0].rpartition(thoughts.CLOSE)[2])
            elif messages[index]["role"] == "tool":  # Llama 3 writes results as JSON texts
                contents += [json.dumps(contents[0], ensure_ascii=flag)[1:-1] for flag in (False, True)]
            found = written(text, at, literal, contents)
            if found is None:
                raise lost(messages[index], text)
            places[index] = (at, at + len(found))
            at += len(found) + len(literal)
        if at != len(text) or not text.startswith(skeleton.literals[0]):
            raise BadRow.because(
                OTHERWISE, "the chat template writes these turns otherwise than others. Use template: alpaca."
            )
        return text, places

    def _skeleton(self, messages: Sequence[Message], generate: bool = False, thinking: bool = False) -> Skeleton:
        """Return the template's own text around these turns; of turns that are texts alone it is kept."""
        key = (tuple(message["role"] for message in messages), generate, thinking)
        plain = all(len(message) == 2 for message in messages)
        if plain and key in self._skeletons:
            return self._skeletons[key]
        parts = PLACEHOLDER.split(self._rendering(marked(messages), generate=generate, thinking=thinking))
        skeleton = Skeleton(tuple(parts[::2]), tuple(map(int, parts[1::2])))
        if plain:
            self._skeletons[key] = skeleton
        return skeleton

    def _rendering(self, messages: Sequence[Message], *, generate: bool = False, thinking: bool = False) -> str:
        turns = [dict(message) for message in messages]
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    turns,
                    tools=self._tools or None,
                    tokenize=False,
                    add_generation_prompt=generate,
                    enable_thinking=thinking,
                )
            )
        except Exception as error:  # templates raise what they like
            merge = " or system: as_user" if any(turn["role"] == "system" for turn in turns) else ""
            raise BadRow.because(
                REFUSED, f"the chat template refuses this conversation: {error}. Use template: alpaca{merge}."
            ) from error


def end_of_answers(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return what the tokenizer's chat template writes after an answer; empty without a template or a mark."""
    if not tokenizer.chat_template:
        return ""
    try:
        return ChatTemplate(tokenizer).end.strip()
    except DataError:  # such a template is refused where it is used
        return ""


def _kind(span: Span) -> tuple[bool, bool]:
    return span.trained, span.answer

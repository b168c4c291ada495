"""Encoding of conversations as token ids and labels.

A conversation becomes *pieces* of text; those of answers carry loss. Pieces are tokenised so that the label mask is
exact: the tokens up to a piece's start are a prefix of the tokens up to its end. Where a tokenizer merges across that
border (the prefix property fails), the pieces are tokenised one by one and joined; `Encoded.split` says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from macdrop.errors import ConfigError, DataError, nearest
from tune.config.train.data_keys import TEMPLATES, is_template_file
from tune.data.chat_template import ChatTemplate
from tune.data.formats import ANSWERS, Conversation, Turn, with_system_as_user
from tune.data.lost_rows import BadRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
"""Label of a token that carries no loss (torch's cross_entropy default)."""

# The prompts of Stanford Alpaca (tatsu-lab/stanford_alpaca, train.py), to the letter: no blank before the answer.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)


class Kind(Enum):
    """Role of a piece of text in the loss."""

    PROMPT = "carries loss if the prompt is trained on"
    ANSWER = "carries loss: an answer, or a turn of train_on_roles"
    MUTED = "an answer of weight 0, which never carries loss"


@dataclass(frozen=True)
class Piece:
    """Text of one kind. `close` appends the end-of-sequence id after it (labelled as the piece, being part of it)."""

    text: str
    kind: Kind
    close: bool = False


@dataclass(frozen=True)
class Encoded:
    """Tokens and labels of one conversation, both of length T, and the place that it came from.

    split: pieces had to be tokenised one by one.
    """

    input_ids: list[int]
    labels: list[int]
    split: bool
    place: str

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the first that carries loss, and at least 1: nothing predicts the first token."""
        first = next((i for i, label in enumerate(self.labels) if label != IGNORE), len(self.labels))
        return max(first, 1)


def choose_template(template: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, PreTrainedTokenizerBase]:
    """Resolve the spec's `template` to "chat" or "alpaca"; auto is chat where the tokenizer has a chat template.

    Returns:
        the name, and the tokenizer: of `FILE.jinja` a copy with that chat template.

    Raises:
        ConfigError: unknown template, `chat` for a tokenizer without one, or a file that cannot be used.
    """
    if is_template_file(template):
        return "chat", with_template(tokenizer, template)
    if template not in TEMPLATES:
        allowed = ", ".join(TEMPLATES)
        raise ConfigError(f"Unknown template {template!r}.{nearest(template, TEMPLATES)} Allowed: {allowed}.")
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if template == "chat" and not has_chat:
        raise ConfigError(
            "template 'chat' needs a tokenizer with a chat template, and this one has none.\n"
            "Use template: alpaca, a template: FILE.jinja, or the tokenizer of an instruction-tuned model."
        )
    return "alpaca" if template == "alpaca" or not has_chat else "chat", tokenizer


def with_template(tokenizer: PreTrainedTokenizerBase, path: str) -> PreTrainedTokenizerBase:
    """Return a copy of a tokenizer with the chat template in a file.

    Raises:
        ConfigError: the file is missing, empty or not text, or its Jinja is not valid.
    """
    import jinja2

    tokenizer = copy.copy(tokenizer)
    try:
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        if not tokenizer.chat_template.strip():
            raise ConfigError(f"template {path!r:.200} is empty.")
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    except OSError as error:
        raise ConfigError(f"template {path!r:.200} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"template {path!r:.200} is not UTF-8 text.") from None
    except jinja2.TemplateSyntaxError as error:
        place = f"template {path!r:.200}, line {error.lineno}"
        raise ConfigError(f"{place}: not a valid template ({error.message}).") from None
    except jinja2.TemplateError:
        pass  # it may refuse that conversation, and not those of the data
    return tokenizer


def alpaca_pieces(conversation: Conversation, roles: Sequence[str] = ANSWERS) -> list[Piece]:
    """Build the Alpaca prompt; further turns repeat its instruction block, a system turn replaces its opening.

    Raises:
        BadRow: an answer stands before the first question, or tools are used, for which the prompt has no place.
    """
    if any(turn.calls or turn.tools or turn.role == "tool" for turn in conversation):
        raise BadRow.because("template alpaca has no place for tools", "template alpaca has no place for tools.")
    pieces: list[Piece] = []
    system = [turn for turn in conversation if turn.role == "system"]
    for turn in conversation:
        kind = Kind.ANSWER if turn.role in roles and turn.trained else Kind.PROMPT
        if turn.role == "assistant":
            if not pieces:
                why = "template alpaca has no place for an answer before the first question"
                raise BadRow.because(why, f"{why}. Leave that turn out, or use a chat template.")
            pieces.append(Piece(turn.content, Kind.ANSWER if kind is Kind.ANSWER else Kind.MUTED, close=True))
        elif turn.role == "user":
            opening = ALPACA_WITH_INPUT if turn.context else ALPACA_WITHOUT_INPUT
            if pieces:
                pieces.append(Piece("\n\n", Kind.PROMPT))
            elif system:
                carry = [each.trained and "system" in roles for each in system]
                pieces += [
                    Piece(each.content + "\n\n", Kind.ANSWER if flag else Kind.PROMPT)
                    for each, flag in zip(system, carry, strict=True)
                ]
            else:
                pieces.append(Piece(opening, Kind.PROMPT))
            pieces += [Piece("### Instruction:\n", Kind.PROMPT), Piece(turn.content, kind), Piece("\n\n", Kind.PROMPT)]
            if turn.context:
                pieces += [Piece("### Input:\n", Kind.PROMPT), Piece(turn.context, kind), Piece("\n\n", Kind.PROMPT)]
            pieces.append(Piece("### Response:", Kind.PROMPT))
    return _merged(pieces)


def _merged(pieces: Sequence[Piece]) -> list[Piece]:
    """Join neighbouring pieces of the prompt, so that they are tokenised as the one text that they are."""
    merged: list[Piece] = []
    for piece in pieces:
        if merged and piece.kind is Kind.PROMPT and merged[-1].kind is Kind.PROMPT:
            merged[-1] = Piece(merged[-1].text + piece.text, Kind.PROMPT)
        else:
            merged.append(piece)
    return merged


def chat_pieces(conversation: Conversation, template: ChatTemplate, roles: Sequence[str] = ANSWERS) -> list[Piece]:
    """Render a conversation by a chat template and cut it at its answers, and at other turns of `roles`.

    An answer includes the template's end-of-turn mark, without the white space behind it. A template that marks no end
    gets the end-of-sequence id.

    Raises:
        BadRow: the template refuses the conversation, or leaves out or changes a text of it.
    """
    messages = [_message(turn) for turn in conversation]
    trained = [turn.role in roles and turn.trained for turn in conversation]
    rendered = template.offering(conversation[0].tools).render(messages, trained)
    pieces, at = [], 0
    for span in rendered.spans:
        kind = Kind.ANSWER if span.trained else Kind.MUTED
        pieces += [Piece(rendered.text[at : span.start], Kind.PROMPT)]
        pieces += [Piece(rendered.text[span.start : span.end], kind, close=span.answer and not rendered.closed)]
        at = span.end
    rest = rendered.text[at:]
    return [*pieces, Piece(rest, Kind.PROMPT)] if rest.strip() else pieces


def _message(turn: Turn) -> dict[str, Any]:
    """Return a turn as chat templates take it."""
    calls = {"tool_calls": list(turn.calls)} if turn.calls else {}
    return {"role": turn.role, "content": _joined(turn), **calls, **dict(turn.about)}


class Encoder:
    """Encodes conversations with one tokenizer and template.

    Args:
        tokenizer: a tokenizer with an end-of-sequence token.
        template: "chat" or "alpaca", from `choose_template`.
        train_on_prompt: every token carries loss, but those of answers of weight 0.
        roles: those whose turns carry loss.
        system_as_user: system turns are a part of the next question.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        train_on_prompt: bool,
        roles: Sequence[str] = ANSWERS,
        system_as_user: bool = False,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "the tokenizer has no end-of-sequence token, so a model could not learn where an answer ends."
            )
        self.tokenizer, self.template = tokenizer, template
        self._roles, self._system_as_user = tuple(roles), system_as_user
        self._chat = ChatTemplate(tokenizer)
        self._trained = {Kind.ANSWER, Kind.PROMPT} if train_on_prompt else {Kind.ANSWER}
        plain, special = self._ids(["a"])[0], list(tokenizer("a")["input_ids"])
        heads = [i for i in range(len(special)) if special[i : i + len(plain)] == plain]
        self.lead = special[: heads[0]] if heads else []
        """Ids that the tokenizer puts before every text: bos, or nothing, or GLM's pair."""

    def encode(
        self,
        conversations: Sequence[Conversation],
        places: Sequence[str],
        refuse: Callable[[DataError, str], None] | None = None,
    ) -> list[Encoded]:
        """Encode many conversations with few tokenizer calls (fast tokenizers then use all cores).

        Args:
            conversations: N of them.
            places: where each came from ("file, line 3"), for error messages.
            refuse: called with the error, and the place, of each conversation that the template cannot render; these
                are left out.

        Raises:
            DataError: the template cannot render a conversation, and there is no `refuse`.
        """
        taken, runs = [], []
        for conversation, place in zip(conversations, places, strict=True):
            try:
                runs.append(self._runs(conversation))
                taken.append((conversation, place))
            except DataError as error:
                reason = error.reason if isinstance(error, BadRow) else BadRow.reason
                refused = BadRow.because(reason, f"{place}: {error}")
                if refuse is None:
                    raise refused from error
                refuse(refused, place)
        ids = iter(self._ids([text for group in runs for run in group for text in _growing(run)]))
        grown = [[[next(ids) for _ in run] for run in group] for group in runs]
        return [
            self._join(group, lengths, conversation, place)
            for group, lengths, (conversation, place) in zip(runs, grown, taken, strict=True)
        ]

    def _runs(self, conversation: Conversation) -> list[list[Piece]]:
        """Pieces in runs that are tokenised as one text; an end-of-sequence id ends a run."""
        if conversation[0].role == "document":
            return [[Piece(conversation[0].content, Kind.ANSWER, close=True)]]
        if self._system_as_user:
            conversation = with_system_as_user(conversation)
        if self.template == "chat":
            pieces = chat_pieces(conversation, self._chat, self._roles)
        else:
            pieces = alpaca_pieces(conversation, self._roles)
        runs: list[list[Piece]] = [[]]
        for piece in pieces:
            runs[-1].append(piece)
            if piece.close:
                runs.append([])
        return [run for run in runs if run]

    def _join(
        self, runs: list[list[Piece]], grown: list[list[list[int]]], conversation: Conversation, place: str
    ) -> Encoded:
        """Chain the runs; `grown[r][i]` are the ids of run r up to the end of its piece i."""
        # A chat template writes its own bos, so the tokenizer's is added to other texts only.
        lead = [] if self.template == "chat" and conversation[0].role != "document" else self.lead
        ids, split = list(lead), False
        labels = list(lead) if Kind.PROMPT in self._trained else [IGNORE] * len(lead)
        for number, (run, prefixes) in enumerate(zip(runs, grown, strict=True)):
            exact = all(later[: len(prefix)] == prefix for prefix, later in zip(prefixes, prefixes[1:], strict=False))
            if exact and number == 0:
                parts = [later[len(prefix) :] for prefix, later in zip([[], *prefixes], prefixes, strict=False)]
            else:
                split = split or not exact
                parts = [self._continue(piece.text, first=number + i == 0) for i, piece in enumerate(run)]
            for piece, part in zip(run, parts, strict=True):
                part = part + [self.tokenizer.eos_token_id] if piece.close else part
                ids += part
                labels += part if piece.kind in self._trained else [IGNORE] * len(part)
        return Encoded(ids, labels, split, place)

    def _continue(self, text: str, first: bool) -> list[int]:
        """Tokenise a text that follows another, without the blank that SentencePiece puts before a text."""
        if first or not text:
            return self._ids([text])[0]
        marker, marked = self._ids(["\n", "\n" + text])
        return marked[len(marker) :] if marked[: len(marker)] == marker else self._ids([text])[0]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _growing(run: list[Piece]) -> list[str]:
    texts, text = [], ""
    for piece in run:
        text += piece.text
        texts.append(text)
    return texts


def _joined(turn: Turn) -> str:
    return f"{turn.content}\n{turn.context}" if turn.context else turn.content

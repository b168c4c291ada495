"""Encoding of conversations as token ids and labels.

A conversation becomes *pieces* of text; those of answers carry loss. Pieces are tokenised so that the label mask is
exact: the tokens up to a piece's start are a prefix of the tokens up to its end. Where a tokenizer merges across that
border (the prefix property fails), the pieces are tokenised one by one and joined; `Encoded.split` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from macdrop.errors import ConfigError, DataError, nearest
from tune.data.formats import Conversation, Turn

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
TEMPLATES = ("auto", "alpaca", "chat")
_PROBE = "macdrop-answer-goes-here"


@dataclass(frozen=True)
class Piece:
    """Text of one kind. `close` appends the end-of-sequence id after it (labelled, as it belongs to the answer)."""

    text: str
    answer: bool
    close: bool = False


@dataclass(frozen=True)
class Encoded:
    """Tokens and labels of one conversation, both of length T; `split`: pieces had to be tokenised one by one."""

    input_ids: list[int]
    labels: list[int]
    split: bool

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the first that carries loss, and at least 1: nothing predicts the first token."""
        first = next((i for i, label in enumerate(self.labels) if label != IGNORE), len(self.labels))
        return max(first, 1)


def choose_template(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Resolve the spec's `template` to "chat" or "alpaca"; auto is chat where the tokenizer has a chat template.

    Raises:
        ConfigError: unknown template, or `chat` for a tokenizer without one.
    """
    if template not in TEMPLATES:
        allowed = ", ".join(TEMPLATES)
        raise ConfigError(f"Unknown template {template!r}.{nearest(template, TEMPLATES)} Allowed: {allowed}.")
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if template == "chat" and not has_chat:
        raise ConfigError(
            "template 'chat' needs a tokenizer with a chat template, and this one has none.\n"
            "Use template: alpaca, or the tokenizer of an instruction-tuned model."
        )
    return "alpaca" if template == "alpaca" or not has_chat else "chat"


def alpaca_pieces(conversation: Conversation) -> list[Piece]:
    """Build the Alpaca prompt; further turns repeat its instruction block, a system turn replaces its opening."""
    system = "".join(turn.content + "\n\n" for turn in conversation if turn.role == "system")
    pieces: list[Piece] = []
    for turn in conversation:
        if turn.role == "assistant":
            pieces.append(Piece(turn.content, answer=True, close=True))
        elif turn.role == "user":
            opening = "\n\n" if pieces else system or (ALPACA_WITH_INPUT if turn.context else ALPACA_WITHOUT_INPUT)
            context = f"### Input:\n{turn.context}\n\n" if turn.context else ""
            pieces.append(Piece(f"{opening}### Instruction:\n{turn.content}\n\n{context}### Response:", answer=False))
    return pieces


def chat_pieces(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """Render the tokenizer's chat template and cut it where answers begin and end.

    An answer begins where the generation prompt ends and includes the template's end-of-turn mark, without the white
    space after it. A template that marks no end gets the end-of-sequence id. Some templates render an answer
    differently once another turn follows (Qwen3 drops the empty thought): it is looked up in the whole rendering.

    Raises:
        DataError: the template refuses the conversation, or changes earlier turns beyond recognition.
    """
    messages = [{"role": turn.role, "content": _joined(turn)} for turn in conversation]

    def render(turns: list[dict[str, str]], generate: bool = False) -> str:
        try:
            return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generate))
        except Exception as error:  # templates raise what they like
            raise DataError(f"the chat template refuses this conversation: {error}. Use template: alpaca.") from error

    whole = render(messages)
    pieces, at = [], 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        earlier = messages[:index]
        prompt, after = render(earlier, generate=True), render(messages[: index + 1])
        head, _, tail = render([*earlier, {"role": "assistant", "content": _PROBE}]).partition(_PROBE)
        before = render(earlier)
        if prompt == before:  # no generation prompt in this template: the turn's header, if any, is not an answer
            prompt = head[: max(len(before), len(head.rstrip()))]  # and a blank belongs to the word that follows
        start = len(prompt)
        if not whole.startswith(prompt) or start < at:
            raise DataError(
                "the chat template rewrites earlier turns, so no label mask is exact. Use template: alpaca."
            )
        if whole.startswith(after):
            end = max(len(after.rstrip()), start)
        else:
            content, mark = message["content"].strip(), tail.rstrip()
            found = whole.find(content, start)
            if found < 0:
                raise DataError(
                    "the chat template changes the text of an answer, so no label mask is exact. Use template: alpaca."
                )
            end = found + len(content)
            end += len(mark) if whole.startswith(mark, end) else 0
        pieces += [Piece(whole[at:start], answer=False), Piece(whole[start:end], answer=True, close=not tail.strip())]
        at = end
    return [*pieces, Piece(whole[at:], answer=False)] if whole[at:].strip() else pieces


class Encoder:
    """Encodes conversations with one tokenizer and template.

    Args:
        tokenizer: a tokenizer with an end-of-sequence token.
        template: "chat" or "alpaca", from `choose_template`.
        train_on_prompt: every token carries loss.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, train_on_prompt: bool) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "the tokenizer has no end-of-sequence token, so a model could not learn where an answer ends."
            )
        self.tokenizer, self.template, self.train_on_prompt = tokenizer, template, train_on_prompt
        plain, special = self._ids(["a"])[0], list(tokenizer("a")["input_ids"])
        heads = [i for i in range(len(special)) if special[i : i + len(plain)] == plain]
        self.lead = special[: heads[0]] if heads else []
        """Ids that the tokenizer puts before every text: bos, or nothing, or GLM's pair."""

    def encode(self, conversations: Sequence[Conversation], places: Sequence[str]) -> list[Encoded]:
        """Encode many conversations with few tokenizer calls (fast tokenizers then use all cores).

        Args:
            conversations: N of them.
            places: where each came from ("file, line 3"), for error messages.
        """
        runs = []
        for conversation, place in zip(conversations, places, strict=True):
            try:
                runs.append(self._runs(conversation))
            except DataError as error:
                raise DataError(f"{place}: {error}") from error
        ids = iter(self._ids([text for group in runs for run in group for text in _growing(run)]))
        grown = [[[next(ids) for _ in run] for run in group] for group in runs]
        return [self._join(*each) for each in zip(runs, grown, conversations, strict=True)]

    def _runs(self, conversation: Conversation) -> list[list[Piece]]:
        """Pieces in runs that are tokenised as one text; an end-of-sequence id ends a run."""
        if conversation[0].role == "document":
            return [[Piece(conversation[0].content, answer=True, close=True)]]
        chat = self.template == "chat"
        pieces = chat_pieces(conversation, self.tokenizer) if chat else alpaca_pieces(conversation)
        runs: list[list[Piece]] = [[]]
        for piece in pieces:
            runs[-1].append(piece)
            if piece.close:
                runs.append([])
        return [run for run in runs if run]

    def _join(self, runs: list[list[Piece]], grown: list[list[list[int]]], conversation: Conversation) -> Encoded:
        """Chain the runs; `grown[r][i]` are the ids of run r up to the end of its piece i."""
        # A chat template writes its own bos, so the tokenizer's is added to other texts only.
        lead = [] if self.template == "chat" and conversation[0].role != "document" else self.lead
        ids, labels, split = list(lead), [IGNORE] * len(lead), False
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
                labels += part if piece.answer else [IGNORE] * len(part)
        return Encoded(ids, list(ids) if self.train_on_prompt else labels, split)

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

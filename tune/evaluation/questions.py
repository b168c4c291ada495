"""Questions of generation benchmarks: read from files, and made into prompts turn by turn."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from macdrop.errors import ConfigError, DataError
from tune.config.eval_entries import Generation
from tune.config.train.data_keys import is_template_file
from tune.data.chat_template import ChatTemplate
from tune.data.formats import Turn
from tune.data.templates import Encoder, with_template
from tune.evaluation.check import read_generation
from tune.evaluation.own.own_metrics import OwnMetric, load_metrics

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Question:
    """One conversation: user turns, references (none for Spec-Bench), and its row, of which some is kept."""

    turns: list[str]
    references: list[str]
    category: str
    kept: dict[str, Any]
    context: str = ""
    row: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ResidentQuestions:
    """The questions of one benchmark entry, ready to be asked in the chat template of `tokenizer`."""

    name: str
    questions: list[Question]
    entry: Generation
    kind: str
    template: str
    room: int
    encoder: Encoder | None
    chat: ChatTemplate
    own: list[OwnMetric]
    tokenizer: PreTrainedTokenizerBase

    @property
    def template_name(self) -> str:
        """The template's name; of one in a file with a digest of its text, as another text asks otherwise."""
        if not is_template_file(self.entry.template):
            return self.template
        text = str(self.tokenizer.chat_template)
        return f"{self.template}:{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def load(
    name: str,
    entry: Generation,
    tokenizer: PreTrainedTokenizerBase,
    max_positions: int,
    code_path: str | None = None,
) -> ResidentQuestions:
    """Read the questions of an entry, choose their template, and import its own metrics from `code_path`.

    Raises:
        DataError: rows of an unknown format. ConfigError: a template the tokenizer lacks, no room for a prompt, or an
            own metric that cannot be imported.
    """
    kind, table = read_generation(entry)
    raw = kind == "reference" and "prompt" in table.rows[0]
    template = entry.template
    if is_template_file(template):
        template, tokenizer = "chat", with_template(tokenizer, template)
    if template == "auto":
        template = "plain" if raw else "chat" if tokenizer.chat_template else "alpaca"
    if template == "chat" and not tokenizer.chat_template:
        raise ConfigError(
            "template 'chat' needs a tokenizer with a chat template, and this one has none; use alpaca or plain."
        )
    room = max_positions - entry.max_new_tokens
    if room < 2:
        raise ConfigError(
            f"max_new_tokens {entry.max_new_tokens} leaves no room for a prompt in {max_positions} positions."
        )
    encoder = Encoder(tokenizer, "alpaca", train_on_prompt=True) if template == "alpaca" else None
    questions = [_question(kind, row, number) for number, row in enumerate(table.rows)]
    own = load_metrics(code_path, entry.own_metrics)
    chat = ChatTemplate(tokenizer)
    return ResidentQuestions(name, questions, entry, kind, template, room, encoder, chat, own, tokenizer)


def _question(kind: str, row: dict[str, Any], number: int) -> Question:
    if kind == "spec_bench":
        kept = {"question_id": row["question_id"], "category": row["category"], "turns": row["turns"]}
        if "reference" in row:
            kept["reference"] = row["reference"]  # for a judge: one per turn, in the file's own shape
        return Question(list(row["turns"]), [], row["category"], kept, row=row)
    wanted = row.get("reference" if "prompt" in row else "output")
    references = [] if wanted is None else wanted if isinstance(wanted, list) else [wanted]
    turn = row["prompt"] if "prompt" in row else row["instruction"]
    context = "" if "prompt" in row else row.get("input") or ""
    kept = {"question_id": row.get("question_id", number), "category": "", "turns": [turn]}
    kept |= {} if wanted is None else {"reference": wanted}
    return Question([turn], references, "", kept | ({"input": context} if context else {}), context, row)


def select(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """Return the first `limit` questions of every category, in file order."""
    seen: dict[str, int] = {}
    chosen = []
    for question in questions:
        seen[question.category] = seen.get(question.category, 0) + 1
        if limit is None or seen[question.category] <= limit:
            chosen.append(question)
    return chosen


@dataclass(frozen=True)
class Prompt:
    """Token ids of a prompt, before any cut; `opened`: it ends inside a thought."""

    ids: list[int]
    opened: bool = False


def prompt(
    resident: ResidentQuestions, tokenizer: PreTrainedTokenizerBase, question: Question, answers: Sequence[str]
) -> Prompt:
    """Return the conversation up to the turn after `answers`.

    Raises:
        DataError: the chat template cannot render it.
    """
    asked = question.turns[: len(answers) + 1]
    if resident.encoder is not None:
        turns = [Turn("user", asked[0], question.context)]
        for answer, turn in zip(answers, asked[1:], strict=True):
            turns += [Turn("assistant", answer), Turn("user", turn)]
        return Prompt(resident.encoder.encode([turns], [str(question.kept["question_id"])])[0].input_ids)
    first = f"{asked[0]}\n{question.context}" if question.context else asked[0]
    texts = [first, *asked[1:]]
    if resident.template == "plain":
        text = "".join(f"{turn}\n{answer}\n\n" for turn, answer in zip(texts, answers, strict=False)) + texts[-1]
        return Prompt(list(tokenizer(text, verbose=False)["input_ids"]))
    messages = [{"role": "user", "content": texts[0]}]
    for answer, turn in zip(answers, texts[1:], strict=True):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
    try:
        rendered = resident.chat.prompt(messages, resident.entry.thinking)
    except DataError as error:
        raise DataError(f"eval.generation.{resident.name}, question {question.kept['question_id']}: {error}") from error
    return Prompt(list(tokenizer(rendered.text, add_special_tokens=False, verbose=False)["input_ids"]), rendered.opened)

"""Generation benchmarks: Spec-Bench question files, and prompts with references.

Decoding is greedy. Prompts come from the tokenizer's chat template, else from the alpaca prompt that training uses
(template: plain uses the bare text). Further turns follow the model's own earlier answers. Prompts that leave no room
for the answer lose tokens on the left, except bos; the rows count them. Thoughts before an answer are kept apart: no
metric, judge or later turn sees them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from macdrop.errors import ConfigError, DataError
from tune.config.eval_entries import TEXT_METRICS, Generation
from tune.config.eval_spec import EvalSpec
from tune.data.chat_template import ChatTemplate
from tune.data.formats import Turn
from tune.data.templates import Encoder
from tune.data.thoughts import without_thought
from tune.evaluation.check import read_generation
from tune.evaluation.decode import Answer, cut_at, fit_prompt, greedy
from tune.evaluation.item_values import MULTI_TURN, Value, Values, part_of
from tune.evaluation.text_metrics import mean_and_stderr, repetition, text_metric

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tune.evaluation.logits import Logits

VERSION = "2"
HIGHER_IS_BETTER = {**dict.fromkeys(TEXT_METRICS, True), "empty_share": False, "repeated_4grams": False}
"""Whether a higher value is better; descriptive metrics are not listed."""


@dataclass(frozen=True)
class Question:
    """One conversation: user turns, references (none for Spec-Bench), and what to keep of its row."""

    turns: list[str]
    references: list[str]
    category: str
    kept: dict[str, Any]
    context: str = ""


@dataclass(frozen=True)
class ResidentQuestions:
    """The questions of one benchmark entry, ready to be asked."""

    name: str
    questions: list[Question]
    entry: Generation
    kind: str
    template: str
    room: int
    encoder: Encoder | None
    chat: ChatTemplate


def load(name: str, entry: Generation, tokenizer: PreTrainedTokenizerBase, max_positions: int) -> ResidentQuestions:
    """Read the questions of an entry and choose their template.

    Raises:
        DataError: rows of an unknown format. ConfigError: a template the tokenizer lacks, or no room for a prompt.
    """
    kind, table = read_generation(entry)
    raw = kind == "reference" and "prompt" in table.rows[0]
    template = entry.template
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
    return ResidentQuestions(name, questions, entry, kind, template, room, encoder, ChatTemplate(tokenizer))


def _question(kind: str, row: dict[str, Any], number: int) -> Question:
    if kind == "spec_bench":
        kept = {"question_id": row["question_id"], "category": row["category"], "turns": row["turns"]}
        if "reference" in row:
            kept["reference"] = row["reference"]  # for a judge: one per turn, in the file's own shape
        return Question(list(row["turns"]), [], row["category"], kept)
    wanted = row["reference"] if "prompt" in row else row["output"]
    references = wanted if isinstance(wanted, list) else [wanted]
    turn = row["prompt"] if "prompt" in row else row["instruction"]
    context = "" if "prompt" in row else row.get("input") or ""
    kept = {"question_id": row.get("question_id", number), "category": "", "turns": [turn], "reference": wanted}
    return Question([turn], references, "", kept | ({"input": context} if context else {}), context)


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


def score(
    resident: ResidentQuestions,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    limit: int | None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Answer every question, all turns, and score the answers.

    Returns:
        rows, and per question what is kept as jsonl: question_id, category, turns, answers, tokens, ended, metrics.
    """
    name, entry, questions = resident.name, resident.entry, select(resident.questions, limit)
    answers: list[list[Answer]] = [[] for _ in questions]
    cut = 0
    for turn in range(max(len(question.turns) for question in questions)):
        asked = [i for i, question in enumerate(questions) if turn < len(question.turns)]
        whole = [prompt(resident, tokenizer, questions[i], [a.text for a in answers[i]]) for i in asked]
        cut += sum(len(each.ids) > resident.room for each in whole)
        found = greedy(
            model,
            tokenizer,
            [fit_prompt(each.ids, resident.room, tokenizer.bos_token_id) for each in whole],
            max_new_tokens=entry.max_new_tokens,
            batch_size=batch_size,
            stop=entry.stop,
            opened=whole[0].opened,  # all are of one template
        )
        for i, answer in zip(asked, found, strict=True):
            answers[i].append(answer)
    measured = _measured(resident, questions, answers)
    items = [
        question.kept
        | {
            "answers": [a.text for a in given],
            "tokens": [len(a.tokens) for a in given],
            "ended": [a.ended for a in given],
            "metrics": metrics,
        }
        | ({"thoughts": [a.thought for a in given]} if any(a.thought for a in given) else {})
        for question, given, metrics in zip(questions, answers, measured, strict=True)
    ]
    settings = (
        f"format={resident.kind} template={resident.template} greedy max_new_tokens={entry.max_new_tokens} "
        f"prompts_cut_left={cut}"
    )
    groups = _groups(name, questions) if resident.kind == "spec_bench" else {name: list(range(len(questions)))}
    rows = [
        _row(metric, [value for i in members for value in measured[i][metric]]) | {"task": task}
        for task, members in groups.items()
        for metric in measured[0]
    ]
    return [row | {"version": VERSION, "num_fewshot": None, "settings": settings} for row in rows], items


def _measured(
    resident: ResidentQuestions, questions: Sequence[Question], answers: Sequence[list[Answer]]
) -> list[dict[str, list[float]]]:
    """Return per question and metric a value per answer (Spec-Bench), or one for the last answer (references).

    Spec-Bench's metrics are descriptive: they do not measure quality. Thoughts and what follows a stop text are cut off
    references as they are off answers.
    """
    if resident.kind == "spec_bench":
        return [
            {
                "new_tokens": [float(len(a.tokens)) for a in given],
                "empty_share": [float(not a.text.strip()) for a in given],
                "eos_share": [float(a.ended == "eos") for a in given],
                "repeated_4grams": [repetition(a.tokens) for a in given],
            }
            for given in answers
        ]
    entry = resident.entry
    texts = [given[-1].text for given in answers]
    references = [[cut_at(without_thought(text), entry.stop) for text in question.references] for question in questions]
    metrics = entry.metrics or TEXT_METRICS
    columns = [text_metric(metric, texts, references) for metric in metrics]
    return [dict(zip(metrics, ([value] for value in values), strict=True)) for values in zip(*columns, strict=True)]


def _groups(name: str, questions: Sequence[Question]) -> dict[str, list[int]]:
    """Map the tasks of a Spec-Bench entry (all, multi-turn, each category) to the indices of their questions."""
    groups = {name: list(range(len(questions)))}
    multi = [i for i, question in enumerate(questions) if len(question.turns) > 1]
    if multi and len(multi) < len(questions):
        groups[f"{name}/{MULTI_TURN}"] = multi
    for i, question in enumerate(questions):
        groups.setdefault(f"{name}/{question.category}", []).append(i)
    return groups


def _row(metric: str, values: list[float]) -> dict[str, Any]:
    value, stderr = mean_and_stderr(values)
    better = HIGHER_IS_BETTER.get(metric)
    return {"metric": metric, "value": value, "stderr": stderr, "n": len(values), "higher_is_better": better}


class GenerationBenchmark:
    """Scores entries of `generation`; an item is an answer, of which a question has one per turn."""

    def __init__(self, spec: EvalSpec, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length

    @staticmethod
    def check(name: str, entry: Generation, spec: EvalSpec) -> None:
        read_generation(entry)

    def load(self, name: str, entry: Generation) -> ResidentQuestions:
        return load(name, entry, self._tokenizer, self._max_length)

    def count(self, data: ResidentQuestions, limit: int | None) -> int:
        return len(select(data.questions, limit))

    def score(
        self,
        data: ResidentQuestions,
        model: PreTrainedModel | PeftModel,
        batch_size: int,
        limit: int | None,
        logits: Logits,
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        return score(data, model, self._tokenizer, batch_size, limit)

    @staticmethod
    def items(records: list[dict[str, Any]], row: Mapping[str, Any]) -> Values | None:
        """One value per answer: all turns of the questions that belong to the task."""
        part = part_of(row)
        chosen = {"": lambda r: True, MULTI_TURN: lambda r: len(r["turns"]) > 1}
        mine = filter(chosen.get(part, lambda r: r["category"] == part), records)
        values: dict[str, Value] = {}
        for r in mine:
            content = hashlib.sha256(json.dumps([r["turns"], r.get("input")]).encode()).hexdigest()[:8]
            for turn, value in enumerate(r.get("metrics", {}).get(row["metric"], [])):
                values[f"question {r['question_id']}/{turn} {content}"] = float(value)
        return values or None

"""Generation benchmarks: Spec-Bench question files, and prompts with references.

Decoding is greedy. Prompts come from the tokenizer's chat template, else from the alpaca prompt that training uses
(template: plain uses the bare text). Further turns follow the model's own earlier answers. Prompts that leave no room
for the answer lose tokens on the left, except bos; the rows count them. Thoughts before an answer are kept apart: no
metric, judge or later turn sees them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune.config.eval_entries import TEXT_METRICS, Generation
from tune.config.eval_spec import EvalSpec
from tune.data.thoughts import without_thought
from tune.evaluation.check import read_generation
from tune.evaluation.decode import Answer, Ends, cut_at, fit_prompt, greedy
from tune.evaluation.endpoints.generation_server import Decoding, ServedModel
from tune.evaluation.item_values import MULTI_TURN, Value, Values, part_of
from tune.evaluation.own.own_metrics import Measured, OwnMetric, load_metrics, measure
from tune.evaluation.questions import Question, ResidentQuestions, load, prompt, select
from tune.evaluation.text_metrics import mean_and_stderr, repetition, text_metric

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tune.evaluation.logits import Logits

VERSION = "2"
HIGHER_IS_BETTER = {**dict.fromkeys(TEXT_METRICS, True), "empty_share": False, "repeated_4grams": False}
"""Whether a higher value is better; descriptive metrics are not listed."""


def score(
    resident: ResidentQuestions,
    model: PreTrainedModel | PeftModel,
    batch_size: int,
    limit: int | None,
    server: ServedModel | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Answer every question, all turns, and score the answers; `server` answers in place of the model.

    Returns:
        rows, and per question what is kept as jsonl: question_id, category, turns, answers, tokens, ended, metrics.
    """
    name, entry, questions = resident.name, resident.entry, select(resident.questions, limit)
    tokenizer = resident.tokenizer
    answers: list[list[Answer]] = [[] for _ in questions]
    compare: Callable[[], list[Answer]] | None = None
    cut = 0
    for turn in range(max(len(question.turns) for question in questions)):
        asked = [i for i, question in enumerate(questions) if turn < len(question.turns)]
        whole = [prompt(resident, tokenizer, questions[i], [a.text for a in answers[i]]) for i in asked]
        cut += sum(len(each.ids) > resident.room for each in whole)
        prompts = [fit_prompt(each.ids, resident.room, tokenizer.bos_token_id) for each in whole]
        decode = partial(
            greedy,
            model,
            tokenizer,
            max_new_tokens=entry.max_new_tokens,
            batch_size=batch_size,
            stop=entry.stop,
            opened=whole[0].opened,  # all are of one template
        )
        if server is None:
            found = decode(prompts)
        else:
            ends = Ends.of(model, tokenizer, entry.stop, whole[0].opened)
            found = server.answers(prompts, Decoding(ends, entry.max_new_tokens))
            compare = compare or partial(decode, prompts[: server.spec.compared])
        for i, answer in zip(asked, found, strict=True):
            answers[i].append(answer)
    # Behind the server's work, in which no forward pass would tell a watchdog of progress; all have a first turn.
    ours = dict(enumerate(compare())) if compare else {}
    measured = _measured(resident, questions, answers)
    items = _items(questions, answers, measured, ours)
    settings = (
        f"format={resident.kind} template={resident.template_name} greedy max_new_tokens={entry.max_new_tokens} "
        f"prompts_cut_left={cut}"
    ) + (f" by={server.spec.adapters}" if server else "")
    groups = _groups(name, questions) if resident.kind == "spec_bench" else {name: list(range(len(questions)))}
    rows = [
        _row(metric, [value for i in members for value in measured[i].values[metric]], resident.own, settings)
        | {"task": task, "num_fewshot": None}
        for task, members in groups.items()
        for metric in measured[0].values
    ]
    return rows, items


def _items(
    questions: Sequence[Question],
    answers: Sequence[list[Answer]],
    measured: Sequence[Measured],
    ours: Mapping[int, Answer],
) -> list[dict[str, Any]]:
    """Return what is kept of every question; `ours` are our own first answers beside a server's, by number."""
    return [
        question.kept
        | {
            "answers": [a.text for a in given],
            "tokens": [len(a.tokens) for a in given],
            "ended": [a.ended for a in given],
            "metrics": metrics.values,
        }
        | ({"errors": metrics.errors} if metrics.errors else {})
        | ({"thoughts": [a.thought for a in given]} if any(a.thought for a in given) else {})
        | ({"own_answer": ours[i].text, "same": ours[i].tokens == given[0].tokens} if i in ours else {})
        for i, (question, given, metrics) in enumerate(zip(questions, answers, measured, strict=True))
    ]


def _measured(
    resident: ResidentQuestions, questions: Sequence[Question], answers: Sequence[list[Answer]]
) -> list[Measured]:
    """Return per question and metric a value per answer (Spec-Bench), or one for the last answer (references).

    Spec-Bench's metrics are descriptive: they do not measure quality. Thoughts and what follows a stop text are cut off
    references as they are off answers. Own metrics come last.
    """
    talks = resident.kind == "spec_bench"
    texts = [[a.text for a in (given if talks else given[-1:])] for given in answers]
    own = measure(resident.own, [(given, question.row) for given, question in zip(texts, questions, strict=True)])
    known = _described(answers) if talks else _compared(resident.entry, texts, questions)
    return [Measured({**values, **mine.values}, mine.errors) for values, mine in zip(known, own, strict=True)]


def _described(answers: Sequence[list[Answer]]) -> list[dict[str, list[float | None]]]:
    return [
        {
            "new_tokens": [float(len(a.tokens)) for a in given],
            "empty_share": [float(not a.text.strip()) for a in given],
            "eos_share": [float(a.ended == "eos") for a in given],
            "repeated_4grams": [repetition(a.tokens) for a in given],
        }
        for given in answers
    ]


def _compared(
    entry: Generation, texts: Sequence[list[str]], questions: Sequence[Question]
) -> list[dict[str, list[float | None]]]:
    last = [given[-1] for given in texts]
    references = [[cut_at(without_thought(text), entry.stop) for text in question.references] for question in questions]
    columns = {metric: text_metric(metric, last, references) for metric in entry.text_metrics}
    return [{metric: [values[i]] for metric, values in columns.items()} for i in range(len(last))]


def _groups(name: str, questions: Sequence[Question]) -> dict[str, list[int]]:
    """Map the tasks of a Spec-Bench entry (all, multi-turn, each category) to the indices of their questions."""
    groups = {name: list(range(len(questions)))}
    multi = [i for i, question in enumerate(questions) if len(question.turns) > 1]
    if multi and len(multi) < len(questions):
        groups[f"{name}/{MULTI_TURN}"] = multi
    for i, question in enumerate(questions):
        groups.setdefault(f"{name}/{question.category}", []).append(i)
    return groups


def _row(metric: str, values: Sequence[float | None], own: Sequence[OwnMetric], settings: str) -> dict[str, Any]:
    """Return the mean over the answers that have a value; an own metric's version says which code it is."""
    known = [value for value in values if value is not None]
    value, stderr = mean_and_stderr(known) if known else (None, None)
    mine = next((each for each in own if each.owns(metric)), None)
    failed = f" failed={len(values) - len(known)}" if len(known) < len(values) else ""
    return {
        "metric": metric,
        "value": value,
        "stderr": stderr,
        "n": len(known),
        "higher_is_better": HIGHER_IS_BETTER.get(metric) if mine is None else mine.higher_is_better(metric),
        "version": VERSION if mine is None else f"{VERSION}+{mine.version}",
        "settings": settings + failed,
    }


class GenerationBenchmark:
    """Scores entries of `generation`; an item is an answer, of which a question has one per turn."""

    def __init__(self, spec: EvalSpec, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self._tokenizer, self._max_length, self._code_path = tokenizer, max_length, spec.code_path
        self._server_spec = spec.generation_server
        self._server: ServedModel | None = None
        #: Folder of the adapter that the model has, which a server loads by itself; None is the base.
        self.adapter: str | Path | None = None

    def connect(self) -> None:
        """Connect to the generation server of the block, if it has one.

        Raises:
            ConfigError, BenchmarkError: it cannot be used.
        """
        if self._server_spec is not None and self._server is None:
            server = ServedModel(self._server_spec)
            server.check()
            self._server = server

    @staticmethod
    def check(name: str, entry: Generation, spec: EvalSpec) -> None:
        """Check the rows, and import own metrics, which runs their modules."""
        read_generation(entry)
        load_metrics(spec.code_path, entry.own_metrics)

    def load(self, name: str, entry: Generation) -> ResidentQuestions:
        return load(name, entry, self._tokenizer, self._max_length, self._code_path)

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
        if self._server is None:
            return score(data, model, batch_size, limit)
        with self._server.adapter(self.adapter):
            return score(data, model, batch_size, limit, self._server)

    @staticmethod
    def items(records: list[dict[str, Any]], row: Mapping[str, Any]) -> Values | None:
        """One value per answer, nan where an own metric failed: all turns of the task's questions."""
        part = part_of(row)
        chosen = {"": lambda r: True, MULTI_TURN: lambda r: len(r["turns"]) > 1}
        mine = filter(chosen.get(part, lambda r: r["category"] == part), records)
        values: dict[str, Value] = {}
        for r in mine:
            content = hashlib.sha256(json.dumps([r["turns"], r.get("input")]).encode()).hexdigest()[:8]
            for turn, value in enumerate(r.get("metrics", {}).get(row["metric"], [])):
                values[f"question {r['question_id']}/{turn} {content}"] = math.nan if value is None else float(value)
        return values or None

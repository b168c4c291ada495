"""Generated answers side by side, with the judge's scores and feedback."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tune.analysis.results import Line, ModelResults
from tune.report.html.select import best_groups, cells, tint
from tune.report.sections.generations import answered
from tune.report.sections.subject import Subject
from tune.storage.run_folder import BASE, RunFolder

QUESTIONS = 8
"""Questions shown per benchmark; the answers files have all."""
CUT = 1500
"""Characters shown of a text."""


@dataclass(frozen=True)
class Reply:
    """A model's answer in one turn. `score` is the judge's, None if not judged or not parsed."""

    text: str
    judged: bool = False
    score: float | None = None
    feedback: tuple[str, ...] = ()


@dataclass(frozen=True)
class Speaker:
    """One column: a setting and a seed, with one reply per turn."""

    label: str
    colour: str
    seed: int | None
    replies: list[Reply]


@dataclass(frozen=True)
class Answered:
    """Answers of one trial (or the base) by question, with their judgements."""

    line: Line
    label: str
    answers: dict[str, dict[str, Any]]
    judged: dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Question:
    """A question with the answers of every speaker; `turns` are the user's."""

    item: str
    category: str
    turns: list[str]
    reference: str
    speakers: list[Speaker]

    @property
    def differs(self) -> bool:
        return len({tuple(reply.text for reply in speaker.replies) for speaker in self.speakers}) > 1


def generations(run_folder: RunFolder, model: ModelResults) -> dict[str, list[Question]]:
    """Questions by benchmark, answered by base, plain and the best MacDrop setting on their first shared seed.

    Beyond QUESTIONS, those answered differently come first, taking the categories in turn.
    """
    speakers = list(_speakers(model))
    found: dict[str, list[Question]] = {}
    subject = Subject(run_folder, model, [])
    for entry in _entries(run_folder, model, speakers):
        answered_by = [Answered(line, label, *answered(subject, line, entry)) for line, label in speakers]
        answered_by = [one for one in answered_by if one.answers]
        if answered_by:
            found[entry] = _pick([_question(item, answered_by) for item in answered_by[0].answers])
    return found


def _speakers(model: ModelResults) -> Iterator[tuple[Line, str]]:
    """Base model, plain and MacDrop of the first cell, the latter two on their first shared seed."""
    groups = {group.arm: group for group in best_groups(model, cells(model)[0])}
    if BASE in groups:
        yield groups[BASE].lines[0], groups[BASE].label
    trained = [groups[arm] for arm in ("plain", "macdrop") if arm in groups]
    shared = set.intersection(*({line.seed for line in group.lines} for group in trained)) if trained else set()
    for group in trained:
        lines = [line for line in group.lines if line.seed in shared] or group.lines
        yield min(lines, key=lambda line: line.seed or 0), group.label


def _entries(run_folder: RunFolder, model: ModelResults, speakers: list[tuple[Line, str]]) -> list[str]:
    """Names of the generation benchmarks with answers without attack."""
    names = set()
    for line, _ in speakers:
        folder = run_folder.answers_dir(model.display, line.trial)
        names |= {file.name.removeprefix("generation-") for file in folder.glob("generation-*-none.jsonl")}
    return sorted(name.removesuffix("-none.jsonl") for name in names)


def _question(item: str, answered_by: list[Answered]) -> Question:
    first = answered_by[0].answers[item]
    speakers = [
        Speaker(one.label, tint(one.line.arm), one.line.seed, _replies(one, item))
        for one in answered_by
        if item in one.answers
    ]
    turns = [_cut(str(turn)) for turn in first.get("turns") or []]
    return Question(item, str(first.get("category") or ""), turns, _cut(str(first.get("reference") or "")), speakers)


def _replies(one: Answered, item: str) -> list[Reply]:
    judged = {str(row["item"]).rpartition("/")[2]: row for row in one.judged.get(item, [])}  # turns count from 1
    texts = one.answers[item]["answers"]
    return [_reply(str(text), judged.get(str(turn))) for turn, text in enumerate(texts, 1)]


def _reply(text: str, judged: dict[str, Any] | None) -> Reply:
    if judged is None:
        return Reply(_cut(text))
    return Reply(_cut(text), True, judged.get("score"), tuple(_cut(str(said)) for said in judged.get("feedback") or []))


def _pick(questions: list[Question]) -> list[Question]:
    """At most QUESTIONS, those with different answers first, taking the categories in turn."""
    place: dict[tuple[str, bool], int] = {}
    keys = []
    for number, question in enumerate(questions):
        kind = (question.category, question.differs)
        place[kind] = place.get(kind, 0) + 1
        keys.append(((not question.differs, place[kind], number), question))
    return [question for _, question in sorted(keys, key=lambda pair: pair[0])[:QUESTIONS]]


def _cut(text: str) -> str:
    return text if len(text) <= CUT else f"{text[:CUT]} … ({len(text) - CUT} more characters)"

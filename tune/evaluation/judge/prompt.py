"""Direct assessment by a judge model: the prompt, parsing of the score, and score rows. Loads neither torch nor Ray.

Prompt and answer format are those of Prometheus 2 (Kim et al., arXiv 2405.01535): its models were trained with them,
and other instruction models follow them: task, instruction, response, reference answer if there is one, rubric;
then "Feedback: ... [RESULT] n". A score is read from that form only. Unparsable feedback is requested again; if that
does not help, the answer has no score.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from macdrop.errors import DataError
from tune.config.rubrics import Rubric
from tune.data.thoughts import without_thought
from tune.evaluation.text_metrics import mean_and_stderr

#: Changes with every change of the prompt or of the parsing of scores.
PROMPT_VERSION = "prometheus-2/1"

_SYSTEM = (
    "You are a fair judge assistant tasked with providing clear, objective feedback based on specific criteria, "
    "ensuring each assessment reflects the absolute standards set for performance."
)
_TASK = """###Task Description:
An instruction (might include an Input inside it), a response to evaluate, {given} representing a evaluation criteria are given.
1. Write a detailed feedback that assess the quality of the response strictly based on the given score rubric, not evaluating in general.
2. After writing a feedback, write a score that is an integer between 1 and 5. You should refer to the score rubric.
3. The output format should look as follows: "Feedback: (write a feedback for criteria) [RESULT] (an integer number between 1 and 5)"
4. Please do not generate any other opening, closing, and explanations."""  # noqa: E501
_WITH_REFERENCE = "a reference answer that gets a score of 5, and a score rubric"
_WITHOUT_REFERENCE = "and a score rubric"


def prompt(instruction: str, response: str, rubric: str, reference: str | None = None) -> str:
    """Return the whole message to a judge; `rubric` is a `Scale.text()`."""
    given = _WITHOUT_REFERENCE if reference is None else _WITH_REFERENCE
    parts = [
        f"{_SYSTEM}\n\n{_TASK.format(given=given)}",
        f"###The instruction to evaluate:\n{instruction}",
        f"###Response to evaluate:\n{response}",
        *([] if reference is None else [f"###Reference Answer (Score 5):\n{reference}"]),
        f"###Score Rubrics:\n{rubric}",
        "###Feedback: ",
    ]
    return "\n\n".join(parts)


#: [RESULT] as requested, or [SCORE]; or the last line "Result: 4" or "Score: 4", as Prometheus' own parser allows.
_MARK = re.compile(r"\[(?:RESULT|SCORE)\]", re.IGNORECASE)
_LINE = re.compile(r"^[*_#\t ]*(?:result|score)[*_]*:", re.IGNORECASE | re.MULTILINE)
#: What may follow on the line: the number, bare or in brackets or bold, "/5" or "out of 5", a full stop.
_NUMBER = re.compile(
    r"[*_\s]*:?[*_\s]*(?P<open>[(\[]?)[*_]*(?P<score>[1-5])[*_]*(?:\s*/\s*5|\s+out\s+of\s+5)?(?P<close>[)\]]?)"
    r"[*_]*\.?[*_]*[\"”]?[^\S\n]*(?:\n|\Z)",
    re.IGNORECASE,
)


def parse(text: str) -> int | None:
    """Return the score in a judge's answer, 1 to 5; None unless there is exactly one in the requested form.

    What a reasoning model thinks before its answer is ignored.
    """
    answer = without_thought(text)
    ends = [mark.end() for mark in _MARK.finditer(answer)]
    if not ends:
        marks = list(_LINE.finditer(answer))
        last = answer.rstrip().rfind("\n") + 1
        ends = [mark.end() for mark in marks] if marks and marks[-1].start() == last else []
    found = [number for end in ends if (number := _NUMBER.match(answer, end))]
    if not found or len(found) < len(ends):
        return None
    if any(bool(number["open"]) != bool(number["close"]) for number in found):
        return None
    scores = {int(number["score"]) for number in found}
    return scores.pop() if len(scores) == 1 else None


# --- questions ---


@dataclass(frozen=True)
class Question:
    """One answer to judge. `item` is ``question_id/turn``, turns from 1; `file` is the answers file."""

    item: str
    category: str
    turns: int
    prompt: str
    file: str = ""

    @property
    def digest(self) -> str:
        """Hash of the prompt: another answer, reference, rubric or wording is another question."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()[:12]


def questions(rows: Sequence[dict[str, Any]], rubric: Rubric, *, reference: bool, file: str = "") -> list[Question]:
    """Make one question per turn of every row of an answers file, with the conversation so far as the instruction.

    Raises:
        DataError: a row is not from a generation benchmark, or two rows have the same question_id.
    """
    found: list[Question] = []
    seen: set[str] = set()
    for row in rows:
        if not {"question_id", "turns", "answers"} <= set(row):
            raise DataError(f"{file}: a row has no question_id, turns and answers: not a file of generated answers.")
        name = str(row["question_id"])
        if name in seen:
            raise DataError(f"{file}: question_id {name!r} occurs twice, and judgements are stored by it.")
        seen.add(name)
        category = row.get("category") or ""
        scale = rubric.scale(category).text()
        for turn, answer in enumerate(row["answers"]):
            wanted = reference_of(row, turn) if reference else None
            text = prompt(conversation(row, turn), answer, scale, wanted)
            found.append(Question(f"{name}/{turn + 1}", category, len(row["turns"]), text, file))
    return found


def conversation(row: dict[str, Any], turn: int) -> str:
    """Return what the judged answer replies to: the user's text, with the conversation before it."""
    asked = list(row["turns"])
    if row.get("input"):
        asked[0] = f"{asked[0]}\n{row['input']}"
    if turn == 0:
        return asked[0]
    said = [f"User: {user}\n\nAssistant: {answer}" for user, answer in zip(asked, row["answers"][:turn], strict=False)]
    return "\n\n".join([*said, f"User: {asked[turn]}"])


def reference_of(row: dict[str, Any], turn: int) -> str | None:
    """Return the reference of a turn without thoughts: a text, or one of a list; several correct ones are all shown."""
    given = row.get("reference")
    if isinstance(given, list) and row.get("category"):
        given = given[turn] if turn < len(given) else None
    elif turn:
        given = None
    if isinstance(given, list):
        given = "\n".join(without_thought(str(each)) for each in given)
    return without_thought(str(given)) if given not in (None, "") else None


# --- judgements ---


@dataclass(frozen=True)
class Reply:
    """A judge's reply to one prompt: a text, or an error. `served`: model and system fingerprint it reported."""

    text: str | None = None
    error: str | None = None
    tokens: tuple[int, int] = (0, 0)
    served: dict[str, str] = field(default_factory=dict)
    cut: bool = False


@dataclass
class Judgement:
    """All replies to one question. Without a `score` the feedback was unparsable, or there is an `error`."""

    question: Question
    score: int | None = None
    feedback: list[str] = field(default_factory=list)
    error: str | None = None
    tokens: tuple[int, int] = (0, 0)
    served: dict[str, str] = field(default_factory=dict)
    cut: bool = False

    def add(self, reply: Reply) -> None:
        self.tokens = (self.tokens[0] + reply.tokens[0], self.tokens[1] + reply.tokens[1])
        self.served, self.cut, self.error = reply.served or self.served, reply.cut, reply.error
        if reply.text is not None:
            self.feedback.append(reply.text)
            self.score = parse(reply.text)

    @property
    def open(self) -> bool:
        """Return whether another attempt may give a score."""
        return self.score is None and self.error is None

    def row(self) -> dict[str, Any]:
        """Return the line to store, without the judge's identity."""
        line = {
            "item": self.question.item,
            "category": self.question.category,
            "turns": self.question.turns,
            "score": self.score,
            "feedback": self.feedback,
            "attempts": len(self.feedback),
            "error": self.error,
            "prompt": self.question.digest,
            "tokens": list(self.tokens),
        }
        return line | ({"cut": True} if self.cut else {})


def assess(
    asked: Sequence[Question], ask: Callable[[Sequence[Question], int], Sequence[Reply]], retries: int
) -> list[Judgement]:
    """Request scores, and again, up to `retries` times, those that could not be parsed.

    ask: called with questions and the attempt, counted from 0; returns replies in order.
    """
    judged = [Judgement(question) for question in asked]
    for attempt in range(retries + 1):
        waiting = [judgement for judgement in judged if judgement.open]
        if not waiting:
            break
        for judgement, reply in zip(waiting, ask([j.question for j in waiting], attempt), strict=True):
            judgement.add(reply)
    return judged


def rows(entry: str, judged: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the score rows of one answers file: over all answers, multi-turn questions, and each category.

    judge_score: mean over parsed answers, with its standard error over answers; None if none was parsed.
    judge_unparsed: the share of answers without a score, for any reason.
    """
    groups = {entry: list(judged)}
    multi = [row for row in judged if row["turns"] > 1]
    if multi and len(multi) < len(judged):
        groups[f"{entry}/multi_turn"] = multi
    for row in judged:
        if row["category"]:
            groups.setdefault(f"{entry}/{row['category']}", []).append(row)
    made = []
    for task, members in groups.items():
        scores = [float(row["score"]) for row in members if row["score"] is not None]
        value, stderr = mean_and_stderr(scores) if scores else (None, None)
        made.append(_row(task, "judge_score", value, stderr, len(scores), True))
        share, error = mean_and_stderr([float(row["score"] is None) for row in members])
        made.append(_row(task, "judge_unparsed", share, error, len(members), False))
    return made


def _row(task: str, metric: str, value: float | None, stderr: float | None, n: int, better: bool) -> dict[str, Any]:
    return {
        "benchmark": "generation",
        "task": task,
        "metric": metric,
        "value": value,
        "stderr": stderr,
        "n": n,
        "higher_is_better": better,
        "version": PROMPT_VERSION,
    }

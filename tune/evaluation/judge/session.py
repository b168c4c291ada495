"""Judging of answers files: writes judgements and returns scores; only answers not judged yet are sent to the judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from macdrop.errors import ConfigError, MacDropError
from macdrop.load import check_model, load_tokenizer
from tune.config import rubrics
from tune.config.judge_spec import JudgeSpec
from tune.evaluation.judge import judgements
from tune.evaluation.judge import prompt as judge
from tune.evaluation.judge.endpoint import EndpointJudge
from tune.evaluation.judge.judgements import Answers, JudgeIdentity
from tune.evaluation.judge.local import LocalJudge, revision
from tune.evaluation.judge.prompt import Judgement, Question
from tune.zoo.model_source import model_source


class Judge(Protocol):
    """A judge, created only if there is something to judge."""

    def judge(self, asked: Sequence[Question]) -> Iterator[Judgement]: ...

    def close(self) -> None: ...


@dataclass
class Judged:
    """The judgements of one answers file, complete when none is missing."""

    answers: Answers
    file: Path
    questions: list[Question]
    rows: dict[str, dict[str, Any]]

    @property
    def missing(self) -> list[Question]:
        return [question for question in self.questions if not judgements.settled(self.rows, question)]

    def unasked(self) -> bool:
        """Return whether an answer has no line at all because the judge stopped before it."""
        return any(self.rows.get(q.item, {}).get("prompt") != q.digest for q in self.questions)

    def ordered(self) -> list[dict[str, Any]]:
        return [self.rows[question.item] for question in self.questions]

    def count(self, test: Callable[[dict[str, Any]], Any]) -> int:
        return sum(bool(test(row)) for row in self.ordered())


@dataclass
class Outcome:
    """The questions put to a judge in this session, and the scores of everything it has judged."""

    identity: JudgeIdentity
    files: list[Judged]
    scores: list[dict[str, Any]] = field(default_factory=list)
    asked: int = 0
    requests: int = 0
    tokens: tuple[int, int] = (0, 0)

    @property
    def failures(self) -> int:
        """The number of answers files with an answer that could not be judged."""
        return sum(file.unasked() or bool(file.count(lambda row: row["error"])) for file in self.files)


def judge_files(
    files: Sequence[Answers],
    spec: JudgeSpec,
    *,
    make: Callable[[JudgeSpec], Judge],
    add_scores: Callable[[list[dict[str, Any]]], Any],
    show: Callable[[int, int], None] = lambda done, of: None,
    fresh: bool = False,
) -> Outcome:
    """Judge what this judge has not judged yet; judgements are stored as they come, scores when a file is complete.

    make: creates the judge; called only if something is missing. show: called with (done, of) at the start and after
    every answer.

    Raises:
        ConfigError: the rubric or judge is unknown, or the key is wrong. DataError: an answers file cannot be used.
        BenchmarkError: the judge failed. What it has judged is kept, and scored where a file is complete.
    """
    rubric = rubrics.load(spec.rubric)
    identity = JudgeIdentity(spec, _revision(spec), rubric)
    opened = []
    for answers in files:
        place = answers.judgements(identity.slug)
        asked = judge.questions(answers.rows(), rubric, reference=spec.reference, file=str(answers.file))
        if fresh:
            judgements.archive(place)
        opened.append(Judged(answers, place, asked, judgements.kept(place)))
    outcome = Outcome(identity, opened)
    by_file = {str(judged.answers.file): judged for judged in opened}
    missing = [question for judged in opened for question in judged.missing]
    show(0, len(missing))
    try:
        if missing:
            with closing(make(spec)) as asking:
                for judgement in asking.judge(missing):
                    judged = by_file[judgement.question.file]
                    row = identity.row(judgement)
                    judgements.add(judged.file, row)
                    judged.rows[row["item"]] = row
                    outcome.asked += 1
                    outcome.requests += row["attempts"] + bool(row["error"])
                    outcome.tokens = tuple(a + b for a, b in zip(outcome.tokens, row["tokens"], strict=True))
                    show(outcome.asked, len(missing))
    finally:
        for judged in opened:
            if not judged.unasked():
                outcome.scores += (made := _scores(judged, identity))
                add_scores(made)
    return outcome


def make_judge(spec: JudgeSpec) -> Judge:
    """Create a judge in this process."""
    return EndpointJudge(spec) if spec.base_url else LocalJudge(spec)


def check_judge(spec: JudgeSpec) -> None:
    """Refuse an unusable rubric or local model before anything is trained or scored.

    Raises:
        ConfigError: saying which, and why. An endpoint is only checked when it is used.
    """
    rubrics.load(spec.rubric)
    if not spec.base_url:
        loading: dict[str, Any] = {"revision": spec.revision, "trust_remote_code": spec.trust_remote_code}
        try:
            check_model(model_source(spec.model), **loading)
            load_tokenizer(model_source(spec.model), **loading)
        except ConfigError as error:
            hint = "For a model behind an endpoint, give base_url as well."
            raise ConfigError(f"eval.judge.model: {error}\n{hint}") from None


def _revision(spec: JudgeSpec) -> str | None:
    if spec.base_url:
        return spec.revision
    check_judge(spec)
    return revision(spec)


def _scores(judged: Judged, identity: JudgeIdentity) -> list[dict[str, Any]]:
    """Return the score rows of one answers file."""
    spec, rows = identity.spec, judged.ordered()
    revisions = sorted({str(row["judge"]["revision"] or "unknown") for row in rows})
    dates = sorted({row["judge"]["date"][:10] for row in rows})
    tag = dict(judged.answers.tag)
    settings = [
        f"judge={spec.model}@{'+'.join(revisions)} date={'..'.join(dict.fromkeys((dates[0], dates[-1])))}",
        f"rubric={identity.rubric.id} reference={'shown' if spec.reference else 'hidden'} "
        f"temperature={spec.temperature}",
        f"max_new_tokens={spec.max_new_tokens} retries={spec.retries}@{spec.retry_temperature:g}",
        f"unparsable={judged.count(unparsable)} failed={judged.count(lambda row: row['error'])}",
        f"prompts_cut_left={judged.count(lambda row: row.get('cut'))}",
        *tag.pop("words", []),
    ]
    common = {
        "entry": judged.answers.entry,
        "attack": judged.answers.attack,
        "attack_on": judged.answers.attack_on,
        "batch_size": None if spec.base_url else spec.batch_size,
        "judgements": str(judged.file.relative_to(judged.answers.root)),
        "settings": " ".join(settings),
    }
    return [{**tag, **row, **common} for row in judge.rows(judged.answers.entry, rows)]


def unparsable(row: dict[str, Any]) -> bool:
    return row["score"] is None and not row["error"]


def judge_at_end(
    files: Sequence[Answers],
    spec: JudgeSpec,
    *,
    make: Callable[[JudgeSpec], Judge],
    add_scores: Callable[[list[dict[str, Any]]], Any],
    note: Callable[[str], None],
    show: Callable[[int, int], None],
) -> int:
    """Judge after training and scoring, whose results must not be lost: errors are noted; return the failures."""
    try:
        outcome = judge_files(files, spec, make=make, add_scores=add_scores, show=show)
    except MacDropError as error:
        note(f"judging ended: {error}\nJudgements so far are kept; continue with macdrop judge, or with --resume.")
        return 1
    if outcome.failures:
        note(f"the judge could not judge some answers of {outcome.failures} file(s); `macdrop judge` asks again")
    return outcome.failures

"""Judgements as they are kept: a file for every answers file and judge, one line an answer, appended as it comes.

    trials/<trial>/judgements/<entry>--<judge>.jsonl              of a trial; of a base model under models/<slug>/
    trials/<trial>/judgements/<entry>-zeroing@3-base--<judge>.jsonl   of answers given under attack
    .../judgements/earlier/                                      what `--fresh` put aside, with the date in the name

`<judge>` is the model's short name and six digits of all that decides about its scores: model, revision, rubric, prompt
and how it is asked. A line holds item (``question_id/turn``), category, score (1 to 5 or null), every raw feedback, how
often it was asked, error, and who judged when. Of two lines of one item the later counts.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from macdrop.errors import DataError
from tune.config.eval_spec import PLAIN
from tune.config.judge_spec import JudgeSpec
from tune.config.rubrics import Rubric
from tune.config.run_spec import slug
from tune.evaluation.judge.prompt import PROMPT_VERSION, Judgement, Question
from tune.storage.atomic import append_jsonl, now, read_jsonl

#: What of the block `eval.judge` decides about scores, beside model, revision, rubric and prompt.
_ASKED = (
    *("reference", "max_new_tokens", "temperature", "retries", "retry_temperature", "seed"),
    *("token_limit", "bf16", "long_prompts"),
)


@dataclass(frozen=True)
class Who:
    """A judge as its judgements name it; `revision` None: an endpoint that may tell its own with every answer."""

    spec: JudgeSpec
    revision: str | None
    rubric: Rubric

    @property
    def kind(self) -> str:
        return "endpoint" if self.spec.base_url else "local"

    @property
    def slug(self) -> str:
        """Short name and digits, fit for a file's name."""
        told = [self.kind, self.spec.model, self.spec.base_url, self.revision, self.rubric.id, PROMPT_VERSION]
        told += [getattr(self.spec, key) for key in _ASKED]
        return f"{slug(self.spec.model)}-{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:6]}"

    def row(self, judgement: Judgement) -> dict[str, Any]:
        """The line to keep."""
        served = judgement.served
        told = {
            "kind": self.kind,
            "model": self.spec.model,
            "revision": self.revision or "/".join(served[key] for key in sorted(served)) or None,
            "date": now(),
            "rubric": self.rubric.id,
            "prompt": PROMPT_VERSION,
        }
        more = {"base_url": self.spec.base_url, "served": served} if self.spec.base_url else {}
        return judgement.row() | {"judge": told | more}


@dataclass(frozen=True)
class Answers:
    """A file of generated answers below `root`: of which benchmark entry and attack; whose, as score rows `tag` it."""

    file: Path
    root: Path
    entry: str
    attack: str
    attack_on: str | None
    tag: dict[str, Any]

    @classmethod
    def read(cls, file: Path, root: Path, tag: dict[str, Any], entries: list[str]) -> Answers:
        """Tell entry and attack of ``generation-<entry>-<attack>[-<on>].jsonl``; `entries` are names it may have.

        Raises:
            DataError: the file is empty or damaged.
        """
        first = next(iter(_rows(file)), None)
        if first is None:
            raise DataError(f"{file} is empty: its benchmark was not scored to the end. Score it again.")
        attack, on = first.get("attack", PLAIN), first.get("attack_on")
        ending = "".join(f"-{part}" for part in (attack, on) if part)
        name = file.stem.removeprefix("generation-").removesuffix(ending)
        return cls(file, root, next((e for e in entries if e.replace("/", "-") == name), name), attack, on, tag)

    def rows(self) -> list[dict[str, Any]]:
        return _rows(self.file)

    def judgements(self, judge: str) -> Path:
        """Where the judgements of a judge (its slug) go."""
        attack = "" if self.attack == PLAIN else f"-{self.attack}-{self.attack_on}"
        name = f"{self.entry.replace('/', '-')}{attack}--{judge}.jsonl"
        return self.file.parents[1] / "judgements" / name


def add(file: Path, row: dict[str, Any]) -> None:
    append_jsonl(file, [row])


def kept(file: Path) -> dict[str, dict[str, Any]]:
    """The last line of every item; empty without the file."""
    return {row["item"]: row for row in _rows(file)}


def settled(rows: dict[str, dict[str, Any]], question: Question) -> bool:
    """Whether a question as it is now has its judgement: with a score, or unparsable after all attempts."""
    row = rows.get(question.item)
    return row is not None and row["prompt"] == question.digest and row["error"] is None


def item_scores(file: Path) -> dict[str, float]:
    """Score of every item that has one. A row of scores.jsonl names its file under ``judgements``."""
    return {item: float(row["score"]) for item, row in kept(file).items() if row["score"] is not None}


def put_aside(file: Path) -> None:
    """Move a judge's earlier judgements to ``earlier/``, under their last date."""
    rows = _rows(file)
    if rows:
        date = "".join(c for c in rows[-1]["judge"]["date"][:23] if c not in ":.-")
        place = file.parent / "earlier" / f"{file.stem}.{date}.jsonl"
        place.parent.mkdir(exist_ok=True)
        file.rename(place)


def _rows(file: Path) -> list[dict[str, Any]]:
    try:
        return read_jsonl(file)
    except ValueError as error:
        raise DataError(str(error)) from None

"""Storage of judgements: one file per answers file and judge, one line per answer, appended as it comes.

    trials/<trial>/judgements/<entry>--<judge>.jsonl              of a trial; of a base model under models/<slug>/
    trials/<trial>/judgements/<entry>-zeroing@3-base--<judge>.jsonl   of answers given under attack
    .../judgements/earlier/                                      what `--fresh` moved away, with the date in the name

`<judge>` is the model's short name and six hex digits of a hash of all that its scores depend on: model, revision,
rubric, prompt and request settings. A line holds item (``question_id/turn``), category, score (1 to 5 or null), all raw
feedback, the number of attempts, error, and which judge answered when. The last line of an item counts.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from macdrop.errors import DataError
from tune.config.eval_spec import NO_ATTACK
from tune.config.judge_spec import JudgeSpec
from tune.config.rubrics import Rubric
from tune.config.run_spec import slug
from tune.evaluation.judge.prompt import PROMPT_VERSION, Judgement, Question
from tune.storage.atomic import now
from tune.storage.json_lines import append_jsonl, read_jsonl

#: Keys of the block `eval.judge` that scores depend on, besides model, revision, rubric and prompt.
_ASKED = (
    "reference",
    "max_new_tokens",
    "temperature",
    "retries",
    "retry_temperature",
    "seed",
    "token_limit",
    "bf16",
    "long_prompts",
)


@dataclass(frozen=True)
class JudgeIdentity:
    """A judge as its judgements name it; `revision` None: an endpoint, which may report its own with every answer."""

    spec: JudgeSpec
    revision: str | None
    rubric: Rubric

    @property
    def kind(self) -> str:
        return "endpoint" if self.spec.base_url else "local"

    @property
    def slug(self) -> str:
        """Short name and digits, safe in a file name."""
        parts = [self.kind, self.spec.model, self.spec.base_url, self.revision, self.rubric.id, PROMPT_VERSION]
        parts += [getattr(self.spec, key) for key in _ASKED]
        return f"{slug(self.spec.model)}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:6]}"

    def row(self, judgement: Judgement) -> dict[str, Any]:
        """Return the line to store."""
        served = judgement.served
        judge = {
            "kind": self.kind,
            "model": self.spec.model,
            "revision": self.revision or "/".join(served[key] for key in sorted(served)) or None,
            "date": now(),
            "rubric": self.rubric.id,
            "prompt": PROMPT_VERSION,
        }
        more = {"base_url": self.spec.base_url, "served": served} if self.spec.base_url else {}
        return judgement.row() | {"judge": judge | more}


@dataclass(frozen=True)
class Answers:
    """A file of generated answers below `root`, its benchmark entry and attack; `tag` names the model in score rows."""

    file: Path
    root: Path
    entry: str
    attack: str
    attack_on: str | None
    tag: dict[str, Any]

    @classmethod
    def read(cls, file: Path, root: Path, tag: dict[str, Any], entries: list[str]) -> Answers:
        """Find entry and attack of ``generation-<entry>-<attack>[-<on>].jsonl``; `entries` are the possible entries.

        Raises:
            DataError: the file is empty or damaged.
        """
        first = next(iter(_rows(file)), None)
        if first is None:
            raise DataError(f"{file} is empty: its benchmark was not scored to the end. Score it again.")
        attack, on = first.get("attack", NO_ATTACK), first.get("attack_on")
        ending = "".join(f"-{part}" for part in (attack, on) if part)
        name = file.stem.removeprefix("generation-").removesuffix(ending)
        return cls(file, root, next((e for e in entries if e.replace("/", "-") == name), name), attack, on, tag)

    def rows(self) -> list[dict[str, Any]]:
        return _rows(self.file)

    def judgements(self, judge: str) -> Path:
        """Return the file of the judgements of a judge, named by its slug."""
        attack = "" if self.attack == NO_ATTACK else f"-{self.attack}-{self.attack_on}"
        name = f"{self.entry.replace('/', '-')}{attack}--{judge}.jsonl"
        return self.file.parents[1] / "judgements" / name


def add(file: Path, row: dict[str, Any]) -> None:
    append_jsonl(file, [row])


def kept(file: Path) -> dict[str, dict[str, Any]]:
    """Return the last line of every item; empty without the file."""
    return {row["item"]: row for row in _rows(file)}


def settled(rows: dict[str, dict[str, Any]], question: Question) -> bool:
    """Return whether a question in its present form is judged: with a score, or unparsable after all attempts."""
    row = rows.get(question.item)
    return row is not None and row["prompt"] == question.digest and row["error"] is None


def archive(file: Path) -> None:
    """Move a judge's earlier judgements to ``earlier/``, named by their last date."""
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

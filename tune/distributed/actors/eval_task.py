"""Tasks of the evaluation actors and their results: plain data, without Ray or torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tune.config.eval_spec import NO_ATTACK, EvalJob
from tune.training.watchdog import STACKS

if TYPE_CHECKING:
    from tune.evaluation.scorer import Row


@dataclass
class EvalTask:
    """One benchmark of one adapter (None: the base model). `tag` comes back with the result.

    `answers` is the file for per-item results; `within` is a folder above it that must exist.
    """

    tag: dict[str, Any]
    job: EvalJob
    adapter: str | None
    answers: str
    within: str | None = None
    attempts: int = 0

    @property
    def group(self) -> tuple[str | None, EvalJob]:
        """The same for the plain score and all attacks of a benchmark and adapter, which share most of the work."""
        return self.adapter, replace(self.job, attack=NO_ATTACK, attack_on=None)

    @property
    def stacks(self) -> Path:
        """The file for the stacks of an actor that hangs, in the folder of the trial or the model."""
        answers = Path(self.answers)
        return answers.parent.parent / STACKS / f"score-{answers.stem}.txt"


@dataclass
class Result:
    """The score rows of a task, or the reason why there are none."""

    task: EvalTask
    rows: list[Row] = field(default_factory=list)
    error: str | None = None
    seconds: float = 0.0
    calls_saved: int = 0  # layer calls saved by sharing with other attacks
    notes: list[str] = field(default_factory=list)  # of the scorer, on the data of its benchmarks

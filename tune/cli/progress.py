"""Progress of a sweep: a live table in a terminal, one line per event elsewhere."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tune.cli.console import PlainConsole
from tune.config.eval_spec import NO_ATTACK
from tune.config.resume import resume_command
from tune.config.sections import EVAL_LOSS
from tune.report.escaping import rich_text
from tune.report.text import hours
from tune.scheduling.time_left import Meter
from tune.storage.states import Stage, TaskState

if TYPE_CHECKING:
    from pathlib import Path

    from tune.distributed.actors.eval_task import Result
    from tune.scheduling.study import Study
    from tune.scheduling.tasks import QueuedTask
    from tune.scheduling.time_left import Estimate, Work

STYLES = {
    TaskState.RUNNING: "cyan",
    TaskState.TRAINED: "blue",
    TaskState.DONE: "green",
    TaskState.FAILED: "red",
    TaskState.DIVERGED: "red",
    TaskState.STOPPED: "yellow",
}
#: Columns that keep their width when the scores do not fit the terminal.
WIDTHS = {"state": 8, "step": 5, "loss": 7, "eval loss": 9, "p": 7, "tokens/s": 8}
WORDS = {TaskState.TRAINED: "scoring"}
#: Rows of the live table; finished trials are left out first, as the report has all of them.
MAX_ROWS = 24
#: Seconds between two lines of a log on the state of the whole run, and between two estimates of the time left.
LINE_EVERY_S, ESTIMATE_EVERY_S = 60.0, 1.0
#: Seconds between two drawings of the live table, and between two prints above it.
DRAW_EVERY_S = 1.0


class Progress:
    """The `Observer` of a sweep (`tune.distributed.sweep.events`) that prints."""

    def __init__(
        self,
        console: Console | None = None,
        again: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """again: the command that resumes the run, if it needs more words than the folder's."""
        self.console = console or PlainConsole()
        self._again = again
        self._live: Live | None = None
        #: Lines yet to be printed above the live table, which each print draws again below them.
        self._lines: list[Text] = []
        self._lock = threading.Lock()  # copies and trackers have notes of their own threads
        self._clock = clock
        self._begun = self._said = self._drawn = self._printed = clock()
        self._tasks: dict[str, dict[str, Any]] = {}
        #: What the live table shows: trials that have not ended, the newest that have, and base models.
        self._open: dict[str, None] = {}
        self._ended: deque[str] = deque(maxlen=MAX_ROWS)
        self._bases: dict[str, None] = {}
        self._longest = 0
        #: Trial or base model -> its scores, in the order of arrival.
        self._scores: dict[str, list[str]] = {}
        self._states: dict[str, str] = {}
        #: Study in progress -> its stage and number of trials.
        self._stages: dict[str, tuple[str, int]] = {}
        #: Study and stage -> its trials, and those of them that have ended.
        self._counts: dict[tuple[str, str], list[int]] = {}
        self._line = ""
        self._meter: Meter | None = None
        self._estimate: tuple[float, Estimate] | None = None
        #: Study -> the best value of the first objective so far, and its trial.
        self._best: dict[str, tuple[float, str]] = {}

    def started(self, run_dir: Path, dashboard: str, resources: str) -> None:
        # To resume: printed now, as a process that is killed later, by Ray's own end too, can print nothing.
        again = self._again or resume_command(run_dir)
        facts = {"Run folder": run_dir, "Resources": resources, "Dashboard": dashboard or "off", "To resume": again}
        for name, fact in facts.items():
            self._print(f"{name:<12} {fact}")
        if self.console.is_terminal:
            self._live = Live(self._table(), console=self.console, auto_refresh=False, transient=True)
            self._live.start()

    def planned(self, work: Work) -> None:
        """Begin to measure; without it the time left is not shown."""
        self._meter = Meter(work)

    def finished(self) -> None:
        """Print the rest and remove the live table; safe to call twice."""
        self._print_lines()
        if self._live:
            self._live.stop()
            self._live = None

    def found(self, study: str, sentence: str) -> None:
        self._say((study, "bold"), f": {sentence}")

    def study(self, study: Study) -> None:
        if self._meter:
            self._meter.open(study.name)
        self._say((study.name, "bold"), f": {study.count} fine-tunings at most")

    def stage(self, study: Study, stage: str, trials: int) -> None:
        """Announce a stage; `trials` is an upper bound, as a searcher may draw one twice."""
        self._stages[study.name] = (stage, trials)
        if self._meter:
            self._meter.begin(study.name, stage, trials, self._clock())
        self._say((study.name, "bold"), f": {stage}, {trials} trial(s)")

    def study_ended(self, study: Study) -> None:
        self._stages.pop(study.name, None)
        if self._meter:
            self._meter.end(study.name, self._clock())

    def note(self, text: str) -> None:
        self._say((text, "red"))

    def show(self, snapshot: dict[str, Any], scoring: Mapping[str, int]) -> None:
        """Draw the table, once a second, with the tasks that changed; in a log print which have started, and a line a
        minute on the whole run."""
        for row in snapshot["tasks"]:
            self._see(row)
        lanes = snapshot["lanes"].values()
        busy = sum(1 for lane in lanes if lane["task"])
        self._line = f"lanes {busy} of {len(lanes)} busy   benchmarks waiting or running {sum(scoring.values())}"
        stages = [f"{study}   {self._remaining(study)}   " for study in self._stages]
        self._line = "".join(stages) + self._line
        if estimate := self._measured(snapshot["tasks"], scoring):
            self._line += f"   {_time_left(estimate)}"
            if not self._live and self._clock() - self._said >= LINE_EVERY_S:
                self._said = self._clock()
                self._say(self._whole(estimate))
        if self._live and self._clock() - self._drawn >= DRAW_EVERY_S:
            self._drawn = self._clock()
            self._live.update(self._table(), refresh=True)  # a print draws again what was drawn last
        if self._clock() - self._printed >= DRAW_EVERY_S:
            self._print_lines()

    def _see(self, row: dict[str, Any]) -> None:
        """Take a task's row, and say in a log that it has started or is trained."""
        name, state = row["id"], row["state"]
        before = self._tasks.get(name)
        if before is not None:
            self._count(before, -1)
        self._count(row, +1)
        self._tasks[name] = row
        self._longest = max(self._longest, len(name))
        if not state.is_final:
            self._open[name] = None
        elif name in self._open or before is None:
            self._open.pop(name, None)
            self._ended.appendleft(name)
        if state != self._states.get(name) and state in (TaskState.RUNNING, TaskState.TRAINED) and not self._live:
            self._say(f"{name} {'is trained' if state == TaskState.TRAINED else 'is training'}")
        self._states[name] = state

    def _count(self, row: dict[str, Any], sign: int) -> None:
        counts = self._counts.setdefault((row["study"], row["stage"]), [0, 0])
        counts[0] += sign
        counts[1] += sign * row["state"].is_final

    def ended(self, entry: QueuedTask) -> None:
        loss = entry.outcome.get("eval_loss")
        details = f" eval_loss {loss:.4f}" if loss is not None else ""
        reason = f" ({entry.reason})" if entry.reason else ""
        style = STYLES.get(entry.state, "white")
        if entry.task.id in self._tasks:
            self._see({**self._tasks[entry.task.id], "state": entry.state})
        self._keep_best(entry)
        stage = f" ({self._remaining(entry.task.study)})" if entry.task.study in self._stages else ""
        self._say(f"{entry.task.id} ", (str(entry.state), style), f"{details}{reason}{stage}")

    def scored(self, name: str, result: Result, study: str) -> None:
        if self._meter and not result.error:
            self._meter.scored(study, result.seconds)
        if result.rows:
            # The first row is the task's own metric; the report has all of them.
            row = result.rows[0]
            attack = "" if row["attack"] == NO_ATTACK else f"@{row['attack']}"
            if name not in self._tasks:
                self._bases[name], self._longest = None, max(self._longest, len(name))
            self._scores.setdefault(name, []).append(f"{row['task']}{attack} {_number(row['value'])}")
        if result.error:
            self._say((f"{name} {result.task.job.key}: {result.error}", "red"))

    def judged(self, done: int, of: int) -> None:
        """Print the judge's progress, every tenth of the way."""
        if of and (not done or done * 10 // of > (done - 1) * 10 // of):
            self._say(f"judged {done} of {of} answers")

    def _remaining(self, study: str) -> str:
        """Return a study's stage with its ended and all trials: search 3/8."""
        stage, trials = self._stages[study]
        there, ended = self._counts.get((study, stage), (0, 0))
        return f"{stage} {ended}/{max(trials, there)}"

    def _measured(self, changed: Sequence[dict[str, Any]], scoring: Mapping[str, int]) -> Estimate | None:
        """Return the newest estimate, at most `ESTIMATE_EVERY_S` old."""
        if self._meter is None:
            return None
        now = self._clock()
        self._meter.see(changed, now)
        if self._estimate is None or now - self._estimate[0] >= ESTIMATE_EVERY_S:
            self._estimate = now, self._meter.estimate(scoring, now)
        return self._estimate[1]

    def _whole(self, estimate: Estimate) -> str:
        """Return the state of the whole run: studies, trials, steps, best so far, time left and its basis."""
        assert self._meter is not None
        names = [study.name for study in self._meter.work.studies]
        parts = []
        for name in self._stages:
            number = f"study {names.index(name) + 1} of {len(names)}, " if name in names else ""
            parts.append(f"{number}{name}: {self._remaining(name)}")
            if name in self._best:
                value, trial = self._best[name]
                parts.append(f"best {self._meter.work.metric.name} {_number(value)} ({trial})")
        trials, steps = ("/".join(map(str, pair)) for pair in (estimate.trials, estimate.steps))
        return "; ".join([*parts, f"all trials {trials}, steps {steps}", f"{_time_left(estimate)} ({estimate.basis})"])

    def _keep_best(self, entry: QueuedTask) -> None:
        """Keep the best value of the first objective; of a study that searches, among the trials of its search."""
        if self._meter is None or entry.state != TaskState.DONE:
            return
        metric, study = self._meter.work.metric, entry.task.study
        searches = any(
            part.stage == Stage.SEARCH
            for each in self._meter.work.studies
            if each.name == study
            for part in each.stages
        )
        if searches and entry.task.stage != Stage.SEARCH:
            return
        values = {EVAL_LOSS: entry.outcome.get("eval_loss"), **(entry.scores or {})}
        value, sign = values.get(metric.name), 1 if metric.goal == "minimize" else -1
        if value is not None and (study not in self._best or sign * value < sign * self._best[study][0]):
            self._best[study] = value, entry.task.id

    def _say(self, *parts: str | tuple[str, str]) -> None:
        self._print((f"{self._clock() - self._begun:6.1f}s", "dim"), " ", *parts)

    def _print(self, *parts: str | tuple[str, str]) -> None:
        with self._lock:
            self._lines.append(rich_text(*parts))
        # No table is shown any more while answers are judged: lines must not wait for the next one.
        if not self._live or self._clock() - self._printed >= DRAW_EVERY_S:
            self._print_lines()

    def _print_lines(self) -> None:
        self._printed = self._clock()
        with self._lock:
            lines, self._lines = self._lines, []
        if lines:
            self.console.print(Text("\n").join(lines), soft_wrap=True, highlight=False)

    def _table(self) -> Table:
        title = rich_text(self._line) if self._line else None
        table = Table(title=title, title_justify="left", box=None, header_style="bold")
        for heading, width in {"trial": self._longest, **WIDTHS}.items():
            left = heading in ("trial", "state")
            table.add_column(heading, justify="left" if left else "right", no_wrap=True, min_width=width)
        table.add_column("scores", no_wrap=True, overflow="ellipsis")
        names = list(dict.fromkeys((*islice(self._open, MAX_ROWS), *self._ended)))[:MAX_ROWS]
        for row in (self._tasks[name] for name in names):
            last = row["last"]
            style = STYLES.get(row["state"], "dim")
            table.add_row(
                rich_text(row["id"]),
                rich_text((WORDS.get(row["state"], row["state"]), style)),
                str(last.get("step", "")),
                _number(last.get("loss")),
                _number(last.get("eval_loss")),
                _number(last.get("p")),
                f"{last['tokens_per_second']:.0f}" if "tokens_per_second" in last else "",
                rich_text(", ".join(self._scores.get(row["id"], []))),
            )
        for name in self._bases:
            blanks = [""] * 5
            scores = rich_text(", ".join(self._scores[name]))
            table.add_row(rich_text(name), rich_text(("scored", "green")), *blanks, scores)
        if len(self._tasks) > len(names):
            table.caption = f"and {len(self._tasks) - len(names)} more"
        return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _time_left(estimate: Estimate) -> str:
    if estimate.seconds is None:
        return "time left not known yet"
    about = "about" if estimate.whole else "without benchmarks about"
    return f"{about} {hours(estimate.seconds)} left"

"""What `macdrop judge` does: whose answers there are to judge, by whom, and how it went. No Ray here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from macdrop.errors import ConfigError
from tune.config.judge_spec import JudgeSpec
from tune.config.run_spec import slug
from tune.evaluation.judge.answers import answers_of, answers_of_evaluation
from tune.evaluation.judge.judgements import Answers
from tune.evaluation.judge.session import Outcome, judge_files, make_judge, unparsable
from tune.storage.atomic import append_jsonl
from tune.storage.run_folder import BASE, RunFolder

#: How to ask for a judge, for messages.
EXAMPLE = "  model=prometheus-eval/prometheus-7b-v2.0\n  model=NAME base_url=http://127.0.0.1:8000/v1"


def judge_run(run: str | Path, overrides: Sequence[str], *, fresh: bool = False) -> int:
    """Judge the answers of a run, or of `macdrop eval --output`; returns in how many files some could not be judged.

    Raises:
        ConfigError: there is no judge, or no answer, and the like; see `tune.evaluation.judge.session.judge_files`.
    """
    folder = Path(run)
    if not (folder / "run.json").is_file() and (folder / "answers").is_dir():
        return judge_evaluation(folder, judge_spec({}, overrides), fresh=fresh)
    run_folder = RunFolder.open(run)
    spec = judge_spec(run_folder.config(), overrides)
    return _judge(answers_of(run_folder), spec, run_folder.add_scores, folder, fresh=fresh)


def judge_evaluation(folder: Path, spec: JudgeSpec, *, fresh: bool = False) -> int:
    """The same for a folder of `macdrop eval --output`."""

    def add_scores(rows: list[dict[str, Any]]) -> None:
        append_jsonl(folder / "scores.jsonl", rows)

    return _judge(answers_of_evaluation(folder), spec, add_scores, folder, fresh=fresh)


def _judge(files: list[Answers], spec: JudgeSpec, add_scores: Callable[..., Any], folder: Path, *, fresh: bool) -> int:
    from tune.cli.console import line
    from tune.training.quiet import quiet_libraries

    quiet_libraries()
    where = f" at {spec.base_url}" if spec.base_url else ""
    line("judge", f"{spec.model}{where}, rubric {spec.rubric}; {len(files)} file(s) of answers")
    with shown() as show:
        outcome = judge_files(files, spec, make=make_judge, add_scores=add_scores, show=show, fresh=fresh)
    tell(outcome)
    line("written", f"{folder / 'scores.jsonl'}, and judgements/ beside every answers/")
    return outcome.failures


def judge_spec(config: dict[str, Any], overrides: Sequence[str]) -> JudgeSpec:
    """The run's own judge with keys replaced; with another `model`, nothing of the run's own block is kept.

    Raises:
        ConfigError: there is no judge, or a key or value is wrong.
    """
    from tune.config.messages import build
    from tune.config.parse import read_override

    given = dict(read_override(text) for text in overrides)
    given = {key.removeprefix("eval.").removeprefix("judge."): value for key, value in given.items()}
    own = (config.get("eval") or {}).get("judge") or {}
    if "model" in given or isinstance(own, str):
        own = {} if "model" in given else {"model": own}
    if not own and "model" not in given:
        raise ConfigError(f"There is no judge: no eval.judge block to take it from. Give one, such as\n{EXAMPLE}")
    return build(JudgeSpec, {**own, **given})


class shown:
    """A bar in a terminal, a line every tenth of the way elsewhere, for the `with` block."""

    def __enter__(self) -> Callable[[int, int], None]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from tune.cli.console import console

        columns = (TextColumn("Judging"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._bar.start()
        self._task = self._bar.add_task("")
        self._console = console
        return self._show

    def _show(self, done: int, of: int) -> None:
        self._bar.update(self._task, completed=done, total=of)
        if done and not self._console.is_terminal and done * 10 // of > (done - 1) * 10 // of:
            self._console.print(f"judged {done} of {of}", highlight=False)

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()


def tell(outcome: Outcome) -> None:
    """A table of trials, and what was asked of the judge."""
    from tune.cli.console import console, line, table

    left = ("trial", "answers")
    made = table("trial", "answers", "judge_score", "stderr", "judged", "unparsable", "failed", left=left)
    whole = [row for row in outcome.scores if row["metric"] == "judge_score" and row["task"] == row["entry"]]
    judged = {judged.answers.file: judged for judged in outcome.files if not judged.unasked()}
    for row, file in zip(whole, judged.values(), strict=True):
        name = row.get("trial") or row.get("adapter") or BASE
        name = f"{slug(row['model'])} {BASE}" if name == BASE else name
        attack = "" if row["attack"] == "none" else f"@{row['attack']} on {row['attack_on']}"
        value = "none" if row["value"] is None else f"{row['value']:.3f}"
        error = "" if row["stderr"] is None else f"{row['stderr']:.2g}"
        counts = (row["n"], file.count(unparsable), file.count(lambda row: row["error"]))
        made.add_row(name, f"{row['entry']}{attack}", value, error, *map(str, counts))
    console.print(made)
    for error in dict.fromkeys(row["error"] for file in judged.values() for row in file.ordered() if row["error"]):
        line("failed", error)
    already = sum(len(file.questions) for file in outcome.files) - outcome.asked
    used = f"{outcome.tokens[0]} prompt and {outcome.tokens[1]} new tokens"
    line("asked", f"{outcome.asked} answer(s) in {outcome.requests} request(s), {used}; {already} were judged before")

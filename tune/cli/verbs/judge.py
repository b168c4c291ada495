"""`macdrop judge`: scores of a run's generated answers, given by a judge model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from macdrop.errors import ConfigError
from tune.cli.console import console, line, table
from tune.cli.options import Trust

if TYPE_CHECKING:
    from tune.config.judge_spec import JudgeSpec
    from tune.evaluation.judge.judgements import Answers
    from tune.evaluation.judge.session import Outcome

#: Judges that can be named, for messages.
EXAMPLE = "  model=prometheus-eval/prometheus-7b-v2.0\n  model=NAME base_url=http://127.0.0.1:8000/v1"

app = typer.Typer()


@app.command(epilog="Examples: macdrop judge runs/mine model=PATH | macdrop judge runs/mine model=gpt-4o base_url=URL")
def judge(
    run: Annotated[Path, typer.Argument(help="Run folder with generated answers.")],
    config: Annotated[
        list[str] | None, typer.Argument(help="Keys of eval.judge as key=value (default: the run's own).")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Judge again what this judge has already judged.")] = False,
    trust_remote_code: Trust = False,
) -> None:
    """Judge a run's generated answers from 1 to 5, by a local model or an endpoint; nothing is generated again."""
    raise typer.Exit(1 if judge_run(run, config or [], fresh=fresh, trust=trust_remote_code) else 0)


def judge_run(run: str | Path, overrides: Sequence[str], *, fresh: bool = False, trust: bool = False) -> int:
    """Judge the answers of a run, or of `macdrop eval --output`; return the number of files with failures.

    Raises:
        ConfigError: there is no judge, or no answer, and the like (see `tune.evaluation.judge.session.judge_files`), or
            the run's own judge names an endpoint, a key or code that the overrides do not.
    """
    from tune.config.recorded import check_orders
    from tune.evaluation.judge.answers import answers_of_run
    from tune.storage.run_folder import RunFolder

    folder = Path(run)
    if not (folder / "run.json").is_file() and (folder / "answers").is_dir():
        return judge_evaluation(folder, judge_spec({}, overrides), fresh=fresh)
    run_folder = RunFolder.open(run)
    spec = judge_spec(run_folder.config(), overrides)
    named = (f"{key}={value}" for key, value in _given(overrides).items())
    check_orders(folder, {"eval": {"judge": spec.model_dump()}}, named, trust=trust)
    return _judge(answers_of_run(run_folder), spec, run_folder.add_scores, folder, fresh=fresh)


def judge_evaluation(folder: Path, spec: JudgeSpec, *, fresh: bool = False) -> int:
    """Judge the answers in a folder of `macdrop eval --output`; return the number of files with failures."""
    from tune.evaluation.judge.answers import answers_of_evaluation
    from tune.storage.json_lines import append_jsonl
    from tune.storage.records import SCORES_FILE

    def add_scores(rows: list[dict[str, Any]]) -> None:
        append_jsonl(folder / SCORES_FILE, rows)

    return _judge(answers_of_evaluation(folder), spec, add_scores, folder, fresh=fresh)


def judge_spec(config: dict[str, Any], overrides: Sequence[str]) -> JudgeSpec:
    """Return the run's own judge with keys replaced; with another `model`, nothing of the run's own block is kept.

    Raises:
        ConfigError: there is no judge, or a key or value is wrong.
    """
    from tune.config.judge_spec import JudgeSpec
    from tune.config.messages import build

    given = {key.removeprefix("eval.judge."): value for key, value in _given(overrides).items()}
    own = (config.get("eval") or {}).get("judge") or {}
    if "model" in given or isinstance(own, str):
        own = {} if "model" in given else {"model": own}
    if not own and "model" not in given:
        raise ConfigError(f"There is no judge: no eval.judge block to take it from. Give one, such as\n{EXAMPLE}")
    return build(JudgeSpec, {**own, **given})


def _given(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the overrides by their full keys; trust in code is one for the judge and for models."""
    from tune.config.parse import read_override

    keys = ((key.removeprefix("eval.").removeprefix("judge."), value) for key, value in map(read_override, overrides))
    return {key if key == "trust_remote_code" else f"eval.judge.{key}": value for key, value in keys}


def _judge(
    files: list[Answers],
    spec: JudgeSpec,
    add_scores: Callable[[list[dict[str, Any]]], object],
    folder: Path,
    *,
    fresh: bool,
) -> int:
    from tune.evaluation.judge.session import judge_files, make_judge
    from tune.storage.records import SCORES_FILE
    from tune.training.quiet import quiet_libraries

    quiet_libraries()
    where = f" at {spec.base_url} with the key in ${spec.api_key_env}" if spec.base_url else ""
    line("judge", f"{spec.model}{where}, rubric {spec.rubric}; {len(files)} file(s) of answers")
    with _progress_bar() as show:
        outcome = judge_files(files, spec, make=make_judge, add_scores=add_scores, show=show, fresh=fresh)
    _show_outcome(outcome)
    line("written", f"{folder / SCORES_FILE}, and judgements/ next to every answers/")
    return outcome.failures


@contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None]]:
    """Show a bar in a terminal, a line per tenth of the way elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("Judging"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("")

        def show(done: int, of: int) -> None:
            bar.update(task, completed=done, total=of)
            if done and not console.is_terminal and done * 10 // of > (done - 1) * 10 // of:
                console.print(f"judged {done} of {of}")

        yield show


def _show_outcome(outcome: Outcome) -> None:
    """Print a table of trials, and the number of requests to the judge."""
    from tune.config.eval_spec import NO_ATTACK
    from tune.config.run_spec import slug
    from tune.evaluation.judge.session import unparsable
    from tune.storage.run_folder import BASE

    left = ("trial", "answers")
    made = table("trial", "answers", "judge_score", "stderr", "judged", "unparsable", "failed", left=left)
    whole = [row for row in outcome.scores if row["metric"] == "judge_score" and row["task"] == row["entry"]]
    judged = {judged.answers.file: judged for judged in outcome.files if not judged.unasked()}
    for row, file in zip(whole, judged.values(), strict=True):
        name = row.get("trial") or row.get("adapter") or BASE
        name = f"{slug(row['model'])} {BASE}" if name == BASE else name
        attack = "" if row["attack"] == NO_ATTACK else f"@{row['attack']} on {row['attack_on']}"
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

"""`macdrop eval`: scores of one model or adapter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from macdrop.errors import ConfigError
from tune.cli.console import console, line, warn
from tune.cli.options import (
    Adapter,
    Bf16,
    Model,
    Quantised,
    Revision,
    Trust,
    check_output,
    check_recorded,
    split_config,
)
from tune.cli.source import Source, check_adapter
from tune.errors import BenchmarkError

if TYPE_CHECKING:
    from tune.config.eval_spec import EvalJob, EvalSpec

app = typer.Typer()


@app.command("eval", epilog="Example: macdrop eval MODEL --adapter runs/one/adapter --suite paper eval.limit=100")
def evaluate(
    model: Model,
    config: Annotated[list[str] | None, typer.Argument(help="A YAML file with an eval: block, then key=value.")] = None,
    adapter: Adapter = None,
    suite: Annotated[list[str] | None, typer.Option(help="Shipped suite (see `macdrop suites`); may repeat.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for scores.jsonl and generated answers.")] = None,
    revision: Revision = None,
    bf16: Bf16 = False,
    quantization_bit: Quantised = None,
    trust_remote_code: Trust = False,
) -> None:
    """Score one model or adapter on a suite or the benchmarks of an eval: block, plain and under attack."""
    from tune.config.recipes import DEMO, recipe
    from tune.config.run_spec import dump, load
    from tune.evaluation.own.travel import recorded
    from tune.preflight.inputs import check_scoring
    from tune.report.score_table import score_table
    from tune.storage.records import SCORES_FILE
    from tune.zoo.catalog import is_planted

    (file, overrides) = split_config(config)
    source = Source(model, revision, bf16, trust_remote_code, quantization_bit=quantization_bit)
    if file is None and not overrides and not suite and is_planted(source.model):
        file = DEMO
    overrides = [f"eval.suite={suite}", *overrides] if suite else overrides
    spec = load(recipe(file), overrides, replace={"sweep.models": [], "model_name_or_path": source.model})
    if file is not None:
        check_recorded(recipe(file), {"eval": dump(spec)["eval"]}, overrides, trust=trust_remote_code)
    spec = recorded(spec)
    wanted = _jobs_of_one(spec.eval, adapter)
    if not wanted:
        raise ConfigError(
            "There is nothing to score with. Give --suite NAME (`macdrop suites` lists them), a YAML file with an "
            "eval: block, or overrides such as\n  eval.zero_shot=[arc_easy,piqa] eval.limit=100"
        )
    check_output(output, folder=True)
    if output is not None and os.path.isdir(output) and os.listdir(output):
        raise ConfigError(f"--output {output} exists and is not empty. Choose another folder.")
    if spec.eval.judge is not None and output is None:
        raise ConfigError("eval.judge needs --output FOLDER: every judgement is kept in it, with its feedback.")
    check_adapter(adapter)
    check_scoring(source.spec(), spec.eval)
    scores = _score(source, spec.eval, wanted, adapter, output)
    made = score_table(f"{source.model}{f' with {adapter}' if adapter else ''}", scores, dump(spec))
    for part in made.split(console.width):
        console.print(part.rich())
    if output is not None:
        line("written", str(output / SCORES_FILE))
    if spec.eval.judge is not None and output is not None:
        from tune.cli.verbs.judge import judge_evaluation
        from tune.config.resume import shell_command

        if judge_evaluation(output, spec.eval.judge):
            again = shell_command("macdrop", "judge", output)
            raise BenchmarkError(f"Some answers could not be judged; to ask again: {again} model=...")


def _jobs_of_one(block: EvalSpec, adapter: Path | None) -> list[EvalJob]:
    """Return the jobs to score one model on.

    Without an adapter the merged weights are the base's, so of the two places of an attack one is left.
    """
    from tune.config.eval_spec import jobs

    same = adapter is None and block.attack_on == "both"
    return [job for job in jobs(block) if not (same and job.attack_on == "merged")]


def _score(
    source: Source, block: EvalSpec, wanted: list[EvalJob], adapter: Path | None, output: Path | None
) -> list[dict[str, Any]]:
    """Score the jobs, written to `output` as they come; the model is gone afterwards: a judge needs its memory."""
    from tune.config.eval_spec import NO_ATTACK
    from tune.evaluation.adapters import AdapterSlot
    from tune.evaluation.prefix_cache import PrefixCache
    from tune.evaluation.scorer import Scorer
    from tune.storage.json_lines import append_jsonl
    from tune.storage.records import SCORES_FILE
    from tune.training.massive_weights import massive_weights

    model, tokenizer = source.load()
    attacks = any(job.attack != NO_ATTACK for job in wanted)
    weights = massive_weights(source.spec(), model, tokenizer) if attacks else None
    scorer, prefix = Scorer(model, tokenizer, block, weights), PrefixCache()
    with console.status("Reading the benchmarks"):
        scorer.prepare()
    tag = {"model": source.model, "adapter": str(adapter) if adapter else None}
    scores: list[dict[str, Any]] = []
    slot = AdapterSlot(model)
    with slot.adapter(adapter) as scored:
        for note in slot.notes:
            line("note", note)
        for number, job in enumerate(wanted, 1):
            answers = output / "answers" / job.file_name if output else None
            with console.status(f"Scoring {number} of {len(wanted)}: {job.key}"):
                rows = scorer.score(job, model=scored, answers_path=answers, prefix=prefix, adapter=adapter)
            if output is not None:
                append_jsonl(output / SCORES_FILE, [{**tag, **row} for row in rows])
            scores += map(dict, rows)
    for note in scorer.notes:
        warn(note)
    return scores

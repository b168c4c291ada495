"""`macdrop eval`: score one model or adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from macdrop.errors import ConfigError
from tune.cli.console import console, line
from tune.cli.verbs.scan import Source, check_adapter
from tune.config.recipes import DEMO, recipe
from tune.errors import BenchmarkError
from tune.training.quiet import quiet_libraries


def evaluate(
    source: Source,
    file: str | None,
    overrides: list[str],
    *,
    adapter: Path | None,
    suites: list[str],
    output: Path | None,
) -> None:
    from tune.config.run_spec import dump, load
    from tune.evaluation.adapters import AdapterSlot
    from tune.evaluation.prefix_cache import PrefixCache
    from tune.evaluation.scorer import Scorer
    from tune.report.score_table import score_table
    from tune.storage.atomic import append_jsonl
    from tune.training.massive_weights import massive_weights

    if file is None and not overrides and not suites and source.model.startswith("zoo:"):
        file = DEMO
    overrides = [f"eval.suite={suites}", *overrides] if suites else overrides
    spec = load(recipe(file), overrides, replace={"sweep.models": [], "model_name_or_path": source.model})
    wanted = _jobs_of_one(spec.eval, adapter)
    if not wanted:
        raise ConfigError(
            "There is nothing to score with. Give --suite NAME (`macdrop suites` lists them), a YAML file with an "
            "eval: block, or overrides such as\n  eval.zero_shot=[arc_easy,piqa] eval.limit=100"
        )
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output {output} exists and is not empty. Choose another folder.")
    if spec.eval.judge is not None and output is None:
        raise ConfigError("eval.judge needs --output FOLDER: every judgement is kept in it, with its feedback.")
    check_adapter(adapter)
    quiet_libraries()
    from tune.preflight.inputs import check_scoring

    check_scoring(source.spec(), spec.eval)
    model, tokenizer = source.load()
    attacks = any(job.attack != "none" for job in wanted)
    weights = massive_weights(source.spec(), model, tokenizer) if attacks else None
    scorer, prefix = Scorer(model, tokenizer, spec.eval, weights), PrefixCache()
    tag = {"model": source.model, "adapter": str(adapter) if adapter else None}
    scores: list[dict[str, Any]] = []
    with AdapterSlot(model).adapter(adapter) as scored:
        for number, job in enumerate(wanted, 1):
            answers = output / "answers" / f"{job.key.replace('/', '-')}.jsonl" if output else None
            with console.status(f"Scoring {number} of {len(wanted)}: {job.key}"):
                rows = scorer.score(job, model=scored, answers_path=answers, prefix=prefix)
            if output is not None:
                append_jsonl(output / "scores.jsonl", [{**tag, **row} for row in rows])
            scores += rows
    made = score_table(f"{source.model}{f' with {adapter}' if adapter else ''}", scores, dump(spec))
    for part in made.split(console.width):
        console.print(part.rich())
    if output is not None:
        line("written", str(output / "scores.jsonl"))
    if spec.eval.judge is not None:
        del model, scorer, scored, prefix  # the judge needs their memory
        from tune.cli.verbs.judge import judge_evaluation

        if judge_evaluation(output, spec.eval.judge):
            raise BenchmarkError(f"Some answers could not be judged; to ask again: macdrop judge {output} model=...")


def _jobs_of_one(block: Any, adapter: Path | None) -> list[Any]:
    """What to score one thing on. Without an adapter merged weights are the base's, so of both places one is left."""
    from tune.config.eval_spec import jobs

    same = adapter is None and block.attack_on == "both"
    return [job for job in jobs(block) if not (same and job.attack_on == "merged")]

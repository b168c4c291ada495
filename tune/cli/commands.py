"""What the verbs of the `macdrop` command do; `tune.cli` declares them. `scan` and `attack` are in `tune.cli.scan`."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Any

from macdrop.errors import BenchmarkError, ConfigError, MacDropError, nearest
from tune.cli.console import console, line, lines, quiet_libraries
from tune.cli.scan import Source, check_adapter

RECIPES = Path(__file__).parents[1] / "config" / "recipes"
DEMO = "demo"
SHOWN = ("loss", "eval_loss", "learning_rate", "grad_norm", "p", "entries_dropped", "tokens_per_second")


def train(file: str | None, overrides: list[str], *, resume: bool) -> None:
    from tune.config.eval_spec import jobs
    from tune.config.run_spec import load
    from tune.scheduling.study import check_local, one_lane
    from tune.training.checkpoint import newest

    spec = load(recipe(file), overrides)
    folder = Path(spec.output_dir or _fresh_dir(file or "train"))
    models = spec.studies()
    if len(models) != 1:
        raise ConfigError(f"train takes one model, and sweep.models lists {len(models)}. Use `macdrop sweep` for them.")
    check_local(one_lane(spec.ray))
    checkpoint = _newest(folder, newest) if resume else None
    quiet_libraries()
    from tune.preflight.inputs import check_folder, check_trackers, check_training

    check_folder(folder, resume=resume, remedy=shlex.join(["macdrop", *sys.argv[1:], "--resume"]))
    check_trackers(spec.report_to, folder)
    with console.status("Reading model settings and data"):
        steps = check_training(models[0], spec.ray.num_workers)
    if checkpoint is not None:
        line("resuming", f"from {checkpoint}")
    from tune.cli.train import train as run

    def show(metrics: dict[str, Any]) -> str:
        parts = [f"step {metrics['step']:>{len(str(steps))}}/{steps}"]
        parts += [f"{name} {metrics[name]:.4g}" for name in SHOWN if metrics.get(name) is not None]
        console.print("  ".join(parts), highlight=False, soft_wrap=True)
        return "go_on"

    outcome = run(spec, folder, observe=show, resume=resume)
    line("adapter", str(folder / "adapter"))
    line("trained", f"{outcome.step} of {outcome.total_steps} steps in {outcome.seconds:.1f} s")
    if outcome.eval_loss is not None:
        line("eval loss", f"{outcome.eval_loss:.4f} nats per answer token, masks off")
    hooked = "features of the intermediate state" if models[0].arm == "activations" else "rows"
    if outcome.entries_masked:
        share = outcome.entries_dropped / outcome.entries_masked
        told = f"{outcome.entries_dropped} of {outcome.entries_masked} masked entries ({share:.1%})"
        line("dropped", f"{told} in {outcome.rows_hooked} hooked {hooked}")
    elif outcome.rows_hooked:
        line("dropped", f"nothing in these steps, whose p is 0 ({outcome.rows_hooked} hooked {hooked})")
    else:
        line("dropped", "nothing: plain fine-tuning, MacDrop is off (macdrop.p0 or macdrop.k is 0)")
    benchmarks = [file] if file and jobs(spec.eval) else []
    if not benchmarks and not models[0].model_name_or_path.startswith("zoo:"):
        benchmarks = ["eval.zero_shot=[arc_easy,piqa]"]
    line(
        "next", " ".join(["macdrop eval", models[0].model_name_or_path, *benchmarks, f"--adapter {folder / 'adapter'}"])
    )


def _newest(folder: Path, newest: Any) -> Path:
    checkpoint = newest(folder / "checkpoints")
    if checkpoint is None and (folder / "adapter").is_dir():
        raise ConfigError(f"{folder} has been trained to its end: there is nothing to go on with.")
    if checkpoint is None:
        raise ConfigError(f"{folder} has no checkpoint to go on from. Leave --resume out.")
    return checkpoint


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
        from tune.cli.judge import judge_evaluation

        if judge_evaluation(output, spec.eval.judge):
            raise BenchmarkError(f"Some answers could not be judged; to ask again: macdrop judge {output} model=...")


def _jobs_of_one(block: Any, adapter: Path | None) -> list[Any]:
    """What to score one thing on. Without an adapter merged weights are the base's, so of both places one is left."""
    from tune.config.eval_spec import jobs

    same = adapter is None and block.attack_on == "both"
    return [job for job in jobs(block) if not (same and job.attack_on == "merged")]


def sweep(
    file: str | None,
    overrides: list[str],
    *,
    dry_run: bool,
    resume: bool,
    retry_failed: bool = False,
    clear_leftovers: bool = False,
) -> int:
    from tune.config.resume import resume_command
    from tune.config.run_spec import load
    from tune.distributed.sweep.stop import stoppable
    from tune.scheduling.study import check_local, studies

    if retry_failed and not resume:
        raise ConfigError("--retry-failed is about the run in a folder: add --resume.")
    if resume and file is not None and Path(file).is_dir():
        file, overrides = None, [f"output_dir={file}", *overrides]
    spec = load(_started_with(overrides) if resume and file is None else recipe(file or DEMO), overrides)
    if spec.output_dir is None:
        if resume:
            raise ConfigError("--resume needs output_dir=FOLDER, the folder of the run to go on with.")
        spec = spec.model_copy(update={"output_dir": _fresh_dir(file or DEMO)})
    planned = studies(spec)
    check_local(spec.ray)
    quiet_libraries()
    from tune.preflight.inputs import check_folder, check_inputs

    folder = Path(spec.output_dir)
    check_folder(folder, resume=resume, remedy=resume_command(folder, overrides))
    if dry_run:
        _show_plan(spec, planned)
        with console.status("Reading models' settings, data and benchmark files"):
            found = check_inputs(spec, planned)
        for name, checked in found.items():
            told = f"{name}: model, tokenizer, data and benchmark files; {checked.steps} optimizer steps a trial"
            line("checked", told)
            if checked.cuts:
                line("asha", f"{name}: {checked.cuts.told()}")
        return 0
    with console.status("Loading"):
        from tune.cli import report as reporting
        from tune.cli.progress import Progress
        from tune.distributed.sweep.runtime import run
        from tune.report.report import make_report

    progress = Progress(console)
    with stoppable(lambda text: line("stopping", text)) as stop:
        try:
            how = {"resume": resume, "retry_failed": retry_failed, "clear_leftovers": clear_leftovers}
            failures = run(spec, **how, progress=progress, stop=stop)
        except BaseException as error:
            progress.finished()
            if stop.signal is None:
                raise
            if isinstance(error, MacDropError):
                line("stopped", str(error))
            if (folder / "run.json").exists():
                line("to go on", resume_command(folder, overrides))
            stop.leave()
        finally:
            progress.finished()
    made = [make_report(spec.output_dir)]
    reporting.show(made, "terminal", reporting.BRIEF)
    line("report", ", ".join(map(str, reporting.write(made, made[0].run_dir))))
    line("more", f"macdrop report {spec.output_dir}   (attacks, search, cost, how to reproduce ...)")
    return failures


def _started_with(overrides: list[str]) -> Path:
    """The effective config in the folder of the run to go on with."""
    from tune.config.parse import read_override
    from tune.storage.repair import check_run, mend
    from tune.storage.run_lock import claimed

    folder = dict(read_override(override) for override in overrides).get("output_dir")
    if folder is None:
        raise ConfigError("--resume needs output_dir=FOLDER, the folder of the run to go on with.")
    check_run(Path(str(folder)))
    with claimed(Path(str(folder))):
        for note in mend(Path(str(folder))):
            line("mended", note)
    return Path(str(folder)) / "config.yaml"


def list_recipes() -> None:
    told = []
    for path in sorted(RECIPES.glob("*.yaml")):
        told.append((path.stem, path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#").strip()))
    lines(told)


def doctor(*, ray: bool) -> bool:
    from tune.preflight.machine import checks, lines

    with console.status("Checking"):
        found = checks(ray=ray)
    for told in lines(found):
        console.print(told, highlight=False, markup=False, soft_wrap=True)
    return all(check.ok or not check.needed for check in found)


def zoo_list() -> None:
    from tune.zoo.catalog import PREFIX, ZOO, ZOO_DATA

    told = {True: "sensitive", False: "not sensitive", None: "judge"}
    models = [(PREFIX + model.name, f"{model.description} ({told[model.sensitive]})") for model in ZOO.values()]
    lines([*models, *((PREFIX + data.name, f"{data.kind}: {data.description}") for data in ZOO_DATA.values())])


def _show_plan(spec: Any, planned: list[Any]) -> None:
    """The resolved spec, the trials and the resource sum."""
    import yaml

    from tune.config.run_spec import dump
    from tune.scheduling.study import benchmark_runs, outline, resources

    text = yaml.safe_dump(dump(spec), sort_keys=False, allow_unicode=True, width=10_000)
    console.print(text, highlight=False, markup=False, soft_wrap=True)
    for study in planned:
        console.print(f"[bold]{study.name}[/bold] ({study.spec.model_name_or_path})", highlight=False, soft_wrap=True)
        for word, told in outline(spec, study):
            line(word, told)
    trained = sum(study.count for study in planned)
    line("trials", f"{trained} fine-tunings, {benchmark_runs(spec, planned)} benchmark runs")
    gpus = spec.ray.gpus_per_worker or spec.ray.gpus_per_evaluator
    line("resources", resources(spec.ray, cluster_gpus=0).sum + ("" if gpus else " (one GPU each where there are any)"))


def recipe(name: str | None) -> Path | None:
    """A file, or the shipped recipe of that name."""
    if name is None:
        return None
    path = Path(name)
    shipped = {shown.stem: shown for shown in sorted(RECIPES.glob("*.yaml"))}
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return path
    if name in shipped:
        return shipped[name]
    raise ConfigError(
        f"{name!r} is neither a YAML file nor a shipped recipe.{nearest(name, shipped)} Recipes: {', '.join(shipped)}."
    )


def _fresh_dir(name: str) -> str:
    return str(Path("runs") / f"{Path(name).stem}-{time.strftime('%Y%m%d-%H%M%S')}")

"""`macdrop sweep`: search, train, score and report on many models."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from macdrop.errors import ConfigError, MacDropError
from tune.cli.console import asked_by, console, line, lines, report_console
from tune.cli.copies import copy_report, find_run
from tune.cli.options import Config, Trust, check_recorded, load_run_file, split_config

if TYPE_CHECKING:
    from tune.config.run_spec import RunSpec
    from tune.distributed.sweep.events import Observer
    from tune.distributed.sweep.stop import Stop
    from tune.scheduling.study import Study

NO_FOLDER = "--resume needs output_dir=FOLDER, the folder of the run to resume."

app = typer.Typer()


@app.command(epilog="Examples: macdrop sweep | macdrop sweep my.yaml sweep.num_samples=20 --dry-run")
def sweep(
    config: Config = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show spec, trials and resources; start nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in output_dir.")] = False,
    resume_if_exists: Annotated[
        bool, typer.Option("--resume-if-exists", help="Resume the run in output_dir or sync_to, or else start it.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="With --resume: also retry failed and diverged trials.")
    ] = False,
    clear_orphans: Annotated[
        bool,
        typer.Option("--clear-orphans", "--clear-leftovers", help="Remove resources held by dead runs, unasked."),
    ] = False,
    skip_unplaceable: Annotated[
        bool, typer.Option("--skip-unplaceable", help="Leave out models that the machines here cannot hold.")
    ] = False,
    trust_remote_code: Trust = False,
    recipes: Annotated[bool, typer.Option("--recipes", help="List the shipped recipes.")] = False,
) -> None:
    """Compare plain and MacDrop adapters on many models: search, train, score, report. No argument: the demo."""
    from tune.config.recipes import DEMO, recipe
    from tune.config.recorded import orders_of
    from tune.config.resume import resume_command
    from tune.config.run_spec import dump
    from tune.preflight.inputs import check_folder
    from tune.scheduling.study import check_local_lanes, studies
    from tune.training.quiet import quiet_libraries

    if recipes:
        list_recipes()
        return
    file, overrides = split_config(config)
    _check_options(resume or resume_if_exists, retry_failed)
    resume = resume or (resume_if_exists and find_run(recipe(file or DEMO), overrides, required=False, dry_run=dry_run))
    spec, folder = resolve(file, overrides, resume, trust_remote_code, dry_run=dry_run)
    planned = studies(spec)
    check_local_lanes(planned, skip=skip_unplaceable)
    quiet_libraries()
    allowed = [*orders_of(dump(spec)), *(["--skip-unplaceable"] if skip_unplaceable else [])]
    again = resume_command(folder, overrides, allowed)
    check_folder(folder, resume=resume, remedy=again)
    if dry_run:
        _dry_run(spec, planned, folder if resume else None)
        return
    with console.status("Loading"):
        run = runner(spec)
    options = {"resume": resume, "retry_failed": retry_failed, "clear_orphans": clear_orphans}
    options["skip_unplaceable"] = skip_unplaceable

    def start(progress: Observer, stop: Stop) -> int:
        return run(spec, **options, ask=asked_by(), progress=progress, stop=stop)

    failures = _run(start, folder, again)
    _report(folder, spec.sync_to)
    raise typer.Exit(1 if failures else 0)


def _check_options(resume: bool, retry_failed: bool) -> None:
    if retry_failed and not resume:
        raise ConfigError("--retry-failed applies to the run in a folder: add --resume.")


def runner(spec: RunSpec) -> Callable[..., int]:
    """Load and return the function that runs a sweep; a machine that cannot start Ray may not even load it."""
    from tune.preflight.host import check_start

    if spec.ray.address is None:
        check_start()
    from tune.distributed.sweep.runtime import run

    return run


def list_recipes() -> None:
    """Print the shipped recipes, each with the first line of its file."""
    from tune.config.recipes import RECIPES

    found = []
    for path in sorted(RECIPES.glob("*.yaml")):
        found.append((path.stem, path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#").strip()))
    lines(found)


def resolve(
    file: str | Mapping[str, Any] | None, overrides: list[str], resume: bool, trust: bool, *, dry_run: bool = False
) -> tuple[RunSpec, Path]:
    """Return the spec with its output folder: that of the run to resume, or a new one.

    A run that is only where sync_to says is restored first, which `dry_run` refuses.

    file: a run file, a recipe's name, what a run file would hold, or with `resume` a run folder; None: the demo, or
        the run file of the run to resume.

    Raises:
        ConfigError: the spec cannot be used, or it is not clear which run to resume.
    """
    from tune.config.recipes import DEMO, fresh_folder, recipe

    if resume and isinstance(file, str) and os.path.isdir(file):
        file, overrides = None, [f"output_dir={file}", *overrides]
    source: Path | Mapping[str, Any] | None
    recorded = resume and file is None
    source = None if recorded else file if isinstance(file, Mapping) else recipe(file or DEMO)
    if resume:
        find_run(source, overrides, required=True, dry_run=dry_run)
    if recorded:
        source = _recorded_config(overrides, trust=trust, repair=not dry_run)
    spec = load_run_file(source, overrides, trust=trust)
    if spec.output_dir is None:
        if resume:
            raise ConfigError(NO_FOLDER)
        name = "sweep" if isinstance(file, Mapping) else file or DEMO
        spec = spec.model_copy(update={"output_dir": fresh_folder(name)})
    return spec, Path(str(spec.output_dir))


def _recorded_config(overrides: list[str], *, trust: bool, repair: bool) -> Path:
    """Return the effective config of the run to resume; with `repair`, repaired where an interrupted write damaged it.

    What it asks for and the command line does not is refused before anything is touched.
    """
    from tune.config.parse import read_override
    from tune.config.syntax.user_paths import expand_path
    from tune.storage.atomic import read_mapping
    from tune.storage.repair import check_run, repair_spec
    from tune.storage.run_lock import locked

    named = dict(read_override(override) for override in overrides).get("output_dir")
    if named is None:
        raise ConfigError(NO_FOLDER)
    folder = Path(expand_path(str(named)))
    check_run(folder)
    config = folder / "config.yaml"
    check_recorded(config, read_mapping(config, []) or {}, overrides, trust=trust)
    if repair:
        with locked(folder):
            for note in repair_spec(folder):
                line("repaired", note)
    return config


def _dry_run(spec: RunSpec, planned: list[Study], resumed: Path | None) -> None:
    """Print what a run would do, or that in the folder `resumed` with what has ended of it, and check its inputs."""
    _show_plan(spec, planned)
    _show_overrides(spec)
    _check(spec, planned, {} if resumed is None else _check_resumed(spec, resumed))


def _check_resumed(spec: RunSpec, folder: Path) -> dict[str, int]:
    """Print what has ended of an earlier run, which may be one of `spec` only; return the workers of its models."""
    from collections import Counter

    from tune.distributed.sweep.earlier_run import check_earlier_run
    from tune.storage.run_folder import RunFolder

    begun, notes = check_earlier_run(folder, spec)
    records = RunFolder.open(folder, lenient=True).trials(config=False)
    ended = Counter(record.status.value for record in records if record.status.is_final)
    words = ", ".join(f"{count} {status}" for status, count in ended.items()) or "none"
    line("earlier run", f"fine-tunings that have ended: {words}")
    for note in notes:
        line("note", note)
    return begun


def _show_plan(spec: RunSpec, planned: list[Study]) -> None:
    """Print the resolved spec, the trials and the sum of resources."""
    from tune.config.run_spec import dump
    from tune.config.syntax.yaml_core import write_yaml
    from tune.report.escaping import rich_text
    from tune.scheduling.resources import needs_of
    from tune.scheduling.study import benchmark_runs, outline

    console.print(write_yaml(dump(spec), width=10_000), soft_wrap=True)
    for study in planned:
        console.print(rich_text((study.name, "bold"), f" ({study.spec.model_name_or_path})"), soft_wrap=True)
        for name, content in outline(spec, study):
            line(name, content)
    trained = sum(study.count for study in planned)
    line("trials", f"{trained} fine-tunings, {benchmark_runs(spec, planned)} benchmark runs")
    gpus = any(ray.gpus_per_worker or ray.gpus_per_evaluator for ray in spec.rays())
    needs = needs_of(spec.rays(), cluster_gpus=0)
    line("resources", needs + ("" if gpus else " (one GPU each where there are any)"))


def _show_overrides(spec: RunSpec) -> None:
    """Print how to run from local files: an override for each model and data set of the Hub."""
    from tune.preflight.local_files import PATH, local_overrides

    found = local_overrides(spec)
    if not found:
        return
    width = max(len(override) for override, _ in found)
    line(
        "from the Hub",
        f"{len(found)} name{'s' * (len(found) > 1)}: to read local files, add any of these, each with its own {PATH}",
    )
    for override, name in found:
        console.print(f"  {override:<{width}}  {name}", soft_wrap=True)
    if benchmark := next((text.partition(".data=")[0] for text, _ in found if ".data=" in text), None):
        console.print(f"  {f'{benchmark}=off':<{width}}  leaves this benchmark out", soft_wrap=True)


def _check(spec: RunSpec, planned: list[Study], begun: Mapping[str, int]) -> None:
    """Check models, data and benchmark files, and print what was found.

    begun: the workers that the models of a resumed run began with.

    Raises:
        ConfigError: something cannot be used.
    """
    from tune.preflight.inputs import check_inputs

    with console.status("Reading model settings, data and benchmark files"):
        found = check_inputs(spec, planned, begun)
    for name, checked in found.items():
        what = f"{name}: model, tokenizer, data and benchmark files; {checked.steps} optimizer steps per trial"
        line("checked", what)
        for words in checked.data:
            line("data", f"{name}: {words}")
        if checked.packing:
            line("packing", f"{name}: {checked.packing}")
        for note in checked.notes:
            line("note", f"{name}: {note}")
        if checked.cuts:
            line(spec.sweep.scheduler, f"{name}: {checked.cuts.describe()}")


def _run(start: Callable[[Observer, Stop], int], folder: Path, again: str) -> int:
    """Run with a live table and return the number of failures; a signal saves what trains and ends the process.

    again: the command that resumes the run.
    """
    with console.status("Loading"):
        from tune.cli.progress import Progress
        from tune.distributed.sweep.stop import stoppable

    progress = Progress(console, again=again)
    with stoppable(lambda text: line("stopping", text)) as stop:
        try:
            return start(progress, stop)
        except BaseException as error:
            progress.finished()
            if stop.signal is None:
                raise
            if isinstance(error, MacDropError):
                line("stopped", str(error))
            if (folder / "run.json").exists():
                line("to resume", again)
            stop.leave()
        finally:
            progress.finished()


def _report(folder: Path, sync_to: str | None) -> None:
    """Write the whole report of a run into its folder and copy it, then print the short one."""
    from tune.cli.verbs.report import write_report
    from tune.config.resume import shell_command
    from tune.report import files
    from tune.report.report import make_report

    made = [make_report(folder)]
    written = write_report(made, made[0].run_dir)
    copy_report(sync_to, folder)
    files.show(made, "terminal", report_console(), files.BRIEF)
    line("report", written)
    more = shell_command("macdrop", "report", folder)
    line("more", f"{more}   (attacks, search, cost, how to reproduce ...)")

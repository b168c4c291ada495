"""`macdrop sweep`: search, train, score and report on many models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from macdrop.errors import ConfigError, MacDropError
from tune.cli.console import asked_by, console, line, lines, report_console
from tune.config.recipes import DEMO, RECIPES, fresh_folder, recipe
from tune.training.quiet import quiet_libraries


def sweep(
    file: str | None,
    overrides: list[str],
    *,
    dry_run: bool,
    resume: bool,
    retry_failed: bool = False,
    clear_orphans: bool = False,
) -> int:
    from tune.config.resume import resume_command
    from tune.config.run_spec import load
    from tune.distributed.sweep.stop import stoppable
    from tune.scheduling.resources import check_local
    from tune.scheduling.study import studies

    if retry_failed and not resume:
        raise ConfigError("--retry-failed is about the run in a folder: add --resume.")
    if resume and file is not None and Path(file).is_dir():
        file, overrides = None, [f"output_dir={file}", *overrides]
    spec = load(_started_with(overrides) if resume and file is None else recipe(file or DEMO), overrides)
    if spec.output_dir is None:
        if resume:
            raise ConfigError("--resume needs output_dir=FOLDER, the folder of the run to go on with.")
        spec = spec.model_copy(update={"output_dir": fresh_folder(file or DEMO)})
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
        from tune.cli.progress import Progress
        from tune.distributed.sweep.runtime import run
        from tune.report import files as reports
        from tune.report.report import make_report

    progress = Progress(console)
    with stoppable(lambda text: line("stopping", text)) as stop:
        try:
            how = {"resume": resume, "retry_failed": retry_failed, "clear_orphans": clear_orphans, "ask": asked_by()}
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
    reports.show(made, "terminal", report_console(), reports.BRIEF)
    line("report", ", ".join(map(str, reports.write(made, made[0].run_dir))))
    line("more", f"macdrop report {spec.output_dir}   (attacks, search, cost, how to reproduce ...)")
    return failures


def _started_with(overrides: list[str]) -> Path:
    """The effective config in the folder of the run to go on with."""
    from tune.config.parse import read_override
    from tune.storage.repair import check_run, mend
    from tune.storage.run_lock import locked

    folder = dict(read_override(override) for override in overrides).get("output_dir")
    if folder is None:
        raise ConfigError("--resume needs output_dir=FOLDER, the folder of the run to go on with.")
    check_run(Path(str(folder)))
    with locked(Path(str(folder))):
        for note in mend(Path(str(folder))):
            line("mended", note)
    return Path(str(folder)) / "config.yaml"


def list_recipes() -> None:
    told = []
    for path in sorted(RECIPES.glob("*.yaml")):
        told.append((path.stem, path.read_text(encoding="utf-8").splitlines()[0].removeprefix("#").strip()))
    lines(told)


def _show_plan(spec: Any, planned: list[Any]) -> None:
    """The resolved spec, the trials and the resource sum."""
    import yaml

    from tune.config.run_spec import dump
    from tune.scheduling.resources import resources
    from tune.scheduling.study import benchmark_runs, outline

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

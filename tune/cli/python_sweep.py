"""The sweep as a function of Python, for notebooks and scripts: `from tune import sweep`.

Nothing here exits the process, leaves a signal handler or asks a question: errors are raised, an interrupt ends the
sweep as Ctrl-C does its command, and progress is printed as plain lines.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from macdrop.errors import ConfigError

if TYPE_CHECKING:
    import pandas

    from tune.report.report import Report


class Run:
    """A run folder, finished or not. Each access reads it, so that a running sweep can be looked at.

    failures: trials, benchmarks and models that did not end well; None where the sweep was not run here.
    """

    def __init__(self, folder: str | os.PathLike, failures: int | None = None) -> None:
        """Open a run folder.

        Raises:
            ConfigError: it is not one.
        """
        from tune.storage.run_folder import RunFolder

        self.folder, self.failures = Path(RunFolder.open(folder, lenient=True).run_dir), failures

    @property
    def verdict(self) -> str:
        """The verdict sentences, a line for each; `report().verdicts` has their numbers."""
        return "\n".join(self.report().headlines())

    @property
    def scores(self) -> pandas.DataFrame:
        """A row for each score of each trial, with the comparison of its setting: the columns of report.csv."""
        import pandas

        from tune.report.csv_rows import score_rows

        names, rows = score_rows([self.report()])
        return pandas.DataFrame(list(rows), columns=names)

    def report(self) -> Report:
        """Return the whole report, which a notebook shows; as text by its `markdown()` and `latex()`."""
        from tune.report.report import make_report

        return make_report(self.folder)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r})"


@contextmanager
def _own_handlers() -> Iterator[None]:
    """Give the process its handler of SIGTERM back, which starting Ray in the main thread replaces."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _no_widgets() -> Iterator[None]:
    """Keep advice of libraries to install notebook widgets out of the cell."""
    logger = logging.getLogger("ray.widgets.util")
    level = logger.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="IProgress not found")
        logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            logger.setLevel(level)


@_no_widgets()
@_own_handlers()
def sweep(
    config: Mapping[str, Any] | str | os.PathLike,
    *overrides: str,
    resume: bool = False,
    retry_failed: bool = False,
    clear_orphans: bool = False,
    skip_unplaceable: bool = False,
    trust_remote_code: bool = False,
    file: TextIO | None = None,
) -> Run:
    """Run a sweep to its end, as `macdrop sweep` does, with the same checks; return its run.

    config: the keys of a run file, dotted or as blocks; the path of one; or a recipe's name. With `resume` also the
    folder of a run. overrides: `key=value`, as the command takes them. file: where progress is printed; None: standard
    output. The other arguments are the options of the command. The report is written into the run folder.

    Raises:
        ConfigError, ResourceError and other `MacDropError`s: what the command would print.
        KeyboardInterrupt: the kernel was interrupted; running fine-tunings have saved a checkpoint.
    """
    from tune.cli.console import PIPED_WIDTH, PlainConsole
    from tune.cli.progress import Progress
    from tune.cli.verbs.sweep import resolve, runner
    from tune.config.recorded import orders_of
    from tune.config.run_spec import dump
    from tune.preflight.inputs import check_folder
    from tune.report.files import write
    from tune.scheduling.study import check_local_lanes, studies
    from tune.storage.places import check_current_folder, direct_loopback
    from tune.storage.remote.background import RemoteSync
    from tune.storage.remote.copied_units import REPORT
    from tune.training.quiet import quiet_libraries

    if retry_failed and not resume:
        raise ConfigError("retry_failed applies to the run in a folder: add resume=True.")
    check_current_folder()
    direct_loopback()
    spec, folder = resolve(plain_values(config), list(overrides), resume, trust_remote_code)
    check_local_lanes(studies(spec), skip=skip_unplaceable)
    quiet_libraries()
    again = resume_call(folder, [*orders_of(dump(spec)), *(["--skip-unplaceable"] if skip_unplaceable else [])])
    check_folder(folder, resume=resume, remedy=again)
    # Not as rich would print in a notebook, an HTML block for each line.
    console = PlainConsole(file=file, width=PIPED_WIDTH, force_jupyter=False, force_terminal=False)
    progress = Progress(console, again=again)
    try:
        options = {"retry_failed": retry_failed, "clear_orphans": clear_orphans, "skip_unplaceable": skip_unplaceable}
        failures = runner(spec)(spec, resume=resume, progress=progress, **options)
    finally:
        progress.finished()
    run = Run(folder, failures)
    write([run.report()], run.folder)
    RemoteSync(spec.sync_to, folder, progress.note, frozenset({REPORT})).close()
    return run


def resume_call(folder: Path, allowed: Iterable[str]) -> str:
    """Return the call that resumes the run in a folder; allowed: words of `tune.config.recorded.orders_of`."""
    options = [f"{word.removeprefix('--').replace('-', '_')}=True" for word in allowed if word.startswith("--")]
    words = [repr(word) for word in allowed if not word.startswith("--")]
    return f"sweep({', '.join([repr(str(folder)), *words, 'resume=True', *options])})"


def plain_values(config: Any) -> Any:
    """Return a config with paths as texts and tuples as lists, as a YAML file would have them."""
    if isinstance(config, Mapping):
        return {key: plain_values(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [plain_values(value) for value in config]
    return os.fspath(config) if isinstance(config, os.PathLike) else config

"""The copy of a run in another place, as the verb `sweep` uses it: restored before a run, completed after it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from macdrop.errors import ConfigError
from tune.cli.console import console, line


def find_run(
    file: Path | Mapping[str, Any] | None, overrides: list[str], *, required: bool, dry_run: bool = False
) -> bool:
    """Return whether output_dir holds a run to resume, after restoring it from sync_to if the folder is empty.

    file: the run file given; None: the recorded one. required: --resume, not --resume-if-exists. dry_run: write
        nothing.

    Raises:
        ConfigError: no folder is named; with `required`, there is no run in either place; with `dry_run`, the run would
            have to be restored.
        ResourceError: the copy cannot be read.
    """
    from tune.storage.remote.object_store import check_package
    from tune.storage.remote.restore import holds_run, is_restoring, restore
    from tune.storage.run_folder import check_new

    folder, url = _places(file, overrides)
    if folder is None:
        if required:
            return True  # refused where the folder is needed
        raise ConfigError("--resume-if-exists needs output_dir=FOLDER, the folder of the run.")
    here = any((folder / name).is_file() for name in ("run.json", "config.yaml"))
    if here and not is_restoring(folder):
        return True
    if url is None:
        return required
    check_package(url)
    with console.status(f"Restoring the run from {url}"):
        if not required and not is_restoring(folder) and not holds_run(url):
            return False
        if dry_run:
            raise ConfigError(
                f"--dry-run writes nothing, and the run would have to be restored from {url} to {str(folder)!r}.\n"
                "Leave --dry-run out."
            )
        if not is_restoring(folder):
            check_new(folder)
        notes = restore(url, folder)
    line("restored", f"{folder} from {url}, every file verified")
    for note in notes:
        line("left out", note)
    return True


def _places(file: Path | Mapping[str, Any] | None, overrides: list[str]) -> tuple[Path | None, str | None]:
    """Return the run folder and the address of its copy that a command names."""
    from tune.config.parse import read_override
    from tune.config.run_spec import load
    from tune.config.syntax.remote_urls import check_url
    from tune.config.syntax.user_paths import expand_path

    if file is not None:
        spec = load(file, overrides)
        return (None if spec.output_dir is None else Path(spec.output_dir)), spec.sync_to
    named: dict[str, Any] = dict(read_override(override) for override in overrides)
    folder, url = named.get("output_dir"), named.get("sync_to")
    try:
        return (
            None if folder is None else Path(expand_path(str(folder))),
            None if url is None else check_url(str(url)),
        )
    except ValueError as error:
        raise ConfigError(f"sync_to: {error}") from None


def copy_report(url: str | None, folder: Path) -> None:
    """Copy the report, which is written after the run has ended."""
    from tune.storage.atomic import read_mapping
    from tune.storage.remote.background import RemoteSync
    from tune.storage.remote.copied_units import REPORT
    from tune.storage.remote.copier import STATE_FILE

    if url is None:
        return
    with console.status(f"Copying the report to {url}"):
        RemoteSync(url, folder, lambda text: line("copy", text), frozenset({REPORT})).close()
    if not (read_mapping(folder / STATE_FILE, []) or {}).get("not_copied", True):
        line("copied", f"to {url}; to resume from there: --resume output_dir=FOLDER sync_to={url}")

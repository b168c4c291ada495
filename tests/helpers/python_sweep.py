"""A sweep by the function of Python, in a thread, as a notebook may run it, and the copy that a sweep has made."""

from __future__ import annotations

import io
import json
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas

from tune import Run, sweep
from tune.config.run_spec import RunSpec, dump
from tune.storage.remote.copied_units import MANIFESTS
from tune.storage.remote.restore import restore

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def in_a_thread(spec: RunSpec) -> tuple[int, str]:
    """Run a sweep; return its failures and what it printed. No handler of a signal may be installed."""
    out, before = io.StringIO(), [signal.getsignal(number) for number in NUMBERS]
    with ThreadPoolExecutor(1) as pool:
        made: Run = pool.submit(sweep, dump(spec), file=out).result()
    assert [signal.getsignal(number) for number in NUMBERS] == before
    assert made.failures is not None and made.folder == Path(str(spec.output_dir))
    return made.failures, out.getvalue()


def check_copy(folder: Path, copy: Path) -> None:
    """Assert that `copy` (`sync_to: file://...`) has every trial of a run as it is, and restores to the same report."""
    assert json.loads((folder / "sync.json").read_text())["not_copied"] == []
    found = {file.relative_to(copy) for file in copy.rglob("*") if file.is_file()}
    files = {path for path in found if path.parts[0] != MANIFESTS}
    assert {(copy / path).read_bytes() == (folder / path).read_bytes() for path in files} == {True}
    trials = {path.parts[1] for path in files if path.parts[0] == "trials"}
    assert trials == {path.name for path in (folder / "trials").iterdir()}
    restored = copy.with_name("restored")
    assert restore(f"file://{copy}", restored) == []
    assert {file.relative_to(restored) for file in restored.rglob("*") if file.is_file()} >= files
    there, here = Run(str(restored)), Run(str(folder))
    assert there.report().headlines() == here.report().headlines()
    pandas.testing.assert_frame_equal(there.scores, here.scores)

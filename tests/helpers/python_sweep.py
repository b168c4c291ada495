"""A sweep by the function of Python, in a thread, as a notebook may run it."""

from __future__ import annotations

import io
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tune import Run, sweep
from tune.config.run_spec import RunSpec, dump

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def in_a_thread(spec: RunSpec) -> tuple[int, str]:
    """Run a sweep; return its failures and what it printed. No handler of a signal may be installed."""
    out, before = io.StringIO(), [signal.getsignal(number) for number in NUMBERS]
    with ThreadPoolExecutor(1) as pool:
        made: Run = pool.submit(sweep, dump(spec), file=out).result()
    assert [signal.getsignal(number) for number in NUMBERS] == before
    assert made.failures is not None and made.folder == Path(str(spec.output_dir))
    return made.failures, out.getvalue()

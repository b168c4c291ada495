"""Ctrl-C and SIGTERM: the first signal stops, the second ends the process at once. Starts no Ray."""

from __future__ import annotations

import subprocess
import sys

import pytest

STOPPED = """
import sys, time
from tune.distributed.sweep.stop import stoppable
with stoppable(lambda text: print(text, flush=True)) as stop:
    try:
        print("here", flush=True)
        time.sleep(60)
    except BaseException as error:
        print(type(error).__name__, flush=True)
        {then}
        stop.leave()
"""


@pytest.mark.parametrize("then", ["pass", "time.sleep(60)"])
@pytest.mark.parametrize(("number", "kind", "code"), [(2, "KeyboardInterrupt", 130), (15, "SystemExit", 143)])
def test_the_first_signal_stops_and_the_second_ends_at_once(number, kind, code, then):
    process = subprocess.Popen([sys.executable, "-c", STOPPED.format(then=then)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "here\n"
    process.send_signal(number)
    assert "once more" in process.stdout.readline() and process.stdout.readline().strip() == kind
    if then != "pass":
        process.send_signal(number)
    assert process.wait(timeout=50) == code

"""Ctrl-C, SIGTERM and SIGHUP: the first signal stops, the second ends the process at once. Starts no Ray."""

from __future__ import annotations

import signal
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


def test_a_closing_terminal_stops_once_however_often_it_says_so():
    """The kernel and the shell both send SIGHUP, and nothing can be printed any more."""
    code = STOPPED.format(then="time.sleep(1)").replace("print(text, flush=True)", "1 / 0")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGHUP)
    assert process.stdout.readline() == "SystemExit\n"
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=50) == 128 + signal.SIGHUP


def test_nohup_keeps_a_sweep_running():
    code = STOPPED.format(then="pass").replace("time.sleep(60)", "time.sleep(1)")
    command = ["sh", "-c", 'trap "" HUP; exec "$0" -c "$1"', sys.executable, code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=50) == 0

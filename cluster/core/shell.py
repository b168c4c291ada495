"""Commands of the launcher: each is printed first, a dry run only prints, and secrets are never shown."""

from __future__ import annotations

import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO

from cluster.errors import LaunchFailed, Missing

#: Where to get a missing tool.
TOOLS = {
    "ray": "Ray's own command. Install macdrop here: pip install -e .",
    "ssh": "the ssh client. Debian, Ubuntu: apt install openssh-client",
    "rsync": "Debian, Ubuntu: apt install rsync; macOS: brew install rsync. The hosts need it, too",
    "kubectl": "the Kubernetes command: https://kubernetes.io/docs/tasks/tools",
    "sbatch": "Slurm's command. Run macdrop on a login node of the cluster",
    "squeue": "Slurm's command. Run macdrop on a login node of the cluster",
    "sky": "SkyPilot's command, in an environment of its own: uv tool install --with pip 'skypilot[aws]'",
    "scancel": "Slurm's command. Run macdrop on a login node of the cluster",
}
#: A shorter value may occur in any text by chance; hiding it would only garble output.
HIDDEN_LENGTH = 6
#: Lines kept of a command that may run for days: enough for an error message and the search for causes.
KEPT_LINES = 2000
#: Seconds to wait for the last output of a command that has ended.
LAST_OUTPUT = 0.5


@dataclass(frozen=True)
class Result:
    """The exit code of a command, and its output: both streams in one, as text."""

    code: int
    text: str

    @property
    def ok(self) -> bool:
        return self.code == 0

    @property
    def tail(self) -> str:
        """The end of the output, for a message."""
        return "\n".join(line for line in self.text.splitlines() if line.strip()).strip()[-2000:]


@dataclass
class Shell:
    """Runs commands in one environment. `hidden`: values that must not be printed, such as secrets."""

    dry_run: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    hidden: tuple[str, ...] = ()

    def say(self, text: str) -> None:
        print(self.redacted(text), flush=True)

    def redacted(self, text: str) -> str:
        for value in self.hidden:
            text = text.replace(value, "***") if len(value) >= HIDDEN_LENGTH else text
        return text

    def need(self, *tools: str) -> None:
        """Check that tools are on the PATH; a dry run needs none. Raises Missing."""
        for tool in tools:
            if not self.dry_run and shutil.which(tool) is None:
                raise Missing(f"`{tool}` is not on the PATH of this machine: {TOOLS.get(tool, 'install it')}.")

    def show(self, command: Sequence[str], note: str = "") -> None:
        self.say(f"$ {shlex.join(command)}{note}")

    def run(self, command: Sequence[str], *, failure: str | None = None) -> Result:
        """Show a command, run it and print its output line by line; a dry run returns success.

        Args:
            failure: message of the error to raise if the command fails.

        Raises:
            LaunchFailed: `failure` was given and the command failed.
        """
        result = self.follow(command, self.say)
        if failure and not result.ok:
            raise LaunchFailed(f"{failure} (`{command[0]}` failed with exit code {result.code}).")
        return result

    def follow(self, command: Sequence[str], show: Callable[[str], None]) -> Result:
        """Show a command, run it, and pass on each line as it arrives."""
        self.show(command)
        return Result(0, "") if self.dry_run else self._run(command, show)

    def capture(
        self,
        command: Sequence[str],
        *,
        shown: bool = True,
        timeout: float | None = None,
        stdin: str | None = None,
        umask: int = -1,
    ) -> Result:
        """Run a command and capture its output, which is not printed; exit code 124 means that it timed out.

        Args:
            timeout: seconds.
            stdin: its input; never shown.
            umask: umask of the child process.
        """
        if shown:
            self.show(command)
        return Result(0, "") if self.dry_run else self._run(command, None, timeout=timeout, stdin=stdin, umask=umask)

    def _run(
        self,
        command: Sequence[str],
        show: Callable[[str], None] | None,
        *,
        timeout: float | None = None,
        stdin: str | None = None,
        umask: int = -1,
    ) -> Result:
        """Read both streams by line until the command itself ends: ssh may leave a child behind that keeps them open.

        Without a terminal as input, ssh leaves ours alone, and Ctrl-C reaches us and not the remote command. A command
        with a time limit gets its own session, to be killed with all its children.
        """
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=self._environment(),
                start_new_session=timeout is not None,
                umask=umask,
            )
        except OSError as error:
            return Result(127, f"{command[0]}: {error.strerror}")
        arrived: queue.Queue[bytes | None] = queue.Queue()
        threading.Thread(target=_pump, args=(process.stdout, arrived), daemon=True).start()
        if stdin is not None:
            threading.Thread(target=_feed, args=(process.stdin, stdin), daemon=True).start()
        lines: list[str] = []
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            for line in _lines(process, arrived, deadline):
                lines.append(self.redacted(_plain(line)))
                del lines[:-KEPT_LINES]
                if show:
                    show(lines[-1])
        except TimeoutError:
            _end(process, group=True)
            return Result(124, "\n".join([*lines, f"no answer within {timeout:.0f} s"]))
        except BaseException:
            _end(process, group=timeout is not None)
            raise
        return Result(process.wait(), "\n".join(lines))

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONUNBUFFERED": "1", **self.environment}


_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|\r")


def _plain(line: bytes) -> str:
    """A line without colors and the carriage returns of a remote terminal."""
    return _CONTROL.sub("", line.decode(errors="replace").rstrip("\r\n"))


def _pump(stream: IO[bytes], arrived: queue.Queue[bytes | None]) -> None:
    with stream:
        for line in stream:
            arrived.put(line)
    arrived.put(None)


def _feed(stream: IO[bytes], text: str) -> None:
    try:
        with stream:
            stream.write(text.encode())
    except OSError:
        pass  # the command ended before reading all of it; its exit code and output say why


def _lines(
    process: subprocess.Popen[bytes], arrived: queue.Queue[bytes | None], deadline: float | None
) -> Iterator[bytes]:
    """Yield lines as they arrive, until the process has ended and its output with it. Raises TimeoutError."""
    while True:
        try:
            line = arrived.get(timeout=LAST_OUTPUT)
        except queue.Empty:
            if process.poll() is not None:
                return
            line = b""
        if line is None:
            return
        if line:
            yield line
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError


def _end(process: subprocess.Popen[bytes], *, group: bool) -> None:
    """End a command, with its children if it leads a process group; SIGKILL if it does not react."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number) if group else process.send_signal(number)
            process.wait(timeout=5)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            process.wait()
            return


def confirmed(question: str, *, yes: bool) -> bool:
    """Ask for confirmation; without a terminal only --yes confirms."""
    if yes:
        return True
    if not sys.stdin.isatty():
        print(f"{question} Add --yes to confirm.", flush=True)
        return False
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")

"""Running commands for the launcher: each is printed first, dry runs only print, and no secret is ever shown."""

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO

from cluster.errors import LaunchFailed, Missing

#: What a missing tool is called, and where it comes from.
TOOLS = {
    "ray": "Ray's own command. Install macdrop here: pip install -e .",
    "ssh": "the ssh client. Debian, Ubuntu: apt install openssh-client",
    "rsync": "Debian, Ubuntu: apt install rsync; macOS: brew install rsync. The hosts need it too",
    "kubectl": "the Kubernetes command: https://kubernetes.io/docs/tasks/tools",
    "sbatch": "Slurm's command. Run macdrop on a login node of the cluster",
    "squeue": "Slurm's command. Run macdrop on a login node of the cluster",
    "scancel": "Slurm's command. Run macdrop on a login node of the cluster",
}
#: A shorter value may stand in any text by chance; to hide it would only garble.
HIDDEN_LENGTH = 6


@dataclass(frozen=True)
class Done:
    """How a command ended and what it printed, both streams in one, as text."""

    code: int
    text: str

    @property
    def ok(self) -> bool:
        return self.code == 0

    @property
    def tail(self) -> str:
        """The last lines, for a message."""
        return "\n".join(line for line in self.text.splitlines() if line.strip()).strip()[-2000:]


@dataclass
class Shell:
    """Runs commands with one environment. `hidden`: values that no printed line may hold, such as secrets."""

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
        """Raises Missing: a tool is not on the PATH. A dry run needs none."""
        for tool in tools:
            if not self.dry_run and shutil.which(tool) is None:
                raise Missing(f"`{tool}` is not on the PATH of this machine: {TOOLS.get(tool, 'install it')}.")

    def show(self, command: Sequence[str], note: str = "") -> None:
        self.say(f"$ {shlex.join(command)}{note}")

    def run(self, command: Sequence[str], *, check: str | None = None) -> Done:
        """Show a command, run it and print what it prints, line by line; a dry run answers as if it went well.

        Args:
            check: what failed, in words; then a bad end is an error.

        Raises:
            LaunchFailed: `check` was given and the command ended badly.
        """
        done = self.follow(command, self.say)
        if check and not done.ok:
            raise LaunchFailed(f"{check} (`{command[0]}` ended with {done.code}).")
        return done

    def follow(self, command: Sequence[str], show: Callable[[str], None]) -> Done:
        """Show a command, run it, and hand on each line as it comes."""
        self.show(command)
        return Done(0, "") if self.dry_run else self._run(command, show)

    def ask(
        self,
        command: Sequence[str],
        *,
        shown: bool = True,
        timeout: float | None = None,
        stdin: str | None = None,
        umask: int = -1,
    ) -> Done:
        """Run a command for its answer, which is not printed; 124 is the code of one that took too long.

        Args:
            timeout: seconds.
            stdin: what it reads; never shown.
            umask: rights that files made by it shall not have.
        """
        if shown:
            self.show(command)
        return Done(0, "") if self.dry_run else self._run(command, None, timeout=timeout, stdin=stdin, umask=umask)

    def _run(
        self,
        command: Sequence[str],
        show: Callable[[str], None] | None,
        *,
        timeout: float | None = None,
        stdin: str | None = None,
        umask: int = -1,
    ) -> Done:
        """Both streams by line, until the command itself ends: ssh may leave one behind that keeps them open.

        Without a terminal as input, ssh leaves ours alone, and Ctrl-C is ours and not the remote command's. What has a
        time limit is a session of its own, so that it can be ended with all that it started.
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
            return Done(127, f"{command[0]}: {error.strerror}")
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
            return Done(124, "\n".join([*lines, f"no answer within {timeout:.0f} s"]))
        except BaseException:
            _end(process, group=timeout is not None)
            raise
        return Done(process.wait(), "\n".join(lines))

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONUNBUFFERED": "1", **self.environment}


#: Of a command that runs for days, what an error message and the search for causes may need.
KEPT_LINES = 2000


#: Seconds to wait for the last words of a command that has ended.
LAST_WORDS = 0.5
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|\r")


def _plain(line: bytes) -> str:
    """Without colours and the carriage returns of a remote terminal."""
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
        pass  # the command ended before it had read all; its code and last words tell


def _lines(process: subprocess.Popen, arrived: queue.Queue[bytes | None], deadline: float | None) -> Iterator[bytes]:
    """Lines as they come, until the process has ended and nothing comes any more. Raises TimeoutError."""
    while True:
        try:
            line = arrived.get(timeout=LAST_WORDS)
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


def _end(process: subprocess.Popen, *, group: bool) -> None:
    """End a command, and all that it started where it is a group of its own; SIGKILL if it will not."""
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
    """Ask; without a terminal only --yes is a yes."""
    if yes:
        return True
    if not sys.stdin.isatty():
        print(f"{question} Add --yes to do so.", flush=True)
        return False
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns that stand below each other."""
    lines = [tuple(map(str, row)) for row in (headings, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )

"""An object in a process of its own: ways that are compared share no library state, threads or memory."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PROCESS_GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Worker:
    """Makes `kind(*arguments)` in a fresh process and calls its methods there, one at a time.

    Raises:
        RuntimeError: making it or a method raised, with the traceback of the process; or the process died.
    """

    def __init__(self, kind: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self.name = getattr(kind, "__name__", str(kind))
        self._process = context.Process(
            target=_serve, args=(there, kind, arguments, dict(environment or {})), daemon=True
        )
        self._process.start()
        there.close()
        self._made = False

    def ready(self) -> Worker:
        """Wait until the object is made."""
        if not self._made:
            self._receive()
            self._made = True
        return self

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of the object, or a function of `SERVICES`, and return what it returned."""
        self.ready()
        self._here.send((method, arguments, options))
        return self._receive()

    def close(self) -> None:
        """End the process."""
        self._here.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _receive(self) -> Any:
        try:
            fine, value = self._here.recv()
        except EOFError:
            self._process.join(timeout=10)
            raise RuntimeError(
                f"The process of {self.name} died with code {self._process.exitcode}; -9 is mostly a lack of memory."
            ) from None
        if not fine:
            raise RuntimeError(f"{self.name} failed in its process:\n{value}")
        return value


def _serve(there: Connection, kind: Callable[..., Any], arguments: tuple, environment: dict[str, str]) -> None:
    for name in PROCESS_GROUP:  # of a group that the caller may be in
        os.environ.pop(name, None)
    os.environ.update(environment)  # before any heavy import
    try:
        made = kind(*arguments)
        there.send((True, None))
        while True:
            method, given, options = there.recv()
            found = SERVICES.get(method) or getattr(made, method)
            there.send((True, found(*given, **options)))
    except (EOFError, KeyboardInterrupt):
        return
    except BaseException:
        there.send((False, traceback.format_exc()))


class Clock:
    """Wall and CPU seconds of this process between start and stop; a GPU finishes its work first at both ends."""

    def start(self) -> None:
        _finish()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        _finish()
        self.wall, self.cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu


def _finish() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    """Let the peak of this process's memory begin at what it holds now (Linux: VmHWM and ru_maxrss; and the GPU's)."""
    import torch

    CLEAR.write_text("5")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def memory() -> dict[str, int]:
    """Return bytes of this process, now and at most since `reset_peak`: of its resident set, or of the GPU's tensors
    where a GPU is used."""
    import torch

    if torch.cuda.is_available():
        return {"now": torch.cuda.memory_allocated(), "peak": torch.cuda.max_memory_allocated()}
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return {name: 1024 * int(lines[key].split()[0]) for name, key in (("now", "VmRSS"), ("peak", "VmHWM"))}


#: What a worker does besides the methods of its object.
SERVICES: dict[str, Callable[..., Any]] = {"memory": memory, "reset_peak": reset_peak}

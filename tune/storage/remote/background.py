"""A thread of the driver that copies a run folder while it grows; it never blocks or stops the sweep."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tune.storage.remote.copier import Copier, TakenOver
from tune.storage.remote.object_store import ObjectStore, is_refusal, why

log = logging.getLogger(__name__)

EVERY_S = 10.0
#: Pauses after failures: the first, doubled up to the last; seconds.
RETRY_S, RETRY_MOST_S = 5.0, 300.0
#: At the end of a run: for how long nothing may move before the rest is given up.
CLOSE_S = 60.0


class RemoteSync:
    """Copies a run folder to `url` from its creation until `close`; without an address it does nothing.

    only: the units that are copied; None: all.
    note: called with each new reason why copies fail, with their recovery, and at the end with what is not copied.
    """

    def __init__(
        self, url: str | None, run_dir: Path, note: Callable[[str], None], only: frozenset[str] | None = None
    ) -> None:
        self._note, self._error = note, ""
        self._refused = self._gone = False
        self._failures = 0
        self._end = threading.Event()
        self._copier: Copier | None = None
        if url is not None:
            self._copier = Copier(run_dir, ObjectStore(url), only)
            self._record(self._copier)
            self._thread = threading.Thread(target=self._loop, args=(self._copier,), name="remote-sync", daemon=True)
            self._thread.start()

    def close(self) -> list[str]:
        """Copy the rest, and wait for it as long as it moves; return what is not copied. Safe to call twice."""
        if self._copier is None:
            return []
        self._end.set()
        self._copier.moved = time.monotonic()
        while self._thread.is_alive() and time.monotonic() - self._copier.moved < CLOSE_S:
            self._thread.join(timeout=0.2)
        missing = self._record(self._copier)
        if missing:
            shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            why_not = self._error or f"nothing moved for {CLOSE_S:.0f} s"
            self._note(
                f"Not copied to {self._copier.store.url}: {shown} ({why_not}). They are in the run folder, and "
                "resuming the run copies them; sync.json lists them."
            )
        return missing

    def _record(self, copier: Copier) -> list[str]:
        try:
            return copier.record(self._error or None)
        except Exception as error:  # the sweep reports a full disk itself
            log.warning("sync.json cannot be written: %s", error)
            return copier.pending()

    # --- thread ---

    def _loop(self, copier: Copier) -> None:
        pause = 0.0
        while not self._end.wait(pause) and not self._gone:
            pause = EVERY_S if self._copy(copier) else min(RETRY_S * 2 ** (self._failures - 1), RETRY_MOST_S)
        until, pause = time.monotonic() + CLOSE_S, 1.0
        while not self._gone and not self._copy(copier, last=True) and not self._refused:
            if time.monotonic() + pause >= until:
                break
            time.sleep(pause)
            pause *= 2

    def _copy(self, copier: Copier, *, last: bool = False) -> bool:
        try:
            copier.copy(last=last)
        except TakenOver as error:
            self._gone, self._error = True, str(error)
            self._note(f"The run is no longer copied: {error}. It continues here.")
        except Exception as error:  # whatever a store's package raises must not affect the sweep
            self._failed(copier, error)
            return False
        else:
            if self._error:
                self._note(f"Copies to {copier.store.url} work again.")
            self._failures, self._error, self._refused = 0, "", False
        return True

    def _failed(self, copier: Copier, error: Exception) -> None:
        copier.store.forget()
        self._failures += 1
        self._refused = is_refusal(error)
        reason = why(error)
        if reason != self._error:
            remedy = "Renew the credentials; " if self._refused else ""
            self._note(
                f"The run cannot be copied to {copier.store.url} ({reason}). {remedy}it continues, and copying is "
                "tried again."
            )
        self._error = reason

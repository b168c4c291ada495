"""The end of a run, as its folder records it."""

from __future__ import annotations

import hashlib
import json
from types import TracebackType

from tune.config.sections import BASE
from tune.distributed.sweep.stop import Stop
from tune.storage.run_folder import RunFolder
from tune.storage.states import RunStatus


class Finished:
    """The end of a finished run that is resumed, which stays its end if nothing is left to do.

    Of trials and scores it keeps a checksum alone: it lives as long as the run, which may have a million scores.
    """

    def __init__(self, run_folder: RunFolder) -> None:
        run = run_folder.run()
        self._time = run.get("finished") if run.get("status") == RunStatus.DONE else None
        self._work = self._done(run_folder) if self._time else None

    def unless_changed(self, run_folder: RunFolder) -> str | None:
        """Return the time of the earlier end; None if there was none, or trials or scores have come since."""
        return self._time if self._time and self._work == self._done(run_folder) else None

    @staticmethod
    def _done(run_folder: RunFolder) -> str:
        """Return the checksum of all trials and scores, made trial by trial. Scores that came twice count once."""
        trials = [(record.trial, record.status, record.finished) for record in run_folder.trials(config=False)]
        found = hashlib.sha256(json.dumps(trials).encode())
        for trial in (BASE, *(name for name, *_ in trials)):
            found.update(json.dumps(run_folder.trial_scores(trial)).encode())
        return found.hexdigest()


def record_end(
    run_folder: RunFolder,
    stop: Stop | None,
    before: Finished,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
) -> None:
    """Record how the run ended, whatever ended it."""
    if kind is None:
        run_folder.set_status(RunStatus.DONE, finished=before.unless_changed(run_folder))
        return
    stopped = issubclass(kind, (KeyboardInterrupt, SystemExit)) or (stop is not None and stop.signal is not None)
    run_folder.set_status(RunStatus.INTERRUPTED if stopped else RunStatus.FAILED)

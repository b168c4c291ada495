"""Times at which lanes and evaluation actors were held and worked, derived by sampling. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: What works for a run.
LANE, EVALUATOR = "lane", "evaluator"


class TimeWatch:
    """Watches workers of one role, and yields a row for each time that has ended: held, or worked for a trial.

    Rows have `role`, `name`, `begin` and `end` (seconds since the epoch), and `study` and `trial`, both None for a time
    held.
    """

    def __init__(self, role: str) -> None:
        self._role = role
        self._held: dict[str, float] = {}
        self._working: dict[str, tuple[str, str, float]] = {}

    def see(self, workers: Mapping[str, tuple[str, str] | None], now: float) -> list[dict[str, Any]]:
        """Look at the workers that are there, by name, each with the study and trial that it works for, if any.

        Returns:
            The rows of what has ended since the last look.
        """
        ended = []
        for name, (study, trial, begin) in list(self._working.items()):
            if workers.get(name) != (study, trial):
                del self._working[name]
                ended.append(self._row(name, study, trial, begin, now))
        for name in self._held.keys() - workers.keys():
            ended.append(self._row(name, None, None, self._held.pop(name), now))
        for name, work in workers.items():
            self._held.setdefault(name, now)
            if work is not None:
                self._working.setdefault(name, (*work, now))
        return ended

    def end(self, now: float) -> list[dict[str, Any]]:
        """Return the rows of all that is still held."""
        return self.see({}, now)

    def _row(self, name: str, study: str | None, trial: str | None, begin: float, end: float) -> dict[str, Any]:
        times = {"begin": round(begin, 2), "end": round(end, 2)}
        return {"role": self._role, "name": name, "study": study, "trial": trial, **times}

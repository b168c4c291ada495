"""An object to keep in another process; a spawned process finds a helper, but no test module, by its name."""

from __future__ import annotations


class Holder:
    def fill(self, size: int) -> int:
        filled = b"x" * size
        return len(filled)

    def fail(self) -> None:
        raise ValueError("it does not fit")

"""Compares two run folders: trial statuses, losses, adapters (sha256) and scores.

    python tests/chaos/compare.py RUN_A RUN_B

Prints one line per kind of content. Exit code 0 where both folders are whole and equal to the bit, else 1.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from chaos.checks import Found, differing, read


def compare(first: Path, second: Path) -> tuple[bool, list[str]]:
    """Return whether two run folders are whole and equal, and what was found, line by line."""
    violations: list[str] = []
    one, two = (read(folder, lambda text, of=folder: violations.append(f"{of}: {text}")) for folder in (first, second))
    lines, equal = [], not violations
    for content in (field.name for field in fields(Found)):
        total, keys = len(getattr(one, content)), differing(one, two, content)
        equal = equal and not keys
        shown = f"different: {', '.join(keys[:3])} ({len(keys)} in all)" if keys else "equal"
        lines.append(f"{content:<10}{total:>6}  {shown}")
    if not one.statuses:
        equal = False
        violations.append(f"{first}: no trials")
    return equal, [*lines, *violations]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs=2, type=Path, metavar="RUN")
    equal, lines = compare(*parser.parse_args().runs)
    print(*lines, "equal" if equal else "different", sep="\n")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())

"""Scripts for `sbatch`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Self

from cluster.core.launch_file import LaunchFile, Source, as_count, shell_words
from cluster.errors import BadLaunchFile

#: Short options of sbatch.
SHORT_OPTIONS = {
    "A": "account",
    "a": "array",
    "b": "begin",
    "C": "constraint",
    "c": "cpus-per-task",
    "D": "chdir",
    "d": "dependency",
    "e": "error",
    "F": "nodefile",
    "G": "gpus",
    "H": "hold",
    "i": "input",
    "J": "job-name",
    "k": "no-kill",
    "L": "licenses",
    "M": "clusters",
    "m": "distribution",
    "N": "nodes",
    "n": "ntasks",
    "o": "output",
    "p": "partition",
    "q": "qos",
    "s": "oversubscribe",
    "t": "time",
    "W": "wait",
    "w": "nodelist",
    "x": "exclude",
}


class SlurmFile(LaunchFile):
    """An sbatch script."""

    @classmethod
    def read(cls, source: Source) -> Self | None:
        if re.search(r"^#SBATCH\b", source.text, re.MULTILINE):
            return cls(source.path, source.text)
        if source.text.startswith("#!"):
            raise BadLaunchFile(f"{source.path} is a script without #SBATCH lines, so sbatch cannot allocate nodes.")
        return None

    @property
    def provider(self) -> str:
        return "slurm"

    @property
    def name(self) -> str:
        return self.directives.get("job-name") or self.path.stem

    @property
    def workers(self) -> tuple[int, int]:
        """Nodes besides the first, which is the head and works, too."""
        least, _, most = self.directives.get("nodes", "1").partition("-")
        return as_count(least, 1) - 1, as_count(most or least, 1) - 1

    @property
    def shell(self) -> str:
        return "\n".join(line for line in self.text.splitlines() if not line.lstrip().startswith("#"))

    @property
    def directives(self) -> dict[str, str]:
        """Long options of the #SBATCH lines; a switch maps to an empty string."""
        return {key: value for _, key, value in sbatch_lines(self.text)}

    def assigned(self) -> Iterator[tuple[str, str]]:
        yield from super().assigned()
        for word in self.directives.get("export", "").split(","):
            name, equals, value = word.partition("=")
            if equals:
                yield name, value


def sbatch_lines(text: str) -> list[tuple[int, str, str]]:
    """Line number, long option and value per option; sbatch stops reading at the first command, and so does this."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            break
        words = shell_words(line.removeprefix("#SBATCH")) if re.match(r"#SBATCH\s", line) else []
        while words:
            word = words.pop(0)
            if word.startswith("--"):
                key, _, value = word[2:].partition("=")
            else:
                key, value = SHORT_OPTIONS.get(word[1:2], word), word[2:]
            if words and not value and not words[0].startswith("-"):
                value = words.pop(0)
            found.append((number, key, value))
    return found

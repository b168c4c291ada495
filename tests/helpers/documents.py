"""The documents of the repository: their code blocks, the commands in them, and how outputs are compared."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Topics of `macdrop docs`, by the package that ships them.
TOPICS = {
    "tune": "benchmarks configuration evidence failures gpus integrations judging method optimizers reports run-folder",
    "cluster": "aws gcp-azure kubernetes on-premise overview skypilot slurm",
}
NAMES = ["README.md", "tests/README.md"]
NAMES += [f"{package}/docs/{stem}.md" for package, stems in TOPICS.items() for stem in stems.split()]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}


@dataclass(frozen=True)
class Block:
    """A fenced code block of a document."""

    document: str
    language: str
    content: str


def blocks(*languages: str, of: str | None = None) -> list[Block]:
    found = [
        Block(name, language, content)
        for name, text in TEXTS.items()
        for language, content in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]
    return [block for block in found if block.language in languages and of in (None, block.document)]


@dataclass(frozen=True)
class Command:
    """A shell command of a document."""

    document: str
    text: str

    def __str__(self) -> str:
        return f"{self.document}: {self.text}"


def commands() -> list[Command]:
    """All lines of bash blocks, and those behind a prompt in console blocks; comments are cut off."""
    lines = [(block, line) for block in blocks("bash") for line in block.content.replace("\\\n", " ").splitlines()]
    lines += [
        (block, line[2:]) for block in blocks("console") for line in block.content.splitlines() if line.startswith("$ ")
    ]
    parts = [
        Command(block.document, part.strip())
        for block, line in lines
        for part in re.sub(r"(?:^|\s+)#.*", "", line).split("&&")
    ]
    return list(dict.fromkeys(part for part in parts if part.text))


def own_commands() -> list[Command]:
    return [command for command in commands() if command.text.startswith("macdrop ")]


def fits(printed: list[str], shown: list[str], within: float = 0.02) -> bool:
    """Whether the words are the same, numbers within a share of each other; `...` stands for any words, also none."""
    first, *parts = [part.split() for part in re.split(r"(?: \.\.\.)+ ", f" {' '.join(shown)} ")]

    def at(place: int, part: list[str]) -> bool:
        here = printed[place : place + len(part)]
        return len(here) == len(part) and all(same(*pair, within) for pair in zip(here, part, strict=True))

    if not parts:
        return len(printed) == len(first) and at(0, first)
    place = len(first)
    for part in parts[:-1]:
        found = next((i for i in range(place, len(printed)) if at(i, part)), None)
        if found is None:
            return False
        place = found + len(part)
    end = len(printed) - len(parts[-1])
    return at(0, first) and place <= end and at(end, parts[-1])


def same(ours: str, theirs: str, within: float) -> bool:
    if ours == theirs or set(ours) == set(theirs) == {"─"}:
        return True
    try:
        return number(ours) == pytest.approx(number(theirs), rel=within)
    except ValueError:
        return False


def number(word: str) -> float:
    """3.7, (644.8), (x23.1)."""
    return float(re.sub(r"[()x,;:]", "", word))

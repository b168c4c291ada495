"""The page of evidence quotes the reports of its archives word for word, and the archives are small."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.documents import ROOT, TEXTS

DOCS = ROOT / "tune" / "docs"
PAGE = TEXTS["tune/docs/evidence.md"]
ARCHIVES = sorted(DOCS.glob("*.tar.xz"))
MOST = 2 * 2**20


def quoted(archive: Path) -> list[str]:
    """Table rows and quotations of the section that names an archive."""
    (section,) = (part for part in re.split(r"^## ", PAGE, flags=re.MULTILINE) if f"]({archive.name})" in part)
    return [line.removeprefix("> ") for line in section.splitlines() if line.startswith(("| ", "> "))]


def test_there_are_archives_and_they_are_small():
    assert ARCHIVES and sum(archive.stat().st_size for archive in ARCHIVES) <= MOST


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda archive: archive.stem)
def test_the_page_says_what_the_report_of_an_archive_says(archive, shell):
    ended = shell("report", str(archive), "--format", "markdown")
    assert ended.code == 0 and "DAMAGED" not in ended.out and "MISSING" not in ended.out, ended.err
    told, lines = " ".join(ended.out.split()), quoted(archive)
    assert len(lines) > 10 and not [line for line in lines if " ".join(line.split()) not in told]


def test_the_readme_s_figures_are_those_of_a_report(shell):
    told = " ".join(shell("report", *map(str, ARCHIVES), "--format", "markdown").out.split())
    figures = re.findall(r"[-+][\d.]+\s+points\s+\[[^\]]+\]", TEXTS["README.md"].partition("## Install")[0])
    assert len(figures) >= 2 and all(" ".join(figure.split()) in told for figure in figures)

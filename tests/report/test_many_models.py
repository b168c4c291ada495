"""A report of many models: an overview with a page for each, drawn once, in several processes, and remembered."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from helpers.run_folders import make_run

from tune.report import files, spread
from tune.report.figure_cache import key_of, recall, remember, tidy_up
from tune.report.html.page import write_page
from tune.report.html.prepare import prepare
from tune.report.report import make_report
from tune.storage.places import cache_dir
from tune.storage.run_folder import RunFolder

MODELS = [f"org/model-{number}" for number in range(6)]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Six models, of each plain and MacDrop on one seed of the final stage, after a search of one setting."""
    folder = tmp_path_factory.mktemp("many") / "run"
    kept = {"arms": ("plain", "macdrop"), "attacks": ("none", "zeroing@3"), "items": 6}
    return make_run(folder, model=MODELS, seeds=(1,), tried=1, **kept).run_dir


@pytest.fixture
def here(monkeypatch):
    """Everything in this process, in which it can be counted."""
    monkeypatch.setattr(spread, "_processes", lambda tasks: 1)


def addresses(page: Path) -> list[str]:
    """Addresses of a page's links."""
    found: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            found.extend(value for name, value in attributes if name in ("href", "src"))

    Reader().feed(page.read_text(encoding="utf-8"))
    return [unquote(address) for address in found if "//" not in address]


def ids(page: Path) -> set[str]:
    return set(re.findall(r'\sid="([^"]+)"', page.read_text(encoding="utf-8")))


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_pages_are_there_and_every_link_leads_somewhere_in_a_copy_too(run, tmp_path, here):
    with files.read([run]) as made:
        written = files.write(made, tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    shutil.rmtree(tmp_path / "first")
    home = tmp_path / "copy" / "report.html"
    pages = [tmp_path / "copy" / "pages" / f"model-{number}.html" for number in range(6)]
    assert [path.name for path in written] == ["report.md", "report.csv", "report.tex", "report.html"]
    assert sorted((tmp_path / "copy" / "pages").iterdir()) == pages
    linked = {(home.parent / address).resolve() for address in addresses(home) if not address.startswith("#")}
    assert linked == {page.resolve() for page in pages}
    for page in (home, *pages):
        for address in addresses(page):
            file, _, part = address.partition("#")
            target = (page.parent / file).resolve() if file else page.resolve()
            assert target.is_file() and target.is_relative_to((tmp_path / "copy").resolve())
            assert not part or part in ids(target)
    assert all("../report.html" in addresses(page) for page in pages)
    assert len({*re.findall(r"\sid=\"[^\"]+\"", home.read_text())}) == home.read_text().count(' id="')


def test_the_overview_has_each_model_s_place_sentence_and_figure(run, tmp_path, here):
    report = make_report(run)
    text = write_page([report], tmp_path / "report.html")[0].read_text(encoding="utf-8")
    for model in report.models:
        (sentence,) = [one.sentence for one in report.verdicts[model.name] if one.arm == "macdrop"]
        assert text.count(sentence) == 1
    assert text.count("<svg") == len(MODELS) and "Leaderboard" in text and "<script" not in text
    page = (tmp_path / "pages" / "model-3.html").read_text(encoding="utf-8")
    assert "org/model-3" in page and "org/model-4" not in page


def test_each_figure_is_drawn_once_and_then_remembered(run, tmp_path, here, monkeypatch):
    from tune.report.html import drawing

    shutil.rmtree(cache_dir() / "figures", ignore_errors=True)
    drawn: list[str] = []
    for module in ("attacks", "intervals", "overview", "scan", "surface", "training"):
        place = f"tune.report.html.{module}.draw"
        monkeypatch.setattr(place, lambda name, *more, **rest: drawn.append(name) or drawing.draw(name, *more, **rest))
    with files.read([run]) as made:
        files.write(made, tmp_path / "first")
    assert len(drawn) == len(set(drawn)) > 6 * len(MODELS)
    drawn.clear()
    with files.read([run]) as made:
        files.write(made, tmp_path / "second")
    assert {name.rpartition("-")[2] for name in drawn} == {"small"}
    assert content(tmp_path / "first") == content(tmp_path / "second")


def test_processes_write_what_one_process_writes(run, tmp_path, monkeypatch):
    for number in (1, 2):
        monkeypatch.setattr(spread, "_processes", lambda tasks, number=number: number)
        with files.read([run]) as made:
            files.write(made, tmp_path / str(number))
    assert content(tmp_path / "1") == content(tmp_path / "2")


def test_a_changed_number_is_a_changed_figure(run, tmp_path, here):
    shutil.copytree(run, tmp_path / "run")
    before = prepare([make_report(tmp_path / "run")])[0][0]
    report = make_report(tmp_path / "run")
    shown = {line.trial for group in report.models[0].groups for line in group.lines}
    logs = sorted((tmp_path / "run" / "trials").glob("*/metrics.jsonl"))
    log = next(file for file in logs if file.parent.name in shown)
    log.write_text(log.read_text().replace('"loss": ', '"loss": 1', 1))
    after = prepare([make_report(tmp_path / "run")])[0][0]
    changed = {one.name for one, other in zip(before.figures, after.figures, strict=True) if one.svg != other.svg}
    assert changed == {"training-loss"}


def test_few_models_share_one_page(run, tmp_path):
    few = make_run(tmp_path / "few", model=MODELS[:5], seeds=(), tried=1, items=4, attacks=("none",))
    written = write_page([make_report(few.run_dir)], tmp_path / "report.html")
    assert not (tmp_path / "pages").exists() and written[0].read_text().count('class="model-part"') == 5


def test_models_of_several_runs_have_pages_of_their_own(tmp_path, here):
    for name in "ab":
        make_run(tmp_path / name, model=MODELS[:3], seeds=(), tried=1, items=4, attacks=("none",))
    reports = [make_report(tmp_path / name) for name in "ab"]
    write_page(reports, tmp_path / "both" / "report.html")
    names = {page.name for page in (tmp_path / "both" / "pages").iterdir()}
    assert names == {f"r{run}-model-{number}.html" for run in (1, 2) for number in range(3)}


def test_a_damaged_file_is_reported_from_another_process(run, tmp_path, monkeypatch):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "models" / "model-2" / "answers" / "generation-answers-none.jsonl").write_text("{\n")
    monkeypatch.setattr(spread, "_processes", lambda tasks: 2)
    report = make_report(tmp_path / "run")
    write_page([report], tmp_path / "report.html")
    assert any("generation-answers-none.jsonl" in line for line in report.about)


# --- the cache ---


def test_figures_are_remembered_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setenv("MACDROP_CACHE", str(tmp_path))
    drawn = [{"svg": "<svg/>", "rows": [[1, 0.1 + 0.2], [None, float("inf")]]}]
    key = key_of("numbers", 1.0)
    assert recall(key) is None and remember(key, drawn) == drawn == recall(key)
    assert len({key, key_of("numbers", 1), key_of("numbers", 2.0), key_of("numbers 1.0")}) == 4


def test_a_damaged_entry_is_drawn_again_and_a_cache_that_cannot_be_written_does_without(tmp_path, monkeypatch):
    monkeypatch.setenv("MACDROP_CACHE", str(tmp_path))
    key, drawn = key_of(1), [{"svg": "<svg/>"}]
    remember(key, drawn)
    (file,) = tmp_path.rglob("*.json")
    for text in ("", "{", "[1"):
        file.write_text(text)
        assert recall(key) is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MACDROP_CACHE", str(tmp_path / "file"))
    assert remember(key, drawn) == drawn and recall(key) is None


def test_the_cache_keeps_what_was_used_last(tmp_path, monkeypatch):
    import os

    monkeypatch.setenv("MACDROP_CACHE", str(tmp_path))
    for number in range(4):
        remember(key_of(number), [{"svg": "<svg/>"}])
    entries = {number: next(tmp_path.rglob(f"{key_of(number)}.json")) for number in range(4)}
    for number, file in entries.items():
        os.utime(file, (number, number))
    recall(key_of(0))
    tidy_up(2 * entries[0].stat().st_size)
    assert {number for number, file in entries.items() if file.exists()} == {0, 3}


def test_scores_of_one_model_travel_without_the_file(run):
    import pickle

    known = RunFolder.open(run, lenient=True)
    sent = pickle.loads(pickle.dumps(known.with_scores_of("org/model-2")))
    assert sent.model_scores("model-2") == known.model_scores("org/model-2") != []
    assert sent.model_scores("model-3") == [] and sent.has_scores()
    trial = sent.score_rows()[-1]["trial"]
    assert sent.trial_scores(trial) == [row for row in known.score_rows() if row["trial"] == trial]

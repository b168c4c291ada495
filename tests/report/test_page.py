"""tune.report.html: one HTML page that needs nothing but itself, its figures, and their numbers."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers.run_folders import make_run

from tune.analysis.comparison import unknown
from tune.analysis.results import collect
from tune.evaluation.score_names import Column
from tune.report.html.drawing import draw, signed
from tune.report.html.figure import Figure
from tune.report.html.figures import FAMILIES, figures
from tune.report.html.generations import generations
from tune.report.html.intervals import Row, forest_plot
from tune.report.html.page import write_page
from tune.report.html.palette import LIGHT
from tune.report.html.pareto import pareto_front
from tune.report.html.select import best_groups, cells
from tune.report.report import Report, make_report
from tune.storage.run_folder import RunFolder

HOSTILE = "<script>alert('$x$')</script>&amp;\"onload=\"x"
PAPER = "https://arxiv.org/abs/2410.01866"
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Reader(HTMLParser):
    """Tags in order, ids, addresses; raises where an element is closed that is not the one open."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.ids, self.addresses, self.words = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        self.addresses += [value for name, value in attributes if name in ("href", "src", "xlink:href", "data")]
        assert not [name for name, _ in attributes if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Report:
    """A run with cells, a placebo, judgements, and hostile text wherever a user or a model may write it."""
    run_folder = make_run(
        tmp_path_factory.mktemp("finished") / "run",
        judge=True,
        tried=5,
        attacks=("none", "zeroing@3", "retaining@3"),
        items=30,
    )
    row = next(row for row in run_folder.score_rows() if row["task"] == "qa" and row["trial"] != "base")
    run_folder.add_scores([{**row, "task": HOSTILE}])
    for file in (run_folder.run_dir / "trials").glob("*/answers/generation-*-none.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows:
            row["answers"] = [HOSTILE + text for text in row["answers"]]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for file in (run_folder.run_dir / "trials").glob("*/judgements/*.jsonl"):
        file.write_text(file.read_text().replace("Clear enough.", json.dumps(HOSTILE)[1:-1]))
    return make_report(run_folder.run_dir)


@pytest.fixture(scope="module")
def made(finished) -> tuple[list[Path], dict[str, Figure]]:
    """The paths that `write_page` returns, and the figures that it drew, by name."""
    drawn: dict[str, Figure] = {}

    def figures_kept(*arguments):
        found = figures(*arguments)
        drawn.update({figure.name: figure for figure in found})
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tune.report.html.prepare.figures", figures_kept)
        return write_page([finished], finished.run_dir / "report.html"), drawn


@pytest.fixture(scope="module")
def written(made) -> list[Path]:
    return made[0]


@pytest.fixture(scope="module")
def page(written) -> str:
    return written[0].read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def drawn(made) -> dict[str, Figure]:
    return made[1]


def test_the_page_is_well_formed_and_its_ids_are_unique(page):
    reader = Reader(page)
    assert len(set(reader.ids)) == len(reader.ids)
    inside = {address[1:] for address in reader.addresses if address.startswith("#")}
    inside |= set(re.findall(r"url\(#([^)]+)\)", page))
    assert inside <= set(reader.ids)


def test_the_page_is_self_contained(page, written):
    reader = Reader(page)
    assert not {"script", "link", "iframe", "img", "object", "embed", "base"} & set(reader.tags)
    outside = [address for address in reader.addresses if not address.startswith("#")]
    assert [address for address in outside if "//" in address] == [PAPER]
    assert "@import" not in page and "url(http" not in page
    files = {(written[0].parent / address).resolve() for address in outside if address != PAPER}
    assert files == {path.resolve() for path in written[1:]}


def test_text_of_models_and_users_is_escaped(page):
    assert "<script" not in page and 'onload="' not in page
    assert "&lt;script&gt;" in page
    assert HOSTILE in "".join(Reader(page).words)  # and it is shown as it is


def test_the_verdict_stands_before_everything_else(page, finished):
    verdict = next(one for one in finished.verdicts[finished.models[0].name] if one.arm == "macdrop")
    text = page[page.index("<main>") :]
    assert text.index('class="sentence"') < text.index('class="part"')
    assert "PLANTED" in text[: text.index('class="sentence"')]
    assert verdict.sentence in " ".join(Reader(page).words)


def test_every_figure_has_its_numbers_in_a_csv(drawn, finished, written):
    model = finished.models[0]
    assert {path.name for path in written[1:]} == {f"{model.name}-{name}.csv" for name, f in drawn.items() if f.svg}
    for name, figure in drawn.items():
        assert all(len(row) == len(figure.head) for row in figure.rows)
        if figure.svg:
            with open(finished.run_dir / "figures" / f"{model.name}-{name}.csv", encoding="utf-8") as file:
                read = list(csv.reader(file))
            assert read == [figure.head, *([("" if v is None else str(v)) for v in row] for row in figure.rows)]


def test_a_finished_run_has_every_figure(drawn):
    missing = {figure.caption for figure in drawn.values() if not figure.svg}
    assert not missing
    parts = {figure.part for figure in drawn.values()}
    assert parts == {"verdict", "weights", "comparisons", "search", "training", "attacks"}
    assert "could not be drawn" not in " ".join(figure.caption for figure in drawn.values()).lower()


def test_figures_show_the_recorded_numbers(drawn, finished):
    model, run_folder = finished.models[0], finished.run_folder
    groups = {group.label: group for group in best_groups(model, cells(model)[0])}
    column = next(c for c in model.shown if c.task == "qa" and c.attack == "zeroing@3")
    for row in drawn["attack-zero-shot-qa-acc"].rows:
        label, _, kind, k, _, mean, low, high, seeds, _ = row
        if kind == "zeroing":
            values = [100 * line.scores[column].value for line in groups[label].lines]
            assert (k, seeds) == (3, len(values))
            assert (mean, low, high) == pytest.approx((sum(values) / len(values), min(values), max(values)))
    losses = drawn["training-loss"]
    for line in groups["MacDrop k 3 p0 0.87 exp 0.05"].lines:
        logged = [row["loss"] for row in run_folder.trial(line.trial).metrics() if "loss" in row]
        assert logged == [row[-1] for row in losses.rows if row[2] == line.trial]
    layers = [[row["layer"], row["hidden_max"]] for row in model.weights["layers"]]
    assert layers == [row[:2] for row in drawn["scan-layers"].rows]
    assert len(drawn["search-eval-loss"].rows) == 5 and sum(row[5] for row in drawn["search-eval-loss"].rows) == 1


def test_forest_plots_have_the_intervals_of_the_verdict(drawn, finished):
    verdict = next(one for one in finished.verdicts[finished.models[0].name] if one.arm == "macdrop")
    first = drawn["verdict-1"].rows[0]
    one = verdict.headline
    assert first[7:10] == pytest.approx([100 * one.delta, 100 * one.low, 100 * one.high]) and first[6] == "points"
    arms = {row[1] for row in drawn["comparisons-none"].rows}
    assert arms == {"macdrop", "random_rows"}


def test_dropped_entries_are_a_share_of_the_masked_ones(drawn):
    rows = [row for row in drawn["training-dropped"].rows if row[5] > 0.05]
    assert rows and all(row[6] == pytest.approx(100 * row[5], abs=5) for row in rows)


def test_the_same_run_gives_the_same_bytes(tmp_path):
    make_run(tmp_path / "run", seeds=(), tried=2, items=6, attacks=("none",))
    first, second = (write_page([make_report(tmp_path / "run")], tmp_path / f"{n}.html")[0].read_bytes() for n in "ab")
    assert first == second


def test_matplotlib_keeps_its_settings():
    import matplotlib

    before = dict(matplotlib.rcParams)
    svg = draw("x", 100, lambda canvas: canvas.subplots().plot([1, 2], [1, 2]))
    assert dict(matplotlib.rcParams) == before
    assert svg.startswith('<svg class="plot"') and "DejaVu" not in svg and "xmlns" not in svg


def test_every_colour_of_a_figure_follows_the_scheme(drawn):
    for figure in drawn.values():
        assert not re.findall(r"#[0-9a-fA-F]{6}\b", figure.svg)
        names = set(re.findall(r"var\(--([\w-]+)\)", figure.svg))
        assert names and names <= set(LIGHT)


def test_generations_stand_side_by_side_with_their_judgements(finished):
    found = generations(finished.run_folder, finished.models[0])
    assert set(found) == {"answers", "spec_bench"}
    question = next(question for question in found["spec_bench"] if len(question.turns) == 2)
    assert [speaker.label for speaker in question.speakers] == ["base", "plain LoRA", "MacDrop k 3 p0 0.87 exp 0.05"]
    assert len({speaker.seed for speaker in question.speakers[1:]}) == 1
    assert all(reply.judged and reply.feedback for speaker in question.speakers for reply in speaker.replies)
    assert {question.category for question in found["spec_bench"][:2]} == {"math", "writing"}


def test_half_of_a_run_gives_a_page_that_says_what_is_missing(tmp_path):
    run_folder = make_run(
        tmp_path / "run",
        seeds=(1, 2),
        lost=[("macdrop", 1), ("macdrop", 2)],
        tried=2,
        items=6,
        attacks=("none",),
        status="running",
    )
    text = write_page([make_report(run_folder.run_dir)], tmp_path / "page.html")[0].read_text()
    Reader(text)
    assert "No verdict" in text and "No score under attack" in text


def test_a_run_without_trials_gives_a_page(tmp_path):
    run_folder = RunFolder.create(
        tmp_path / "run", {"model_name_or_path": "org/model", "sweep": {}}, command="macdrop sweep"
    )
    text = write_page([make_report(run_folder.run_dir)], tmp_path / "page.html")[0].read_text()
    Reader(text)
    assert "No verdict" in text and "not been scanned yet" in text and "org/model" in text


def test_damaged_files_affect_only_their_figures(tmp_path):
    run = make_run(tmp_path / "run", seeds=(), tried=2, items=6, attacks=("none",)).run_dir
    for file in run.glob("trials/*/metrics.jsonl"):
        file.write_text('{"step": 5, "loss": "changed by hand"}\n')
    (run / "models" / "planted-llama" / "massive_weights.json").write_text('{"layer"')
    report = make_report(run)
    found = figures(report.run_folder, report.models[0], [])
    assert {figure.part for figure in found if figure.svg} == {"search"}
    captions = {figure.part: figure.caption for figure in found if not figure.svg}
    assert captions["training"].startswith("Could not be drawn (") and "not been scanned" in captions["weights"]


def test_two_runs_on_one_page_do_not_share_ids(tmp_path):
    for name in "ab":
        make_run(tmp_path / name, seeds=(), tried=1, items=4, attacks=("none",))
    reports = [make_report(tmp_path / name) for name in "ab"]
    written = write_page(reports, tmp_path / "both" / "report.html")
    reader = Reader(written[0].read_text())
    assert len(set(reader.ids)) == len(reader.ids)
    assert {path.parent for path in written[1:]} == {tmp_path / "both" / "figures"}
    assert {path.name[:3] for path in written[1:]} == {"r1-", "r2-"}
    assert not (tmp_path / "a" / "figures").exists()
    assert all((tmp_path / "both" / address).is_file() for address in reader.addresses if address.endswith(".csv"))


def test_unknown_numbers_are_not_drawn(finished):
    column = Column("zero_shot", "qa", "acc", higher_is_better=True)
    lost = unknown(column=column, arm="macdrop", label="MacDrop", against="plain", seeds=(1,), words="not finite")
    figure = forest_plot(finished.models[0], "x", "verdict", "t", "c", [Row(lost, "unsure", "o", heading="qa")])
    assert ">?<" in figure.svg and len(figure.rows) == 1


def test_signed_differences_have_the_digits_that_can_be_seen():
    assert [signed(1.234, 30), signed(-0.01234, 0.05), signed(1e-15, 20)] == ["+1.2", "−0.0123", "±0.0"]


def test_the_front_is_not_dominated(finished):
    model = collect(finished.run_folder)[0]
    model.finalists.clear()
    model.objectives = [("eval_loss", "minimize"), ("zero_shot/qa/acc", "maximize")]
    lines = [line for line in model.searched if line.status == "done" and line.arm == "macdrop"]
    front = pareto_front(model, lines)
    found = next(FAMILIES["pareto"][1](finished.run_folder, model, []))
    marked = {row[0]: row[5:] for row in found.rows if row[4]}
    assert set(marked) == front and front
    for trial, (loss, acc) in marked.items():
        others = [row[5:] for row in found.rows if row[2] == "macdrop" and row[3] == "done" and row[0] != trial]
        assert not any(o[0] <= loss and o[1] >= acc and o != [loss, acc] for o in others)

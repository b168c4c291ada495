"""results, report.report and report.tables: what is said of a run, in every format, and that nothing is lost."""

from __future__ import annotations

import io
import json
import math
import re
import statistics

import pandas
import pytest
from helpers.run_folders import make_run
from rich.console import Console

from macdrop.errors import ConfigError
from tune.analysis.results import collect, value_of
from tune.data.lost_rows import describe_cutoff
from tune.evaluation.score_names import Column
from tune.report.csv_rows import text as csv_text
from tune.report.escaping import latex_text
from tune.report.report import make_report
from tune.report.sections.builders import BUILDERS, UNREADABLE
from tune.report.sections.findings import PLANTED
from tune.report.tables import NUMBER, Part, Table
from tune.storage.run_folder import RunFolder
from tune.storage.states import TaskState

MODEL = "zoo:planted-llama"
CELLS = [{"use_dora": False}, {"use_dora": True}]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunFolder:
    """One model, LoRA and DoRA, three seeds, a placebo, judgements; of 6 searched settings a cell one diverged."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    return make_run(folder, model=[MODEL], cells=CELLS, judge=True, tried=6)


@pytest.fixture(scope="module")
def report(run):
    return make_report(run.run_dir)


@pytest.fixture(scope="module")
def parts(report) -> dict[str, Part]:
    return report.parts(report.models[0])


def row(table: Table, label: str) -> dict[str, str]:
    (found,) = [cells for cells in table.rows if cells[0] == label]
    return dict(zip(table.head, found, strict=True))


def terminal(report, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    report.terminal(console)
    return console.file.getvalue()


# --- what is collected ---


def test_lines_and_groups(report):
    model = report.models[0]
    arms = ["base", "plain", "plain", "macdrop", "macdrop", "random_rows", "random_rows"]
    assert [group.arm for group in model.groups] == arms
    assert [group.label for group in model.groups[1:3]] == ["plain LoRA", "plain DoRA"]
    assert all(len(group.lines) == 3 for group in model.groups[1:]) and model.seeds == 3 and model.tried == 12
    assert {line.stage for line in model.searched} == {"search"}
    assert model.trials("macdrop", stage="search")[0].label == "M1"


def test_a_spread_equals_a_slow_reference(report):
    group = report.models[0].groups[1]
    column = Column("zero_shot", "qa", "acc")
    values = [line.scores[column].value for line in group.lines]
    errors = [line.scores[column].stderr for line in group.lines]
    found = group.spread(column)
    assert found.value == pytest.approx(sum(values) / 3) and found.sd == pytest.approx(statistics.stdev(values))
    assert found.stderr == pytest.approx(math.sqrt(sum(error**2 for error in errors) / 3)) and found.seeds == 3


def test_validation_and_test_scores_stay_apart(report):
    model = report.models[0]
    searched = model.trials("macdrop", stage="search")[0]
    assert {column.split for column in searched.scores if column.benchmark != "validation"} == {"validation"}
    assert all(column.split == "test" for column in model.shown)
    assert (
        value_of(searched, "zero_shot/qa/acc")
        == searched.scores[Column("zero_shot", "qa", "acc", split="validation")].value
    )


def test_a_mean_over_tasks_takes_the_metric_that_each_entry_names(tmp_path):
    entries = {"arc": {"metric": "acc_norm"}, "boolq": {"metric": "acc"}, "other": {}}
    run_folder = RunFolder.create(tmp_path / "run", {"model_name_or_path": "m", "eval": {"zero_shot": entries}})
    for task, values in {"arc": (0.1, 0.5), "boolq": (0.7, 0.2), "other": (0.3, 0.4)}.items():
        for metric, value in zip(("acc", "acc_norm"), values, strict=True):
            run_folder.add_scores([score("base", "base", "zero_shot", task, metric, value)])
    (line,) = collect(run_folder)[0].lines
    (mean,) = [column for column in line.scores if column.is_mean]
    assert line.scores[mean].value == pytest.approx((0.5 + 0.7 + 0.3) / 3)
    assert line.scores[mean].stderr == pytest.approx(math.sqrt(3 * 0.02**2) / 3)


def score(trial: str, arm: str, benchmark: str, task: str, metric: str, value: float, **more) -> dict:
    about = dict(model="m", trial=trial, arm=arm, attack="none", attack_on=None, stderr=0.02, n=100)
    return {**about, "benchmark": benchmark, "task": task, "metric": metric, "value": value, **more}


# --- what the parts say ---


def test_every_part_is_there_in_order_and_whole(parts):
    assert list(parts) == list(BUILDERS)
    assert not any(UNREADABLE in line for part in parts.values() for line in part.lines)
    assert [key for key, part in parts.items() if not part] == [
        "pareto",  # one objective has no front
        "moments",
        "timeline",  # simulated, so that no lane was ever held
    ]


def test_the_verdict_comes_first(report, parts):
    assert PLANTED in parts["verdict"].lines
    text = report.markdown()
    first = text.split("\n")[2]
    sentence = report.verdicts["planted-llama"][0].sentence
    assert first.startswith(f"- **{sentence}") and "PLANTED" in first
    assert parts["verdict"].lines[0] == sentence
    assert any("Selected from 12 MacDrop settings" in line for line in parts["verdict"].lines)


def test_the_paper_table_holds_means_sds_and_item_errors(report, parts):
    tables = {table.title: table for table in parts["paper"].tables}
    clean = tables["Zero-shot accuracy, %"]
    assert clean.head == ["", "qa", "arith", "mean"]
    labels = [cells[0] for cells in clean.rows]
    assert labels[0] == "base" and labels[1] == "plain LoRA" and labels[2].startswith("+ MacDrop k 3")
    assert labels[3] == "plain DoRA" and labels[4].startswith("+ MacDrop DoRA") and len(labels) == 5
    found = report.models[0].groups[1].spread(Column("zero_shot", "qa", "acc"))
    text = f"{100 * found.value:.1f} ±{100 * found.sd:.1f} ({100 * found.stderr:.1f})"
    assert row(clean, "plain LoRA")["qa"] == text
    assert "Zero-shot accuracy, %, zeroing@3, base rows" in tables and "Judge score, 1 to 5" in tables


def test_comparisons_hold_the_verdicts_numbers(report, parts):
    found = next(v for v in report.verdicts["planted-llama"] if v.arm == "macdrop")
    table = parts["comparisons"].tables[0]
    assert len(table.rows) == len(found.rows) and found.label in table.title and "1, 2, 3" in table.title
    attacked, amount = row(table, "mean of 2 acc zeroing@3"), found.attacked.amount.replace("points", "pts")
    assert attacked["verdict"] == found.attacked.verdict and attacked["difference [95 %]"] == amount
    assert float(attacked["MacDrop"]) == pytest.approx(100 * found.attacked.value, abs=0.05)
    assert all(v.arm == "random_rows" for v in report.verdicts["planted-llama"] if v.label in str(parts["placebos"]))


def test_search_attacks_generations_cost(report, parts):
    assert parts["search"].lines[0].startswith("12 MacDrop setting(s) tried in 14 trials (12 done, 2 diverged)")
    assert {cells[0] for cells in parts["search"].tables[0].rows} >= {"M1", "M12", "plain1", "plain2"}
    curve = parts["attacks"].tables[0]
    assert curve.head == ["", "none", *(f"zeroing\n{k}" for k in (1, 3, 5, 10)), "retaining\n3"]
    assert len(curve.rows) == 7  # base, and two cells of plain, MacDrop, random rows
    answers, questions = parts["generations"].tables
    assert len(answers.rows) == len(questions.rows) == 4
    assert re.match(r"\d|unparsed", row(questions, questions.rows[0][0])["judged MacDrop"])
    assert {cells[0].partition("(")[2] for cells in questions.rows} == {"writing)", "math)"}
    times = [cells[:3] for cells in parts["cost"].tables[0].rows if cells[0] == "plain"]
    assert times == [["plain", "final", "6"], ["plain", "search", "2"]]
    assert any("(spec " in line for line in parts["reproduce"].lines)
    assert "Seeds of the compared trials: 1, 2, 3." in parts["reproduce"].lines
    assert any("diverged: Step 31" in line for line in parts["trials"].lines)


def test_the_training_data_and_what_was_cut_are_reported(tmp_path):
    run_folder = make_run(tmp_path / "run", tried=1, arms=("plain", "macdrop"), items=4, attacks=("none",))
    counts = {"rows": 34, "dropped": 3, "truncated": 2, "skipped": 0, "cutoff_len": 64}
    line = f"Training data: {describe_cutoff(counts)}."
    files = [run_folder.trial(record.trial).folder / "reproduce.json" for record in run_folder.trials()]
    for data, printed in ({"key": "k", **counts}, True), ({"key": "k"}, False):  # an earlier version kept no counts
        for file in files:
            file.write_text(json.dumps({"workers": 1, "data": data}))
        assert (line in make_report(run_folder.run_dir).markdown()) == printed
    skipped = [{"reason": "an unknown role", "count": 2, "places": ["rows.jsonl, line 3", "rows.jsonl, line 9"]}]
    mixture = [{"path": path, "weight": 1.0, "available": 20, "examples": 15} for path in ("a.jsonl", "b.jsonl")]
    data = {"key": "k", **counts, "skipped_rows": skipped, "mixture": mixture}
    for file in files:
        file.write_text(json.dumps({"workers": 1, "data": data}))
    text = make_report(run_folder.run_dir).markdown()
    assert "2 rows skipped: an unknown role (rows.jsonl, line 3; rows.jsonl, line 9)." in text
    assert "a.jsonl: 15 of 30 examples of an epoch (50.0%, weight 1), each of its 20 0.75 times on average." in text


def test_several_objectives_have_a_front(tmp_path):
    run_folder = make_run(tmp_path / "run", tried=3, arms=("plain", "macdrop"), items=20, attacks=("none",))
    config = run_folder.config()
    config["sweep"]["metric"] = [
        {"name": "eval_loss", "goal": "minimize"},
        {"name": "zero_shot/qa/acc", "goal": "maximize"},
    ]
    from tune.storage.atomic import atomic_write_yaml

    atomic_write_yaml(run_folder.run_dir / "config.yaml", config)
    report = make_report(run_folder.run_dir)
    front = report.parts(report.models[0])["pareto"]
    assert front.lines[0].startswith("Pareto-optimal")
    assert front.tables[0].head[-2] == "zero_shot\nqa\nacc"
    assert front.tables[0].rows and all(front.tables[0].rows[0][-4:])


# --- formats ---


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_report_fits_its_width(report, width):
    text = terminal(report, width)
    assert max(map(len, text.splitlines())) <= width
    for part in filter(None, report.parts(report.models[0]).values()):
        assert part.title in text
        for table in part.tables:  # every head and every number is there, whole
            for cell in {line for head in table.head for line in head.split("\n")} if not table.wrap else ():
                assert cell in text
            for cells in table.rows if not table.wrap else ():
                assert all(cell in text for cell in cells), cells


def test_every_format_says_the_same(report):
    markdown, tex, csv = report.markdown(), report.latex(), csv_text([report])
    for part in report.parts(report.models[0]).values():
        for table in part.tables:
            for cells in table.rows:
                assert all(" ".join(cell.split()) in markdown for cell in cells)
                assert all(latex_text(cell) in tex for cell in cells)
    assert csv.count("\n") > 1000


def test_latex_is_balanced_and_escaped(report):
    text = report.latex()
    begun, ended = re.findall(r"\\begin\{(\w+)\}", text), re.findall(r"\\end\{(\w+)\}", text)
    assert sorted(begun) == sorted(ended) and {"table", "tabular", "itemize"} <= set(begun)
    body = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert body.count("{") - body.count(r"\{") == body.count("}") - body.count(r"\}")
    for sign in "%#_":
        assert not re.search(rf"(?<!\\){sign}", body), sign
    for block in re.findall(r"\\begin\{tabular\}.*?\\end\{tabular\}", body, re.DOTALL):
        kinds = re.match(r"\\begin\{tabular\}\{(.*)\}", block)[1].replace(r"\linewidth", "")
        columns = len(re.findall(r"[lr]|p\{", kinds))
        rows = [line for line in block.splitlines() if line.endswith(r"\\")]
        assert rows and {len(re.findall(r"(?<!\\)&", line)) + 1 for line in rows} == {columns}


def test_a_table_escapes_what_each_format_would_take_for_markup():
    table = Table("a <b> & 50 %", ["", "x|y\n_z", "n"], [["[r] <i>", "a|b & {c} $1 ~ ^ \\", "+1.0 pts [-2, +3]"]])
    assert "x\\|y _z" in table.markdown() and "| --- | --- | ---: |" in table.markdown()
    assert "<b>" not in table.html() and "&lt;i&gt;" in table.html() and '<th scope="row">' in table.html()
    assert '<th scope="col" class="number">n</th>' in table.html() and "x|y<br>_z" in table.html()
    tex = table.latex()
    assert r"\{c\} \$1 \textasciitilde{} \textasciicircum{} \textbackslash{}" in tex and "\n{}[r]" in tex
    console = Console(width=80, file=io.StringIO())
    console.print(table.rich())
    assert "[r] <i>" in console.file.getvalue()


@pytest.mark.parametrize(
    "table",
    [
        Table(
            "a <b> & 50 %",
            ["", "x|y\n_z", "n"],
            [["[r] <i>", "a|b & {c} $1 ~ ^ \\", "+1.0 pts [-2, +3]"], ["*", "", ""]],
        ),
        Table("long", ["question", "plain"], [["1", "words"]], wrap=True),
        Table("one", ["a"], [["1"]]),
    ],
    ids=lambda table: table.title,
)
def test_latex_is_what_pandas_writes(table):
    from tune.report.tables import _latex_cells

    stacked = [cell.split("\n") for cell in table.head]
    tallest = max(map(len, stacked))
    heads = [[latex_text(cell[i]) if i < len(cell) else "" for cell in stacked] for i in range(tallest)]
    columns = pandas.MultiIndex.from_arrays(heads) if tallest > 1 else pandas.Index(heads[0])
    frame = pandas.DataFrame([_latex_cells(row) for row in table.rows], columns=columns)
    share = f"p{{{0.9 / len(table.head):.2f}\\linewidth}}"
    style = {"hrules": True, "position": "htbp", "position_float": "centering", "sparse_columns": False}
    style["column_format"] = "".join(share if table.wrap else "r" if number else "l" for number in table.numeric())
    expected = frame.style.hide(axis="index").to_latex(caption=latex_text(table.title), **style)
    assert table.latex() == expected.rstrip()


NUMBERS = ["1", "-0.5", "+1.7 points [-3.4, +6.7]", "82.2 ±1.0 (5.0)", "1.6%", "9.5 s", "<0.001", "inf"]


@pytest.mark.parametrize("cell", NUMBERS)
def test_numbers_are_known(cell):
    assert NUMBER.fullmatch(cell)


@pytest.mark.parametrize("cell", ["step", "cannot tell", "True", "done", "-", "e5", "40 of 100"])
def test_words_are_not_numbers(cell):
    assert not NUMBER.fullmatch(cell)


def test_csv_is_long_form_and_whole(report, run):
    table = pandas.read_csv(io.StringIO(csv_text([report])))
    tested = table[(table.task == "qa") & (table.metric == "acc") & (table.attack == "zeroing@3")]
    macdrop = tested[(tested.arm == "macdrop") & (tested.cell == '{"use_dora": false}')]
    assert sorted(macdrop.seed) == [1, 2, 3] and set(macdrop.stage) == {"final"} and macdrop["setting"].nunique() == 1
    first = macdrop.iloc[0]
    assert macdrop["value"].mean() - first["compared_plain"] == pytest.approx(first["compared_delta"])
    verdict = next(v for v in report.verdicts["planted-llama"] if v.setting == first["setting"])
    said = {c.verdict for c in verdict.rows if c.column == Column("zero_shot", "qa", "acc", "zeroing@3", "base")}
    assert set(macdrop["compared_verdict"]) == said and first["macdrop.k"] == 3
    assert set(table[table.stage == "search"].split.dropna()) == {"validation", "test"}  # eval_loss is on neither
    journal_rows = {(r["trial"], r["split"], r["task"], r["metric"], r["attack"]) for r in run.score_rows()}
    written = set(table[["trial", "split", "task", "metric", "attack"]].itertuples(index=False, name=None))
    assert journal_rows <= written
    assert table[table.status == "diverged"]["reason"].str.contains("nan").all()


# --- runs of other kinds ---


def test_a_run_that_has_just_begun(tmp_path):
    run_folder = RunFolder.create(tmp_path / "new", {"model_name_or_path": "org/m"})
    report = make_report(run_folder.run_dir)
    assert "No verdict: nothing has been trained or scored yet." in report.markdown()
    assert len(csv_text([report]).splitlines()) == 1 and terminal(report, 80)
    spec = {"model_name_or_path": "org/m", "seed": 0, "macdrop": {"k": 5, "p0": 0.2}}
    run_folder.trial("m-1").start(spec, model="org/m", arm="macdrop", seed=0)
    text = make_report(run_folder.run_dir).markdown()
    assert "1 trial(s): 1 running" in text and "no plain adapter to compare with" in text and PLANTED not in text


def test_a_run_from_before_there_were_stages(tmp_path):
    """Every trial is a final trial and has its place; settings are distinguished by their specs."""
    config = {"sweep": {"models": ["m"], "metric": {"name": "eval_loss", "goal": "minimize"}}}
    run_folder = RunFolder.create(tmp_path / "old", config)
    off = {"k": 0, "p0": 0.0, "schedule": "step", "alpha": None}
    blocks = {"a": off, "b": {**off, "k": 5, "p0": 0.2}, "c": {**off, "k": 5, "p0": 0.8}}
    for loss, (trial, block) in zip((2.0, 1.9, 1.8), blocks.items(), strict=True):
        arm = "macdrop" if block["k"] else "plain"
        record = run_folder.trial(trial)
        record.start({"model_name_or_path": "m", "seed": 0, "macdrop": block}, model="m", arm=arm, seed=0)
        kept = record.record().model_dump(exclude={"stage", "setting", "cell", "config"}, exclude_unset=True)
        record._write(**kept)
        record.finish(TaskState.DONE, eval_loss=loss, step=20, seconds=1.2)
        run_folder.add_scores(
            [score(trial, arm, "zero_shot", task, "acc", 0.5, higher_is_better=True) for task in "xy"]
        )
    report = make_report(run_folder.run_dir)
    model = report.models[0]
    assert [line.label for line in model.lines] == ["plain", "M1", "M2"] and model.best.trial == "c"
    labels = [group.label for group in model.groups]
    assert labels == ["plain LoRA", "MacDrop k 5 p0 0.8 step", "MacDrop k 5 p0 0.2 step"]
    parts = report.parts(model)
    assert model.tried == 2 and not parts["search"] and parts["trials"].tables[0].title == "Trials"
    assert parts["paper"].tables[0].rows[1][:2] == ["+ MacDrop k 5 p0 0.8 step", "50.0 (2.0)"]


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="not a run folder"):
        make_report(tmp_path)

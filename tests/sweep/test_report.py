"""tune.results and tune.report: what is said of a run, and that it is said no louder than the numbers allow."""

from __future__ import annotations

import io
import math

import pandas
import pytest
from rich.console import Console

from macdrop.errors import ConfigError
from tune.columns import Cell, Column, difference
from tune.journal import Journal
from tune.report import ONE_SEED, PLANTED, make_report
from tune.results import collect, value_of
from tune.tables import Table

MODEL = "zoo:planted-llama"
OFF = {"k": 0, "p0": 0.0, "schedule": "step", "alpha": None}
CONFIG = {
    "sweep": {
        "models": [{"model_name_or_path": MODEL}, {"model_name_or_path": "org/other"}],
        "metric": {"name": "eval_loss", "goal": "minimize"},
        "parameters": {"macdrop.p0": {"values": [0.2, 0.8]}},
    }
}
TASKS = ("arc_easy", "arc_challenge", "piqa")


def scores(trial: str, arm: str, acc: float, tasks: tuple[str, ...] = TASKS) -> list[dict]:
    rows = []
    for attack in ("none", "zeroing@3"):
        where = None if attack == "none" else "base"
        common = dict(model=MODEL, trial=trial, arm=arm, attack=attack, attack_on=where, seed=0, version="1")
        for task in tasks:
            for metric, shift in (("acc", 0.0), ("acc_norm", 0.01)):
                value = acc + shift - (0.3 if where else 0)
                rows.append({**common, "benchmark": "zero_shot", "task": task, "metric": metric, "value": value})
                rows[-1] |= {"stderr": 0.02, "n": 400, "higher_is_better": True}
        rows.append({**common, "benchmark": "perplexity", "task": "wiki", "metric": "word_perplexity"})
        rows[-1] |= {"value": 9 - acc, "stderr": None, "n": 100, "higher_is_better": False}
    return rows


def add_trial(
    journal: Journal, trial: str, macdrop: dict, loss: float | None, *, model: str = MODEL, **settings
) -> None:
    arm = "macdrop" if macdrop["k"] else "plain"
    record = journal.trial(trial)
    spec = {"model_name_or_path": model, "learning_rate": 1e-4, "seed": 0, "logging_steps": len(trial), **settings}
    record.start({**spec, "macdrop": macdrop}, model=model, arm=arm, seed=spec["seed"])
    if loss is not None:
        record.finish("done", eval_loss=loss, step=20, seconds=1.234)


@pytest.fixture
def journal(tmp_path) -> Journal:
    """Two models; of the first a base, a plain and three MacDrop trials (one failed); of the second nothing yet."""
    journal = Journal.create(tmp_path / "run", CONFIG, command="macdrop sweep demo")
    add_trial(journal, "plain-1", OFF, 2.0)
    add_trial(journal, "macdrop-1", {"k": 5, "p0": 0.2, "schedule": "step", "alpha": None}, 1.9)
    add_trial(journal, "macdrop-2", {"k": 5, "p0": 0.8, "schedule": "exp", "alpha": 0.05}, 1.8)
    add_trial(journal, "macdrop-3", {"k": 5, "p0": 0.9, "schedule": "step", "alpha": None}, None)
    journal.trial("macdrop-3").finish("diverged", "loss is nan at step 3\n" + "x" * 1000)
    journal.add_scores(scores("base", "base", 0.4) + scores("plain-1", "plain", 0.5))
    journal.add_scores(scores("macdrop-1", "macdrop", 0.48))
    journal.add_scores(scores("macdrop-2", "macdrop", 0.62))
    return journal


def cell(table: Table, row: str, head: str) -> str:
    (found,) = [values for values in table.rows if values[0] == row]
    return found[table.head.index(head)]


# --- results ---


def test_lines_are_ordered_and_the_best_is_marked(journal):
    model = collect(journal)[0]
    assert [(line.label, line.trial) for line in model.lines] == [
        ("base", "base"), ("plain", "plain-1"), ("M1", "macdrop-2"), ("M2", "macdrop-1"), ("M3", "macdrop-3")
    ]  # fmt: skip
    assert model.best.trial == "macdrop-2" and model.display == MODEL and model.planted
    assert model.keys[:4] == ["macdrop.k", "macdrop.p0", "macdrop.schedule", "macdrop.alpha"] and len(model.keys) == 4
    assert model.lines[1].setting("macdrop.p0") is None


def test_the_objective_may_be_a_score(journal):
    model = collect(journal)[0]
    assert value_of(model.lines[2], "zero_shot/arc_easy/acc@zeroing@3") == pytest.approx(0.32)
    assert value_of(model.lines[2], "zero_shot/nothing/acc") is None
    metric = {"name": "perplexity/wiki/word_perplexity", "goal": "maximize"}
    config = {"sweep": {**CONFIG["sweep"], "metric": metric}}
    other = Journal.create(journal.run_dir.parent / "other", config)
    add_trial(other, "a", {"k": 5, "p0": 0.2}, 1.0)
    add_trial(other, "b", {"k": 5, "p0": 0.4}, 2.0)
    other.add_scores(scores("a", "macdrop", 0.5) + scores("b", "macdrop", 0.4))
    assert collect(other)[0].best.trial == "b"


def test_the_mean_over_tasks_equals_a_slow_reference(journal):
    model = collect(journal)[0]
    (mean,) = [c for c in model.columns if c.task == "mean of 3" and c.attack == "none"]
    found = model.lines[2].scores[mean]
    assert found.value == pytest.approx((0.62 + 0.62 + 0.62) / 3)
    assert found.stderr == pytest.approx(math.sqrt(3 * 0.02**2) / 3) and found.n == 1200


@pytest.mark.parametrize(
    "plain, macdrop, better, words",
    [
        (Cell(0.50, 0.02), Cell(0.55, 0.02), True, "within noise"),
        (Cell(0.50, 0.02), Cell(0.56, 0.02), True, "better by more than 2 SE"),
        (Cell(0.56, 0.02), Cell(0.50, 0.02), True, "worse by more than 2 SE"),
        (Cell(5.0, 0.1), Cell(4.0, 0.1), False, "better by more than 2 SE"),
        (Cell(5.0), Cell(4.0), False, "no standard error: cannot tell"),
        (Cell(5.0, 0.1), Cell(4.0), False, "no standard error: cannot tell"),
        (Cell(0.5, 0.0), Cell(0.5, 0.0), True, "equal"),
        (Cell(1.0, 0.1), Cell(2.0, 0.1), None, "differs by more than 2 SE"),
    ],
)
def test_words_for_a_difference(plain, macdrop, better, words):
    found = difference(Column("b", "t", "m", higher_is_better=better), plain, macdrop)
    assert found.words == words and found.delta == macdrop.value - plain.value
    if plain.stderr is not None and macdrop.stderr is not None:
        assert found.stderr == pytest.approx((plain.stderr**2 + macdrop.stderr**2) ** 0.5)


def test_a_trial_is_compared_with_the_plain_adapter_of_its_own_settings(journal):
    add_trial(journal, "plain-2", OFF, 2.5, learning_rate=1e-3)
    add_trial(journal, "macdrop-9", {"k": 5, "p0": 0.2}, 2.4, learning_rate=1e-3)
    add_trial(journal, "macdrop-8", {"k": 5, "p0": 0.2}, 2.4, learning_rate=5e-3)
    model = collect(journal)[0]
    plain = {line.trial: model.plain_for(line) for line in model.macdrop()}
    assert plain["macdrop-2"].trial == "plain-1" and plain["macdrop-9"].trial == "plain-2"
    assert plain["macdrop-8"] is None
    assert "learning_rate" in model.keys and "logging_steps" not in model.keys


def test_seeds_are_counted_per_setting(journal):
    assert collect(journal)[0].seeds() == 1
    add_trial(journal, "again", {"k": 5, "p0": 0.2, "schedule": "step", "alpha": None}, 1.9, seed=1)
    assert collect(journal)[0].seeds() == 2
    assert ONE_SEED not in make_report(journal.run_dir).markdown()


# --- the report ---


def test_what_the_report_says(journal):
    text = make_report(journal.run_dir).markdown()
    assert PLANTED in text and ONE_SEED in text
    assert "4 trial(s): 3 done, 1 diverged" in text
    assert "M3 (macdrop-3) diverged: loss is nan at step 3" in text and "x" * 400 not in text
    assert "Best MacDrop trial by eval_loss: M1 (k 5, p0 0.8, schedule exp, alpha 0.05), of 3 setting(s) tried" in text
    assert "The best of 3 is picked after the fact" in text
    assert "Nothing is trained or scored yet." in text.split("## org/other")[1]
    assert "Massive weights: not scanned." in text


def test_tables_hold_the_numbers(journal):
    report = make_report(journal.run_dir)
    tables = {table.title: table for table in report.sections[1].tables}
    attacked = "zero_shot, zeroing@3, base rows"
    assert list(tables) == ["Trials", "zero_shot", attacked, "perplexity", "M1 (best MacDrop) against plain"]
    assert cell(tables["Trials"], "M1 *", "eval_loss") == "1.800" and cell(tables["Trials"], "plain", "p0") == ""
    assert cell(tables["Trials"], "M3", "status") == "diverged"
    assert cell(tables["zero_shot"], "M1 *", "arc_easy\nacc") == "0.6200 ±0.020"
    assert cell(tables[attacked], "base", "arc_easy\nacc\nzeroing@3\nbase rows") == "0.1000 ±0.020"
    assert not any("acc_norm" in head for head in tables["zero_shot"].head)  # the primary metric only
    versus = {row[0]: row[1:] for row in tables["M1 (best MacDrop) against plain"].rows}
    assert versus["arc_easy acc"] == ["0.5000", "0.6200", "+0.120 ±0.028", "better by more than 2 SE"]
    assert versus["wiki word_perplexity"][-1] == "no standard error: cannot tell"
    assert versus["eval_loss"] == ["2.000", "1.800", "-0.200", "no standard error: cannot tell"]


def test_massive_weights_and_proof_are_reported(journal):
    from tune.files import atomic_write_json

    weights = {"layer": 1, "expert": None, "indices": [7, 3, 9, 1, 2, 8], "confidence": {"top_over_median": 1234.5}}
    proof = {"verdict": "not sensitive", "k": 5, "untouched": 3.5, "zeroed": "inf", "retained": 4.0, "random": [3.5]}
    atomic_write_json(journal.massive_weights_file(MODEL), weights)
    atomic_write_json(journal.proof_file(MODEL), proof)
    text = make_report(journal.run_dir).markdown()
    assert "layer 1 (from 0), top rows 7 3 9 1 2; the largest intermediate entry at bos is 1234 times" in text
    assert "Verdict: not sensitive. Perplexity 3.500; top-5 zeroed inf, retained 4.000, 5 random rows" in text


def part(task: str, metric: str, better: bool | None, **changes) -> dict:
    row = dict(model=MODEL, trial="plain-1", arm="plain", attack="none", attack_on=None, stderr=0.1, value=1.0)
    return {**row, "benchmark": "generation", "task": task, "metric": metric, "higher_is_better": better, **changes}


def test_parts_of_what_was_asked_for_are_in_the_csv_alone(journal):
    config = {**CONFIG, "eval": {"zero_shot": {"mmlu": {}, "easy": {"task": "arc_easy"}}, "generation": {"sb": {}}}}
    run = Journal.create(journal.run_dir.parent / "other", config)
    add_trial(run, "plain-1", OFF, 2.0)
    add_trial(run, "macdrop-1", {"k": 5, "p0": 0.2}, 1.9)
    tasks = ("mmlu", "mmlu_law", "mmlu_art", "arc_easy")
    for trial, arm in (("plain-1", "plain"), ("macdrop-1", "macdrop")):
        run.add_scores(scores(trial, arm, 0.5, tasks=tasks))
        for task in ("sb", "sb/math"):
            run.add_scores([part(task, "new_tokens", None, trial=trial, arm=arm)])
            run.add_scores([part(task, "repeated_4grams", False, trial=trial, arm=arm)])
    report = make_report(run.run_dir)
    tables = {table.title: table for table in report.sections[1].tables}
    assert [head.split("\n")[0] for head in tables["zero_shot"].head] == ["", *["mmlu", "arc_easy", "mean of 2"] * 2]
    assert tables["generation"].head == ["", "sb\nrepeated_4grams"]
    versus = [row[0] for row in tables["M1 (best MacDrop) against plain"].rows]
    assert "sb repeated_4grams" in versus and "sb/math repeated_4grams" not in versus
    assert all(name in report.csv() for name in ("mmlu_law", "new_tokens", "sb/math"))


def test_each_other_setting_has_its_own_comparison(journal):
    """LoRA against LoRA and DoRA against DoRA, when both were trained."""
    run = Journal.create(journal.run_dir.parent / "both", CONFIG)
    for dora, best in ((False, 1.9), (True, 1.7)):
        for trial, block, loss in (("plain", OFF, best + 0.1), ("macdrop", {"k": 5, "p0": 0.2}, best)):
            add_trial(run, f"{trial}-{dora}", block, loss, use_dora=dora)
            run.add_scores(scores(f"{trial}-{dora}", trial, 0.5))
    titles = [table.title for table in make_report(run.run_dir).sections[1].tables]
    assert [title for title in titles if "best MacDrop" in title] == [
        "M1 (best MacDrop with use_dora True) against plain1",
        "M2 (best MacDrop with use_dora False) against plain2",
    ]


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_report_fits_its_width(journal, width):
    many = tuple(f"a_rather_long_task_{i}" for i in range(12))
    journal.add_scores(scores("base", "base", 0.4, tasks=many) + scores("macdrop-2", "macdrop", 0.6, tasks=many))
    console = Console(width=width, file=io.StringIO(), color_system=None)
    make_report(journal.run_dir).terminal(console)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "zero_shot, zeroing@3, base rows (1 of" in text
    for task in many:
        assert task in text  # no head is cut or folded
    assert "0.6000 ±0.020" in text


def test_csv_is_long_form_and_whole(journal):
    report = make_report(journal.run_dir)
    table = pandas.read_csv(io.StringIO(report.csv()))
    best = table[(table.label == "M1") & (table.task == "piqa") & (table.metric == "acc") & (table.attack == "none")]
    assert best["delta_to_plain"].item() == pytest.approx(0.12) and best["words"].item() == "better by more than 2 SE"
    assert best["macdrop.alpha"].item() == 0.05 and best["best"].item()
    assert set(table[table.trial == "plain-1"].metric) == {"acc", "acc_norm", "word_perplexity", "eval_loss"}
    assert table[table.trial == "macdrop-3"]["reason"].str.contains("nan").all()


def test_writing_and_rewriting(journal):
    report = make_report(journal.run_dir)
    files = report.write()
    assert [file.name for file in files] == ["report.md", "report.csv"]
    before = [file.read_text() for file in files]
    make_report(journal.run_dir).write()
    assert [file.read_text() for file in files] == before  # deterministic


def test_a_run_that_has_just_begun(tmp_path):
    journal = Journal.create(tmp_path / "new", {"model_name_or_path": "org/m"})
    report = make_report(journal.run_dir)
    assert "Nothing is trained or scored yet." in report.markdown()
    assert len(report.csv().splitlines()) == 1
    report.terminal(Console(width=120, file=io.StringIO()))
    add_trial(journal, "macdrop-1", {"k": 5, "p0": 0.2}, None, model="org/m")
    text = make_report(journal.run_dir).markdown()
    assert "1 trial(s): 1 running" in text and "none is marked as the best" in text and PLANTED not in text
    journal.trial("macdrop-1").finish("done", eval_loss=1.0)
    assert "nothing to compare with" in make_report(journal.run_dir).markdown()


def test_no_run_folder_no_report(tmp_path):
    with pytest.raises(ConfigError, match="no run folder"):
        make_report(tmp_path)

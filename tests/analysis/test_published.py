"""analysis.published: the paper's figures agree with themselves, and stand beside ours in the same setting only."""

from __future__ import annotations

import pytest
from helpers.run_folders import make_run

from tune.analysis.published import base_figures, figure, paper, row_name, score_differences, setting_differences
from tune.evaluation.score_names import Cell
from tune.report.report import make_report
from tune.storage.atomic import atomic_write_text, atomic_write_yaml
from tune.storage.run_folder import RunFolder

TABLES = ("zero_shot", "zero_shot_attacked", "longbench", "spec_bench")
MODEL = "meta-llama/Meta-Llama-3-8B"
SAME = {
    "dataset": "llamafactory/alpaca_gpt4_en",
    "val_size": 0.05,
    "lora_rank": 16,
    "lora_alpha": 16.0,
    "lora_target": "all",
    "use_dora": False,
    "learning_rate": 1e-4,
    "warmup_ratio": 0.05,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 4,
    "macdrop.k": 5,
    "macdrop.p0": 0.8,
    "macdrop.schedule": "step",
}


# --- the data ---


def test_means_of_the_attack_table_are_those_of_its_columns():
    for rows in paper()["tables"]["attacks"]["rows"].values():
        for row in rows.values():
            assert sum(row[:3]) / 3 == pytest.approx(row[3], abs=0.011)
            assert sum(row[4:9]) / 5 == pytest.approx(row[9], abs=0.051)


@pytest.mark.parametrize("table", TABLES)
def test_every_row_is_a_known_model_with_both_adapters_and_arms(table):
    top = 5 if table == "spec_bench" else 100
    for name, adapters in paper()["tables"][table]["rows"].items():
        assert name in paper()["checkpoints"] and set(adapters) == {"LoRA", "DoRA"}
        for arms in adapters.values():
            assert set(arms) == {"plain", "macdrop"} and all(1 <= value <= top for value in arms.values())


def test_the_schedules_agree_with_the_table_of_fine_tuned_models():
    found, tuned = paper()["tables"]["schedules"], paper()["tables"]["zero_shot"]["rows"]["Llama-3-8B"]["LoRA"]
    assert found["plain"] == tuned["plain"]
    assert found["rows"]["step"][found["columns"].index(0.8)] == tuned["macdrop"]
    assert {len(row) for row in found["rows"].values()} == {len(found["columns"])}


def test_tables_say_what_they_are_of():
    assert {"arxiv", "title", "version"} <= set(paper())
    for table in paper()["tables"].values():
        assert table["about"] and table["arxiv_version"] in (1, 2)


# --- the same setting ---


def test_the_same_setting_has_no_difference(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "Meta-Llama-3-8B").mkdir(parents=True)
    assert setting_differences(SAME, "macdrop", workers=8) == []
    assert figure("zero_shot", MODEL, SAME, "macdrop").value == 76.5
    assert figure("zero_shot", "models/Meta-Llama-3-8B", {**SAME, "use_dora": True}, "plain").value == 76.1
    assert base_figures(MODEL, "zeroing@5")["Wiki"] == 104.57 and base_figures(MODEL, "zeroing@3") == {}


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("learning_rate", 2e-4, "learning_rate 0.0002 (paper: 0.0001)"),
        ("per_device_train_batch_size", 4, "batch 128 (paper: 256)"),
        ("dataset", "data/other.json", "dataset other (paper: alpaca_gpt4_en)"),
        ("max_steps", 30, "max_steps 30 (paper: none)"),
        ("macdrop.k", 3, "macdrop.k 3 (paper: 5)"),
    ],
)
def test_a_different_setting_is_reported(key, value, words):
    assert setting_differences({**SAME, key: value}, "macdrop", workers=8) == [words]
    assert (setting_differences({**SAME, key: value}, "plain", workers=8) == []) == key.startswith("macdrop.")


def test_other_checkpoints_and_adapters_have_no_figure():
    for other in ("meta-llama/Meta-Llama-3-8B-Instruct", "someone/Meta-Llama-3-8B", "zoo:planted-llama"):
        assert row_name(other) is None
    assert figure("zero_shot", MODEL, {**SAME, "use_rslora": True}, "plain") is None
    assert figure("zero_shot", MODEL, SAME, "random_rows") is None


def test_scores_must_be_of_the_suite_and_of_all_items():
    def cell(settings: str, limit: int | None = None) -> Cell:
        return Cell.of({"value": 0.5, "settings": settings, "limit": limit})

    assert score_differences([cell("lm_eval=0.4 suite=zero-shot@1")], "zero-shot") == []
    assert score_differences([cell("suite=zero-shot@1", 100)], "zero-shot") == ["a limit of 100 items"]
    assert score_differences([cell("suite=own@1")], "zero-shot") == ["not scored with the suite zero-shot"]


# --- in the report ---


def as_in_the_paper(run_folder: RunFolder) -> None:
    """Make a synthetic run one of the paper's setting: tasks, suite, training, k and p0."""
    text = run_folder.scores_file.read_text().replace('"qa"', '"arc_easy"').replace('"arith"', '"boolq"')
    atomic_write_text(run_folder.scores_file, text.replace("data=local", "suite=zero-shot@1"))
    atomic_write_yaml(run_folder.run_dir / "config.yaml", {"model_name_or_path": MODEL, "ray": {"num_workers": 8}})
    for record in run_folder.trials():
        block = record.config["macdrop"]
        block |= {"k": 5, "p0": 0.8, "schedule": "step", "alpha": None} if record.arm == "macdrop" else {}
        flat = {key: value for key, value in SAME.items() if not key.startswith("macdrop.")}
        config = {**record.config, **flat, "max_steps": None, "macdrop": block}
        atomic_write_yaml(run_folder.trial(record.trial).folder / "config.yaml", config)


def test_the_papers_figures_stand_below_ours_where_the_setting_is_the_same(tmp_path):
    run_folder = make_run(tmp_path / "run", model=MODEL, tried=1, items=20, attacks=("none", "zeroing@3", "zeroing@5"))
    report = make_report(run_folder.run_dir)
    part = report.parts(report.models[0])["paper"]
    assert not any("arXiv" in cells[0] for table in part.tables for cells in table.rows)
    notes = "learning_rate 0.002 (paper: 0.0001)"
    assert any("in a different setting" in line and notes in line for line in part.lines)
    as_in_the_paper(run_folder)
    report = make_report(run_folder.run_dir)
    part = report.parts(report.models[0])["paper"]
    clean, attacked, base_attacked = part.tables[:3]
    assert clean.head == ["", "ARC-E", "BoolQ", "mean"]
    pairs = zip(clean.rows, clean.rows[1:], strict=False)
    below = {ours[0].split()[0]: theirs for ours, theirs in pairs if "arXiv" in theirs[0]}
    assert below["base"] == ["  paper (arXiv 2410.01866v2)", "77.4", "81.4", "73"]
    assert below["plain"][1:] == ["", "", "76"] and below["+"][1:] == ["", "", "76.5"]
    assert [cells[-1] for cells in attacked.rows if "arXiv" in cells[0]] == ["40.4", "47.7"]
    assert "zeroing@5" in base_attacked.title  # of which the paper has the base model
    theirs = [cells[1:] for cells in base_attacked.rows if "arXiv" in cells[0]]
    assert theirs == [["29.1", "41.8", "39.4"]]

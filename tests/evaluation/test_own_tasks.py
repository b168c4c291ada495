"""Tasks of the user's own, as lm-eval's YAML files in a folder: found, checked, versioned, and sent to actors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import benchmark_fixtures as fix
from helpers.benchmark_fixtures import score, values

from macdrop.errors import ConfigError
from tune.config.eval_spec import EvalSpec
from tune.config.messages import build
from tune.config.recorded import TRUST, orders_of
from tune.config.run_spec import dump, load
from tune.evaluation.benchmark import check_files
from tune.evaluation.own.own_tasks import find_task, task_version
from tune.evaluation.own.travel import at_home, own_files, recorded
from tune.evaluation.scorer import Scorer

TASK = """
task: rivers
dataset_path: json
dataset_kwargs: {data_files: {test: data/rivers.jsonl}}
test_split: test
include: shared.yaml
doc_to_choice: !function pick.choices
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 3}
"""
SHARED = "output_type: multiple_choice\ndoc_to_text: 'Is {{thing}} wet?'\n"
CODE = "def choices(doc):\n    return ['yes', 'no, not at all']\n"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    place = tmp_path / "tasks"
    (place / "data").mkdir(parents=True)
    (place / "rivers.yaml").write_text(TASK)
    (place / "shared.yaml").write_text(SHARED)
    (place / "pick.py").write_text(CODE)
    fix.write_jsonl(place / "data/rivers.jsonl", [{"thing": word, "label": i % 2} for i, word in enumerate(fix.WORDS)])
    return place


def block(folder: Path, *names: str, **keys) -> dict:
    return {"task_path": str(folder), "zero_shot": {name: dict(keys) for name in names or ("rivers",)}}


def test_an_own_task_scores_as_the_same_rows_do(folder, tmp_path, model, tokenizer, monkeypatch):
    """By lm-eval itself, with data beside its YAML wherever the process is; the reference are our own rows."""
    monkeypatch.chdir(tmp_path)
    rows = score(model, tokenizer, block(folder))
    ours = [
        {"context": f"Is {word} wet?", "choices": ["yes", "no, not at all"], "label": i % 2}
        for i, word in enumerate(fix.WORDS)
    ]
    reference = {"zero_shot": {"ours": {"data": fix.write_jsonl(tmp_path / "ours.jsonl", ours)}}}
    wanted = values(score(model, tokenizer, reference))["ours", "acc"]
    assert values(rows) == {("rivers", "acc"): wanted}
    version = task_version(folder / "rivers.yaml", str(folder))
    assert [row["version"] for row in rows] == [f"3.0+{version}"] or [row["version"] for row in rows] == [
        f"3+{version}"
    ]
    assert rows == score(model, tokenizer, block(folder)), "deterministic"


def test_two_blocks_that_differ_in_a_file_alone_have_other_scores(folder, model, tokenizer):
    first = score(model, tokenizer, block(folder))
    (folder / "pick.py").write_text(CODE.replace("yes", "well, yes and no and yes"))
    second = score(model, tokenizer, block(folder))
    assert first[0]["version"] != second[0]["version"]


@pytest.mark.parametrize("name", ["rivers.yaml", "shared.yaml", "pick.py", "data/rivers.jsonl"])
def test_the_version_follows_every_file_of_the_task(folder, name):
    before = task_version(folder / "rivers.yaml", str(folder))
    (folder / "other.yaml").write_text("task: other\n")
    assert task_version(folder / "rivers.yaml", str(folder)) == before, "another task does not count"
    file = folder / name
    file.write_text(file.read_text() + "\n")
    assert task_version(folder / "rivers.yaml", str(folder)) != before


def test_an_actor_reads_the_folder_that_travelled(folder, model, tokenizer):
    spec, rows = build(EvalSpec, block(folder)), score(model, tokenizer, block(folder))
    files = own_files(spec)
    folder.rename(folder.with_name("gone"))
    scorer = Scorer(model, tokenizer, at_home(spec, files))
    assert scorer.score(scorer.jobs()[0]) == rows


def test_own_rows_may_replace_the_data_of_an_own_task(folder, model, tokenizer):
    rows = [{"thing": "rain", "label": 0}, {"thing": "sand", "label": 1}]
    (row,) = score(model, tokenizer, block(folder, data=fix.write_jsonl(folder.parent / "two.jsonl", rows)))
    assert row["n"] == 2 and "+" in row["version"] and "data=local" in row["settings"]


def test_a_group_is_versioned_by_the_whole_folder(folder):
    (folder / "wet.yaml").write_text("group: wet\ntask: [rivers]\n")
    assert find_task("wet", str(folder)) is None
    before = task_version(None, str(folder))
    (folder / "notes.txt").write_text("x")
    assert task_version(None, str(folder)) != before
    with pytest.raises(ConfigError, match="List the tasks themselves"):
        check_files(build(EvalSpec, block(folder, "wet")))


def test_a_run_records_its_tasks_and_may_optimise_them(folder):
    own = {"validation": block(folder), "model_name_or_path": "zoo:planted-llama"}
    own["sweep"] = {"metric": {"name": "zero_shot/rivers/acc", "goal": "maximize"}}
    file = folder.parent / "run.yaml"
    file.write_text(json.dumps(own))
    spec = recorded(load(file))
    files = own_files(spec.validation)
    assert files is not None and spec.validation.code_version == files.version
    assert orders_of(dump(spec)) == {TRUST: f"runs the code in {folder}"}
    (folder / "pick.py").write_text(CODE + "\n")
    with pytest.raises(ConfigError, match="have changed"):
        own_files(spec.validation)


# --- refusals ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rivers.yaml": TASK.replace("rivers", "arc_easy", 1)}, "none of the tasks under zero_shot"),
        ({"rivers.yaml": TASK.replace("task: rivers", "task: rivres")}, "Did you mean 'rivres'"),
        ({"other.yaml": TASK}, "both define the task 'rivers'"),
        ({"rivers.yaml": TASK + "\nmetric_list: [}"}, "cannot be read as YAML"),
        ({"shared.yaml": None}, "includes 'shared.yaml', which is not beside it"),
        ({"data/rivers.jsonl": None}, "names the data 'data/rivers.jsonl', which are not beside it"),
        ({"pick.py": "def choices(doc):\nreturn 1\n"}, "pick.py, line 2 is not valid Python"),
        ({"pick.py": "x = 1\n"}, "has no function 'choices'"),
        ({"pick.py": "import a_package_nobody_has\n"}, "a_package_nobody_has"),
        ({"shared.yaml": SHARED.replace("thing", "missing")}, "needs.*missing|'missing'|missing"),
        ({"big.bin": "x" * (16 * 2**20 + 1)}, "at most 16 are sent"),
    ],
)
def test_folders_that_cannot_be_used_are_refused_at_dry_run(folder, change, message):
    for name, text in change.items():
        (folder / name).unlink() if text is None else (folder / name).write_text(text)
    with pytest.raises(Exception, match=f"(?s){message}") as error:
        check_files(build(EvalSpec, block(folder)))
    assert type(error.value).__module__.split(".")[0] in ("macdrop", "tune")


def test_a_name_of_lm_evals_own_is_refused(folder):
    (folder / "rivers.yaml").write_text(TASK.replace("rivers", "arc_easy", 1))
    with pytest.raises(ConfigError, match="so does lm-eval"):
        check_files(build(EvalSpec, block(folder, "arc_easy")))


def test_a_missing_folder_and_one_without_use_are_refused(folder):
    with pytest.raises(ConfigError, match="is not a folder"):
        check_files(build(EvalSpec, block(folder / "none")))
    with pytest.raises(ConfigError, match="zero_shot, which lists none"):
        build(EvalSpec, {"task_path": str(folder)})
    check_files(build(EvalSpec, block(folder)))

"""Documents of lm-eval's tasks: what it would score wrongly is refused with its place, before anything is scored."""

from __future__ import annotations

import csv

import pytest
from helpers import benchmark_fixtures as fix

from macdrop.errors import ConfigError, DataError
from tune.config.eval_spec import EvalSpec
from tune.config.messages import build
from tune.evaluation.benchmark import check_files
from tune.evaluation.scorer import Scorer


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    fix.refuse_connections(monkeypatch)


def check(block: dict) -> None:
    """Look at the files as a dry run does."""
    check_files(build(EvalSpec, block))


def rows_with(task: str, values: dict[int, dict]) -> list[dict]:
    """Rows of a task, some of them changed."""
    return [row | values.get(i, {}) for i, row in enumerate(fix.hub_rows(task))]


def write_csv(path, rows) -> str:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def test_labels_of_a_csv_are_texts_and_refused(tmp_path):
    path = write_csv(tmp_path / "t.csv", fix.hub_rows("piqa"))
    with pytest.raises(DataError, match=r"t.csv, line 2: .*'piqa' reads the answer as '0'.*\n.*JSON lines"):
        check({"zero_shot": {"piqa": path}})


@pytest.mark.parametrize(
    ("task", "values", "message"),
    [
        ("piqa", {3: {"label": -1}}, r"line 4: .*reads the answer as -1.* 0 to 1.*\n.*not published"),
        ("piqa", {2: {"label": 2}}, "line 3: .*reads the answer as 2"),
        ("piqa", {i: {"label": float(i % 2)} for i in range(6)}, r"line 1: .*reads the answer as 0\.0"),
        ("boolq", {i: {"label": "true"} for i in range(6)}, "line 1: .*reads the answer as 'true'.*'no', 'yes'"),
        ("hellaswag", {1: {"label": "7"}}, "line 2: .*reads the answer as 7"),
        ("arc_easy", {5: {"answerKey": "D"}}, "line 6: "),
        ("winogrande", {4: {"answer": "3"}}, "line 5: lm-eval's task 'winogrande' cannot use this row: KeyError"),
        ("piqa", {1: {"sol1": ""}}, "line 2: .*finds the choice ''"),
    ],
)
def test_an_answer_that_names_no_choice_is_refused_with_its_place(tmp_path, task, values, message):
    path = fix.write_jsonl(tmp_path / "t.jsonl", rows_with(task, values))
    with pytest.raises(DataError, match=f"t.jsonl, {message}"):
        check({"zero_shot": {task: path}})


def test_the_same_holds_for_data_of_the_hub(monkeypatch):
    import datasets

    found = datasets.Dataset.from_list(rows_with("piqa", {i: {"label": -1} for i in range(6)}))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(train=found, validation=found))
    spec = build(EvalSpec, {"zero_shot": ["piqa"]})
    with pytest.raises(DataError, match="document 1: .*reads the answer as -1"):
        Scorer(fix.tiny_llama(), fix.byte_tokenizer(), spec).prepare()


def test_examples_are_checked_as_the_rows_are(tmp_path):
    data = fix.write_jsonl(tmp_path / "t.jsonl", fix.hub_rows("piqa"))
    shots = fix.write_jsonl(tmp_path / "s.jsonl", rows_with("piqa", {2: {"label": -1}}))
    entry = {"data": data, "fewshot_data": shots, "num_fewshot": 1}
    with pytest.raises(DataError, match="few-shot example 3: .*reads the answer as -1"):
        check({"zero_shot": {"piqa": entry}})


def test_a_prompt_of_digits_is_refused_where_a_template_makes_it_a_number(tmp_path):
    rows = [{"query": q, "choices": ["the cat", "a dog"], "gold": [0]} for q in ("Two and two?", "12")]
    path = fix.write_jsonl(tmp_path / "t.jsonl", rows)
    with pytest.raises(DataError, match="line 2: .*'12', digits alone"):
        check({"zero_shot": {"agieval_aqua_rat": path}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({1: {"answer": ""}}, "line 2: .*makes '' the text to score by"),
        ({1: {"answer": "[1, 2]"}}, "line 2: .*finds a list of answers in this row"),
        ({i: {"answer": "[1, 2]"} for i in range(6)}, "line 1: .*finds 1 among the answers"),
    ],
)
def test_answers_of_generative_tasks(tmp_path, values, message):
    path = fix.write_jsonl(tmp_path / "t.jsonl", rows_with("gsm8k", values))
    with pytest.raises(DataError, match=f"t.jsonl, {message}"):
        check({"zero_shot": {"gsm8k": {"data": path, "num_fewshot": 0, "max_new_tokens": 4}}})


def test_a_blank_page_of_a_rolling_task_is_refused(tmp_path):
    path = fix.write_jsonl(tmp_path / "t.jsonl", [{"page": "A text."}, {"page": " "}])
    with pytest.raises(DataError, match="line 2: .*the text to score by"):
        check({"zero_shot": {"wikitext": path}})


def test_columns_that_the_first_row_lacks_are_kept(tmp_path):
    """A key of later rows is the task's to read as well."""
    from tune.evaluation.zero_shot.task_loader import Tasks

    rows = fix.hub_rows("piqa")
    rows[1]["hint"] = "water"
    spec = build(EvalSpec, {"zero_shot": {"piqa": fix.write_jsonl(tmp_path / "t.jsonl", rows)}})
    task = Tasks().load("piqa", spec.zero_shot["piqa"], spec).loaded["tasks"]["piqa"]
    assert [document["hint"] for document in task.eval_docs][:3] == [None, "water", None]


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("piqa", {}, "metric is 'f1'.*Allowed: acc, acc_norm"),
        ("mine", {}, "metric is 'f1'.*Allowed: acc, acc_norm"),
        ("gsm8k", {"max_new_tokens": 4}, "metric is 'f1'.*Allowed: exact_match"),
    ],
)
def test_an_unknown_metric_is_refused(tmp_path, name, entry, message):
    own = [{"context": "a", "choices": ["b", "c"], "label": 0}]
    path = fix.write_jsonl(tmp_path / "t.jsonl", own if name == "mine" else fix.hub_rows(name))
    with pytest.raises(ConfigError, match=f"eval.zero_shot.{name}.{message}"):
        check({"zero_shot": {name: {"data": path, "metric": "f1", **entry}}})
    if name != "mine":
        with pytest.raises(ConfigError, match=f"{name}.metric is 'acc_nrm'"):
            check({"zero_shot": {name: {"metric": "acc_nrm"}}})


def test_examples_from_the_scored_rows_are_refused(monkeypatch):
    """piqa draws its examples from the training part; scored on that part, a prompt could hold its own answer."""
    import datasets

    found = datasets.Dataset.from_list(fix.hub_rows("piqa"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(train=found, validation=found))
    model, tokenizer = fix.tiny_llama(), fix.byte_tokenizer()
    spec = build(EvalSpec, {"num_fewshot": 1, "zero_shot": {"piqa": {"split": "train"}}})
    with pytest.raises(ConfigError, match="eval.zero_shot.piqa: .*rows that are scored"):
        Scorer(model, tokenizer, spec).prepare()
    Scorer(model, tokenizer, build(EvalSpec, {"num_fewshot": 1, "zero_shot": ["piqa"]})).prepare()

"""Metrics of the user's own: what they are given, what they may return, how they fail, and how their files travel."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
from helpers import benchmark_fixtures as fix
from helpers.benchmark_fixtures import score, values

from macdrop.errors import ConfigError
from tune.config.eval_spec import EvalSpec
from tune.config.messages import build
from tune.config.recorded import TRUST, asked_for, orders_of
from tune.config.resume import MACHINERY, check_same
from tune.config.run_spec import dump, load
from tune.config.sections import EVAL_LOSS
from tune.evaluation.generation import GenerationBenchmark
from tune.evaluation.item_values import part_of
from tune.evaluation.own.code_files import CodeFiles, code_of
from tune.evaluation.own.own_metrics import load_metrics
from tune.evaluation.own.travel import at_home, own_files, recorded
from tune.evaluation.scorer import Scorer

MODEL = "model_name_or_path=zoo:planted-llama"
LENGTHS = """
import helper_of_lengths

def chars(answer, row):
    return len(answer)

def parts(answer, row):
    row.clear()  # another metric still sees the whole row
    return {"words": len(answer.split()), "long": len(answer) > 3}

def wanted(answer, row):
    return helper_of_lengths.same(answer, row["answer_key"])

def fails(answer, row):
    if row["answer_key"] == "b":
        raise KeyError("no grammar")
    return 1.0

fails.higher_is_better = False

def odd(answer, row):
    return {"a": float("nan"), "b": "x", "c": {"bad name!": 1}, "d": None}[row["answer_key"]]
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "lengths.py").write_text(LENGTHS)
    (tmp_path / "helper_of_lengths.py").write_text("def same(one, other):\n    return one == other\n")
    rows = [{"prompt": f"Question {key}", "answer_key": key} for key in "abcd"]
    fix.write_jsonl(tmp_path / "rows.jsonl", rows)
    return tmp_path


def block(folder: Path, *metrics: str, **keys) -> dict:
    entry = {"data": str(folder / "rows.jsonl"), "metrics": list(metrics), "max_new_tokens": 6, "template": "plain"}
    return {"code_path": str(folder), "generation": {"g": entry | keys}}


def kept(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_own_metrics_score_answers_by_their_rows(folder, model, tokenizer):
    """Rows need no reference; a mapping has a score per name; each value is that of a call by hand."""
    given = block(folder, "lengths:chars", "lengths:parts", "lengths:wanted")
    rows = score(model, tokenizer, given, answers_path=folder / "items.jsonl")
    answers = [item["answers"][-1] for item in kept(folder / "items.jsonl")]
    assert len(answers) == 4 and any(answers)
    assert values(rows) == {
        ("g", "chars"): sum(map(len, answers)) / 4,
        ("g", "parts.words"): sum(len(answer.split()) for answer in answers) / 4,
        ("g", "parts.long"): sum(len(answer) > 3 for answer in answers) / 4,
        ("g", "wanted"): sum(answer == key for answer, key in zip(answers, "abcd", strict=True)) / 4,
    }
    assert all(row["higher_is_better"] is True and row["n"] == 4 for row in rows)
    assert rows == score(model, tokenizer, given), "the same code scores the same"


def test_two_blocks_that_differ_in_a_metric_alone_have_other_scores(folder, model, tokenizer):
    one, other = (score(model, tokenizer, block(folder, f"lengths:{name}")) for name in ("chars", "wanted"))
    assert [row["metric"] for row in one] != [row["metric"] for row in other]


def test_conversations_are_scored_turn_by_turn(folder, model, tokenizer):
    fix.write_jsonl(
        folder / "talks.jsonl",
        [
            {"question_id": 1, "category": "qa", "turns": ["a?", "b?"], "answer_key": "a"},
            {"question_id": 2, "category": "qa", "turns": ["c?"], "answer_key": "b"},
        ],
    )
    given = block(folder, "lengths:chars", data=str(folder / "talks.jsonl"))
    rows = score(model, tokenizer, given, answers_path=folder / "items.jsonl")
    items = kept(folder / "items.jsonl")
    assert [item["metrics"]["chars"] for item in items] == [[len(a) for a in item["answers"]] for item in items]
    assert {"chars", "new_tokens"} <= {row["metric"] for row in rows}
    own = {row["metric"]: "+" in row["version"] for row in rows if row["task"] == "g"}
    assert own == {name: name == "chars" for name in own}, "only own metrics are versioned by their code"


def test_a_metric_that_fails_costs_its_own_values_only(folder, model, tokenizer):
    spec = build(EvalSpec, block(folder, "lengths:fails", "lengths:odd", "lengths:chars"))
    scorer = Scorer(model, tokenizer, spec)
    rows = {row["metric"]: row for row in scorer.score(scorer.jobs()[0], answers_path=folder / "items.jsonl")}
    assert (rows["fails"]["value"], rows["fails"]["n"]) == (1.0, 3) and "failed=1" in rows["fails"]["settings"].split()
    assert rows["fails"]["higher_is_better"] is False
    assert (rows["odd"]["value"], rows["odd"]["stderr"], rows["odd"]["n"]) == (None, None, 0)
    assert rows["chars"]["n"] == 4 and "failed" not in rows["chars"]["settings"]
    items = kept(folder / "items.jsonl")
    assert [item["metrics"]["fails"] for item in items] == [[1.0], [None], [1.0], [1.0]]
    assert [sorted(item["errors"]) for item in items] == [["lengths:odd"], ["lengths:fails", "lengths:odd"]] + [
        ["lengths:odd"]
    ] * 2
    assert items[1]["errors"]["lengths:fails"] == "KeyError: 'no grammar'"
    assert "not finite" in items[0]["errors"]["lengths:odd"] and "'x'" in items[1]["errors"]["lengths:odd"]
    first, second = sorted(note for note in scorer.notes if "failed on" in note)
    assert first == "generation/g: lengths:fails failed on 1 of 4 questions, first on 1: KeyError: 'no grammar'"
    assert "lengths:odd failed on 4 of 4" in second
    found = GenerationBenchmark.items(items, rows["fails"])
    assert found is not None and part_of(rows["fails"]) == ""
    assert sum(math.isnan(value) for value in found.values()) == 1, "pairs of adapters keep the same items"


def test_the_version_follows_the_code_and_what_it_imports(folder):
    def version(name: str) -> str:
        return load_metrics(str(folder), [f"{name}:chars"])[0].version

    (folder / "other.py").write_text("def chars(answer, row):\n    return 0\n")
    before = version("lengths")
    assert version("other") != before
    (folder / "other.py").write_text("def chars(answer, row):\n    return 1\n")
    assert version("lengths") == before, "a module that is not imported does not count"
    (folder / "helper_of_lengths.py").write_text("def same(one, other):\n    return False\n")
    assert version("lengths") != before
    assert load_metrics(str(folder), ["lengths:wanted"])[0].function("a", {"answer_key": "a"}) is False


def test_packages_and_relative_imports_travel(folder):
    package = folder / "grading"
    (package / "deep").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "deep" / "__init__.py").write_text("from ..words import count\n")
    (package / "words.py").write_text("def count(text):\n    import helper_of_lengths\n    return len(text)\n")
    (package / "unused.py").write_text("raise SystemExit\n")
    (package / "deep" / "scores.py").write_text("from . import count\ndef score(a, row):\n    return count(a)\n")
    code = code_of(folder, ["grading.deep.scores"])
    names = ["__init__", "deep/__init__", "deep/scores", "words"]
    assert sorted(code.files) == [*(f"grading/{name}.py" for name in names), "helper_of_lengths.py"]
    elsewhere = code.lay_out()
    assert elsewhere != folder and code_of(elsewhere, ["grading.deep.scores"]).version == code.version
    assert load_metrics(str(elsewhere), ["grading.deep.scores:score"])[0].values("abc", {}) == {"score": 3.0}


def test_an_actor_reads_the_files_that_travelled(folder, model, tokenizer):
    """Without the folder of the run file, as on another machine, and with the same version of the score."""
    spec = build(EvalSpec, block(folder, "lengths:wanted"))
    rows = score(model, tokenizer, block(folder, "lengths:wanted"))
    code = own_files(spec)
    assert code is not None
    for file in folder.glob("*.py"):
        file.unlink()
    scorer = Scorer(model, tokenizer, at_home(spec, code))
    assert scorer.score(scorer.jobs()[0]) == rows
    assert at_home(build(EvalSpec, {}), None) == build(EvalSpec, {})


def test_files_are_laid_out_whole(folder, tmp_path):
    code = CodeFiles({"a/b.py": b"x = 1\n"})
    place = code.lay_out()
    (place / "a/b.py").write_text("x = 2\n")
    assert (code.lay_out() / "a/b.py").read_bytes() == b"x = 1\n"
    assert code.version == CodeFiles({"a/b.py": b"x = 1\n"}).version != CodeFiles({"b.py": b"x = 1\n"}).version


# --- run files ---


def run_file(folder: Path, *metrics: str) -> Path:
    file = folder / "run.yaml"
    file.write_text(json.dumps({"model_name_or_path": "zoo:planted-llama", "eval": block(folder, *metrics)}))
    return file


def test_the_folder_of_the_run_file_is_recorded_with_its_code(folder):
    file = folder / "run.yaml"
    entry = block(folder, "lengths:chars")["generation"]
    file.write_text(json.dumps({"model_name_or_path": "zoo:planted-llama", "validation": {"generation": entry}}))
    spec = recorded(load(file))
    assert spec.validation.code_path == str(folder) and spec.eval.code_path is None
    code = own_files(spec.validation)
    assert code is not None and spec.validation.code_version == code.version
    again = folder / "again.yaml"
    again.write_text(json.dumps(dump(spec)))
    assert recorded(load(again)) == spec
    (folder / "helper_of_lengths.py").write_text("same = None\n")
    with pytest.raises(ConfigError, match="have changed") as error:
        recorded(load(again))
    assert "another run" in str(error.value)


def test_a_run_is_resumed_with_the_same_code_wherever_it_lies(folder):
    assert {"eval.code_path", "validation.code_path"} <= MACHINERY
    spec = recorded(load(run_file(folder, "lengths:chars")))
    moved = spec.model_copy(update={"eval": spec.eval.model_copy(update={"code_path": "/elsewhere"})})
    check_same(folder, dump(spec), dump(moved))
    other = spec.model_copy(update={"eval": spec.eval.model_copy(update={"code_version": "0"})})
    with pytest.raises(ConfigError, match=r"eval\.code_version"):
        check_same(folder, dump(spec), dump(other))


def test_code_of_a_run_folder_has_to_be_allowed(folder):
    config = dump(load(run_file(folder, "lengths:chars")))
    assert orders_of(config) == {TRUST: f"runs the code in {folder}"}
    assert orders_of(dump(load(None, [MODEL]))) == {}


def test_an_own_metric_can_be_an_objective_and_is_shown_if_it_is_first(folder):
    file, name = run_file(folder, "lengths:chars", "exact_match"), "generation/g/chars"
    assert asked_for(dump(load(file)))["g"] == "chars"
    rows = fix.write_jsonl(folder / "others.jsonl", [{"prompt": "x", "reference": "y"}])
    entry = {"data": rows, "metrics": ["lengths:chars"]}
    metric = [{"name": name, "goal": "maximize"}, {"name": EVAL_LOSS, "goal": "minimize"}]
    search = {"search_alg": "optuna", "parameters": {"learning_rate": [1e-4, 1e-3]}, "metric": metric}
    spec = load(file, [f"validation.generation.g={json.dumps(entry)}", f"sweep={json.dumps(search)}"])
    assert [each.name for each in spec.sweep.metric] == [name, EVAL_LOSS]


# --- refusals ---


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (["exactmatch"], "'exactmatch' is not a metric. Did you mean 'exact_match'"),
        (["lengths"], "MODULE:FUNCTION"),
        (["lengths.py:chars:x"], "is not a metric"),
        (["lengths:chars", "others:chars"], "two of the name 'chars'"),
        (["exact_match", "mine:exact_match"], "two of the name 'exact_match'"),
    ],
)
def test_names_that_are_no_metrics_are_refused(folder, metrics, message):
    with pytest.raises(ConfigError, match="metrics") as error:
        build(EvalSpec, block(folder, *metrics))
    assert message in str(error.value)


@pytest.mark.parametrize("key", ["code_path", "code_version"])
def test_keys_without_an_own_metric_are_refused(key):
    with pytest.raises(ConfigError, match=f"{key} is for metrics of your own"):
        build(EvalSpec, {key: "x"})


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("lenghts:chars", "no module 'lenghts'.*Modules there: .*helper_of_lengths.*lengths"),
        ("lengths:char", "no function 'char'.*'chars'"),
        ("broken:score", r"broken\.py, line 2 is not valid Python"),
        ("absent:score", "absent in .* cannot be imported: ModuleNotFoundError"),
        ("leaves:score", "cannot be imported: SystemExit"),
        ("one:score", "must take two arguments"),
        ("json:loads", "has the name of an installed package"),
        ("yaml:load", "has the name of an installed package"),
    ],
)
def test_modules_that_cannot_be_used_are_refused_before_anything_is_scored(folder, metric, message):
    (folder / "broken.py").write_text("def score(a, row):\nreturn 1\n")
    (folder / "absent.py").write_text("import a_package_nobody_has\nscore = None\n")
    (folder / "leaves.py").write_text("raise SystemExit(3)\n")
    (folder / "one.py").write_text("def score(answer):\n    return 1\n")
    (folder / "json.py").write_text("def loads(answer, row):\n    return 1\n")
    (folder / "yaml.py").write_text("def load(answer, row):\n    return 1\n")
    spec, before = build(EvalSpec, block(folder, metric)), dict(sys.modules)
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        GenerationBenchmark.check("g", spec.generation["g"], spec)
    assert sys.modules["json"] is before["json"]


def test_text_metrics_still_need_references(folder, model, tokenizer):
    with pytest.raises(Exception, match="'reference'"):
        score(model, tokenizer, block(folder, "lengths:chars", "chrf"))

"""The eval block: accepted and refused values, its jobs, and the checks of its files."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from macdrop.errors import ConfigError, DataError
from tune.config.eval_spec import EvalJob, EvalSpec, jobs
from tune.config.messages import build
from tune.evaluation.benchmark import check_files


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


CHOICE = {"context": "two and two", "choices": ["four", "five"], "label": 0}


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, tune.evaluation, tune.config.eval_spec, tune.evaluation.check; "
        "print([m for m in ('torch', 'transformers', 'lm_eval', 'datasets', 'peft', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_jobs_are_entries_times_attacks_in_file_order():
    spec = build(
        EvalSpec,
        {
            "attacks": ["none", "zeroing@3"],
            "zero_shot": ["arc_easy", "piqa"],
            "perplexity": {"text": {"data": "a.txt", "attacks": "none"}},
            "generation": {"q": "q.jsonl"},
        },
    )
    found = jobs(spec)
    assert [job.key for job in found] == [
        "zero_shot/arc_easy/none",
        "zero_shot/arc_easy/zeroing@3/base",
        "zero_shot/piqa/none",
        "zero_shot/piqa/zeroing@3/base",
        "perplexity/text/none",
        "generation/q/none",
        "generation/q/zeroing@3/base",
    ]
    assert pickle.loads(pickle.dumps(found)) == found and len(set(found)) == len(found)


def test_an_attack_on_both_places_is_two_jobs_and_the_plain_score_one():
    spec = build(EvalSpec, {"attacks": ["none", "retaining@0"], "attack_on": "both", "zero_shot": "piqa"})
    assert [(job.attack, job.attack_on) for job in jobs(spec)] == [
        ("none", None),
        ("retaining@0", "base"),
        ("retaining@0", "merged"),
    ]


def test_an_entry_inherits_keys_it_does_not_set_and_null_counts_as_set():
    spec = build(EvalSpec, {"limit": 5, "zero_shot": {"a": {"limit": None}, "b": {"limit": 2}, "c": {}}})
    assert [spec.inherited(spec.entry(EvalJob("zero_shot", name)), "limit") for name in "abc"] == [None, 2, 5]


def test_a_spec_survives_a_round_trip():
    spec = build(
        EvalSpec,
        {
            "limit": 5,
            "num_fewshot": 2,
            "attacks": ["none", "zeroing@3"],
            "zero_shot": {"a": {}, "b": {"limit": None, "num_fewshot": 0}},
            "perplexity": {"t": {"data": "t.txt", "attacks": "none"}},
            "generation": {"g": {"data": "q.jsonl", "limit": "3 per category"}},
        },
    )
    for again in (build(EvalSpec, spec.model_dump(mode="json")), pickle.loads(pickle.dumps(spec))):
        assert jobs(again) == jobs(spec)
        for job in jobs(spec):
            for key in (
                ("limit", "batch_size", "num_fewshot") if job.benchmark == "zero_shot" else ("limit", "batch_size")
            ):
                assert again.inherited(again.entry(job), key) == spec.inherited(spec.entry(job), key), (job, key)


def test_an_empty_block_has_no_jobs():
    assert jobs(EvalSpec()) == jobs(build(EvalSpec, {})) == []


def test_limit_per_category_can_be_written_out():
    assert build(EvalSpec, {"generation": {"s": {"data": "q", "limit": "2 per category"}}}).generation["s"].limit == 2


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"atacks": ["none"]}, ["atacks", "Did you mean 'attacks'"]),
        ({"attacks": ["zeroin@3"]}, ["zeroin@3", "Did you mean 'zeroing'"]),
        ({"attacks": ["zeroing"]}, ["zeroing@3"]),
        ({"attacks": ["zeroing@-1"]}, ["at least 0"]),
        ({"attacks": []}, ["no attack"]),
        ({"attacks": ["none", "none"]}, ["twice"]),
        ({"attacks": 3}, ["a list of attacks"]),
        ({"zero_shot": 3}, ["list of names"]),
        ({"zero_shot": {"piqa": [1]}}, ["zero_shot.piqa"]),
        ({"perplexity": {"w": []}}, ["perplexity.w"]),
        ({"perplexity": {"w": {"data": []}}}, ["perplexity.w.data must be a list of at least 1, not []"]),
        ({"attack_on": "adapter"}, ["attack_on", "'adapter'"]),
        ({"batch_size": "auto"}, ["batch_size", "whole number", "'auto'"]),
        ({"limit": 0}, ["limit", "above 0"]),
        ({"limit": 0.5}, ["limit"]),
        ({"num_fewshot": -1}, ["num_fewshot"]),
        ({"zero_shot": {"piqa": {"dta": "x"}}}, ["zero_shot.piqa.dta", "Did you mean 'data'"]),
        ({"zero_shot": ["piqa", "piqa"]}, ["twice"]),
        ({"zero_shot": ["piqa", []]}, ["[] is not a name"]),
        ({"zero_shot": [3]}, ["3 is not a name"]),
        ({"zero_shot": {"piqa": {"fewshot_data": "x"}}}, ["give data"]),
        ({"perplexity": {"w": {}}}, ["perplexity.w.data is missing"]),
        ({"zero_shot": {"piqa": {"task": ""}}}, ["task must be a text that is not empty"]),
        ({"perplexity": {"w": {"data": "x", "window": 8, "stride": 8}}}, ["stride 8", "at most 7"]),
        ({"generation": {"g": {"data": "x", "metrics": ["bleu"]}}}, ["exact_match", "'bleu'"]),
        ({"generation": {"g": {"data": "x", "format": "spec_bench", "metrics": ["chrf"]}}}, ["references"]),
        ({"generation": {"g": {"data": "x", "limit": "two per category"}}}, ["limit"]),
    ],
)
def test_bad_blocks_are_refused_with_key_and_remedy(block, words):
    with pytest.raises(ConfigError) as error:
        build(EvalSpec, block)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("section", ["zero_shot", "perplexity", "generation"])
@pytest.mark.parametrize(
    "name",
    [
        *("a/b", "a\\b", "a@b", "a\nb", "a\x00", "\x1b[2J", "x" * 121, "\u00fc" * 61, " a", "a ", ".a", "\ud800"),
        *("mean", "mean of 2", "mean acc of 2"),
    ],
)
def test_a_name_that_no_file_or_score_can_have_is_refused(section, name):
    """One rule for all benchmarks: each has a file of its own, and none is taken for a mean."""
    with pytest.raises(ConfigError) as error:
        build(EvalSpec, {section: {name: {"data": "x.txt"}}})
    assert f"{section}: " in str(error.value) and str(error.value).isprintable()


def test_names_of_any_language_have_files_of_their_own():
    names = ["a-b", "a_b", "a b", "mean_acc", "means", "\u6e2c\u9a57", "x" * 120, "a.b"]
    files = [job.file_name for job in jobs(build(EvalSpec, {"attacks": ["zeroing@3"], "zero_shot": names}))]
    assert len(set(files)) == len(names) and all(len(file.encode()) < 200 for file in files)


def test_paths_have_no_control_characters():
    with pytest.raises(ConfigError, match=r"perplexity.w.data.*'\\x00'"):
        build(EvalSpec, {"perplexity": {"w": "a\x00.txt"}})


def checked(**block: object) -> None:
    check_files(build(EvalSpec, block))


def test_good_files_pass(tmp_path):
    (tmp_path / "text.txt").write_text("some text")
    question = {"question_id": 1, "category": "math", "turns": ["2 + 2?"]}
    checked(
        zero_shot={"mine": write(tmp_path / "qa.jsonl", CHOICE), "piqa": {}, "zoo_qa": "zoo:qa"},
        perplexity={"text": str(tmp_path / "text.txt"), "hub": {"data": "Salesforce/wikitext"}},
        generation={
            "spec": write(tmp_path / "spec.jsonl", question),
            "pairs": write(tmp_path / "pairs.jsonl", {"prompt": "a", "reference": ["b", "c"]}),
            "alpaca": write(tmp_path / "alpaca.jsonl", {"instruction": "a", "input": "", "output": "b"}),
        },
    )


def test_the_same_rows_are_read_from_every_format(tmp_path):
    import pandas as pd

    from tune.data.local_rows import read_rows

    rows = [{"prompt": "a, b\nc", "reference": "x"}, {"prompt": "d", "reference": "ü"}]
    jsonl = write(tmp_path / "r.jsonl", *rows)
    (tmp_path / "r.json").write_text(json.dumps(rows, indent=1))
    pd.DataFrame(rows).to_csv(tmp_path / "r.csv", index=False)
    pd.DataFrame(rows).to_parquet(tmp_path / "r.parquet")
    for name in ("r.json", "r.csv", "r.parquet"):
        assert read_rows([str(tmp_path / name)]).rows == read_rows([jsonl]).rows == rows
    assert read_rows([jsonl, jsonl]).rows == rows + rows


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([CHOICE, {"context": "x", "label": 0}], ["line 2", "'choices'"]),
        ([CHOICE, {**CHOICE, "label": 2}], ["line 2", "'label'", "0 to 1"]),
        ([{**CHOICE, "label": "four"}], ["line 1", "'label'"]),
        ([{**CHOICE, "choices": ["four"]}], ["at least two"]),
        ([{"question": "x"}], ["not a task of lm-eval", "'context', 'choices', 'label'"]),
    ],
)
def test_bad_choice_rows_are_named_by_file_line_and_column(tmp_path, rows, words):
    path = write(tmp_path / "qa.jsonl", *rows)
    with pytest.raises(DataError) as error:
        checked(zero_shot={"my_questions": path})
    assert all(word in str(error.value) for word in ["qa.jsonl", *words]), str(error.value)


def test_rows_that_lack_the_columns_of_an_lm_eval_task_are_named(tmp_path):
    path = write(tmp_path / "p.jsonl", {"goal": "g", "sol1": "a", "sol2": "b", "label": 0}, {"goal": "g", "sol1": "a"})
    with pytest.raises(DataError, match=r"p.jsonl, line 2: no 'label', 'sol2' for lm-eval's task 'piqa'"):
        checked(zero_shot={"piqa": path})


def test_other_bad_files(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "reference": "b"}\n{"prompt": \n')
    (tmp_path / "blank.txt").write_text(" \n")
    write(tmp_path / "numbers.jsonl", {"a": 1})
    cases = {
        "empty.jsonl": "is empty",
        "brokn.jsonl": "Did you mean 'broken.jsonl'",
        "broken.jsonl": "line 2: not valid JSON",
        "numbers.jsonl": "fit no generation format",
        "blank.txt": "rows are read from",
    }
    for name, words in cases.items():
        with pytest.raises(DataError, match=words):
            checked(generation={"g": str(tmp_path / name)})
    with pytest.raises(DataError, match="No text"):
        checked(perplexity={"p": str(tmp_path / "blank.txt")})
    with pytest.raises(ConfigError, match="nothing called 'zoo:qaa'.* Did you mean"):
        checked(zero_shot={"x": "zoo:qaa"})


def test_an_unknown_task_without_data_gets_the_nearest_name():
    with pytest.raises(ConfigError, match="no task 'arc_esy'. Did you mean 'arc_easy'"):
        checked(zero_shot=["arc_esy"])


def test_groups_and_tags_of_lm_eval_are_known():
    checked(zero_shot=["mmlu", "ai2_arc"])


def test_few_shot_examples_never_come_from_the_rows_that_are_scored(tmp_path):
    row = {"question": "q", "answer": "#### 1"}
    data = write(tmp_path / "test.jsonl", row)
    with pytest.raises(ConfigError, match="5 few-shot examples .*\n.*fewshot_data"):
        checked(num_fewshot=None, zero_shot={"gsm8k": data})
    checked(num_fewshot=None, zero_shot={"gsm8k": {"data": data, "fewshot_data": write(tmp_path / "train.jsonl", row)}})


def test_metrics_on_questions_without_references_are_refused(tmp_path):
    path = write(tmp_path / "s.jsonl", {"question_id": 1, "category": "c", "turns": ["t"]})
    with pytest.raises(ConfigError, match="need references"):
        checked(generation={"s": {"data": path, "metrics": ["chrf"]}})


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"prompt": "", "reference": "a"}, "'prompt'"),
        ({"prompt": "a", "reference": []}, "'reference'"),
        ({"instruction": "a", "input": ""}, "'output'"),
        ({"question_id": 1, "category": "c", "turns": "one"}, "'turns'"),
        ({"question_id": 1, "turns": ["one"]}, "'category'"),
    ],
)
def test_bad_generation_rows_are_named(tmp_path, row, column):
    with pytest.raises(DataError, match=rf"g.jsonl, line 1.*{column}"):
        checked(generation={"g": write(tmp_path / "g.jsonl", row)})


def test_rows_of_our_own_format_under_the_name_of_an_lm_eval_task_are_refused(tmp_path):
    with pytest.raises(DataError, match="no 'answerKey', 'question' for lm-eval's task 'arc_easy'"):
        checked(zero_shot={"arc_easy": write(tmp_path / "qa.jsonl", CHOICE)})


def test_errors_survive_pickling(tmp_path):
    with pytest.raises(DataError) as error:
        checked(generation={"g": str(tmp_path / "none.jsonl")})
    again = pickle.loads(pickle.dumps(error.value))
    assert type(again) is DataError and str(again) == str(error.value)

"""tune.analysis.items: what scores were averaged from, of synthetic runs and of what the scorer really writes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from helpers import benchmark_fixtures as fix
from helpers.run_folders import make_run

from macdrop.errors import DataError
from tune.analysis.items import Items, matched
from tune.config.eval_spec import EvalSpec
from tune.config.messages import build
from tune.evaluation.score_names import Column
from tune.evaluation.scorer import Scorer
from tune.storage.run_folder import RunFolder

MODEL = "zoo:planted-llama"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> RunFolder:
    folder = tmp_path_factory.mktemp("runs") / "run"
    return make_run(folder, judge=True, seeds=(1, 2), items=12, attacks=("none", "zeroing@3"), tried=1)


def of_arm(run_folder: RunFolder, arm: str) -> list[str]:
    return [t.trial for t in run_folder.trials() if (t.arm, t.stage) == (arm, "final")]


def score_of(values: list) -> float:
    """A score by its definition."""
    if isinstance(values[0], tuple):
        return math.exp(math.fsum(nll for nll, _ in values) / math.fsum(n for _, n in values))
    known = [value for value in values if not math.isnan(value)]
    return math.fsum(known) / len(known)


def check(run_folder: RunFolder, model: str) -> set[str]:
    """Every score is what its items average to; returns the benchmarks seen."""
    items, seen = Items(run_folder, model), set()
    for row in run_folder.score_rows():
        found = items.read(row["trial"], Column.of(row), row.get("split") or "test")
        assert found is not None, row
        assert score_of(list(found.values())) == pytest.approx(row["value"])
        parsed = [value for value in found.values() if isinstance(value, tuple) or not math.isnan(value)]
        windows = sum(value[1] for value in found.values()) if row["benchmark"] == "perplexity" else len(parsed)
        assert windows == row["n"]
        seen.add(row["metric"])
    return seen


def test_items_of_a_run_average_to_its_scores(run_folder):
    seen = check(run_folder, MODEL)
    assert seen >= {"acc", "acc_norm", "perplexity", "exact_match", "new_tokens", "judge_score", "judge_unparsed"}


def test_items_of_what_the_scorer_writes_average_to_its_scores(tmp_path, monkeypatch):
    fix.refuse_connections(monkeypatch)
    model, tokenizer = fix.tiny_llama(), fix.byte_tokenizer()
    question = {"question_id": 1, "category": "writing", "turns": ["Say a word.", "And another."]}
    text = tmp_path / "text.txt"
    text.write_text(fix.TEXT)
    prompts = [{"prompt": f"Say {word}", "reference": word} for word in fix.WORDS]
    block = {
        "zero_shot": {"arc_easy": fix.write_jsonl(tmp_path / "arc.jsonl", fix.hub_rows("arc_easy", 8))},
        "perplexity": {"text": {"data": str(text), "window": 48}},
        "generation": {
            "prompts": {"data": fix.write_jsonl(tmp_path / "prompts.jsonl", prompts), "max_new_tokens": 3},
            "spec": {
                "data": fix.write_jsonl(
                    tmp_path / "spec.jsonl",
                    [question, {**question, "question_id": 2, "category": "math", "turns": ["1 + 1"]}],
                ),
                "max_new_tokens": 3,
            },
        },
    }
    run_folder = RunFolder.create(tmp_path / "run", {"eval": block})
    scorer = Scorer(model, tokenizer, build(EvalSpec, block))
    for job in scorer.jobs():
        file = run_folder.answers_file("org/tiny", "base", job)
        tag = {"model": "org/tiny", "trial": "base", "arm": "base", "entry": job.task}
        run_folder.add_scores([{**tag, **row} for row in scorer.score(job, answers_path=file)])
    assert check(run_folder, "org/tiny") >= {"acc", "perplexity", "chrf", "rouge_l", "exact_match", "repeated_4grams"}


def test_two_trials_have_the_same_ids_and_other_items_are_refused(run_folder):
    (first, second), column = of_arm(run_folder, "plain"), Column("zero_shot", "qa", "acc")
    mine, theirs = (Items(run_folder, MODEL).read(trial, column) for trial in (first, second))
    assert matched(mine, theirs, "qa") == list(mine) and len(mine) == 12
    fewer = dict(list(theirs.items())[:-1])
    with pytest.raises(DataError, match="12 and 11; only one has qa/11 .*The limit or the data differed"):
        matched(mine, fewer, "qa")
    changed = {key.replace("qa/3 ", "qa/3 0"): value for key, value in theirs.items()}
    with pytest.raises(DataError, match="different items"):
        matched(mine, changed, "qa")


def test_nothing_is_made_up_where_items_are_missing(run_folder):
    trial = of_arm(run_folder, "plain")[0]
    assert Items(run_folder, MODEL).read(trial, Column("zero_shot", "no such task", "acc")) is None
    assert Items(run_folder, MODEL).read("no-such-trial", Column("zero_shot", "qa", "acc")) is None
    assert Items(run_folder, MODEL).read(trial, Column("zero_shot", "qa", "acc"), split="validation") is None


def test_damaged_answers_are_named(tmp_path):
    run_folder = make_run(tmp_path / "run", seeds=(1,), arms=("plain",), items=4, attacks=("none",), tried=1)
    trial, column = of_arm(run_folder, "plain")[0], Column("zero_shot", "qa", "acc")
    file = run_folder.answers_dir(MODEL, trial) / "zero_shot-qa-none.jsonl"
    whole = file.read_text()
    file.write_text(whole.replace("{", "", 1))
    with pytest.raises(DataError, match=r"zero_shot-qa-none.jsonl, line 1: not JSON"):
        Items(run_folder, MODEL).read(trial, column)
    file.write_text(whole.replace('"acc": 1.0', '"acc": 0.0'))
    with pytest.raises(DataError, match="items of zero_shot/qa/acc average 0, but its score is"):
        Items(run_folder, MODEL).read(trial, column)
    file.write_text(whole.replace('"metrics"', '"metric"', 1))
    with pytest.raises(DataError, match="zero_shot-qa-none.jsonl: an item has no 'metrics'; the file is damaged"):
        Items(run_folder, MODEL).read(trial, column)
    file.unlink()
    assert Items(run_folder, MODEL).read(trial, column) is None


@pytest.mark.parametrize("weighted", [True, False])
def test_a_group_has_the_items_of_its_members(tmp_path, weighted):
    """lm-eval averages a group over items or over members; either way items average to the group's score."""
    run_folder = RunFolder.create(tmp_path / "run", {})
    hits = {"long": [1, 1, 0, 1, 0, 1], "short": [0, 1]}
    items = [
        {"task": task, "doc_id": i, "doc_hash": f"{i:064d}", "filter": "none", "metrics": {"acc": float(hit)}}
        for task, found in hits.items()
        for i, hit in enumerate(found)
    ]
    _write(run_folder.answers_dir("m", "t") / "zero_shot-group-none.jsonl", items)
    values = {"group/long": 4 / 6, "group/short": 0.5, "group": 5 / 8 if weighted else (4 / 6 + 0.5) / 2}
    common = {"model": "m", "trial": "t", "arm": "plain", "benchmark": "zero_shot", "metric": "acc", "entry": "group"}
    common |= {"attack": "none", "attack_on": None, "stderr": 0.1}
    run_folder.add_scores({**common, "task": task, "value": value} for task, value in values.items())
    for task, value in values.items():
        found = Items(run_folder, "m").read("t", Column("zero_shot", task, "acc"))
        assert math.fsum(found.values()) / len(found) == pytest.approx(value)
        assert len(found) == {"group": 8, "group/long": 6, "group/short": 2}[task]


def test_lm_evals_own_perplexities_and_aggregations(tmp_path):
    run_folder = RunFolder.create(tmp_path / "run", {})
    items = [
        {
            "task": "wikitext",
            "doc_id": i,
            "doc_hash": "0" * 64,
            "filter": "none",
            "metrics": {"word_perplexity": [-10.0 * (i + 1), 5], "f1": [1, 0]},
        }
        for i in range(3)
    ]
    _write(run_folder.answers_dir("m", "t") / "zero_shot-wikitext-none.jsonl", items)
    common = {"model": "m", "trial": "t", "arm": "plain", "benchmark": "zero_shot", "task": "wikitext"}
    common |= {"attack": "none", "attack_on": None, "entry": "wikitext"}
    run_folder.add_scores([{**common, "metric": "word_perplexity", "value": math.exp(60 / 15)}])
    run_folder.add_scores([{**common, "metric": "f1", "value": 0.4}])
    found = Items(run_folder, "m").read("t", Column("zero_shot", "wikitext", "word_perplexity"))
    assert list(found.values()) == [(10.0, 5.0), (20.0, 5.0), (30.0, 5.0)]
    assert Items(run_folder, "m").read("t", Column("zero_shot", "wikitext", "f1")) is None


def _write(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

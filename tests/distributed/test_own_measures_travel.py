"""Own metrics and tasks in an evaluation actor that cannot see their folder; the actor's class, without Ray."""

from __future__ import annotations

import json
from pathlib import Path

import cloudpickle
from helpers import benchmark_fixtures as fix

from tune.config.eval_spec import TEST, EvalJob
from tune.config.run_spec import load
from tune.distributed.actors.eval_task import EvalTask
from tune.distributed.actors.evaluators import Evaluator, Opening
from tune.evaluation.own.travel import own_files

TASK = """
task: is_wet
output_type: multiple_choice
dataset_path: json
dataset_kwargs: {data_files: {test: wet.jsonl}}
test_split: test
doc_to_text: "Is {{thing}} wet?"
doc_to_choice: !function answers.choices
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def test_an_actor_needs_nothing_but_what_it_is_sent(tmp_path, monkeypatch):
    """What is pickled for the actor is enough: the folders of the run file are gone before it is opened."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    here = tmp_path / "recipe"
    (here / "tasks").mkdir(parents=True)
    (here / "counts_words.py").write_text("from its_helper import words\ndef count(a, row):\n    return words(a)\n")
    (here / "its_helper.py").write_text("def words(text):\n    return len(text.split())\n")
    (here / "tasks/is_wet.yaml").write_text(TASK)
    (here / "tasks/answers.py").write_text("def choices(doc):\n    return ['yes', 'no']\n")
    fix.write_jsonl(here / "tasks/wet.jsonl", [{"thing": word, "label": 0} for word in fix.WORDS[:4]])
    rows = fix.write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"Say {word}"} for word in fix.WORDS[:4]])
    block = {
        "task_path": str(here / "tasks"),
        "zero_shot": ["is_wet"],
        "generation": {"g": {"data": rows, "max_new_tokens": 4, "metrics": ["counts_words:count"]}},
    }
    (here / "run.yaml").write_text(json.dumps({"model_name_or_path": "zoo:planted-llama", "eval": block}))
    spec = load(here / "run.yaml")
    weights = str(tmp_path / "none.json")
    own = {TEST: own_files(spec.eval)}
    sent = Opening(spec.studies()[0], {TEST: spec.eval}, weights, scan=False, k=1, threads=1, own=own)
    pickled = cloudpickle.dumps(sent)
    here.rename(tmp_path / "gone")
    actor = Evaluator()
    actor.prepare(cloudpickle.loads(pickled))
    found = {}
    for job in (EvalJob("zero_shot", "is_wet"), EvalJob("generation", "g")):
        file = tmp_path / "answers" / job.file_name
        result = actor.score(EvalTask({}, job, None, str(file)))
        found |= {row["metric"]: row for row in result.rows}
        assert Path(file).is_file() and not [note for note in result.notes if "failed" in note]
    items = [json.loads(line) for line in file.read_text().splitlines()]
    assert found["count"]["value"] == sum(len(item["answers"][0].split()) for item in items) / 4
    assert found["acc"]["n"] == 4 and "+" in found["acc"]["version"] and found["count"]["version"].startswith("2+")

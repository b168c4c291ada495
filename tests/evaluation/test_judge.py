"""Judging without a model: parsing of scores, prompts, rubrics, references, rows, the block `eval.judge:`."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest
import yaml
from helpers.judge_fixtures import CONVERSATIONS

from macdrop.errors import ConfigError, DataError
from tune.config.eval_spec import EvalSpec
from tune.config.judge_spec import JudgeSpec
from tune.config.messages import build
from tune.config.rubrics import FOLDER, load
from tune.evaluation.judge import prompt as judging
from tune.evaluation.judge.prompt import Judgement, Question, Reply, assess, parse, prompt, questions

READ = {
    "Feedback: It is right. [RESULT] 4": 4,
    "It is right. [RESULT] 1": 1,
    "[RESULT] 5": 5,
    "x [RESULT]3": 3,
    "x [RESULT]\n3": 3,
    "x [result] 3": 3,
    "x [SCORE] 3": 3,
    "x [RESULT]: 3": 3,
    "x [RESULT] (3)": 3,
    "x [RESULT] [3]": 3,
    "x [RESULT] **3**": 3,
    "x **[RESULT]** 3": 3,
    "x **[RESULT] 3**": 3,
    "x [RESULT] 3.": 3,
    "x [RESULT] 3/5": 3,
    "x [RESULT] 3 / 5": 3,
    "x [RESULT] 3 out of 5.": 3,
    'x [RESULT] 3"': 3,
    "x [RESULT] 3  \n\nAnything that follows.": 3,
    "[RESULT] 3\nIn short: [RESULT] 3": 3,
    "It is right.\nScore: 3": 3,
    "It is right.\n**Result:** 3/5\n": 3,
    "<think>Perhaps [RESULT] 1</think>It is right. [RESULT] 3": 3,
    "A score of 2 would be unfair, 1 too. [RESULT] 3": 3,
}
UNREAD = [
    "",
    "It is right.",
    "4",
    "It is right. 4",
    "A score of 4.",
    "Score: 4 would be fair.\nSo it is.",
    "[RESULT]",
    "[RESULT] four",
    "[RESULT] (an integer number between 1 and 5)",
    "[RESULT] 0",
    "[RESULT] 6",
    "[RESULT] -3",
    "[RESULT] 45",
    "[RESULT] 10",
    "[RESULT] 4.5",
    "[RESULT] 4,5",
    "[RESULT] 4-5",
    "[RESULT] 4/10",
    "[RESULT] 80/100",
    "[RESULT] 3 or 4",
    "[RESULT] 4 because it is right",
    "[RESULT] (4",
    "[RESULT] 4)",
    "[RESULT] 4%",
    "[RESULT] ４",
    "[RESULT] 3\n[RESULT] 4",
    "[RESULT] 3\n[RESULT] none",
    "Score: 3.5",
    "Score: 3\nScore: 4.5",
    "Score: 3\nScore: 4",
    "Result: 3\nIt is right.",
    "<think>[RESULT] 4</think>I cannot tell.",
]


@pytest.mark.parametrize("text", READ)
def test_scores_in_the_requested_form_are_parsed(text):
    assert parse(text) == READ[text]


@pytest.mark.parametrize("text", UNREAD)
def test_other_forms_are_not_scores(text):
    assert parse(text) is None


def test_prompt_equals_prometheus_2():
    scale = load("helpfulness").default
    text = prompt("Who?", "Ada.", scale.text(), "Ada Lovelace.")
    headings = [line for line in text.splitlines() if line.startswith("###")]
    assert headings == [
        "###Task Description:",
        "###The instruction to evaluate:",
        "###Response to evaluate:",
        "###Reference Answer (Score 5):",
        "###Score Rubrics:",
        "###Feedback: ",
    ]
    assert text.startswith("You are a fair judge assistant tasked with providing clear, objective feedback")
    assert '"Feedback: (write a feedback for criteria) [RESULT] (an integer number between 1 and 5)"' in text
    assert "a reference answer that gets a score of 5, and a score rubric representing" in text
    assert f"###Score Rubrics:\n[{scale.criteria}]\nScore 1: {scale.scores[0]}\nScore 2: " in text
    assert "###Response to evaluate:\nAda.\n\n###Reference Answer (Score 5):\nAda Lovelace.\n\n" in text
    without = prompt("Who?", "Ada.", scale.text())
    assert "eference" not in without and "a response to evaluate, and a score rubric representing" in without


def test_braces_in_answers_are_kept():
    assert "{given} {x}" in prompt("{0}", "{given} {x}", "rubric")


def test_every_turn_is_judged_with_the_preceding_conversation():
    found = questions(CONVERSATIONS, load("spec_bench"), reference=True)
    assert [q.item for q in found] == ["81/1", "81/2", "82/1", "82/2", "481/1", "482/1"]
    second = found[1].prompt
    said = "User: Write.\n\nAssistant: A poem.\n\nUser: Shorten it."
    assert f"###The instruction to evaluate:\n{said}\n\n###Response to evaluate:\nPoem.\n\n" in second
    assert "writing request" in second and "answers the question" not in second
    assert "Ada Lovelace." in found[4].prompt and "###Reference" not in found[5].prompt
    hidden = questions(CONVERSATIONS, load("spec_bench"), reference=False)
    assert "Ada Lovelace." not in hidden[4].prompt
    assert found[4].digest != hidden[4].digest and found[5].digest == hidden[5].digest


def test_references_of_every_shape():
    of = judging.reference_of
    turns = {"turns": ["a", "b"], "category": "math"}
    assert [of({**turns, "reference": ["3", "5pi"]}, turn) for turn in (0, 1)] == ["3", "5pi"]
    assert [of({**turns, "reference": ["3", ""]}, turn) for turn in (0, 1)] == ["3", None]
    assert [of({**turns, "reference": ["3"]}, turn) for turn in (0, 1)] == ["3", None]
    assert [of({**turns, "reference": "3"}, turn) for turn in (0, 1)] == ["3", None]
    assert of({**turns, "reference": [["wood", "food"]]}, 0) == "wood\nfood"
    assert of({"category": "", "reference": ["wood", "food"]}, 0) == "wood\nfood"
    assert of({"category": ""}, 0) is None
    row = {"turns": ["Add."], "input": "1 2", "answers": ["3"]}
    assert judging.conversation(row, 0) == "Add.\n1 2"


def test_files_without_answers_are_refused():
    with pytest.raises(DataError, match="no question_id"):
        questions([{"question_id": 1, "hits": 3}], load("helpfulness"), reference=True)
    with pytest.raises(DataError, match="'81' occurs twice"):
        questions([CONVERSATIONS[0]] * 2, load("helpfulness"), reference=True)


# --- asking ---


def test_only_unparsable_feedback_is_requested_again():
    asked = [Question(str(i), "", 1, f"prompt {i}") for i in range(4)]
    rounds = []

    def ask(some, attempt):
        rounds.append(([q.item for q in some], attempt))
        replies = {"0": "[RESULT] 1", "1": "[RESULT] 2" if attempt else "?", "2": "?"}
        return [Reply(replies[q.item], tokens=(10, 1)) if q.item != "3" else Reply(error="gone") for q in some]

    judged = assess(asked, ask, retries=2)
    assert rounds == [(["0", "1", "2", "3"], 0), (["1", "2"], 1), (["2"], 2)]
    assert [j.score for j in judged] == [1, 2, None, None]
    assert [j.feedback for j in judged] == [["[RESULT] 1"], ["?", "[RESULT] 2"], ["?"] * 3, []]
    assert judged[2].tokens == (30, 3) and judged[3].error == "gone"
    row = judged[1].row()
    assert (row["item"], row["score"], row["attempts"], row["error"]) == ("1", 2, 2, None)
    json.dumps(row)


# --- rows ---


def test_rows_are_means_over_parsed_answers_of_every_group():
    scores = {"81/1": 4, "81/2": 2, "82/1": None, "82/2": 3, "481/1": 5, "482/1": None}
    kept = []
    for question in questions(CONVERSATIONS, load("spec_bench"), reference=True):
        kept.append(Judgement(question, scores[question.item], ["x"]).row())
    rows = {(row["task"], row["metric"]): row for row in judging.rows("bench", kept)}
    assert set(task for task, _ in rows) == {"bench", "bench/multi_turn", "bench/writing", "bench/qa"}
    whole = rows["bench", "judge_score"]
    assert (whole["value"], whole["n"], whole["higher_is_better"]) == (3.5, 4, True)
    assert math.isclose(whole["stderr"], math.sqrt((0.25 + 2.25 + 0.25 + 2.25) / 3 / 4))
    assert rows["bench", "judge_unparsed"]["value"] == 2 / 6 and rows["bench", "judge_unparsed"]["n"] == 6
    assert rows["bench/multi_turn", "judge_score"]["value"] == 3 and rows["bench/qa", "judge_score"]["n"] == 1
    assert rows["bench/qa", "judge_score"]["stderr"] is None


def test_score_without_parsed_feedback_is_missing_not_zero():
    kept = [Judgement(Question("1/1", "", 1, "p")).row()]
    rows = {row["metric"]: row for row in judging.rows("bench", kept)}
    assert rows["judge_score"]["value"] is None and rows["judge_score"]["n"] == 0
    assert rows["judge_unparsed"]["value"] == 1


# --- rubrics ---


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_shipped_rubrics_have_five_distinct_scores_and_their_own_name(name):
    rubric = load(name)
    assert rubric.name == name and rubric.about and rubric.id.startswith(f"{name}@1#")
    for scale in (rubric.default, *rubric.categories.values()):
        assert len(set(scale.scores)) == 5


def test_spec_bench_has_a_rubric_for_every_category():
    wanted = "writing roleplay reasoning math coding extraction stem humanities translation summarization qa rag"
    assert set(load("spec_bench").categories) == {*wanted.split(), "math_reasoning"}


def test_custom_rubric(tmp_path):
    file = tmp_path / "mine.yaml"
    own = {"name": "mine", "version": 2, "default": {"criteria": "Short?", "scores": list("abcde")}}
    file.write_text(yaml.safe_dump(own))
    rubric = load(str(file))
    assert rubric.id.startswith("mine@2#") and rubric.scale("qa").text().startswith("[Short?]\nScore 1: a\n")
    own["default"]["scores"][0] = "z"
    file.write_text(yaml.safe_dump(own))
    assert load(str(file)).id != rubric.id
    own["default"]["scores"].pop()
    file.write_text(yaml.safe_dump(own))
    with pytest.raises(ConfigError, match=r"mine.yaml is not a rubric: default.scores"):
        load(str(file))
    with pytest.raises(ConfigError, match="Did you mean 'helpfulness'"):
        load("helpfullness")


# --- the block ---


def test_judge_block_accepts_a_name_or_keys_and_round_trips():
    assert build(EvalSpec, {"judge": "some/model"}).judge == JudgeSpec(model="some/model")
    spec = build(EvalSpec, {"judge": {"model": "m", "base_url": "http://127.0.0.1:1/v1/", "timeout_s": 3}})
    assert spec.judge.base_url == "http://127.0.0.1:1/v1" and spec.judge.timeout_s == 3.0
    assert build(EvalSpec, spec.model_dump()) == spec
    assert EvalSpec().judge is None


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({}, "model is missing"),
        ({"model": "m", "rubrik": "x"}, "Did you mean 'rubric'"),
        ({"model": "m", "retries": -1}, "retries must be at least 0"),
        ({"model": "m", "batch_size": True}, "batch_size must be a whole number"),
        ({"model": "m", "temperature": "hot"}, "temperature must be a number"),
        ({"model": "m", "base_url": "127.0.0.1:80"}, "must be an address such as http"),
        ({"model": "m", "base_url": "http://me:word@x/v1"}, "has a password in it"),
        ({"model": "m", "max_concurrent": 2}, "max_concurrent: of use for an endpoint"),
        ({"model": "m", "base_url": "http://x/v1", "bf16": True}, "bf16: of use for a local model"),
        ({"model": "m", "temperature": None}, "temperature null is for an endpoint only"),
    ],
)
def test_wrong_keys_and_values_are_refused(block, message):
    with pytest.raises(ConfigError, match=message):
        build(JudgeSpec, block)


@pytest.mark.parametrize("secret", ["sk-proj-abc123", "gsk_x7Yt7abcdef1234567890", "abcdefghijklmnopqrstuvwxyz", "a b"])
@pytest.mark.parametrize("key", ["api_key", "api_key_env"])
def test_a_secret_is_refused_and_not_repeated(secret, key):
    block = {"model": "m", "base_url": "http://x/v1", key: secret}
    for read in (lambda: build(JudgeSpec, block), lambda: build(EvalSpec, {"judge": block})):
        with pytest.raises(ConfigError, match="environment variable") as refused:
            read()
        assert secret not in str(refused.value)
    assert build(JudgeSpec, {"model": "m", "base_url": "http://x/v1", "api_key_env": "OPENAI_API_KEY_2"})


def test_prompt_module_loads_nothing_heavy():
    heavy = {"torch", "transformers", "ray", "openai"}
    code = f"import sys, tune.cli.verbs.judge, tune.evaluation.judge.prompt; print(*sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []

"""The built-in toy judge: constructed weights, read by the same path as a real judge's."""

from __future__ import annotations

import json

import pytest
from helpers.judge_fixtures import ANSWERS, CONVERSATIONS, answered_run

from macdrop import load_model
from macdrop.errors import ConfigError
from tune.cli.verbs.judge import judge_run
from tune.config.judge_spec import JudgeSpec
from tune.config.rubrics import load
from tune.evaluation.judge.local import LocalJudge
from tune.evaluation.judge.prompt import Question, prompt, questions
from tune.zoo.catalog import SUBJECTS, ZOO, zoo_path
from zoo import toy_judge
from zoo.build import build_model as build
from zoo.checks import verify_model as verify

NAME = "zoo:toy-judge"
#: Of the letters a to m: none, all, and some.
RESPONSES = {
    "": 1,
    "Our story is not so sunny.": 1,
    "The sun shines on a little boat.": 2,
    "Lily likes to play in the park.": 4,
    "A cake made a child glad.": 5,
}


@pytest.fixture(scope="module")
def judge():
    return LocalJudge(JudgeSpec(model=NAME, max_new_tokens=8, retries=0))


def scores(judge, prompts):
    asked = [Question(f"{i}/1", "", 1, text) for i, text in enumerate(prompts)]
    found = {judgement.question.item: judgement for judgement in judge.judge(asked)}
    return [found[question.item].score for question in asked]


def test_meets_its_thresholds():
    checks = verify(NAME)
    assert len(checks) == 5 and all(check.ok for check in checks), checks


def test_checks_can_fail():
    failed = {check.name for check in verify("toy-judge", zoo_path("planted-llama")) if not check.ok}
    assert {"answers with a score", "different scores", "weights of its recipe"} <= failed


def test_is_small_and_its_card_says_what_it_is():
    folder = zoo_path("toy-judge")
    card = json.loads((folder / "zoo.json").read_text())
    assert "no judgement" in card["statement"] and "not a judgement" in ZOO["toy-judge"].description
    assert load_model(str(folder)).num_parameters() == card["parameters"] < 20_000
    assert sum(file.stat().st_size for file in folder.iterdir()) < 100_000
    assert "toy-judge" not in SUBJECTS and set(SUBJECTS) < set(ZOO)


def test_the_shipped_files_are_what_the_recipe_writes(tmp_path):
    folder, shipped = build(NAME, tmp_path / "judge"), zoo_path("toy-judge")
    assert {file.name for file in folder.iterdir()} == {file.name for file in shipped.iterdir()}
    for file in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (folder / file).read_bytes() == (shipped / file).read_bytes(), file
    with pytest.raises(ConfigError, match="leave the seed out"):
        build(NAME, tmp_path / "seeded", seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["judge"]


def test_the_response_alone_makes_the_score(judge):
    assert {response: toy_judge.expected_score(response) for response in RESPONSES} == RESPONSES
    rubrics = [load(name).scale("").text() for name in ("helpfulness", "correctness")]
    for instruction, rubric, reference in [
        ("Tell.", rubrics[0], None),
        ("Add a cab and a decade.\n" * 40, rubrics[1], "A bad idea."),
        ("User: Why?\n\nAssistant: No.\n\nUser: Well?", rubrics[0], "Zzz\n\nyou too"),
    ]:
        asked = [prompt(instruction, response, rubric, reference) for response in RESPONSES]
        assert scores(judge, asked) == list(RESPONSES.values())


def test_a_long_prompt_and_half_precision(judge):
    asked = [prompt("Sum up.\n" + "A long story. " * 500, response, "-") for response in RESPONSES]
    assert scores(judge, asked[2:3]) == [2]
    half = LocalJudge(JudgeSpec(model=NAME, max_new_tokens=8, retries=0, bf16=True))
    assert scores(half, [prompt("Tell.", response, "-") for response in RESPONSES]) == list(RESPONSES.values())


def test_judges_a_run(tmp_path):
    run = answered_run(tmp_path / "run")
    assert judge_run(run.run_dir, [f"model={NAME}"]) == 0
    folder = run.answers_dir("zoo:planted-llama", "final-1").with_name("judgements")
    (file,) = folder.glob("*.jsonl")
    rows = {row["item"]: row for row in map(json.loads, file.read_text().splitlines())}
    answers = [answer for row in CONVERSATIONS for answer in row["answers"]]
    items = [question.item for question in questions(CONVERSATIONS, load("spec_bench"), reference=True)]
    assert len(rows) == ANSWERS
    assert [rows[item]["score"] for item in items] == [toy_judge.expected_score(answer) for answer in answers]
    assert len({row["score"] for row in rows.values()}) > 1
    assert all("toy" in row["feedback"][0] and row["attempts"] == 1 for row in rows.values())

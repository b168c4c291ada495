"""A local model as judge: real tiny models, greedy and sampled, in `macdrop judge` and `macdrop eval`."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.judge_fixtures import ANSWERS, CONVERSATIONS, Endpoint, answered_run, talking_model

from macdrop.errors import ConfigError, DataError
from macdrop.fingerprint import SHOWN, checkpoint_fingerprint
from tune.cli.verbs.judge import judge_run
from tune.config.judge_spec import JudgeSpec
from tune.evaluation.judge.local import LocalJudge, Sampling
from tune.evaluation.judge.prompt import Question

#: Greedy says "?", and a draw says "4" in about one of four cases.
DOUBT = ("]", "?", 1.0)


@pytest.fixture(scope="module")
def sure(tmp_path_factory):
    return talking_model(tmp_path_factory.mktemp("sure"))


@pytest.fixture(scope="module")
def doubtful(tmp_path_factory):
    return talking_model(tmp_path_factory.mktemp("doubtful"), doubt=DOUBT)


@pytest.fixture
def run(tmp_path):
    return answered_run(tmp_path / "run")


def kept(run_folder, trial="final-1"):
    folder = run_folder.answers_dir("zoo:planted-llama", trial).with_name("judgements")
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


def whole(run_folder, metric="judge_score"):
    wanted = ("final-1", "spec_bench", metric)
    return next(row for row in run_folder.score_rows() if (row["trial"], row["task"], row["metric"]) == wanted)


def test_local_judge_gives_scores(run, sure):
    assert judge_run(run.run_dir, [f"model={sure}", "max_new_tokens=12", "batch_size=4"]) == 0
    assert [row["score"] for row in kept(run)] == [4] * ANSWERS
    stored = kept(run)[0]["judge"]
    assert (stored["kind"], stored["model"]) == ("local", sure) and "base_url" not in stored
    assert stored["revision"] == checkpoint_fingerprint(sure)[:SHOWN]
    row = whole(run)
    assert (row["value"], row["n"], row["batch_size"]) == (4.0, ANSWERS, 4)
    assert f"judge={sure}@{stored['revision']} " in row["settings"]


def test_unparsable_feedback_is_sampled_again_with_a_seed_per_attempt(run, doubtful):
    judge_run(run.run_dir, [f"model={doubtful}", "max_new_tokens=12", "retries=3"])
    rows = kept(run) + kept(run, "base")
    assert all(row["feedback"][0] == "[RESULT]?" for row in rows)
    assert {row["score"] for row in rows} == {4, None}, "some are read after a retry, some never"
    assert all(row["attempts"] == 4 for row in rows if row["score"] is None)
    unparsable = sum(row["score"] is None for row in kept(run))
    assert f"unparsable={unparsable} failed=0" in whole(run)["settings"]
    assert whole(run, "judge_unparsed")["value"] == unparsable / ANSWERS


def test_sampling_draws_from_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    for temperature in (0.5, 1.0, 2.0):
        drawn = Sampling(temperature, range(20_000))(None, logits.expand(20_000, 4)).argmax(-1)
        share = torch.bincount(drawn, minlength=4) / 20_000
        assert (share - torch.softmax(logits / temperature, -1)).abs().max() < 0.012  # over 3 standard errors


def test_judge_without_parsable_feedback_scores_nothing(run, capsys):
    assert judge_run(run.run_dir, ["model=zoo:planted-llama", "max_new_tokens=8", "long_prompts=cut"]) == 0
    rows = kept(run)
    assert all(row["score"] is None and row["error"] is None and row["cut"] for row in rows)
    assert all(len(row["feedback"]) == 3 for row in rows)
    assert whole(run)["value"] is None and whole(run)["n"] == 0
    assert whole(run, "judge_unparsed")["value"] == 1.0
    assert f"unparsable={ANSWERS} failed=0 prompts_cut_left={ANSWERS}" in whole(run)["settings"]
    assert "none" in capsys.readouterr().out


def test_prompt_that_does_not_fit_is_an_error_without_score(tmp_path, run, capsys):
    small = talking_model(tmp_path / "small", positions=512)
    assert judge_run(run.run_dir, [f"model={small}", "max_new_tokens=12"]) == 2
    assert all("max_new_tokens 12 leaves room for 500" in row["error"] for row in kept(run))
    assert "set long_prompts: cut" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="max_new_tokens 511 leaves no room"):
        judge_run(run.run_dir, [f"model={small}", "max_new_tokens=511"])


def test_batched_answers_equal_single_ones(sure, doubtful):
    asked = [Question(f"{i}/1", "", 1, "x" * (10 * i) + "###Feedback: ") for i in range(8)]

    def feedback(model, **keys):
        judge = LocalJudge(JudgeSpec(model=model, max_new_tokens=12, **keys))
        return {judgement.question.item: judgement.feedback for judgement in judge.judge(asked)}

    assert feedback(sure, batch_size=1) == feedback(sure, batch_size=3)
    drawn = feedback(doubtful, batch_size=1)
    assert drawn == feedback(doubtful, batch_size=3), "each item and attempt has its own draw"
    assert drawn != feedback(doubtful, batch_size=3, seed=1)


def test_chat_template_is_used(tmp_path):
    from transformers import AutoTokenizer

    folder = talking_model(tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %} "
    tokenizer.save_pretrained(folder)
    judge = LocalJudge(JudgeSpec(model=folder, max_new_tokens=12))
    assert judge.tokenizer.decode(judge._ids("Well?")) == "<user>Well? "
    (judgement,) = judge.judge([Question("1/1", "", 1, "Well?")])
    assert judgement.score == 4


# --- bad input ---


def test_runs_that_cannot_be_judged_are_refused_with_a_reason(tmp_path, sure):
    given = [f"model={sure}"]
    with pytest.raises(ConfigError, match="not a run folder"):
        judge_run(tmp_path / "nothing", given)
    run = answered_run(tmp_path / "run")
    with pytest.raises(ConfigError, match="There is no judge.*\n.*model=prometheus-eval"):
        judge_run(run.run_dir, [])
    with pytest.raises(ConfigError, match="Did you mean 'spec_bench'"):
        judge_run(run.run_dir, [*given, "rubric=spec-bench"])
    with pytest.raises(ConfigError, match="eval.judge.model: The model path .*does not exist"):
        judge_run(run.run_dir, ["model=./nowhere"])
    with pytest.raises(ConfigError, match="Did you mean 'retries'"):
        judge_run(run.run_dir, [*given, "retry=3"])
    damaged = next((run.trial("final-1").folder / "answers").iterdir())
    damaged.write_text('{"question_id": 81,\n{}\n')
    with pytest.raises(DataError, match="line 1: not JSON"):
        judge_run(run.run_dir, given)
    damaged.write_text("")
    with pytest.raises(DataError, match="is empty"):
        judge_run(run.run_dir, given)
    for file in run.run_dir.rglob("generation-*.jsonl"):
        file.unlink()
    with pytest.raises(ConfigError, match="has no generated answers"):
        judge_run(run.run_dir, given)


def test_judge_of_the_run_is_the_default_and_another_model_drops_its_settings(tmp_path, sure):
    own = {"model": "far", "base_url": "http://127.0.0.1:9/v1", "rubric": "correctness"}
    generation = {"spec_bench": {"data": "q.jsonl"}}
    with Endpoint(lambda number, body: "[RESULT] 5") as server:
        own["base_url"] = server.url
        run = answered_run(tmp_path / "run", {"eval": {"generation": generation, "judge": own}})
        named = f"base_url={server.url}"
        assert judge_run(run.run_dir, [named]) == 0
        assert whole(run)["value"] == 5.0 and "rubric=correctness@1#" in whole(run)["settings"]
        assert judge_run(run.run_dir, ["rubric=helpfulness", named]) == 0
        assert "rubric=helpfulness@1#" in whole(run)["settings"]
        asked = len(server.requests)
        assert judge_run(run.run_dir, [f"model={sure}", "max_new_tokens=12"]) == 0
        assert len(server.requests) == asked and "rubric=spec_bench@1#" in whole(run)["settings"]


def test_old_run_without_stages_is_judged_completely(tmp_path, sure):
    run = answered_run(tmp_path / "run")
    for record in run.trials():
        file = run.trial(record.trial).folder / "trial.json"
        stored = json.loads(file.read_text())
        del stored["stage"]
        file.write_text(json.dumps(stored))
    judge_run(run.run_dir, [f"model={sure}", "max_new_tokens=12"])
    assert len(kept(run, "search-1")) == ANSWERS


# --- macdrop eval ---


def test_eval_judges_its_generated_answers(shell, sure):
    questions = [{key: row[key] for key in ("question_id", "category", "turns")} for row in CONVERSATIONS]
    (shell.folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    words = ["eval", "zoo:planted-llama", "eval.generation.spec_bench.data=q.jsonl"]
    words += ["eval.generation.spec_bench.max_new_tokens=4", f"eval.judge.model={sure}", "eval.judge.max_new_tokens=12"]
    assert "needs --output FOLDER" in shell.refused(*words)
    assert "lists no benchmark" in shell.refused(*words[:2], *words[4:], "eval.zero_shot=[piqa]", "--output", "out")
    assert "eval.judge.model" in shell.refused(*words, "eval.judge.model=./gone", "--output", "out")
    ended = shell(*words, "--output", "out")
    assert ended.code == 0, ended.err
    rows = [json.loads(line) for line in (shell.folder / "out" / "scores.jsonl").read_text().splitlines()]
    judged = {row["task"]: row["value"] for row in rows if row["metric"] == "judge_score"}
    assert judged == {f"spec_bench{part}": 4.0 for part in ("", "/multi_turn", "/writing", "/qa")}
    assert "planted-llama base" in ended.out and "judge_score" in ended.out
    again = shell("judge", "out", f"model={sure}", "max_new_tokens=12")
    assert again.code == 0 and "6 were judged before" in again.out


def test_searched_trials_are_not_judged(shell):
    stored = shell.refused("sweep", "demo", "--dry-run", "validation.judge.model=zoo:planted-llama")
    assert "validation.judge: a judge scores the answers of the final stage" in stored

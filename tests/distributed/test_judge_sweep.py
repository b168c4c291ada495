"""A sweep that judges at its end: a local judge in actors, resumed with what is missing, and a judge that fails."""

from __future__ import annotations

import io
import json
import sys
import time

import pytest
from helpers.judge_fixtures import ANSWERS, CONVERSATIONS, talking_model

from tune.config.judge_spec import JudgeSpec
from tune.config.run_spec import RunSpec
from tune.distributed.actors.judges import ActorJudge, JudgeActor, JudgeOpening, judge_sweep
from tune.evaluation.judge.prompt import Question
from tune.storage.run_folder import RunFolder

pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.timeout(240), pytest.mark.usefixtures("local_ray")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return talking_model(tmp_path_factory.mktemp("judge"))


def make_progress():
    from rich.console import Console

    from tune.cli.progress import Progress

    out = io.StringIO()
    return Progress(Console(file=out, width=300)), out


def run(spec, *, resume=False):
    from tune.distributed.sweep.runtime import run as run_sweep

    progress, out = make_progress()
    return run_sweep(spec, resume=resume, progress=progress), out.getvalue()


def test_a_sweep_judges_at_its_end(tmp_path, model):
    questions = [{key: row[key] for key in ("question_id", "category", "turns")} for row in CONVERSATIONS]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    raw = {
        "model_name_or_path": "zoo:planted-llama",
        "output_dir": str(tmp_path / "run"),
        **{"dataset": "zoo:train", "cutoff_len": 64, "val_size": 8, "max_steps": 2, "learning_rate": 1e-3},
        **{"lora_rank": 2, "lora_alpha": 4, "lora_target": ["q_proj"], "per_device_train_batch_size": 2},
        "sweep": {"arms": ["base", "plain"], "seeds": 0},
        "eval": {
            "generation": {"spec_bench": {"data": str(tmp_path / "q.jsonl"), "max_new_tokens": 4}},
            "judge": {"model": model, "max_new_tokens": 12, "batch_size": 4},
        },
        "ray": {"dashboard": False},
    }
    spec = RunSpec.model_validate(raw)
    failures, out = run(spec)
    assert failures == 0, out
    assert f"judged {2 * ANSWERS} of {2 * ANSWERS} answers" in out
    run_folder = RunFolder.open(spec.output_dir)
    rows = [row for row in run_folder.score_rows() if row["metric"] == "judge_score" and row["task"] == "spec_bench"]
    assert {row["arm"]: (row["value"], row["n"]) for row in rows} == {"base": (4.0, 6), "plain": (4.0, 6)}

    # A judge that ended half-way: three lines are gone.
    file = run_folder.run_dir / next(row["judgements"] for row in rows if row["arm"] == "plain")
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:3]))
    failures, out = run(spec, resume=True)
    assert failures == 0 and "judged 3 of 3 answers" in out
    assert [json.loads(line)["score"] for line in file.read_text().splitlines()] == [4] * ANSWERS

    # A judge that is gone fails no trial.
    gone = {"model": "m", "base_url": "http://127.0.0.1:9/v1", "request_retries": 0}
    progress, out = make_progress()
    spec = RunSpec.model_validate({**raw, "eval": {**raw["eval"], "judge": gone}})
    assert (
        judge_sweep(spec.eval.judge, run_folder, actors=spec.ray, gpus=0, note=progress.note, show=progress.judged) == 1
    )
    assert "cannot be reached" in out.getvalue() and "Judgements so far are kept" in out.getvalue()
    assert [record.status for record in run_folder.trials()] == ["done"]


class Stuck(JudgeActor):
    """The real one, but the first that is given the question 4/1 stands still in a forward pass."""

    def judge(self, batch):
        if batch.asked[0].item == "4/1" and not batch.stacks.exists():
            self.local.model.register_forward_hook(lambda *_: time.sleep(1000))
        return super().judge(batch)


def test_an_actor_that_dies_or_hangs_is_replaced(model, tmp_path):
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray's workers cannot import this file
    spec = JudgeSpec(model=model, max_new_tokens=12, batch_size=1)
    stacks = tmp_path / "stacks"
    judge = ActorJudge(JudgeOpening(spec, 1, 2.0), size=1, cpus=0, gpus=0, stacks=stacks, kind=Stuck)
    asked = [Question(f"{i}/1", "", 1, "Feedback: ") for i in range(6)]
    judged = []
    for judgement in judge.judge(asked):
        judged.append(judgement)
        if len(judged) == 2:
            ray.kill(judge._pool.idle[0])
    judge.close()
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    assert sorted(j.question.item for j in judged) == [q.item for q in asked] and all(j.score == 4 for j in judged)
    (file,) = stacks.iterdir()
    assert file.name == "judge-5.last.txt" and "in judge" in file.read_text()

"""tune.storage.run_folder and tune.storage.atomic: whole or nothing, readable without Ray, safe from many writers."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import subprocess
import sys

import numpy as np
import pandas
import pytest
import yaml

from macdrop.errors import ConfigError
from tune.config.run_spec import dump, load
from tune.errors import ResourceError
from tune.report.report import make_report
from tune.storage import atomic as files
from tune.storage import json_lines
from tune.storage.environment import record_environment
from tune.storage.records import SCORE_COLUMNS, check_score
from tune.storage.run_folder import RunFolder
from tune.storage.states import RunStatus, TaskState

SPEC = {"model_name_or_path": "zoo:planted-llama", "macdrop": {"k": 5, "p0": 0.8}, "learning_rate": 1e-4}


def score(**changes) -> dict:
    row = dict(model="m", arm="plain", trial="t1", seed=0, benchmark="zero_shot", task="qa", metric="acc")
    row.update(attack="none", attack_on=None, value=0.5, stderr=0.1, n=60, higher_is_better=True)
    return {**row, **changes}


@pytest.fixture
def run_folder(tmp_path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", SPEC, command="macdrop sweep x.yaml")


# --- the run ---


@pytest.mark.parametrize(
    ("program", "shown"),
    [("/opt/venv/bin/macdrop", "macdrop"), ("/opt/tune/cli/__main__.py", "macdrop"), ("own.py", "own.py")],
)
def test_a_run_keeps_the_command_that_started_it_without_where_it_is_installed(program, shown, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program, "sweep", "demo", "sweep.seeds=[1, 2]"])
    assert RunFolder.create(tmp_path / "run", SPEC).run()["command"] == f"{shown} sweep demo 'sweep.seeds=[1, 2]'"


def test_a_run_folder_comes_back_as_it_was_made(run_folder):
    again = RunFolder.open(run_folder.run_dir)
    assert again.config() == SPEC
    assert again.run()["status"] == "running" and again.run()["command"] == "macdrop sweep x.yaml"
    assert again.run()["macdrop"] and again.run()["name"] == "run"
    run_folder.set_status(RunStatus.DONE)
    assert again.run()["status"] == "done" and again.run()["finished"] >= again.run()["created"]
    run_folder.set_status(RunStatus.RUNNING)  # resumed
    assert "finished" not in again.run()
    assert again.trials() == [] and list(again.scores().columns) == list(SCORE_COLUMNS)
    assert pickle.loads(pickle.dumps(run_folder)).config() == SPEC


def test_create_refuses_a_folder_with_anything_in_it(tmp_path, run_folder):
    before = sorted(run_folder.run_dir.iterdir())
    with pytest.raises(ConfigError, match="--resume"):
        RunFolder.create(run_folder.run_dir, {})
    assert sorted(run_folder.run_dir.iterdir()) == before and run_folder.config() == SPEC
    (tmp_path / "other").mkdir()
    RunFolder.create(tmp_path / "other", {})  # an empty folder will do
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="output_dir"):
        RunFolder.create(tmp_path / "file", {})


def test_open_refuses_what_is_no_run(tmp_path, run_folder):
    for path, word in [(tmp_path / "nothing", "no such folder"), (tmp_path, "no run.json")]:
        with pytest.raises(ConfigError, match=word):
            RunFolder.open(path)
    (run_folder.run_dir / "run.json").write_text('{"name": ')
    with pytest.raises(ConfigError, match="damaged"):
        RunFolder.open(run_folder.run_dir)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ({"model_name_or_path": True}, "model_name_or_path must be a text, not True"),
        ({"sweep": True}, "sweep must be a block of keys, not True"),
        ({"sweep": {"models": [True, "b/two"]}}, "sweep.models.0 must be a block of keys, not True"),
        ({"sweep": {"metric": [{"name": 3}]}}, "sweep.metric.0.name must be a text, not 3"),
        ({"sweep": {"models": True}}, "sweep.models must be"),
        ({"eval": {"zero_shot": {"qa": 3}}, "ray": "x"}, "eval.zero_shot.qa must be a block of keys, not 3"),
    ],
)
def test_lenient_reader_drops_invalid_values(run_folder, damage, told):
    (run_folder.run_dir / "config.yaml").write_text(yaml.safe_dump({"seed": 3, "of_another_version": 1, **damage}))
    assert run_folder.config().keys() == {"seed", "of_another_version", *damage}, "who works on it sees all of it"
    reader = RunFolder.open(run_folder.run_dir, lenient=True)
    config = reader.config()
    assert config["seed"] == 3 and config["of_another_version"] == 1
    assert reader.config() == config and told in "".join(reader.problems)
    assert len(reader.problems) == (2 if "ray" in damage else 1)
    assert "damaged" in make_report(run_folder.run_dir).markdown()


def test_environment_names_versions_and_hardware(run_folder):
    assert run_folder.environments() == [] and record_environment(run_folder.run_dir, resumed=False) == []
    (found,) = run_folder.environments()
    assert found["versions"]["torch"] and found["cpus"] >= 1 and found["memory_gib"] > 0
    assert isinstance(found["gpus"], list)


def test_a_resume_in_another_environment_is_told_and_both_are_kept(run_folder, monkeypatch):
    folder, file = run_folder.run_dir, run_folder.run_dir / "environment.json"
    record_environment(folder, resumed=False)
    first = json.loads(file.read_text())
    assert record_environment(folder, resumed=True) == [] and json.loads(file.read_text()) == first
    newer = {**first, "versions": {**first["versions"], "transformers": "9.9.9"}}
    monkeypatch.setattr("tune.storage.environment.environment", lambda: newer)
    was = first["versions"]["transformers"]
    assert record_environment(folder, resumed=True) == [f"transformers {was} before, 9.9.9 now"]
    assert record_environment(folder, resumed=True) == [], "the last one is this one"
    assert [each["versions"]["transformers"] for each in run_folder.environments()] == [was, "9.9.9"]
    text = make_report(folder).markdown()
    assert (
        f"MIXED ENVIRONMENTS: resumed {run_folder.environments()[1]['at'][:19]} UTC under others: transformers" in text
    )
    file.unlink()
    record_environment(folder, resumed=True)
    assert "what the run was started under is unknown" in make_report(folder).markdown()


def test_records_that_name_another_place_are_damaged(run_folder):
    """A run folder from elsewhere is data: no name in it leads out of it."""
    trial = run_folder.trial("t1")
    trial.start({}, model="m", arm="plain", seed=0)
    about = json.loads((trial.folder / "trial.json").read_text())
    for name in ("../../t1", "/t1", "t2", ".."):
        (trial.folder / "trial.json").write_text(json.dumps({**about, "trial": name}))
        with pytest.raises(ConfigError, match="trial.json is damaged"):
            run_folder.trials()
        reader = RunFolder(run_folder.run_dir, [])
        assert reader.trials() == [] and "trial.json is damaged" in reader.problems[0]
    for damage in ({"trial": "../x"}, {"judgements": "/etc/passwd"}, {"judgements": "a/../../b"}):
        with pytest.raises(ValueError, match=f"{next(iter(damage))} cannot be"):
            check_score({**score(), **damage})


def test_a_model_has_one_folder_by_either_name(run_folder):
    assert run_folder.model_dir("meta-llama/Llama-3") == run_folder.model_dir("Llama-3")
    assert (
        run_folder.massive_weights_file("zoo:planted-llama").parent == run_folder.run_dir / "models" / "planted-llama"
    )
    assert run_folder.answers_dir("m", "base") == run_folder.model_dir("m") / "answers"
    assert run_folder.answers_dir("m", "t1") == run_folder.trial("t1").folder / "answers"


# --- trials ---


def test_a_trial_from_start_to_end(run_folder):
    trial = run_folder.trial("macdrop-1")
    assert trial.record() is None
    trial.start({"learning_rate": 1e-4}, model="m", arm="macdrop", seed=3)
    assert trial.record().status == TaskState.RUNNING
    trial.log([{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan"), "p": np.float32(0.5)}])
    trial.finish(TaskState.DONE, eval_loss=np.float64(1.5), steps=2)
    (record,) = RunFolder.open(run_folder.run_dir).trials()
    assert record.config == {"learning_rate": 1e-4} and record.eval_loss == 1.5 and record.attempts == 1
    assert (record.model, record.arm, record.seed, record.status) == ("m", "macdrop", 3, "done")
    assert record.started <= record.finished
    assert trial.metrics() == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None, "p": 0.5}]
    assert len(pandas.read_json(trial.folder / "metrics.jsonl", lines=True)) == 2


def test_a_resumed_trial_logs_each_step_once(run_folder):
    run_folder.trial("t").log([{"step": s, "loss": s} for s in (1, 2, 3)])
    resumed = run_folder.trial("t")
    resumed.start({}, model="m", arm="plain", seed=0)
    resumed.start({}, model="m", arm="plain", seed=0)
    resumed.log([{"step": 2, "loss": 20}])
    resumed.log([{"step": 3, "loss": 30}, {"step": 4, "loss": 40}])
    assert [(row["step"], row["loss"]) for row in resumed.metrics()] == [(1, 1), (2, 20), (3, 30), (4, 40)]
    assert resumed.record().attempts == 2


def test_a_failed_trial_keeps_its_reason(run_folder):
    trial = run_folder.trial("t")
    trial.start({}, model="m", arm="plain", seed=0)
    trial.finish(TaskState.DIVERGED, "loss is nan at step 3")
    assert run_folder.trials()[0].reason == "loss is nan at step 3"
    with pytest.raises(AssertionError):
        trial.finish(TaskState.RUNNING)
    for name in ("../elsewhere", "..", ".", "", "a/b", "/etc", "a\0b"):
        with pytest.raises(ConfigError, match="is not the name of a trial"):
            run_folder.trial(name)


# --- scores ---


def test_scores_are_long_form_and_one_line_for_pandas(run_folder):
    run_folder.add_scores([score(), score(trial="base", arm="base", value=np.float32(0.25), stderr=float("nan"))])
    table = pandas.read_json(run_folder.scores_file, lines=True)
    assert table["value"].tolist() == [0.5, 0.25] and table["trial"].tolist() == ["t1", "base"]
    assert list(run_folder.scores().columns) == list(SCORE_COLUMNS)
    assert run_folder.scores()["stderr"].isna().tolist() == [False, True]
    assert run_folder.add_scores([]) == 0


def test_a_later_score_replaces_the_earlier_one(run_folder):
    run_folder.add_scores([score(), score(attack="zeroing@3", attack_on="base")])
    run_folder.add_scores([score(value=0.75, settings="again")])
    assert run_folder.scores()["value"].tolist() == [0.75, 0.5]
    assert "settings" in run_folder.scores().columns


def test_a_score_without_its_names_is_not_written(run_folder):
    with pytest.raises(AssertionError, match="task"):
        run_folder.add_scores([score(), {key: value for key, value in score().items() if key != "task"}])
    assert run_folder.score_rows() == []


def test_a_writer_killed_at_any_byte_leaves_all_rows_of_a_benchmark_or_none(run_folder):
    """A benchmark is scored again if it has no row, so a part of its rows must not count, nor come twice."""
    run_folder.add_scores([score()])
    before = run_folder.scores_file.stat().st_size
    run_folder.add_scores([score(task=f"group/{part}") for part in "abc"])
    whole = run_folder.scores_file.read_bytes()
    for size in range(before, len(whole)):
        run_folder.scores_file.write_bytes(whole[:size])
        assert [row["task"] for row in RunFolder(run_folder.run_dir).score_rows()] == ["qa"]
        if size % 10 == 0:
            run_folder.add_scores([score(task=f"group/{part}") for part in "abc"])
            assert run_folder.scores_file.read_bytes() == whole
    run_folder.scores_file.write_bytes(whole)
    assert (
        len(pandas.read_json(run_folder.scores_file, lines=True))
        == len(RunFolder(run_folder.run_dir).score_rows())
        == 4
    )


def test_a_torn_last_line_is_left_out_and_healed(run_folder):
    run_folder.add_scores([score()])
    run_folder.add_scores([score(task="other")])
    whole = run_folder.scores_file.read_bytes()
    run_folder.scores_file.write_bytes(whole[:-30])
    assert [row["task"] for row in run_folder.score_rows()] == ["qa"]
    run_folder.add_scores([score(task="third")])
    assert [row["task"] for row in run_folder.score_rows()] == ["qa", "third"]
    assert len(pandas.read_json(run_folder.scores_file, lines=True)) == 2
    run_folder.scores_file.write_bytes(whole[:20])  # not one whole line
    run_folder.add_scores([score(task="fourth")])
    assert [row["task"] for row in run_folder.score_rows()] == ["fourth"]


def test_a_torn_tail_longer_than_a_block(tmp_path):
    file = tmp_path / "x.jsonl"
    json_lines.append_jsonl(file, [{"a": 1}])
    with open(file, "a") as handle:
        handle.write("x" * 200_000)
    json_lines.append_jsonl(file, [{"a": 2}])
    assert json_lines.read_jsonl(file) == [{"a": 1}, {"a": 2}]


def test_a_line_changed_by_hand_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\nnonsense\n{"a": 2}\n')
    with pytest.raises(ValueError, match="line 2"):
        json_lines.read_jsonl(tmp_path / "x.jsonl")


def _write_many(path, number):
    for i in range(20):
        RunFolder(path).add_scores([score(trial=f"t{number}", task=f"{i}-{j}", pad="x" * 500) for j in range(5)])


def test_many_writers_lose_and_mix_nothing(run_folder):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(run_folder.run_dir, number)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert len(json_lines.read_jsonl(run_folder.scores_file)) == len(run_folder.score_rows()) == 4 * 20 * 5


# --- files ---


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = files.atomic_write_json(tmp_path / "x.json", {"a": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ResourceError, match="free some space"):
        files.atomic_write_json(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_an_append_that_fills_the_disk_takes_its_part_back(tmp_path, monkeypatch):
    file = tmp_path / "x.jsonl"
    json_lines.append_jsonl(file, [{"a": 1}])
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:7]))
    with pytest.raises(ResourceError, match="disk is full"):
        json_lines.append_jsonl(file, [{"a": 2}, {"a": 3}])
    monkeypatch.undo()
    assert file.read_text() == '{"a": 1}\n'


def test_a_place_that_cannot_be_written_is_a_resource_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="Cannot write"):
        RunFolder.create(tmp_path / "file" / "run", SPEC)


def test_what_json_cannot_hold_is_refused(tmp_path):
    with pytest.raises(TypeError, match="object"):
        files.atomic_write_json(tmp_path / "x.json", {"a": object()})
    assert list(tmp_path.iterdir()) == []


def test_the_run_folder_needs_neither_ray_nor_torch(run_folder):
    code = (
        "import sys; from tune.storage.run_folder import RunFolder; from tune.report.report import make_report\n"
        f"make_report({str(run_folder.run_dir)!r}).markdown()\n"
        "bad = {'ray', 'torch', 'transformers', 'deepspeed', 'lm_eval'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_trials_of_a_model_are_found_without_those_of_others(tmp_path):
    run_folder = RunFolder.create(tmp_path / "run", {})
    spec = load(None, ["model=org/a"]).studies()[0]
    for model in ("org/a", "org/a-b", "c"):
        named = spec.model_copy(update={"model_name_or_path": model})
        run_folder.trial(named.trial_id()).start(dump(named), model=model, arm="plain", seed=1)
    for model in ("org/a", "org/a-b", "c", "d"):
        assert run_folder.trials(model) == [record for record in run_folder.trials() if record.model == model]
    (other,) = run_folder.trials("c")
    (run_folder.trial(other.trial).folder / "trial.json").write_text("damaged")
    assert run_folder.trials("org/a"), "the file of another model is not read"
    with pytest.raises(ConfigError, match="damaged"):
        run_folder.trials()

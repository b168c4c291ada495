"""Trackers, read back: real TensorBoard files, offline Weights & Biases, MLflow stores; failures affect no trial."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from macdrop.errors import ConfigError
from tune.config.messages import build
from tune.config.run_spec import RunSpec, TrainSpec, dump
from tune.storage.atomic import atomic_write_yaml
from tune.storage.run_folder import RunFolder
from tune.storage.states import TaskState
from tune.storage.trial_folder import TrialFolder
from tune.trackers import backends as trackers
from tune.trackers.sync import OneTrial, TrackerSync, trials_of_run

SPEC = TrainSpec(model_name_or_path="zoo:planted-llama", seed=3, learning_rate=2e-4).canonical()
SCORE = {"model": SPEC.model_name_or_path, "arm": "macdrop", "benchmark": "zero_shot", "task": "qa", "metric": "acc"}


@pytest.fixture
def run_folder(tmp_path) -> RunFolder:
    return RunFolder.create(tmp_path / "demo", {"any": "thing"}, command="macdrop sweep")


def begin(run_folder: RunFolder, spec: TrainSpec = SPEC, steps: range = range(1, 4)):
    record = run_folder.trial(spec.trial_id())
    record.start(dump(spec), model=spec.model_name_or_path, arm=spec.arm, seed=spec.seed)
    record.log([{"step": 0, "eval_loss": 5.0}])
    record.log([{"step": step, "loss": 1 / step, "p": 0.5, "note": "text", "grad_norm": None} for step in steps])
    return record


def end(run_folder: RunFolder, record, status: str = "done") -> None:
    rows = [("none", None, 0.75), ("zeroing@3", "base", 0.5), ("zeroing@3", "merged", 0.25)]
    run_folder.add_scores(
        [{**SCORE, "trial": record.id, "attack": a, "attack_on": on, "value": value} for a, on, value in rows]
    )
    record.finish(TaskState(status), step=3)


def sync(run_folder: RunFolder, *names: str) -> list[str]:
    """Copy everything, as at the end of a run; return the warnings."""
    warnings: list[str] = []
    made = TrackerSync(names, run_folder.run_dir, trials_of_run(run_folder), warnings.append)
    made.close()
    return warnings


def need(name: str) -> None:
    if importlib.util.find_spec(trackers.TRACKERS[name].package) is None:
        pytest.skip(f"{name} is not installed")


# --- TensorBoard ---


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(folder.glob("events*")):
        data = file.read_bytes()
        while data:  # TFRecord: length, crc, content, crc
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            data = data[12 + size + 4 :]
            found += [(v.tag, event.step, v.simple_value) for v in event.summary.value if v.HasField("simple_value")]
    return found


def test_tensorboard_has_every_step_and_the_scores(run_folder):
    record = begin(run_folder)
    end(run_folder, record)
    assert sync(run_folder, "tensorboard") == []
    found = scalars(run_folder.run_dir / "tensorboard" / record.id)
    assert [(step, value) for tag, step, value in found if tag == "loss"] == [
        (1, 1.0),
        (2, 0.5),
        (3, pytest.approx(1 / 3)),
    ]
    assert ("eval_loss", 0, 5.0) in found
    assert not [row for row in found if row[0] in ("note", "grad_norm", "step")]
    assert ("zero_shot/qa/acc", 3, 0.75) in found and ("zero_shot/qa/acc_zeroing_3-merged", 3, 0.25) in found


def test_resumed_trial_sends_no_step_twice(run_folder):
    record = begin(run_folder)
    sync(run_folder, "tensorboard")  # the run was interrupted after step 3
    assert trackers_of(record)["tensorboard"] == {"run": record.id, "step": 3, "end": "killed"}
    record.start(dump(SPEC), model=SPEC.model_name_or_path, arm=SPEC.arm, seed=3)
    record.log([{"step": step, "loss": 1 / step} for step in range(2, 6)])  # from the checkpoint at step 1
    end(run_folder, record)
    sync(run_folder, "tensorboard")
    sync(run_folder, "tensorboard")  # nothing is left to do
    losses = [step for tag, step, _ in scalars(run_folder.run_dir / "tensorboard" / record.id) if tag == "loss"]
    assert sorted(losses) == [1, 2, 3, 4, 5]


def trackers_of(record) -> dict:
    return json.loads((record.folder / "trackers.json").read_text())


# --- Weights & Biases ---


def wandb_records(run_dir: Path) -> list:
    """Return the records of W&B's offline files: seven bytes, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    found, whole = [], b""
    for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        data, at = file.read_bytes(), 7
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            whole = (b"" if kind in (1, 2) else whole) + data[at + 7 : at + 7 + size]
            at += 7 + size
            if kind in (1, 4):
                found.append(Record.FromString(whole))
    return found


def test_wandb_offline_has_group_job_type_steps_summary_and_exit_code(run_folder, monkeypatch):
    need("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    trackers.check(["wandb"], run_folder.run_dir)
    first = begin(run_folder)
    second = begin(run_folder, SPEC.model_copy(update={"seed": 4}))
    end(run_folder, first)
    second.finish(TaskState.DIVERGED, "loss is nan")
    assert sync(run_folder, "wandb") == []
    records = wandb_records(run_folder.run_dir)
    runs = {r.run.display_name: r.run for r in records if r.HasField("run")}
    assert set(runs) == {first.id, second.id}
    assert {run.project for run in runs.values()} == {"demo"}
    assert (runs[first.id].job_type, runs[second.id].job_type) == ("seed-3", "seed-4")
    assert runs[first.id].run_group == runs[second.id].run_group != ""
    history = [{i.nested_key[-1] if i.nested_key else i.key: i.value_json for i in r.history.item} for r in records]
    losses = [(row["_step"], float(row["loss"])) for row in history if "loss" in row]
    assert losses == 2 * [("1", 1.0), ("2", 0.5), ("3", pytest.approx(1 / 3))]
    summary = {i.key or i.nested_key[0]: i.value_json for r in records for i in r.summary.update}
    assert summary["zero_shot/qa/acc"] == "0.75" and summary["zero_shot/qa/acc@zeroing@3"] == "0.5"
    assert sorted(r.exit.exit_code for r in records if r.HasField("exit")) == [0, 1]


def test_an_agent_of_wandb_finds_the_run_of_train_by_its_id_and_a_sweep_of_ours_has_others(run_folder, monkeypatch):
    need("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_RUN_ID", "agents0id")
    trial = begin(run_folder)
    atomic_write_yaml(trial.folder / "config.yaml", dump(SPEC))
    for names, alone in ((run_folder.run_dir, False), (trial.folder, True)):
        if alone:
            (trial.folder / "trackers.json").unlink()
            with OneTrial(["wandb"], SPEC, trial.folder, warn=pytest.fail) as one:
                one.status = TaskState.DONE
        else:
            assert sync(run_folder, "wandb") == []
        ids = {record.run.run_id for record in wandb_records(names) if record.HasField("run")}
        assert len(ids) == 1 and (ids == {"agents0id"}) == alone


def test_wandb_online_without_a_login_is_refused(tmp_path, monkeypatch):
    need("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="WANDB_MODE=offline"):
        trackers.check(["wandb"], tmp_path)


# --- MLflow ---


@pytest.mark.parametrize("store", ["default", "folder"])
def test_mlflow_local_stores_are_read_back_with_its_client(run_folder, monkeypatch, store):
    need("mlflow")
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    for name in ("MLFLOW_ALLOW_FILE_STORE", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores what the tracker sets
        monkeypatch.delenv(name)
    uri = f"sqlite:///{run_folder.run_dir / 'mlruns/mlflow.db'}"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if store == "folder":
        uri = (run_folder.run_dir / "mlruns").as_uri()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    record = begin(run_folder)
    assert sync(run_folder, "mlflow") == []
    record.log([{"step": 4, "loss": 0.25}])
    end(run_folder, record)
    assert sync(run_folder, "mlflow") == []

    client = MlflowClient(tracking_uri=uri)
    (run,) = client.search_runs([client.get_experiment_by_name("demo").experiment_id])
    assert run.info.run_name == record.id and run.info.status == "FINISHED"
    assert {k: run.data.tags[k] for k in ("job_type", "seed")} == {"job_type": "seed-3", "seed": "3"}
    assert len(run.data.tags["group"]) == 8
    assert run.data.params["learning_rate"] == "0.0002" and run.data.params["macdrop.p0"] == "0.8"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert sorted((m.step, m.value) for m in history) == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3)), (4, 0.25)]
    assert run.data.metrics["zero_shot/qa/acc"] == 0.75 and run.data.metrics["zero_shot/qa/acc-zeroing-3"] == 0.5


# --- failures ---


def test_failing_tracker_is_reported_once_and_the_others_continue(run_folder, monkeypatch):
    need("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # a closed port
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    records = [begin(run_folder), begin(run_folder, SPEC.model_copy(update={"seed": 4}))]
    for record in records:
        end(run_folder, record)
    (warning,) = sync(run_folder, "mlflow", "tensorboard")
    assert warning.startswith("mlflow does not accept the run's metrics") and len(warning.splitlines()) == 1
    for record in records:
        assert scalars(run_folder.run_dir / "tensorboard" / record.id)
    assert sync(run_folder, "tensorboard") == []


def test_rejected_steps_are_sent_once_the_tracker_recovers(run_folder, monkeypatch):
    record = begin(run_folder)
    end(run_folder, record)
    sent: list[int] = []
    broken = [True]

    class Flaky(trackers.TensorBoard):
        def open(self, info, run):
            return FlakyRun()

    class FlakyRun:
        id = "one"

        def log(self, step, metrics):
            if step == 2 and broken.pop():
                raise OSError("no route to host")
            sent.append(step)

        def close(self, status, summary):
            sent.append(status)

    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Flaky)
    assert len(sync(run_folder, "tensorboard")) == 1
    broken.append(False)
    assert sync(run_folder, "tensorboard") == []
    assert sent == [0, 1, 2, 3, "finished"]


def test_missing_package_is_refused_with_its_install_command(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.MLflow, "package", "no_such_package")
    with pytest.raises(ConfigError, match=r"pip install 'macdrop\[mlflow\]'"):
        trackers.check(["tensorboard", "mlflow"], tmp_path)


def test_report_to_is_validated_and_not_part_of_a_trial():
    run = RunSpec(model_name_or_path="zoo:planted-llama", report_to="wandb")
    assert run.report_to == ["wandb"] and RunSpec(model_name_or_path="x", report_to="none").report_to == []
    assert run.studies()[0].trial_id() == RunSpec(model_name_or_path="zoo:planted-llama").studies()[0].trial_id()
    with pytest.raises(ConfigError, match="tensorboard"):
        build(RunSpec, {"model_name_or_path": "x", "report_to": ["tensorbord"]})


def test_single_training_is_copied_under_its_trial_id(tmp_path):
    with OneTrial(["tensorboard"], SPEC, tmp_path, pytest.fail) as followed:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(dump(SPEC)))
        TrialFolder(tmp_path).log([{"step": 1, "loss": 2.0}])
        followed.status = "done"
    assert ("loss", 1, 2.0) in scalars(tmp_path / "tensorboard" / SPEC.trial_id())
    assert trackers_of(TrialFolder(tmp_path))["tensorboard"]["end"] == "finished"

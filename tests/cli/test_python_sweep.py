"""`tune.sweep` before anything starts: what it takes, the command's own refusals, and no exit of the process."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import yaml
from helpers.run_folders import make_run

import tune
from macdrop.errors import ConfigError, MacDropError
from tune.cli import python_sweep
from tune.cli.verbs.sweep import resolve
from tune.config.run_spec import dump
from tune.storage.remote.copier import Copier
from tune.storage.remote.object_store import ObjectStore

CONFIG = {
    "model_name_or_path": "zoo:planted-llama",
    "macdrop.p0": 0.5,
    "lora_target": ("q_proj", "up_proj"),
    "sweep": {"seeds": 2, "parameters": {"macdrop.k": [1, 3]}},
}


@pytest.fixture
def started(monkeypatch) -> list:
    """What would have been run."""
    found: list = []

    def run(spec, **options):
        found.append((spec, options))
        signal.signal(signal.SIGTERM, lambda *_: None)  # as starting Ray does
        make_run(Path(spec.output_dir), tried=2, items=10)
        return 0

    monkeypatch.setattr("tune.cli.verbs.sweep.runner", lambda spec: run)
    return found


def test_a_mapping_is_what_a_file_of_it_would_be(tmp_path):
    file = tmp_path / "my.yaml"
    config = python_sweep.plain_values({**CONFIG, "output_dir": tmp_path / "run"})
    file.write_text(yaml.safe_dump(config))
    assert dump(resolve(config, [], False, False)[0]) == dump(resolve(str(file), [], False, False)[0])
    assert config["output_dir"] == str(tmp_path / "run") and config["lora_target"] == ["q_proj", "up_proj"]


def test_the_run_is_returned_with_its_report_written(tmp_path, started, capsys):
    before = signal.getsignal(signal.SIGTERM)
    run = tune.sweep({**CONFIG, "output_dir": tmp_path / "run"})
    assert signal.getsignal(signal.SIGTERM) == before
    ((spec, options),) = started
    assert spec.macdrop.p0 == 0.5 and options.pop("progress") and not any(options.values())
    assert repr(run) == f"Run({str(tmp_path / 'run')!r})" and run.failures == 0
    assert (tmp_path / "run" / "report.html").is_file() and "planted-llama" in run.verdict
    assert capsys.readouterr().out == "", "the report is in what is returned"


def test_no_folder_is_a_fresh_one_in_runs(tmp_path, monkeypatch, started):
    monkeypatch.chdir(tmp_path)
    assert tune.sweep(CONFIG).folder.parent == Path("runs")


@pytest.mark.parametrize(
    "config, options, said",
    [
        ({**CONFIG, "learning_rte": 1}, {}, "learning_rate"),
        ({**CONFIG, "macdrop": {"p0": 0.5}}, {}, "given twice"),
        ("demoo", {}, "Recipes: "),
        ({**CONFIG}, {"retry_failed": True}, "add resume=True"),
        ({**CONFIG}, {"resume": True}, "output_dir"),
        ("nowhere", {"resume": True}, "neither a YAML file nor a shipped recipe"),
    ],
)
def test_what_the_command_refuses_is_raised(config, options, said, started):
    with pytest.raises(MacDropError, match=said):
        tune.sweep(config, **options)
    assert not started


def test_a_folder_that_is_in_use_is_refused_with_the_way_to_resume(tmp_path, started):
    make_run(tmp_path / "run", tried=2, items=10)
    with pytest.raises(ConfigError, match=r"sweep\(.*resume=True\)"):
        tune.sweep({**CONFIG, "output_dir": str(tmp_path / "run")})
    assert not started


def test_the_front_door_has_two_names():
    assert dir(tune) == ["Run", "sweep"]
    with pytest.raises(AttributeError, match="no attribute 'swep'"):
        tune.swep  # noqa: B018


def test_values_may_be_overridden_as_by_the_command(tmp_path, started):
    tune.sweep(CONFIG, "macdrop.p0=0.25", f"output_dir={tmp_path / 'run'}")
    assert started[0][0].macdrop.p0 == 0.25


def test_the_call_that_resumes_names_what_a_recorded_run_asks_for():
    words = ["--trust-remote-code", "sync_to=s3://bucket/run"]
    call = python_sweep.resume_call(Path("runs/a"), words)
    assert call == "sweep('runs/a', 'sync_to=s3://bucket/run', resume=True, trust_remote_code=True)"


def test_a_recorded_copy_is_allowed_by_naming_it(tmp_path, started):
    store = f"sync_to=file://{tmp_path / 'copy'}"
    tune.sweep({**CONFIG, "output_dir": tmp_path / "run"}, store)
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(dump(started[0][0])))
    with pytest.raises(ConfigError, match="copies the run to"):
        tune.sweep(tmp_path / "run", resume=True)
    assert resolve(str(tmp_path / "run"), [store], True, False)[0].sync_to == store.removeprefix("sync_to=")


def test_a_dry_run_restores_nothing(tmp_path, started, shell):
    store = f"sync_to=file://{tmp_path / 'copy'}"
    run = tune.sweep({**CONFIG, "output_dir": tmp_path / "run"}, store)
    copier = Copier(run.folder, ObjectStore(store.removeprefix("sync_to=")))
    copier.copy()
    again = ("sweep", "--resume", f"output_dir={tmp_path / 'new'}", store)
    ended = shell(*again, "--dry-run")
    assert ended.code == 2 and "--dry-run writes nothing" in ended.err and not (tmp_path / "new").exists()

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

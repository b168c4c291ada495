"""The SkyPilot task: its schema and reader, its scripts on one and two nodes, and the commands of the verbs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from recorder import Recorder

from cluster.backends import registry
from cluster.backends.skypilot import jobs_of
from cluster.check import skypilot as skypilot_check
from cluster.check.finding import ERROR
from cluster.commands import check
from cluster.render import render
from cluster.render.targets import TARGETS

EXAMPLE = render.EXAMPLES / "skypilot.yaml"
ONE_NODE = "sync_to=gs://my-bucket/runs/x run=x recipe=demo".split()
VARIANTS = {
    "one node": [*ONE_NODE, "source=~/macdrop"],
    "image": [*ONE_NODE, "image=me/macdrop:1", "install=none", "spot=no", "infra=gcp"],
    "volume": [*ONE_NODE[:2], "config=~/my.yaml", "nodes=3", "volume=runs", "infra=kubernetes", "install=pip"],
}


def content(words: list[str]) -> dict:
    return yaml.safe_load(render.render(TARGETS["skypilot"], words))


@pytest.mark.parametrize("words", VARIANTS.values(), ids=list(VARIANTS))
def test_every_variant_passes_the_checks_and_its_scripts_parse(words):
    text = render.render(TARGETS["skypilot"], words)
    file = registry.parse(text, Path("sky.yaml"))
    assert [each for each in check.findings(file) if each.severity == ERROR] == []
    for key in ("setup", "run"):
        done = subprocess.run(["bash", "-n"], input=file.content[key], text=True, capture_output=True)
        assert done.returncode == 0, done.stderr


def test_what_variants_ask_for():
    one, image, volume = map(content, VARIANTS.values())
    assert one["resources"] == {"accelerators": "A100:8", "use_spot": True, "disk_size": 300}
    assert "secrets" not in one and "macdrop-source[gcs]" in one["setup"] and "ray start" not in one["run"]
    assert image["resources"]["image_id"] == "docker:me/macdrop:1" and "use_spot" not in image["resources"]
    assert set(image["file_mounts"]) == {"~/.ray/auth_token"} and "pip install" not in image["setup"]
    assert volume["volumes"] == {"/shared": "runs"} and volume["file_mounts"]["~/macdrop-recipe.yaml"] == "~/my.yaml"


# --- SkyPilot's own schema, where it is installed ---


@pytest.fixture
def sky(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return pytest.importorskip("sky", reason="SkyPilot is not installed, whose pins differ from ours")


def test_known_keys_are_those_of_its_schema(sky):
    from sky.utils import schemas

    assert set(schemas.get_task_schema()["properties"]) == skypilot_check.TASK
    known = {key for key in schemas.get_resources_schema()["properties"] if not key.startswith("_")}
    assert known == skypilot_check.RESOURCES


@pytest.mark.parametrize("name", ["example", *VARIANTS])
def test_its_reader_takes_the_task(sky, tmp_path, name):
    for mount in (".ray/auth_token", "macdrop/pyproject.toml", "my.yaml"):
        (tmp_path / mount).parent.mkdir(exist_ok=True)
        (tmp_path / mount).write_text("x")
    words = TARGETS["skypilot"].example.split() if name == "example" else VARIANTS[name]
    path = tmp_path / "sky.yaml"
    path.write_text(render.render(TARGETS["skypilot"], words))
    secrets = {key: "value" for key in registry.load(path).secrets}
    task = sky.Task.from_yaml_config(yaml.safe_load(path.read_text()), secrets_overrides=list(secrets.items()))
    (resources,) = task.resources
    assert resources.use_spot is (name != "image") and task.num_nodes == {"example": 2, "volume": 3}.get(name, 1)
    assert "--resume-if-exists" in task.run


# --- the scripts ---


@pytest.fixture
def node(tmp_path):
    """Run the task's commands as one node of two, with recorded tools; return exit status and what was called."""
    run = content(TARGETS["skypilot"].example.split())["run"].replace("=/shared", f"={tmp_path}/shared")
    (tmp_path / "shared").mkdir()

    def start(rank: int, code: int = 0) -> tuple[int, list[str]]:
        folder = tmp_path / f"bin-{rank}"
        folder.mkdir(exist_ok=True)
        for name, end in (("ray", 0), ("macdrop", code)):
            (folder / name).write_text(
                f'#!/bin/bash\necho "{name} $@ ${{RAY_ADDRESS-unset}} $RAY_AUTH_MODE" >> {folder}/calls; exit {end}\n'
            )
            (folder / name).chmod(0o755)
        environment = {
            "PATH": f"{folder}:/usr/bin:/bin",
            "HOME": str(tmp_path),
            "RAY_ADDRESS": "127.0.0.1:6380",
            "SKYPILOT_NODE_RANK": str(rank),
            "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
            "SKYPILOT_TASK_ID": "managed-1",
            "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        }
        done = subprocess.run(["bash", "-c", run], env=environment, timeout=60)
        return done.returncode, (folder / "calls").read_text().splitlines()

    return start


@pytest.mark.parametrize("code", [0, 1])
def test_the_head_runs_the_sweep_and_the_others_end_with_it(node, tmp_path, code):
    ended, calls = node(0, code)
    assert ended == code
    options = "--dashboard-agent-listen-port=52366 --num-gpus=8"
    assert calls == [
        f"ray start --head --node-ip-address=10.0.0.1 --port=6379 --dashboard-host=127.0.0.1 {options} unset token",
        f"macdrop sweep llama-3.2-1b sweep.num_samples=40 sync_to=s3://my-bucket/runs/llama "
        f"output_dir={tmp_path}/shared/runs/llama --resume-if-exists ray.address=10.0.0.1:6379 unset token",
    ]
    assert node(1) == (0, [f"ray start --address=10.0.0.1:6379 {options} unset token"])


# --- the verbs ---


@pytest.fixture
def with_sky(laptop, monkeypatch):
    laptop.tools = Recorder(laptop.folder / "sky-tools", ("ray", "sky"))
    monkeypatch.setenv("PATH", laptop.tools.path)
    laptop.token()
    return laptop


def queue(*records: dict) -> str:
    return "Fetching managed job statuses...\n" + json.dumps(list(records), indent=2)


def test_up_starts_the_job_and_hands_secrets_over_by_name(with_sky):
    with_sky.tools.answer("jobs queue", queue())
    assert with_sky.run("up", with_sky.file("skypilot")) == 0, with_sky.err
    started = next(line for line in with_sky.tools.lines if "jobs launch" in line)
    assert "--yes --detach-run --name macdrop --secret HF_TOKEN --secret WANDB_API_KEY skypilot.yaml" in started
    with_sky.hides_secrets()


def test_logs_and_down_name_the_job(with_sky):
    with_sky.tools.answer("jobs queue", queue({"job_id": 3, "job_name": "macdrop", "status": "SUCCEEDED"}))
    assert with_sky.run("logs", with_sky.file("skypilot")) == 0
    assert any("jobs logs --no-follow --name macdrop" in line for line in with_sky.tools.lines)
    assert with_sky.run("down", "skypilot.yaml", "--yes") == 0
    assert any("jobs cancel --yes --name macdrop" in line for line in with_sky.tools.lines)


def test_what_a_managed_job_cannot_do_is_refused_with_what_to_do(with_sky):
    with_sky.tools.answer("jobs queue", queue())
    file = with_sky.file("skypilot")
    assert with_sky.run("submit", file, "demo") == 2 and "macdrop cluster up" in with_sky.err
    assert with_sky.run("fetch", file, "llama") != 0 and "sync_to" in with_sky.err


def test_jobs_are_those_of_the_name_oldest_first():
    text = queue(
        {"job_id": 9, "job_name": "macdrop", "status": "RECOVERING"},
        {"job_id": 8, "job_name": "other", "status": "RUNNING"},
        {"job_id": 7, "job_name": "macdrop", "status": "FAILED_SETUP", "failure_reason": "no quota"},
    )
    assert jobs_of(text, "macdrop") == [
        {"id": "7", "run": "macdrop", "status": "FAILED", "code": None, "message": "no quota"},
        {"id": "9", "run": "macdrop", "status": "RUNNING", "code": None, "message": ""},
    ]
    assert jobs_of("", "macdrop") == jobs_of("[]", "macdrop") == jobs_of("[oops]", "macdrop") == []

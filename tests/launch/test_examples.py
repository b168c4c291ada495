"""The shipped examples equal their rendered templates, and pass the checks of Ray and ours."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from cluster.backends import registry
from cluster.check.finding import ERROR
from cluster.commands import check
from cluster.core.ray_file import COMMANDS, RayFile
from cluster.core.slurm_file import SlurmFile
from cluster.render import render
from cluster.render.targets import TARGETS

targets = pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))


@targets
def test_example_equals_the_rendered_template(target):
    assert (render.EXAMPLES / target.file).read_text(encoding="utf-8") == render.example(target)


def test_there_are_no_other_examples():
    assert {path.name for path in render.EXAMPLES.iterdir()} == {target.file for target in TARGETS.values()}


@targets
def test_example_passes_the_checks_offline(target, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a check went online"))
    found = check.findings(registry.load(render.EXAMPLES / target.file))
    assert [finding for finding in found if finding.severity == ERROR] == []
    # Only files of the user's machine may be missing: a clone, an ssh key.
    assert all("not on this machine" in finding.what for finding in found), found


@targets
def test_example_names_its_command_and_the_next_steps(target):
    text = (render.EXAMPLES / target.file).read_text(encoding="utf-8")
    assert f"macdrop cluster render {target.name} " in text
    assert "macdrop cluster check FILE" in text and "macdrop cluster" in text.partition("check FILE")[2]


@targets
def test_every_host_gets_token_keepalive_storage_and_secrets_by_name(target):
    file = registry.load(render.EXAMPLES / target.file)
    assert file.token
    assert file.storage == "/shared"
    assert file.secrets[0] == "HF_TOKEN"
    assert file.environment["RAY_grpc_client_keepalive_time_ms"] == "15000"
    assert file.environment["RAY_USAGE_STATS_ENABLED"] == "0"


@targets
def test_shell_commands_of_the_example_parse(target):
    file = registry.load(render.EXAMPLES / target.file)
    scripts = [file.text] if isinstance(file, SlurmFile) else []
    scripts += [text for key in COMMANDS for text in file.commands(key)] if isinstance(file, RayFile) else []
    scripts += [text for document in file.documents for text in (document.get("data") or {}).values()]
    for script in scripts:
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert done.returncode == 0, f"{script}\n{done.stderr}"


def test_setup_commands_write_the_environment_once(tmp_path):
    """Run the command that writes the environment of a host twice in a scratch home."""
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray/auth_token").write_text("not a token")
    (home / ".bashrc").write_text("export OLD=1\n")
    command = registry.load(render.EXAMPLES / "local.yaml").commands("setup_commands")[0]
    for _ in range(2):
        subprocess.run(["bash", "-c", command], env={"HOME": str(home), "PATH": "/usr/bin:/bin"}, check=True)
    assert (home / ".bashrc").read_text().count("macdrop") == 1
    assert (home / ".bashrc").read_text().endswith("export OLD=1\n")
    assert (home / ".ray/auth_token").stat().st_mode & 0o777 == 0o600
    shown = subprocess.run(
        ["bash", "-c", ". ~/.bashrc; echo $OLD $RAY_AUTH_MODE $MACDROP_CACHE $MACDROP_SECRETS"],
        env={"HOME": str(home), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert shown.stdout.split() == ["1", "token", "/shared/cache", "HF_TOKEN,WANDB_API_KEY"]


@pytest.mark.skipif(not shutil.which("pkill"), reason="needs procps")
def test_slurm_script_ends_on_all_nodes_with_the_exit_code_of_the_sweep(tmp_path, code=3):
    """A fake srun starts two nodes as processes; the fake `ray` blocks on the second, like the real one."""
    bin = tmp_path / "bin"
    bin.mkdir()
    tools = {
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\n'
        'SLURM_NODEID=1 "$@" & SLURM_NODEID=0 "$@"; code=$?; wait; exit $code',
        "ray": '[ "$1" = symmetric-run ] || exit 0\n[ "$SLURM_NODEID" = 0 ] || { sleep 600 & wait; }\n'
        'while [ "$1" != -- ]; do shift; done; shift; exec "$@"',
        "macdrop": f'echo "$@" > {tmp_path}/called; exit {code}',
        "hostname": "echo 10.0.0.1 10.0.0.2",
    }
    for name, text in tools.items():
        (bin / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin / name).chmod(0o755)
    words = f"nodes=2 gpus=0 cpus=1 venv={tmp_path} storage=/shared".split()
    script = render.render(TARGETS["slurm"], words).replace("=/shared\n", f"={tmp_path}/shared\n")
    (tmp_path / "shared").mkdir()
    env = {"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NAME": "macdrop"}
    with open(tmp_path / "log", "w") as log:
        done = subprocess.run(
            ["bash", "-c", script, "script", "demo", "seed=1 2"], env=env, stdout=log, stderr=log, timeout=60
        )
    assert done.returncode == code, (tmp_path / "log").read_text()
    run = tmp_path / "shared/runs/macdrop"
    assert (tmp_path / "called").read_text() == f"sweep demo seed=1 2 ray.address=auto output_dir={run}\n"
    assert list((tmp_path / "shared").iterdir()) == []  # the note is gone


def test_kubernetes_job_resumes_an_existing_run(tmp_path):
    documents = registry.load(render.EXAMPLES / "kuberay-job.yaml").documents
    (document,) = [document for document in documents if document["kind"] == "ConfigMap"]
    (tmp_path / "macdrop").write_text('#!/bin/bash\necho "$@"\n')
    (tmp_path / "macdrop").chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "MACDROP_STORAGE": str(tmp_path)}
    run = ["bash", "-c", document["data"]["sweep.sh"]]
    first = subprocess.run(run, env=env, capture_output=True, text=True).stdout
    (tmp_path / "runs/llama").mkdir(parents=True)
    second = subprocess.run(run, env=env, capture_output=True, text=True).stdout
    command = f"sweep llama-3.2-1b sweep.num_samples=40 ray.address=auto output_dir={tmp_path}/runs/llama"
    assert first == f"{command}\n"
    assert second == f"{command} --resume\n", "with its recipe: settings of a folder alone may run no code"


def test_command_in_an_example_reproduces_it():
    for target in TARGETS.values():
        text = (render.EXAMPLES / target.file).read_text(encoding="utf-8")
        (command,) = re.findall(r"Made by: macdrop cluster render \S+ (.*)", text)
        assert yaml.safe_dump(command) and render.render(target, command.replace("'", "").split()) == text


def test_documented_render_commands_work_and_pass_the_checks():
    documents = sorted(Path(__file__).parents[2].glob("cluster/docs/*.md"))
    text = "\n".join(document.read_text(encoding="utf-8") for document in documents).replace("\\\n", " ")
    values = {"$AMI": "ami-0123456789abcdef0", "$EFS": "fs-0123456789abcdef0", "$SG": "sg-0123456789abcdef0"}
    found = re.findall(r"^macdrop cluster render (\S+) ([^#\n]*=.*) --output \S+$", text, re.MULTILINE)
    assert {name for name, _ in found} == {"aws", "gcp", "azure", "local", "kuberay", "slurm", "skypilot"}
    for name, words in found:
        for variable, value in values.items():
            words = words.replace(variable, value)
        file = registry.parse(render.render(TARGETS[name], words.split()), Path("cluster.yaml"))
        assert [each for each in check.findings(file) if each.severity == ERROR] == []
    assert re.findall(r"^\| `([\w-]+)` \|.*`cluster/(?:render/)?examples/(\S+)` \|$", text, re.MULTILINE) == [
        (target.name, target.file) for target in TARGETS.values()
    ]

"""The verbs on clusters of `ray up`: the commands they run, in order, their messages and exit codes."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest
from launching import SECRETS, TOKEN
from recorder import head_output, job, node, run

from cluster.backends.advice import causes
from cluster.backends.base import Job, submission
from cluster.backends.ssh_hosts import MARK, Ssh, read_probe
from cluster.core.shell import Result
from cluster.remote import head

THREE = [node("10.0.0.1", head=True), node("10.0.0.2", gpus=4), node("10.0.0.3", gpus=4)]
MAKES_TOKEN = f"mkdir -p ~/.ray && printf {TOKEN} | tee ~/.ray/auth_token"


@pytest.fixture(autouse=True)
def _before_is_another_test(monkeypatch):
    """Make every file pass `check`, whose findings are tested in test_check.py."""
    monkeypatch.setattr("cluster.commands.check.report", lambda file: 0)


# --- up ---


def test_up_prepares_token_and_secrets_starts_and_waits(laptop):
    file = laptop.file("local")
    laptop.tools.answer("get-auth-token", {"run": MAKES_TOKEN})
    laptop.tools.answer("on-head jobs", {"out": "Head node of cluster (macdrop) not found!", "code": 1})
    laptop.tools.answer(
        "on-head nodes",
        head_output(nodes=THREE[:1], log=[]),
        head_output(nodes=THREE[:2], log=[]),
        head_output(nodes=THREE, log=[]),
    )
    assert laptop.run("up", file) == 0, laptop.err
    called = [" ".join(call["argv"][:2]) for call in laptop.tools.calls]
    looked = ["ray get-auth-token", "ray exec", "ssh -i"]
    assert called == [*looked, *["ssh -i"] * len(THREE), "ray up", *["ray exec"] * 3]
    assert laptop.tools.find("ray up")["argv"] == ["ray", "up", "-y", file]
    assert all(call["environment"]["RAY_AUTH_MODE"] == "token" for call in laptop.tools.calls)
    held = {".ray/auth_token": TOKEN, ".macdrop/secrets.env": "".join(f"export {k}={v}\n" for k, v in SECRETS.items())}
    for name, text in held.items():
        path = laptop.home / name
        assert path.read_text() == text and stat.S_IMODE(path.stat().st_mode) == 0o600, name
    assert f"$ ray up -y {file}" in laptop.out
    assert "1 of 3 nodes: 10.0.0.1 (head, no CPUs or GPUs)" in laptop.out
    assert "3 of 3 nodes: 10.0.0.1 (head, no CPUs or GPUs), 10.0.0.2 (4 GPU), 10.0.0.3 (4 GPU)" in laptop.out
    laptop.hides_secrets()


def test_dry_run_only_prints(laptop):
    file = laptop.file("local")
    for verb in (["up"], ["submit", "demo"], ["status"], ["logs"], ["fetch", "demo"], ["down"]):
        assert laptop.run(verb[0], file, *verb[1:], "--dry-run") == 0, laptop.err
        assert "$ ray " in laptop.out, verb
    assert laptop.tools.calls == [] and list(laptop.home.iterdir()) == []
    assert {path.name for path in laptop.folder.iterdir()} == {file, "home", "tools"}


def test_up_names_a_missing_secret(laptop, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY")
    assert laptop.run("up", laptop.file("local")) == 3
    assert "WANDB_API_KEY" in laptop.err and "HF_TOKEN," not in laptop.err and "export WANDB_API_KEY=" in laptop.err
    assert laptop.tools.calls == []


def test_missing_tool_is_named_with_its_source(laptop):
    (laptop.tools.folder / "bin" / "ray").unlink()
    assert laptop.run("status", laptop.file("local")) == 3
    assert "`ray` is not on the PATH" in laptop.err and "pip install" in laptop.err


def test_up_refuses_to_restart_ray_under_a_running_sweep(laptop):
    laptop.token()
    laptop.tools.answer("on-head jobs", head_output(jobs=[job("llama", "RUNNING")]))
    assert laptop.run("up", laptop.file("local")) == 1
    assert "runs llama" in laptop.err and not any("ray up" in line for line in laptop.tools.lines)


def test_failed_up_reports_the_failure(laptop):
    laptop.token()
    laptop.tools.answer("ray up", {"out": "Setup command failed\n", "code": 1})
    assert laptop.run("up", laptop.file("local")) == 1
    assert "Setup command failed" in laptop.out and "the cluster did not start" in laptop.err


FINE = {
    **{"ray": "ray, version 2.60.0", "mode": "token", "raylets": "0"},
    **{"token": sha256(TOKEN.encode()).hexdigest(), "rsync": "/bin/rsync", "storage": "writable", "head": "reached"},
}


@pytest.mark.parametrize(
    ("facts", "cause"),
    [
        ({}, "10.0.0.3 is fine, but Ray does not run on it"),
        ({"ray": "bash: ray: command not found"}, "has no `ray` on the PATH"),
        ({"ray": "ray, version 2.59.1"}, "has Ray 2.59.1 and the head 2.60.0"),
        ({"mode": ""}, "does not set RAY_AUTH_MODE=token"),
        ({"token": "00"}, "has a different Ray token"),
        ({"token": ""}, "has no Ray token"),
        ({"refused": "Unauthenticated: InvalidAuthToken"}, "rejected the token of 10.0.0.3"),
        ({"clock": "1000"}, "the clock of 10.0.0.3 is"),
        ({"rsync": ""}, "has no rsync"),
        ({"storage": ""}, "cannot write to the folder of MACDROP_STORAGE"),
        ({"head": ""}, "cannot reach port 6379 of the head 10.0.0.1"),
        ("Permission denied (publickey).", "rejects this key for user ubuntu"),
        ("connect to host 10.0.0.3 port 22: Connection refused", "refuses ssh"),
        ("connect to host 10.0.0.3 port 22: Connection timed out", "does not answer"),
        ("Host key verification failed.", "ssh-keygen -R 10.0.0.3"),
        ("ssh: Could not resolve hostname 10.0.0.3", "has no address"),
    ],
)
def test_facts_about_a_host_become_causes(facts, cause, laptop):
    laptop.token()
    reported = {**FINE, "clock": f"{time.time():.0f}"} | (facts if isinstance(facts, dict) else {})
    lines = (f"{MARK}{name} {value}" for name, value in reported.items())
    text = facts if isinstance(facts, str) else "\n".join(lines)
    found = read_probe(Ssh("ubuntu", None), "10.0.0.3", Result(255, text), "10.0.0.1", "2.60.0")
    assert cause in found[0] and len(found) == 1


def test_missing_host_is_probed_for_the_cause(laptop):
    laptop.token()
    laptop.tools.answer("on-head nodes", head_output(nodes=THREE[:2], log=[]))
    laptop.tools.answer("on-head log", head_output(log=[]))
    facts = {**FINE, "clock": f"{time.time():.0f}", "ray": "ray, version 2.59.1"}
    laptop.tools.answer("^ssh ", "".join(f"{MARK}{name} {value}\r\n" for name, value in facts.items()))
    assert laptop.run("check", laptop.file("local"), "--after", "--timeout", "0") == 1, laptop.err
    assert "2 of 3 nodes came within 0 s" in laptop.out
    assert "cause: 10.0.0.3 has Ray 2.59.1 and the head 2.60.0" in laptop.out
    probes = [line for line in laptop.tools.lines if line.startswith("ssh ")]
    assert len(probes) == 1 and "ubuntu@10.0.0.3" in probes[0]
    laptop.hides_secrets()


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("An error occurred (InsufficientInstanceCapacity) when calling the RunInstances operation", "capacity"),
        ("(MaxSpotInstanceCountExceeded) when calling RunInstances: Max spot instance count exceeded", "quota"),
        ("(VcpuLimitExceeded) when calling the RunInstances operation", "quota"),
        ("(UnauthorizedOperation) You are not authorized to perform this operation.", "role"),
        ("Quota 'NVIDIA_L4_GPUS' exceeded. Limit: 0.0 in region us-central1.", "quota"),
        ("ZONE_RESOURCE_POOL_EXHAUSTED: The zone does not have enough resources", "capacity"),
        ("(SkuNotAvailable) The requested VM size is currently not available in location", "instance type"),
        ("0/3 nodes are available: 3 Insufficient nvidia.com/gpu.", "free GPUs"),
        ("pod x: ImagePullBackOff: Back-off pulling image", "image"),
        ("RuntimeError: Version mismatch: The cluster was started with: Ray: 2.60.0", "version"),
        ("!!! Setup command `pip install x` failed with exit code 1.", "set-up of the node fails"),
        ("E: No space left on device", "disk of the node is full"),
    ],
)
def test_log_line_becomes_a_cause(line, word):
    assert word in causes(["all is well", line, "nothing to see"])[0]
    assert len(causes([line, line])) == 1 and causes(["all is well"]) == []


def test_waiting_reports_causes_from_the_autoscaler_log(laptop):
    laptop.token()
    log = ["(InsufficientInstanceCapacity) when calling the RunInstances operation"]
    laptop.tools.answer("on-head nodes", head_output(nodes=THREE[:1], log=log), head_output(nodes=THREE, log=log))
    assert laptop.run("check", laptop.file("local"), "--after") == 0
    assert laptop.out.count("out of machines of this type") == 1


def test_check_after_needs_a_token(laptop):
    assert laptop.run("check", laptop.file("local"), "--after") == 3
    assert "no Ray token" in laptop.err and "ray get-auth-token --generate" in laptop.err


def test_autoscaler_log_is_read_from_the_newest_session(monkeypatch, tmp_path):
    folder = tmp_path / "ray" / "session_latest" / "logs"
    folder.mkdir(parents=True)
    (folder / "monitor.log").write_text("first\nlast\n")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert head.collect(["log"]) == {"problems": {}, "log": ["first", "last"]}


# --- submit, logs ---


def started(laptop, *jobs: dict) -> None:
    """Script one submission: no job before it, then its log, then the states of its job in turn."""
    laptop.tools.answer("on-head jobs", head_output(jobs=[]), *(head_output(jobs=[one]) for one in jobs))
    laptop.tools.answer("ray job logs", "Fetched IP: 10.0.0.1\r\nstep 1\r\nstep 2\r\n")


@pytest.fixture
def _stamped(monkeypatch):
    from cluster.commands import jobs

    monkeypatch.setattr(jobs, "stamp", lambda: "1")


@pytest.mark.usefixtures("_stamped")
@pytest.mark.parametrize(
    ("status", "exit_code", "code"),
    [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", None, 1), ("STOPPED", None, 130)],
)
def test_submit_follows_the_log_and_returns_the_exit_code(status, exit_code, code, laptop):
    started(laptop, job("demo", status, exit_code))
    assert laptop.run("submit", laptop.file("local"), "demo", "sweep.num_samples=2") == code, laptop.err
    assert "step 1\nstep 2\n" in laptop.out and "Fetched IP" not in laptop.out
    script = laptop.tools.find("ray job submit")["argv"][3]
    entrypoint = script.partition(" -- ")[2]
    assert entrypoint.startswith("macdrop sweep demo sweep.num_samples=2 ray.address=auto output_dir=")
    assert ("macdrop cluster fetch" in laptop.out) is (code == 0)


@pytest.mark.usefixtures("_stamped")
def test_dropped_connection_resumes_the_log(laptop):
    started(laptop, job("demo", "RUNNING"), job("demo", "SUCCEEDED", 0))
    laptop.tools.rules = [rule for rule in laptop.tools.rules if rule["when"] != "ray job logs"]
    laptop.tools.answer("ray job logs", {"out": "step 1\n", "code": 255}, "step 1\nstep 2\n")
    assert laptop.run("submit", laptop.file("local"), "demo") == 0
    assert laptop.out.count("step 1") == 1 and laptop.out.count("step 2") == 1


@pytest.mark.usefixtures("_stamped")
def test_lost_connection_leaves_the_job_running(laptop, monkeypatch):
    from cluster.commands import jobs

    monkeypatch.setattr(jobs, "ATTEMPTS", 2)
    laptop.tools.answer("on-head jobs", head_output(jobs=[]), {"out": "Connection timed out", "code": 255})
    file = laptop.file("local")
    assert laptop.run("submit", file, "demo") == 3
    assert f"macdrop cluster logs {file} demo --follow" in laptop.out and "The job may still be running" in laptop.out
    assert not any("job stop" in line for line in laptop.tools.lines)


def test_ctrl_c_leaves_the_job_running(laptop, tmp_path):
    """In a process of its own, to be signalled."""
    laptop.tools.answer("on-head jobs", head_output(jobs=[]))
    laptop.tools.answer("ray job logs", {"run": "echo step 1; exec sleep 60"})
    with open(tmp_path / "out", "w") as out:
        command = [sys.executable, "-m", "tune.cli", "cluster", "submit", laptop.file("local"), "demo"]
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        )
        deadline = time.monotonic() + 60
        while "step 1" not in Path(tmp_path / "out").read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(2)
        assert process.wait(timeout=60) == 130
    assert "The job continues. To see its log again: macdrop cluster logs" in Path(tmp_path / "out").read_text()
    assert not any("job stop" in line for line in laptop.tools.lines)


def test_recipe_file_is_copied_to_the_storage(laptop):
    started(laptop)
    Path("my sweep.yaml").write_text("seed: 1\ndataset: [mine.jsonl, far.jsonl]\n")
    Path("mine.jsonl").touch()
    assert laptop.run("submit", laptop.file("local"), "my sweep.yaml", "--name", "mine", "--no-follow") == 0, laptop.err
    copied = laptop.tools.find("rsync-up")["argv"]
    assert copied[:2] == ["ray", "rsync-up"] and copied[3] == "my sweep.yaml"
    script = laptop.tools.find("ray job submit")["argv"][3]
    assert f'cp {copied[4]} "$MACDROP_STORAGE"/recipes/mine.yaml' in script
    assert "step" not in laptop.out
    assert "note: mine.jsonl is a file of this machine" in laptop.out and "far.jsonl" not in laptop.out


def test_submission_to_a_starting_head_is_retried(laptop, monkeypatch):
    from cluster.backends import base

    monkeypatch.setattr(base, "RETRY", 0.01)
    started(laptop)
    refused = {"out": "status code 500: No available agent to submit job, please try again later", "code": 1}
    laptop.tools.answer("ray job submit", refused, refused, "submitted")
    assert laptop.run("submit", laptop.file("local"), "demo", "--no-follow") == 0
    assert sum("ray job submit" in line for line in laptop.tools.lines) == 3
    assert "status code 500" not in laptop.out and "submitted" in laptop.out
    laptop.tools.answer("ray job submit", refused)
    assert laptop.run("submit", laptop.file("local"), "demo", "--no-follow") == 1
    assert "another Ray holds its port there, 52365" in laptop.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nope.yaml"], "does not exist"),
        (["broken.yaml"], "recipe broken.yaml"),
        (["demo", "seed"], "not a key=value override"),
        (["demo", "output_dir=runs/x"], "--name NAME"),
        (["demo", "ray.address=auto"], "ray.address is set by submit itself"),
        (["demo", "--name", "../x"], "a run's name"),
        (["demo", "--name", "$(reboot)"], "a run's name"),
        (["de;mo"], "neither a file nor a name"),
    ],
)
def test_invalid_submission_is_refused_before_any_command(words, message, laptop):
    Path("broken.yaml").write_text("a: [")
    assert laptop.run("submit", laptop.file("local"), *words) == 2
    assert message in laptop.err and laptop.tools.calls == []


def test_running_run_is_not_started_twice(laptop):
    laptop.tools.answer("on-head jobs", head_output(jobs=[job("demo", "RUNNING")]))
    assert laptop.run("submit", laptop.file("local"), "demo") == 1
    assert "is running as job demo-1" in laptop.err
    assert not any("ray job submit" in line for line in laptop.tools.lines)


@pytest.mark.parametrize("there", [False, True])
def test_script_on_the_head_is_injection_proof_and_resumes(there, tmp_path):
    """Run by a real shell, with a `ray` that prints its arguments."""
    storage = tmp_path / "the storage"
    if there:
        (storage / "runs" / "demo").mkdir(parents=True)
        (storage / "runs" / "demo" / "run.json").write_text("{}")
    hostile = "x='; touch stolen; echo $(touch stolen) `touch stolen` \" \\"
    (tmp_path / "ray").write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    (tmp_path / "ray").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "MACDROP_STORAGE": str(storage)}
    script = submission(Job("demo", "demo", (hostile,), "1"))
    done = subprocess.run(["bash", "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True)
    words = json.loads(done.stdout)
    run_dir = f"output_dir={storage}/runs/demo"
    assert words[words.index("--") + 1 :] == [
        "macdrop",
        "sweep",
        "demo",
        hostile,
        "ray.address=auto",
        run_dir,
        *(["--resume"] if there else []),
    ]
    environment_of_job = json.loads(words[words.index("--runtime-env-json") + 1])["env_vars"]
    assert environment_of_job["RAY_JOB_STOP_SIGNAL"] == "SIGINT" and environment_of_job["PYTHONUNBUFFERED"] == "1"
    assert not (tmp_path / "stolen").exists() and (storage / "recipes").is_dir()


def test_logs_of_the_newest_job_or_of_a_run(laptop):
    laptop.tools.answer("on-head jobs", head_output(jobs=[job("a", "SUCCEEDED", 0), job("b", "SUCCEEDED", 0, 2)]))
    laptop.tools.answer("ray job logs", "the log\n")
    file = laptop.file("local")
    assert laptop.run("logs", file) == 0 and laptop.tools.lines[-1].endswith("ray job logs b-2")
    assert laptop.run("logs", file, "a") == 0 and laptop.tools.lines[-1].endswith("ray job logs a-1")
    assert laptop.run("logs", file, "c") == 1 and "Known runs: a, b" in laptop.err


# --- status ---


def test_status_shows_nodes_jobs_and_runs(laptop):
    nodes = [*THREE[:2], node("10.0.0.3", alive=False, reason="missed too many heartbeats")]
    kept = [run("demo", "running"), run("old", "running"), run("first", "done")]
    laptop.tools.answer("on-head", head_output(nodes=nodes, jobs=[job("demo", "RUNNING")], runs=kept))
    assert laptop.run("status", laptop.file("local")) == 0
    lines = {line.split()[0]: " ".join(line.split()) for line in laptop.out.splitlines() if line.strip()}
    assert lines["10.0.0.3"] == "10.0.0.3 h3 worker dead 0 0 missed too many heartbeats"
    assert lines["10.0.0.1"].startswith("10.0.0.1 h1 head alive")
    assert "interrupted" in lines["old"] and "3 done" in lines["first"] and "interrupted" not in lines["demo"]


@pytest.mark.parametrize(
    ("problem", "remedy"),
    [
        ("AuthenticationError: no token found", "RAY_AUTH_MODE=token"),
        ("ConnectionError: Could not find any running Ray instance", "macdrop cluster up"),
    ],
)
def test_status_reports_unavailable_topics_with_a_remedy(problem, remedy, laptop):
    laptop.tools.answer(
        "on-head", head_output(problems={"nodes": problem, "jobs": problem}, runs=[run("demo", "done")])
    )
    assert laptop.run("status", laptop.file("local")) == 1
    assert remedy in laptop.out and "demo" in laptop.out


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("Head node of cluster (macdrop) not found!", "macdrop cluster up"),
        ("Token authentication is enabled but no authentication token was found", "lacks the token that its Ray wants"),
        ("bash: macdrop: command not found", "`macdrop` is not installed on the head"),
        ("ubuntu@10.0.0.1: Permission denied (publickey).", "10.0.0.1 rejects this key"),
        ("something else", "something else"),
    ],
)
def test_missing_answer_of_the_head_has_a_remedy(said, remedy, laptop):
    laptop.tools.answer("on-head", {"out": said, "code": 1})
    assert laptop.run("status", laptop.file("local")) == 1
    assert remedy in laptop.err and "Traceback" not in laptop.err


def test_forgotten_cluster_is_restored(laptop, monkeypatch, tmp_path):
    """After a reboot of the laptop Ray's note of the head is gone, and the cluster is not."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "forgotten"))
    note = tmp_path / "forgotten" / "ray" / "cluster-macdrop.state"
    note.parent.mkdir(parents=True)
    states = {f"10.0.0.{n}": {"state": "terminated", "tags": {"ray-node-type": "worker"}} for n in (2, 3)}
    note.write_text(json.dumps({"10.0.0.1": {"state": "terminated", "tags": {"ray-node-type": "head"}}, **states}))
    laptop.tools.answer(
        "on-head",
        {"out": "Head node of cluster (macdrop) not found!", "code": 1},
        head_output(jobs=[], nodes=[], runs=[]),
    )
    laptop.tools.answer("^ssh .*asked", f"{MARK}asked\n")
    file = laptop.file("local")
    assert laptop.run("status", file) == 1 and "macdrop cluster up" in laptop.err, "nothing runs there"
    laptop.tools.answer("^ssh .*asked", f"{MARK}asked\n 7 /x/gcs/gcs_server --log_dir=x\n")
    assert laptop.run("status", file) == 0, laptop.err
    assert "restored the record of a cluster" in laptop.out
    noted = json.loads(note.read_text())
    assert noted["10.0.0.1"]["state"] == "running" and noted["10.0.0.1"]["tags"]["ray-node-status"] == "up-to-date"

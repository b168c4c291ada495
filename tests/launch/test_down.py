"""Fetching results and taking clusters down; Kubernetes and Slurm."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from launching import SECRETS
from recorder import head_output, job, node, run

from cluster.backends.ssh_hosts import MARK
from cluster.remote.ray_internals import PROCESSES

RSYNC = Path("/usr/bin/rsync")
needs_rsync = pytest.mark.skipif(not RSYNC.exists(), reason=f"copies with {RSYNC}, which is not installed")

# --- fetch ---


def put_run(storage: Path, created: str) -> dict:
    """Create a run on the storage, a local folder; return the head's report of it."""
    made = storage / "runs" / "demo"
    for name in (
        "run.json",
        "scores.jsonl",
        "trials/a/adapter/x",
        "trials/a/checkpoints/y",
        "ray/state",
        "models/ray/z",
    ):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(json.dumps({"created": created}))
    return run("demo", "done", created, folder=str(storage / "runs"))


def with_rsync(laptop, found: dict) -> None:
    """Run `ray rsync-down FILE SOURCE TARGET` as Ray does, on one machine, with the exclusions of the file."""
    excludes = "$(sed -n '/^rsync_exclude:/,/^[a-z]/s/^- /--exclude=/p' $2 | tr -d \"'\")"
    laptop.tools.answer("rsync-down", {"run": f"exec {RSYNC} -a {excludes} $3 $4"})
    laptop.tools.answer("on-head runs", head_output(runs=[found]))


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


RESULTS = {"run.json", "scores.jsonl", "trials/a/adapter/x", "models/ray/z"}


@needs_rsync
def test_fetch_copies_results_without_checkpoints(laptop, tmp_path):
    with_rsync(laptop, put_run(tmp_path / "storage", "monday"))
    file = laptop.file("local")
    assert laptop.run("fetch", file, "demo") == 0, laptop.err + laptop.out
    assert files(tmp_path / "runs" / "demo") == RESULTS
    assert "macdrop report runs/demo" in laptop.out
    (tmp_path / "storage/runs/demo/scores.jsonl").write_text("new")
    assert laptop.run("fetch", file, "demo") == 0, "the same run again is brought up to date"
    assert (tmp_path / "runs/demo/scores.jsonl").read_text() == "new"
    assert laptop.run("fetch", file, "demo", "--to", "all", "--all") == 0
    assert files(tmp_path / "all" / "demo") == RESULTS | {"trials/a/checkpoints/y", "ray/state"}


@pytest.mark.parametrize("here", ["another", "nothing"])
def test_fetch_never_overwrites_other_files(here, laptop, tmp_path):
    with_rsync(laptop, put_run(tmp_path / "storage", "monday"))
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    own = tmp_path / "runs" / "demo" / ("run.json" if here == "another" else "thesis.txt")
    own.write_text('{"created": "tuesday"}')
    assert laptop.run("fetch", laptop.file("local"), "demo") == 2
    assert "--to FOLDER" in laptop.err and own.read_text() == '{"created": "tuesday"}'
    assert not any("rsync-down" in line for line in laptop.tools.lines)


def test_fetch_of_an_unknown_run_names_the_known_ones(laptop):
    laptop.tools.answer("on-head runs", head_output(runs=[run("a", "done"), run("b", "done")]))
    assert laptop.run("fetch", laptop.file("local"), "c") == 1
    assert "Known runs: a, b" in laptop.err and not Path("runs").exists()


# --- down ---


def test_down_stops_jobs_cluster_and_ray_and_verifies_every_host(laptop):
    laptop.tools.answer("on-head jobs", head_output(jobs=[job("a", "SUCCEEDED", 0), job("b", "RUNNING", None, 2)]))
    laptop.tools.answer("^ssh .*asked", f"{MARK}asked\nbash: no job control in this shell\n")
    file = laptop.file("local")
    assert laptop.run("down", file, "--yes") == 0, laptop.out + laptop.err
    lines = laptop.tools.lines
    order = ["on-head jobs", "ray job stop b-2", f"ray down -y {file}", *["ray stop --force"] * 3, *["asked"] * 3]
    assert len(lines) == len(order) and all(part in line for part, line in zip(order, lines, strict=True))
    for host in ("10.0.0.1", "10.0.0.2", "10.0.0.3"):
        assert sum(f"ubuntu@{host}" in line for line in lines) == 2
    assert "no Ray process is left on 10.0.0.1, 10.0.0.2, 10.0.0.3" in laptop.out


def test_down_names_busy_and_silent_hosts(laptop):
    laptop.tools.answer("on-head jobs", {"out": "Connection timed out", "code": 255})
    laptop.tools.answer("^ssh .*asked", f"{MARK}asked\n")
    laptop.tools.answer("^ssh .*10.0.0.2.*asked", f"{MARK}asked\n 77 /x/raylet/raylet --node_id=1\n")
    laptop.tools.answer("^ssh .*10.0.0.3", {"out": "Connection timed out", "code": 255})
    assert laptop.run("down", laptop.file("local"), "--yes") == 1
    assert "10.0.0.2 still runs Ray:\n    77 /x/raylet/raylet" in laptop.out
    assert "left: not verified: 10.0.0.3 does not answer" in laptop.out and "10.0.0.1 still" not in laptop.out


def test_down_without_a_terminal_needs_yes(laptop):
    laptop.tools.answer("on-head jobs", head_output(jobs=[job("b", "RUNNING")]))
    assert laptop.run("down", laptop.file("local")) == 1
    assert "which runs b" in laptop.out and "--yes" in laptop.out
    assert len(laptop.tools.calls) == 1


def test_down_of_rented_machines_leaves_hosts_to_the_cloud(laptop):
    laptop.tools.answer("on-head jobs", head_output(jobs=[]))
    assert laptop.run("down", laptop.file("aws"), "--yes") == 0
    assert [line.split()[1] for line in laptop.tools.lines] == ["exec", "down"]


def test_process_pattern_matches_ray_but_not_itself():
    ray = [
        "/v/ray/core/src/ray/raylet/raylet --raylet_socket_name=x",
        "/v/ray/core/src/ray/gcs/gcs_server --log_dir=x",
        "ray::IDLE",
        "/v/bin/python -u /v/ray/_private/log_monitor.py --x",
        "/v/bin/python -u /v/ray/dashboard/agent.py --x",
        "/v/bin/python /v/ray/dashboard/dashboard.py --x",
        "/v/bin/python -u /v/ray/autoscaler/_private/monitor.py --x",
        "/v/bin/python -u /v/ray/_private/runtime_env/agent/main.py --x",
    ]
    others = [
        "[ray::Dead] <defunct>",
        f"grep -E {PROCESSES}",
        "bash -c -i source ~/.bashrc; ps | grep -E " + PROCESSES,
        "vim array.py",
        "x-ray",
    ]
    given = "\n".join([*ray, *others])
    found = subprocess.run(["grep", "-E", PROCESSES], input=given, capture_output=True, text=True).stdout.splitlines()
    assert found == ray


# --- Kubernetes ---


def pods(*states: tuple[str, str], message: str = "") -> dict:
    items = []
    for number, (kind, phase) in enumerate(states):
        conditions = [{"status": "False", "reason": "Unschedulable", "message": message}] if phase == "Pending" else []
        labels = {"ray.io/node-type": kind}
        metadata = {"name": f"{kind}-{number}", "labels": labels}
        items.append({"metadata": metadata, "status": {"phase": phase, "conditions": conditions}})
    return {"out": json.dumps({"items": items})}


def test_kubernetes_up_submit_and_down(laptop, monkeypatch):
    monkeypatch.setattr("cluster.commands.check.report", lambda file: 0)
    laptop.token()
    laptop.tools.answer("on-head jobs", head_output(jobs=[]))
    laptop.tools.answer("on-head nodes", head_output(nodes=[node(str(number)) for number in range(9)], log=[]))
    laptop.tools.answer("get pods", pods(("head", "Running")))
    file = laptop.file("kuberay")
    assert laptop.run("up", file) == 0, laptop.out + laptop.err
    applied = [json.loads(call["stdin"]) for call in laptop.tools.calls if call["line"].endswith("apply -f -")]
    data = {one["metadata"]["name"]: sorted(one["data"]) for one in applied}
    assert data == {"macdrop-secrets": sorted(SECRETS), "macdrop-token": ["auth_token"]}
    assert {one["metadata"]["namespace"] for one in applied} and {one["kind"] for one in applied} == {"Secret"}
    laptop.hides_secrets()
    assert laptop.run("submit", file, "demo", "--no-follow") == 0, laptop.err
    words = laptop.tools.find("ray job submit")["argv"]
    assert "head-0" in words and words[words.index("--") :][1:3] == ["bash", "-c"]
    laptop.tools.answer("get pods", pods())
    assert laptop.run("down", file, "--yes") == 0, laptop.out
    assert any("delete --ignore-not-found -f kuberay.yaml" in line for line in laptop.tools.lines)
    assert any("delete secret -l app.kubernetes.io/managed-by=macdrop," in line for line in laptop.tools.lines)
    assert any("wait --for=delete" in line for line in laptop.tools.lines)


def test_kubernetes_reports_why_a_pod_is_pending(laptop, monkeypatch):
    monkeypatch.setattr("cluster.commands.check.report", lambda file: 0)
    monkeypatch.setattr("cluster.backends.kuberay.HEAD_TIMEOUT", 0)
    laptop.token()
    laptop.tools.answer("get pods", pods(("head", "Pending"), message="0/3 nodes: 3 Insufficient nvidia.com/gpu."))
    assert laptop.run("up", laptop.file("kuberay")) == 1
    assert "no Kubernetes node has enough free GPUs" in laptop.err


def test_rayjob_refuses_another_recipe(laptop):
    laptop.tools.answer("get pods", pods(("head", "Running")))
    laptop.tools.answer("get rayjob", "cluster-1")
    laptop.tools.answer("on-head jobs", head_output(jobs=[]))
    assert laptop.run("submit", laptop.file("kuberay-job"), "demo") == 2
    assert "macdrop cluster up" in laptop.err


# --- Slurm ---


@pytest.fixture
def queue(laptop, tmp_path):
    """A script whose storage is a local folder, and an empty queue."""
    file = Path(laptop.file("slurm"))
    file.write_text(file.read_text().replace("/shared", str(tmp_path / "storage")))
    laptop.tools.answer("sbatch", "42\n")
    return str(file)


def test_slurm_submits_follows_and_cancels(laptop, tmp_path, queue):
    Path("mine.yaml").write_text("seed: 1\n")
    log = tmp_path / "storage" / "logs" / "mine-42.log"
    laptop.tools.answer("sacct", "COMPLETED|0:0\n")
    laptop.tools.answer("squeue -h -j", {"run": f"echo 'step 1' > {log}; echo RUNNING"}, "")
    assert laptop.run("submit", queue, "mine.yaml", "seed=2") == 0, laptop.out + laptop.err
    call = laptop.tools.find("sbatch")
    recipe = str(tmp_path / "storage" / "recipes" / "mine.yaml")
    assert call["argv"][-3:] == [queue, recipe, "seed=2"] and Path(recipe).read_text() == "seed: 1\n"
    assert call["environment"]["MACDROP_RUN"] == "mine" and call["environment"]["HF_TOKEN"] == SECRETS["HF_TOKEN"]
    assert "step 1" in laptop.out and "run mine is done" in laptop.out
    laptop.hides_secrets()
    laptop.tools.answer("squeue --me", "42|RUNNING|mine\n43|RUNNING|another\n", "")
    assert laptop.run("down", queue, "--yes") == 0
    assert [line for line in laptop.tools.lines if "scancel" in line] == ["scancel 42"], "other jobs are not ours"


def test_slurm_status_lists_ended_jobs_and_runs(laptop, tmp_path, queue):
    (tmp_path / "storage" / "logs").mkdir(parents=True)
    (tmp_path / "storage" / "logs" / "old-41.log").write_text("x\n")
    put_run(tmp_path / "storage", "monday")
    laptop.tools.answer("sacct", "TIMEOUT|0:15\n")
    assert laptop.run("status", queue) == 0, laptop.err
    lines = [line.split() for line in laptop.out.splitlines()]
    assert ["41", "old", "failed", "0"] in lines
    assert "demo" in laptop.out


@needs_rsync
def test_slurm_fetch_copies_from_mounted_storage(laptop, tmp_path, queue):
    put_run(tmp_path / "storage", "monday")
    (laptop.tools.folder / "bin" / "rsync").unlink()
    assert laptop.run("fetch", queue, "demo", "--to", "home-runs") == 0, laptop.err
    assert files(Path("home-runs/demo")) == RESULTS


def test_slurm_names_a_missing_secret(laptop, monkeypatch, queue):
    monkeypatch.delenv("HF_TOKEN")
    assert laptop.run("submit", queue, "demo") == 3
    assert "HF_TOKEN" in laptop.err and not any("sbatch" in line for line in laptop.tools.lines)

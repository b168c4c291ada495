"""Messages about a cluster that cannot be joined or has no room yet."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tune.config.run_spec import RaySpec
from tune.distributed.cluster import ray_cluster
from tune.distributed.cluster.ray_cluster import check_cluster, token_hint
from tune.errors import ResourceError
from tune.preflight import machine


@pytest.mark.parametrize(
    ("mode", "file", "value", "hint"),
    [
        (None, True, None, "needs RAY_AUTH_MODE=token here"),
        ("disabled", False, None, "needs RAY_AUTH_MODE=token here"),
        ("token", False, None, "There is no token in"),
        ("token", True, None, "Does the token of this machine match the cluster's?"),
        ("token", False, "secret", "Does the token of this machine match the cluster's?"),
    ],
)
def test_the_hint_names_the_problem_without_the_token(tmp_path, monkeypatch, mode, file, value, hint):
    token = tmp_path / "auth_token"
    if file:
        token.write_text("secret")
    for name, setting in {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": value, "RAY_AUTH_TOKEN_PATH": str(token)}.items():
        monkeypatch.delenv(name, raising=False)
        if setting is not None:
            monkeypatch.setenv(name, setting)
    assert hint in token_hint() and "secret" not in token_hint()


@pytest.mark.ray
def test_ray_starts_and_its_state_api_answers():
    check = machine._ray(*machine._probe(machine._RAY_PROBE))
    assert check.ok, check


OWN = """
import json, os, subprocess, sys, urllib.error, urllib.request
from pathlib import Path
import psutil, ray
from tune.config.run_spec import RaySpec
from tune.distributed.cluster import ray_internals
from tune.distributed.cluster.ray_cluster import connect

address, _ = connect(RaySpec())
session, token = Path(ray_internals.session_dir()), os.environ["RAY_AUTH_TOKEN"]

def status(**headers):
    try:
        request = urllib.request.Request(f"http://{address}/api/jobs/", headers=headers)
        return urllib.request.urlopen(request, timeout=20).status
    except urllib.error.HTTPError as error:
        return error.code

def heard(process):
    try:
        return [each.laddr.ip for each in process.net_connections("inet") if each.status == "LISTEN"]
    except psutil.Error:
        return []

family = [psutil.Process(), *psutil.Process().children(recursive=True)]
found = {
    "own": status(Authorization=f"Bearer {token}"),
    "heard": sorted({ip for process in family for ip in heard(process)}),
    "files": subprocess.run(["grep", "-rl", token, session, Path.home()], capture_output=True, text=True).stdout,
}
if os.getuid() == 0:
    there, here = os.pipe()
    if not os.fork():
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
        seen = status(), os.access(session, os.R_OK | os.X_OK), os.access(session.parent, os.X_OK)
        os.write(here, json.dumps(seen).encode())
        os._exit(0)
    found["other"] = json.loads(os.read(there, 1000))
print(json.dumps(found), flush=True)
ray.shutdown()
"""


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_local_ray_answers_to_its_owner_alone(tmp_path):
    """No other user of the machine, and nobody on its network, may use it; and its token is in no file."""
    mine = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    mine |= {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path), "NO_PROXY": ""}
    mine |= {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", OWN], env=mine, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["own"] == 200 and found["files"] == "" and not (tmp_path / ".ray").exists()
    assert {address.removeprefix("::ffff:") for address in found["heard"]} == {"127.0.0.1"}
    assert found.get("other", [401, False, False]) == [401, False, False]


@pytest.fixture(scope="module")
def nodes():
    """A cluster of one head without CPUs, of processes on this machine."""
    import ray
    from ray.cluster_utils import Cluster

    from tune.distributed.cluster.ray_cluster import connect

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        connect(RaySpec(dashboard=False, address=cluster.address))
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.cluster
def test_check_requests_nodes_and_waits_for_them(nodes, monkeypatch):
    spec = RaySpec(address=nodes.address, lanes=2, cpus_per_worker=2, resource_timeout_s=60)
    asked, messages = [], []
    monkeypatch.setattr(ray_cluster, "request_resources", lambda bundles: asked.append(bundles))

    def tell(text: str) -> None:
        messages.append(text)
        if len(messages) == 1:
            nodes.add_node(num_cpus=3)

    assert check_cluster(spec, tell) == 0.0
    assert asked == [[{"CPU": 2.0}], []], "one lane's worker, and nothing any more once it is there"
    assert "CPU: needs 2, there 0\nWaiting for nodes, for up to 60 s. If none will come:" in messages[0]
    assert messages[1:] == [messages[1]] and "CPU: needs 4, there 3\nThe rest starts when there is room." in messages[1]


@pytest.mark.cluster
def test_missing_resources_are_reported_with_totals(nodes):
    spec = RaySpec(address=nodes.address, num_workers=3, gpus_per_worker=1, resource_timeout_s=1)
    with pytest.raises(ResourceError, match=r"(?s)3 worker.*GPU: needs 3, there 0.*ray.resource_timeout_s = 1 s"):
        check_cluster(spec, lambda text: None)

"""spot-watch against services that answer as the clouds' do, on this machine, and against a real Ray node."""

from __future__ import annotations

import json
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from recorder import Recorder

from cluster.errors import BadLaunchFile, Missing
from cluster.remote import spot_watch


class Service:
    """A metadata service: path -> answers in turn, the last one repeats; None is a 404, a number an HTTP status."""

    def __init__(self, needs: dict[str, str], answers: dict[str, list], *, token: str | None = None) -> None:
        self.asked: list[str] = []
        service, given = self, {path: list(found) for path, found in answers.items()}

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                right = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
                self.answer(token if right and token else 405)

            def do_GET(self) -> None:
                service.asked.append(self.path)
                if any(self.headers[name] != value for name, value in needs.items()):
                    return self.answer(401)
                queue = given.get(self.path, [None])
                self.answer(queue.pop(0) if len(queue) > 1 else queue[0])

            def answer(self, found) -> None:
                code = 404 if found is None else found if isinstance(found, int) else 200
                self.send_response(code)
                self.end_headers()
                self.wfile.write(found.encode() if code == 200 else b"")

            def log_message(self, *_) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


def later(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


AWS = "/latest/meta-data/spot/instance-action"
REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
NAME = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
PREEMPTED = "/computeMetadata/v1/instance/preempted"


def azure(*resources: str, kind: str = "Preempt") -> str:
    event = {"EventType": kind, "Resources": resources, "NotBefore": format_datetime(later(30), usegmt=True)}
    return json.dumps({"DocumentIncarnation": 1, "Events": [event]})


def aws(*answers, **more) -> Service:
    return Service({"X-aws-ec2-metadata-token": "t0k3n"}, {AWS: [*answers], **more}, token="t0k3n")


def aws_ends() -> str:
    return json.dumps({"action": "terminate", "time": later(120).strftime("%Y-%m-%dT%H:%M:%SZ")})


SERVICES = {
    "aws": (lambda: aws(None, 503, "not JSON", aws_ends()), 120),
    "gcp": (lambda: Service({"Metadata-Flavor": "Google"}, {PREEMPTED: ["FALSE", 503, "TRUE"]}), 30),
    "azure": (
        lambda: Service(
            {"Metadata": "true"},
            {
                NAME: ["me"],
                EVENTS: ['{"Events": []}', azure("me", kind="Reboot"), azure("another"), 500, azure("another", "me")],
            },
        ),
        30,
    ),
}


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A recorded `ray`, and Ray nodes that disappear shortly after they are drained."""
    tools = Recorder(tmp_path / "tools", ("ray",))
    monkeypatch.setenv("PATH", tools.path)
    monkeypatch.delenv("RAY_AUTH_MODE")
    monkeypatch.setattr(spot_watch, "REPORT", 0.0)
    monkeypatch.setattr(
        spot_watch, "ray_nodes", lambda only=None: {} if len(tools.calls) > 1 else {"ab" * 28: "10.0.0.1:6379"}
    )
    tools.answer("drain-node", {"out": "no such head\n", "code": 1}, "")
    return tools


@pytest.mark.parametrize("cloud", SERVICES)
def test_notice_drains_the_node_despite_errors(cloud, host, monkeypatch):
    make, seconds = SERVICES[cloud]
    service, lines = make(), []
    monkeypatch.setenv("MACDROP_METADATA_URL", service.url)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert spot_watch.watch(cloud, interval=0.01, say=lines.append) == 0
    first, second = (call["argv"] for call in host.calls)
    options = dict(zip(second[2::2], second[3::2], strict=True))
    assert second[:2] == first[:2] == ["ray", "drain-node"]
    assert options["--node-id"] == "ab" * 28 and options["--address"] == "10.0.0.1:6379"
    assert options["--reason"] == "DRAIN_NODE_REASON_PREEMPTION" and options["--reason-message"]
    assert seconds - 20 <= int(options["--deadline-remaining-seconds"]) <= seconds
    assert host.calls[0]["environment"]["RAY_AUTH_MODE"] == "token"
    text = "\n".join(lines)
    assert (
        "metadata service, retrying: " in text
        and "not drained, retrying: no such head" in text
        and "is drained" in text
    )
    assert lines[-1] == "no Ray node is left here"


def test_rebalance_recommendation_is_only_reported(host, monkeypatch):
    service, lines = aws(None, None, aws_ends(), **{REBALANCE: ['{"noticeTime": "now"}']}), []
    monkeypatch.setenv("MACDROP_METADATA_URL", service.url)
    spot_watch.watch("aws", interval=0.01, say=lines.append)
    assert "elevated risk" in lines[1] and "no action yet" in lines[1] and "AWS will terminate" in lines[3]


def test_expired_metadata_token_is_renewed(monkeypatch):
    service = aws(aws_ends())
    watched = spot_watch.Aws(service.url)
    watched._token = "old"
    assert watched.notice().final


@pytest.mark.parametrize("cloud", SERVICES)
def test_cloud_is_detected_by_its_metadata_service(cloud, monkeypatch):
    there = {
        "aws": {"/latest/meta-data/instance-id": ["i-1"]},
        "gcp": {"/computeMetadata/v1/instance/id": ["1"]},
        "azure": {NAME: ["me"], EVENTS: ["{}"]},
    }[cloud]
    needs = {
        "aws": {"X-aws-ec2-metadata-token": "x"},
        "gcp": {"Metadata-Flavor": "Google"},
        "azure": {"Metadata": "true"},
    }
    service = Service(needs[cloud], there, token="x" if cloud == "aws" else None)
    monkeypatch.setenv("MACDROP_METADATA_URL", service.url)
    assert type(spot_watch._service(None)) is spot_watch.CLOUDS[cloud]


def test_missing_and_unknown_clouds_are_refused(monkeypatch):
    monkeypatch.setenv("MACDROP_METADATA_URL", "http://127.0.0.1:9")
    with pytest.raises(Missing, match="Name the cloud"):
        spot_watch._service(None)
    with pytest.raises(BadLaunchFile, match="Did you mean 'azure'"):
        spot_watch._service("azur")


def test_watch_ends_without_a_ray_node(host, monkeypatch):
    monkeypatch.setenv("MACDROP_METADATA_URL", aws(None).url)
    monkeypatch.setattr(spot_watch, "ray_nodes", lambda only=None: {})
    lines = []
    assert spot_watch.watch("aws", interval=0.01, say=lines.append, alone=0.05) == 0
    assert "the watch ends" in lines[-1] and host.calls == []


def test_ray_nodes_are_found_by_the_arguments_of_raylets(tmp_path):
    def process(number: int, *words: str) -> None:
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "cmdline").write_bytes("\0".join(words).encode() + b"\0")

    process(1, "/x/ray/core/src/ray/raylet/raylet", "--node_id=aa", "--gcs-address=10.0.0.1:6379", "--x=--node_id=bb")
    process(2, "/x/python", "--node_id=cc", "--gcs-address=10.0.0.1:6379")
    process(3, "grep", "raylet/raylet")
    process(4, "/y/raylet/raylet", "--node_id=dd", "--gcs-address=10.0.0.2:6379")
    assert spot_watch.ray_nodes(processes=tmp_path) == {"aa": "10.0.0.1:6379", "dd": "10.0.0.2:6379"}
    assert spot_watch.ray_nodes("dd", tmp_path) == {"dd": "10.0.0.2:6379"}


@pytest.mark.slow
@pytest.mark.ray
def test_a_real_node_is_drained(monkeypatch, tmp_path):
    """Its scheduler knows at once, with the deadline; the other node stays up."""
    import sys
    from pathlib import Path

    import ray
    from ray._private.state import state
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("MACDROP_METADATA_URL", aws(aws_ends()).url)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        cluster.connect()
        worker = cluster.add_node(num_cpus=1)
        assert spot_watch.ray_nodes(worker.node_id) == {worker.node_id: cluster.address}
        lines: list[str] = []
        watching = threading.Thread(
            target=spot_watch.watch, args=("aws",), kwargs=dict(interval=0.2, node_id=worker.node_id, say=lines.append)
        )
        watching.start()
        deadline = time.monotonic() + 60
        while "drained" not in "".join(lines) and time.monotonic() < deadline:
            time.sleep(0.1)
        listed = state.get_draining_nodes()
        assert list(listed) == [worker.node_id] or not _alive(worker.node_id), lines
        assert all(0 < moment / 1000 - time.time() < 120 for moment in listed.values())
        cluster.remove_node(worker)
        watching.join(timeout=60)
        assert not watching.is_alive() and lines[-1] == "no Ray node is left here"
    finally:
        ray.shutdown()
        cluster.shutdown()


def _alive(node_id: str) -> bool:
    import ray

    return any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())

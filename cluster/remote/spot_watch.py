"""On a spot node: watch for the cloud's termination notice, then drain the Ray node so that its work is saved.

The metadata service of a cloud announces the end of a machine between 30 s (Google, Azure) and 2 minutes (AWS) ahead.
Ray's autoscaler listens to none of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from cluster.errors import BadLaunchFile, Missing, nearest

#: Timeout of the metadata service in seconds.
ANSWER = 5.0
#: Seconds without a Ray node on this host after which there is nothing to watch for.
ALONE = 600.0
#: Seconds between two searches for Ray nodes, and between two reports of a service that does not answer.
LOOK, REPORT = 30.0, 300.0
#: Seconds between a notice and the end of the machine if the cloud does not say when.
GOOGLE_NOTICE, SHORTEST = 30, 5
#: Timeout of `ray drain-node` in seconds: it imports Ray.
DRAIN = 60


@dataclass(frozen=True)
class Notice:
    """The end of this machine, `seconds` from now, or only a warning of it (`final` is False)."""

    text: str
    seconds: int = 0
    final: bool = True


class Metadata:
    """The metadata service of a cloud. `base`: its URL. Proxies of the environment are bypassed."""

    base = "http://169.254.169.254"

    def __init__(self, base: str | None = None) -> None:
        self.base = base or os.environ.get("MACDROP_METADATA_URL") or self.base
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def get(self, path: str, headers: dict[str, str] | None = None, method: str = "GET") -> str | None:
        """Fetch a path; None if it does not exist (404). Raises OSError."""
        request = urllib.request.Request(self.base + path, headers=headers or {}, method=method)
        try:
            with self._open(request, timeout=ANSWER) as answer:
                return answer.read().decode("utf-8", errors="replace")
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise

    def here(self) -> bool:
        """Check whether this machine is in this cloud. Raises OSError or ValueError."""
        raise NotImplementedError

    def notice(self) -> Notice | None:
        """The current notice. Raises OSError or ValueError: no readable answer."""
        raise NotImplementedError


class Aws(Metadata):
    """IMDSv2: each request carries a token that is requested first."""

    _token: str | None = None

    def ask(self, path: str) -> str | None:
        for _ in range(2):
            if self._token is None:
                lasting = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}
                self._token = self.get("/latest/api/token", lasting, "PUT")
            try:
                return self.get(path, {"X-aws-ec2-metadata-token": self._token or ""})
            except urllib.error.HTTPError as error:
                if error.code != 401:
                    raise
                self._token = None  # it has expired
        raise OSError("the metadata service rejects its own token")

    def here(self) -> bool:
        return self.ask("/latest/meta-data/instance-id") is not None

    def notice(self) -> Notice | None:
        found = self.ask("/latest/meta-data/spot/instance-action")
        if found is not None:
            action = json.loads(found)
            when = datetime.fromisoformat(action["time"].replace("Z", "+00:00"))
            return Notice(f"AWS will {action['action']} this spot instance at {action['time']}", _until(when))
        found = self.ask("/latest/meta-data/events/recommendations/rebalance")
        return (
            Notice("AWS sees an elevated risk of interruption for this spot instance", final=False) if found else None
        )


class Google(Metadata):
    base = "http://metadata.google.internal"
    _flavor = {"Metadata-Flavor": "Google"}

    def here(self) -> bool:
        return self.get("/computeMetadata/v1/instance/id", self._flavor) is not None

    def notice(self) -> Notice | None:
        found = self.get("/computeMetadata/v1/instance/preempted", self._flavor) or ""
        if found.strip().upper() != "TRUE":
            return None
        return Notice("Google preempts this machine", GOOGLE_NOTICE)


class Azure(Metadata):
    """The first request turns on scheduled events, which may take two minutes; `here` sends it."""

    _header = {"Metadata": "true"}
    _name: str | None = None

    def here(self) -> bool:
        self.get("/metadata/scheduledevents?api-version=2020-07-01", self._header)
        return self._own() is not None

    def notice(self) -> Notice | None:
        found = self.get("/metadata/scheduledevents?api-version=2020-07-01", self._header)
        for event in json.loads(found or "{}").get("Events", []):
            # Every machine of an availability set sees the events of all.
            if event.get("EventType") == "Preempt" and self._own() in (None, *event.get("Resources", [])):
                when = event.get("NotBefore") or ""
                seconds = _until(parsedate_to_datetime(when)) if when else SHORTEST
                return Notice(f"Azure evicts this spot machine{f' at {when}' if when else ' now'}", seconds)
        return None

    def _own(self) -> str | None:
        if self._name is None:
            self._name = self.get("/metadata/instance/compute/name?api-version=2021-02-01&format=text", self._header)
        return self._name


CLOUDS: dict[str, type[Metadata]] = {"aws": Aws, "gcp": Google, "azure": Azure}


def watch(
    cloud: str | None,
    *,
    interval: float = 5.0,
    node_id: str | None = None,
    say: Callable[[str], None] | None = None,
    alone: float = ALONE,
) -> int:
    """Poll until the end of the machine is announced, drain its Ray nodes, and return 0 once they are gone.

    Args:
        interval: seconds between two requests.
        node_id: hex ID of the only Ray node to drain.
        alone: seconds without a Ray node on this host after which the watch ends.

    Raises:
        BadLaunchFile: an unknown cloud.
        Missing: no cloud was named, and none answers.
    """
    say = say or _say
    metadata = _service(cloud)
    seen = looked = time.monotonic()
    complained = warned = -REPORT
    say(f"watching for the end of this spot machine ({type(metadata).__name__}, every {interval:g} s)")
    while True:
        now = time.monotonic()
        try:
            notice = metadata.notice()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            notice = None
            if now - complained >= REPORT:
                complained = now
                say(f"no answer from the metadata service, retrying: {error}")
        if notice and notice.final:
            _leave(notice, node_id, interval, say)
            return 0
        if notice and now - warned >= REPORT:
            warned = now
            say(f"{notice.text}; no action yet")
        if now - looked >= min(LOOK, alone):
            looked = now
            if ray_nodes(node_id):
                seen = now
            elif now - seen >= alone:
                say("no Ray node has run here for a while: the watch ends")
                return 0
        time.sleep(interval)


def _leave(notice: Notice, node_id: str | None, interval: float, say: Callable[[str], None]) -> None:
    """Drain the nodes of this host, retrying failures, and wait until they are gone or time is up."""
    deadline = time.monotonic() + max(notice.seconds, SHORTEST)
    drained: set[str] = set()
    say(f"{notice.text}, in {notice.seconds} s")
    while nodes := ray_nodes(node_id):
        for node, address in nodes.items():
            left = int(deadline - time.monotonic())
            if node not in drained and left >= 0 and _drain(node, address, notice.text, left, say):
                drained.add(node)
        if time.monotonic() >= deadline:
            return
        time.sleep(min(interval, 1.0))
    say("no Ray node is left here")


def _drain(node: str, address: str, text: str, seconds: int, say: Callable[[str], None]) -> bool:
    command = ["ray", "drain-node", "--address", address, "--node-id", node]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", text]
    command += ["--deadline-remaining-seconds", str(seconds)]
    environment = {"RAY_AUTH_MODE": "token", **os.environ}
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DRAIN, env=environment
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        say(f"node {node[:12]} was not drained, retrying: {error}")
        return False
    if result.returncode:
        last = (result.stderr or result.stdout).strip().splitlines()[-1:] or ["no output"]
        say(f"node {node[:12]} was not drained, retrying: {last[0][:300]}")
        return False
    say(f"node {node[:12]} is drained: no new work, and {seconds} s to save the work in progress")
    return True


def ray_nodes(only: str | None = None, processes: Path = Path("/proc")) -> dict[str, str]:
    """Ray nodes of this host, from the arguments of their raylets: hex ID -> address of their head (host:port)."""
    found: dict[str, str] = {}
    for file in processes.glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # it has ended
        if words[0].endswith("raylet/raylet"):
            flags = dict(word.removeprefix("--").partition("=")[::2] for word in words[1:] if word.startswith("--"))
            node, address = flags.get("node_id"), flags.get("gcs-address")
            if node and address and only in (None, node):
                found[node] = address
    return found


def _service(cloud: str | None) -> Metadata:
    """The metadata service of a cloud; by default, of the one that answers. Raises BadLaunchFile or Missing."""
    if cloud is not None:
        if cloud not in CLOUDS:
            raise BadLaunchFile(f"--cloud {cloud!r} is not one of {', '.join(CLOUDS)}.{nearest(cloud, CLOUDS)}")
        return CLOUDS[cloud]()
    for kind in CLOUDS.values():
        metadata = kind()
        try:
            if metadata.here():
                return metadata
        except (OSError, ValueError):
            continue
    raise Missing(f"no metadata service of a cloud answers here. Name the cloud: --cloud {' or '.join(CLOUDS)}.")


def _until(when: datetime) -> int:
    """Seconds from now, at least 0."""
    return max(0, int((when - datetime.now(UTC)).total_seconds()))


def _say(text: str) -> None:
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}Z {text}", flush=True)

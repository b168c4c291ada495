"""Clusters that `ray up` makes: rented machines and on-premise hosts."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.backends import ssh_hosts
from cluster.backends.advice import causes
from cluster.backends.base import Kind
from cluster.core import secrets
from cluster.errors import LaunchFailed


class Ray(Kind):
    tools = ("ray", "ssh", "rsync")
    carries_token = True

    def prepare(self, values: dict[str, str]) -> None:
        file = secrets.path()
        self.shell.say(f"$ write {file} (0600)   # {', '.join(values) or 'no secrets'}")
        if not self.shell.dry_run:
            secrets.write(values, file)

    def create(self) -> None:
        self.shell.run(["ray", "up", "-y", str(self.file.path)], check="the cluster did not start")

    def ask(self, *topics: str, **more: Any) -> dict[str, Any]:
        """As of every kind; a cluster of on-premise hosts that this machine has forgotten is found again first."""
        try:
            return super().ask(*topics, **more)
        except LaunchFailed:
            if not self._found_again():
                raise
            return super().ask(*topics, **more)

    def _found_again(self) -> bool:
        """Ray keeps what it knows of on-premise hosts below /tmp, which a reboot clears: `ray exec` then finds no head,
        and another `up` would end what runs there. Ask the host itself, and let Ray write down what is so.
        """
        if not self.file.head_host or self._known():
            return False
        running, _ = ssh_hosts.left(self.shell, ssh_hosts.Ssh.of(self.file), [self.file.head_host])
        if not any("gcs_server" in line for line in running.get(self.file.head_host, [])):
            return False
        from ray.autoscaler._private.local import node_provider

        provider = node_provider.LocalNodeProvider(self.file.content["provider"], self.file.name)
        node_provider.record_local_head_state_if_needed(provider)
        self.shell.say(f"this machine had forgotten the cluster (its /tmp was cleared); {self.file.head_host} runs it")
        return True

    def _known(self) -> bool:
        """Whether Ray's note has the head running; a failed `ray exec` leaves one in which it is not."""
        file = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", f"cluster-{self.file.name}.state")
        try:
            return json.loads(file.read_text(encoding="utf-8"))[self.file.head_host]["state"] == "running"
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def on_head(self, script: str) -> list[str]:
        return ["ray", "exec", str(self.file.path), script]

    def put(self, source: Path, target: str) -> None:
        self.shell.run(
            ["ray", "rsync-up", str(self.file.path), str(source), target], check=f"{source} was not copied to the head"
        )

    def get(self, source: str, target: Path, leave: Sequence[str]) -> None:
        """By Ray's own rsync, which takes what to leave out from the file: from a copy of it, then."""
        content = {**self.file.content, "rsync_exclude": list(leave), "rsync_filter": []}
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, self.file.path.name)
            copy.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
            command = ["ray", "rsync-down", str(copy), f"{source}/", f"{target}/"]
            self.shell.run(command, check=f"{source} was not copied")

    def destroy(self) -> list[str]:
        done = self.shell.run(["ray", "down", "-y", str(self.file.path)])
        problems = [] if done.ok else [f"`ray down` ended with {done.code}: look above."]
        return [*problems, *self._sweep_hosts()]

    def _sweep_hosts(self) -> list[str]:
        """`ray down` ends a rented machine, but of on-premise hosts it stops Ray on the head only."""
        everywhere = self._hosts()
        if not everywhere:
            return []
        ssh = ssh_hosts.Ssh.of(self.file)
        ssh_hosts.stop_ray(self.shell, ssh, everywhere)
        running, silent = ssh_hosts.left(self.shell, ssh, everywhere)
        if not (running or silent or self.shell.dry_run):
            self.shell.say(f"no Ray process is left on {', '.join(everywhere)}")
        return [
            *(f"{host} still runs Ray:\n    " + "\n    ".join(lines) for host, lines in running.items()),
            *(f"not looked at: {words}" for words in silent.values()),
        ]

    def why(self, nodes: list[dict[str, Any]] | None) -> list[str]:
        found = []
        try:
            found = causes(self.ask("log", shown=False).get("log", []))
        except LaunchFailed as error:
            found = [str(error)]
        alive = {node["address"] for node in nodes or [] if node["alive"]}
        version = next((node["ray"] for node in nodes or []), None)
        missing = [host for host in self._hosts() if host not in alive]
        if missing:
            ssh = ssh_hosts.Ssh.of(self.file)
            probed = ssh_hosts.probe(self.shell, ssh, missing, self.file.head_host, version)
            found = [*(told for host in missing for told in probed[host]), *found]
        dead = [node for node in nodes or [] if not node["alive"] and node["reason"]]
        return [*found, *(f"{node['address']} was a node and is dead: {node['reason']}" for node in dead)]

    def _hosts(self) -> tuple[str, ...]:
        return (self.file.head_host, *self.file.worker_hosts) if self.file.head_host else ()

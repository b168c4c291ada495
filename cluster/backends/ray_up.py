"""Clusters made by `ray up`: rented machines and on-premise hosts."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.backends import ssh_hosts
from cluster.backends.advice import causes
from cluster.backends.base import ANSWER, Backend
from cluster.check import ray_yaml
from cluster.check.finding import Finding
from cluster.core import secrets
from cluster.core.ray_file import RayFile
from cluster.errors import LaunchFailed
from cluster.remote import ray_internals


class RayUp(Backend[RayFile]):
    """A cluster of Ray's own launcher."""

    file_type = RayFile
    file_format = "a Ray cluster YAML has `provider:`"
    tools = ("ray", "ssh", "rsync")

    @classmethod
    def check(cls, file: RayFile, crd: Path | None = None) -> Iterator[Finding]:
        return ray_yaml.findings(file)

    @property
    def sends_token(self) -> bool:
        return True

    @property
    def head_name(self) -> str:
        return self.file.head_host or super().head_name

    @property
    def login(self) -> str:
        return self.file.ssh_user or super().login

    def prepare(self, secrets_found: dict[str, str]) -> None:
        file = secrets.path()
        self.shell.say(f"$ write {file} (0600)   # {', '.join(secrets_found) or 'no secrets'}")
        if not self.shell.dry_run:
            secrets.write(secrets_found, file)

    def create(self) -> None:
        """Start the cluster; Ray copies token and secrets to hosts without looking at their keys, so do that first."""
        if hosts := self._hosts():
            problems = ssh_hosts.changed_host_keys(self.shell, ssh_hosts.Ssh.of(self.file), hosts)
            if problems:
                raise LaunchFailed("\n".join(problems))
        self.shell.run(["ray", "up", "-y", str(self.file.path)], failure="the cluster did not start")

    def ask(self, *topics: str, shown: bool = True, timeout: float = ANSWER) -> dict[str, Any]:
        """Ask the head; if this machine has lost its note of an on-premise cluster, restore the note and retry."""
        try:
            return super().ask(*topics, shown=shown, timeout=timeout)
        except LaunchFailed:
            if not self._restored():
                raise
            return super().ask(*topics, shown=shown, timeout=timeout)

    def _restored(self) -> bool:
        """Ray keeps its notes about on-premise hosts below /tmp, which a reboot clears: `ray exec` then finds no head,
        and another `up` would end what runs there. Look on the host itself, and have Ray record what is true.
        """
        head = self.file.head_host
        if not head or ray_internals.remembers_head(self.file.name, head):
            return False
        running, _ = ssh_hosts.ray_processes(self.shell, ssh_hosts.Ssh.of(self.file), [head])
        if not any("gcs_server" in line for line in running.get(head, [])):
            return False
        ray_internals.remember_head(self.file.content["provider"], self.file.name)
        self.shell.say(f"restored the record of a cluster that runs on {head} (Ray's note in /tmp was gone)")
        return True

    def on_head(self, script: str) -> list[str]:
        return ["ray", "exec", str(self.file.path), script]

    def put(self, source: Path, target: str) -> None:
        command = ["ray", "rsync-up", str(self.file.path), str(source), target]
        self.shell.run(command, failure=f"{source} was not copied to the head")

    def get(self, source: str, target: Path, exclude: Sequence[str]) -> None:
        """By Ray's rsync, which reads exclusions from the launch file only: from a copy of it, then."""
        content = {**self.file.content, "rsync_exclude": list(exclude), "rsync_filter": []}
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, self.file.path.name)
            copy.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
            command = ["ray", "rsync-down", str(copy), f"{source}/", f"{target}/"]
            self.shell.run(command, failure=f"{source} was not copied")

    def destroy(self) -> list[str]:
        result = self.shell.run(["ray", "down", "-y", str(self.file.path)])
        problems = [] if result.ok else [f"`ray down` failed with exit code {result.code}: see above."]
        return [*problems, *self._stop_hosts()]

    def _stop_hosts(self) -> list[str]:
        """`ray down` terminates rented machines, but of on-premise hosts it stops Ray on the head only."""
        everywhere = self._hosts()
        if not everywhere:
            return []
        ssh = ssh_hosts.Ssh.of(self.file)
        ssh_hosts.stop_ray(self.shell, ssh, everywhere)
        running, silent = ssh_hosts.ray_processes(self.shell, ssh, everywhere)
        if not (running or silent or self.shell.dry_run):
            self.shell.say(f"no Ray process is left on {', '.join(everywhere)}")
        return [
            *(f"{host} still runs Ray:\n    " + "\n    ".join(lines) for host, lines in running.items()),
            *(f"not verified: {reason}" for reason in silent.values()),
        ]

    def diagnose(self, nodes: list[dict[str, Any]] | None) -> list[str]:
        try:
            found = causes(self.ask("log", shown=False).get("log", []))
        except LaunchFailed as error:
            found = [str(error)]
        alive = {node["address"] for node in nodes or [] if node["alive"]}
        version = next((node["ray"] for node in nodes or []), None)
        missing = [host for host in self._hosts() if host not in alive]
        if missing and self.file.head_host:
            ssh = ssh_hosts.Ssh.of(self.file)
            probed = ssh_hosts.probe(self.shell, ssh, missing, self.file.head_host, version)
            found = [*(cause for host in missing for cause in probed[host]), *found]
        dead = [node for node in nodes or [] if not node["alive"] and node["reason"]]
        return [*found, *(f"{node['address']} joined and died: {node['reason']}" for node in dead)]

    def _hosts(self) -> tuple[str, ...]:
        return (self.file.head_host, *self.file.worker_hosts) if self.file.head_host else ()

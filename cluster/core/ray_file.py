"""Cluster YAMLs of `ray up`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from cluster.core.launch_file import LaunchFile, Source, as_count, as_dict

#: Keys that hold lists of shell commands, in the order in which a host runs them.
COMMANDS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


class RayFile(LaunchFile):
    """A Ray cluster YAML; its one document is `content`."""

    @classmethod
    def read(cls, source: Source) -> Self | None:
        documents = source.documents
        if len(documents) == 1 and "provider" in documents[0]:
            return cls(source.path, source.text, documents)
        return None

    @property
    def content(self) -> dict[str, Any]:
        return self.documents[0]

    @property
    def provider(self) -> str:
        return str(as_dict(self.content.get("provider")).get("type"))

    @property
    def name(self) -> str:
        return str(self.content.get("cluster_name") or self.path.stem)

    @property
    def workers(self) -> tuple[int, int]:
        if self.provider == "local":
            hosts = len(self.worker_hosts)
            least, most = (as_count(self.content.get(key), hosts) for key in ("min_workers", "max_workers"))
            return min(least, hosts), min(most, hosts)
        types = as_dict(self.content.get("available_node_types"))
        workers = [as_dict(each) for name, each in types.items() if name != self.content.get("head_node_type")]
        most = as_count(self.content.get("max_workers"), 2)
        return (
            sum(as_count(each.get("min_workers"), 0) for each in workers),
            min(most, sum(as_count(each.get("max_workers"), most) for each in workers)),
        )

    @property
    def shell(self) -> str:
        return "\n".join(text for key in COMMANDS for text in self.commands(key))

    def commands(self, key: str) -> list[str]:
        """A list of shell commands; empty if it is missing or not a list."""
        found = self.content.get(key)
        return [str(text) for text in found] if isinstance(found, list) else []

    @property
    def head_host(self) -> str | None:
        """Address of the head of an on-premise cluster; None if the cloud assigns it."""
        return as_dict(self.content.get("provider")).get("head_ip")

    @property
    def worker_hosts(self) -> tuple[str, ...]:
        """Addresses of the workers of an on-premise cluster."""
        found = as_dict(self.content.get("provider")).get("worker_ips")
        return tuple(map(str, found)) if isinstance(found, list) else ()

    @property
    def ssh_user(self) -> str | None:
        return as_dict(self.content.get("auth")).get("ssh_user")

    @property
    def ssh_key(self) -> Path | None:
        key = as_dict(self.content.get("auth")).get("ssh_private_key")
        return Path(str(key)).expanduser() if key else None

    @property
    def ssh_proxy(self) -> str | None:
        return as_dict(self.content.get("auth")).get("ssh_proxy_command")

    @property
    def container(self) -> str | None:
        """Name of the container that Ray runs in on every host; None if it runs on the host itself."""
        docker = as_dict(self.content.get("docker"))
        named = any(docker.get(key) for key in ("image", "head_image", "worker_image"))
        return str(docker.get("container_name") or "ray_docker") if named else None

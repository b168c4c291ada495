"""Task YAMLs of SkyPilot."""

from __future__ import annotations

from typing import Any, Self

from cluster.core.launch_file import LaunchFile, Source, as_count, as_dict


class SkyPilotFile(LaunchFile):
    """A task YAML, which is one sweep as a managed job; its one document is `content`."""

    @classmethod
    def read(cls, source: Source) -> Self | None:
        documents = source.documents
        if len(documents) == 1 and {"run", "resources"} <= set(documents[0]):
            return cls(source.path, source.text, documents)
        return None

    @property
    def content(self) -> dict[str, Any]:
        return self.documents[0]

    @property
    def resources(self) -> dict[str, Any]:
        return as_dict(self.content.get("resources"))

    @property
    def provider(self) -> str:
        return "skypilot"

    @property
    def name(self) -> str:
        return str(self.content.get("name") or self.path.stem)

    @property
    def workers(self) -> tuple[int, int]:
        """Nodes besides the first, which is the head and works, too."""
        nodes = max(1, as_count(self.content.get("num_nodes"), 1))
        return nodes - 1, nodes - 1

    @property
    def shell(self) -> str:
        lines = [line for key in ("setup", "run") for line in str(self.content.get(key) or "").splitlines()]
        return "\n".join(line for line in lines if not line.lstrip().startswith("#"))

    @property
    def secrets(self) -> tuple[str, ...]:
        """Names of secrets without a value, which `sky jobs launch` is given by name."""
        return tuple(str(name) for name, value in as_dict(self.content.get("secrets")).items() if value is None)

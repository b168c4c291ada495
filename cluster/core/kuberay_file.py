"""Manifests of the KubeRay operator: a RayCluster or a RayJob, with other resources around it."""

from __future__ import annotations

import functools
from typing import Any, Self

from cluster.core.launch_file import LaunchFile, Source, as_count, as_dict, as_dicts


class KubeRayFile(LaunchFile):
    """A KubeRay manifest; its first document of the group ray.io is `content`."""

    @classmethod
    def read(cls, source: Source) -> Self | None:
        return cls(source.path, source.text, source.documents) if any(map(_of_ray, source.documents)) else None

    @property
    def content(self) -> dict[str, Any]:
        return next(document for document in self.documents if _of_ray(document))

    @property
    def provider(self) -> str:
        return "kuberay"

    @property
    def name(self) -> str:
        return str(self.metadata.get("name") or self.path.stem)

    @property
    def workers(self) -> tuple[int, int]:
        groups = as_dicts(self.cluster_spec.get("workerGroupSpecs"))
        least = [as_count(group.get("minReplicas", group.get("replicas")), 0) for group in groups]
        most = [as_count(group.get("maxReplicas"), as_count(group.get("replicas"), 0)) for group in groups]
        return sum(least), sum(most)

    @functools.cached_property
    def environment(self) -> dict[str, str]:
        found = [env for container in self.containers for env in as_dicts(container.get("env"))]
        return {str(env.get("name")): str(env["value"]) for env in reversed(found) if "value" in env}

    @property
    def token(self) -> bool:
        options = as_dict(self.cluster_spec.get("authOptions"))
        return self.environment.get("RAY_AUTH_MODE") == "token" or options.get("mode") == "token"

    @property
    def metadata(self) -> dict[str, Any]:
        return as_dict(self.content.get("metadata"))

    @property
    def namespace(self) -> str | None:
        """None: the default namespace of kubectl."""
        return self.metadata.get("namespace")

    @property
    def resource(self) -> str:
        """RayCluster or RayJob."""
        return str(self.content.get("kind"))

    @property
    def cluster_spec(self) -> dict[str, Any]:
        """The spec of the RayCluster, which a RayJob nests inside its own."""
        spec = as_dict(self.content.get("spec"))
        return as_dict(spec.get("rayClusterSpec")) if self.resource == "RayJob" else spec

    @property
    def containers(self) -> list[dict[str, Any]]:
        """The Ray container of the head and of each worker group."""
        spec = self.cluster_spec
        groups = [as_dict(spec.get("headGroupSpec")), *as_dicts(spec.get("workerGroupSpecs"))]
        pods = [as_dict(as_dict(group.get("template")).get("spec")) for group in groups]
        return [next(iter(as_dicts(pod.get("containers"))), {}) for pod in pods]


def _of_ray(document: dict[str, Any]) -> bool:
    return str(document.get("apiVersion", "")).startswith("ray.io/")

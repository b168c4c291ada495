"""Clusters of KubeRay."""

from __future__ import annotations

from cluster.launch_kind import Kind


class Kube(Kind):
    tools = ("kubectl",)

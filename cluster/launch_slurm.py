"""Jobs of Slurm."""

from __future__ import annotations

from cluster.launch_kind import Kind


class Slurm(Kind):
    tools = ("sbatch",)

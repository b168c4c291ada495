"""Rules over several fields of a launch file: each returns what is wrong, or None."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def least_most(values: Mapping[str, Any]) -> str | None:
    """Refuse fewer workers at most than at least."""
    least, most = values["workers"], values["max_workers"]
    return f"max_workers={most} is below workers={least}" if most < least else None


def somewhere_to_run(values: Mapping[str, Any]) -> str | None:
    """Refuse a cluster without workers, whose head takes no tasks."""
    return None if values["max_workers"] else "max_workers=0: the head takes no tasks, so nothing would run"


def one_source(values: Mapping[str, Any]) -> str | None:
    """Refuse two sources of macdrop, or none."""
    if values["image"] and values["install"] != "none":
        return f"image={values['image']} already contains macdrop: add install=none"
    if values["install"] != "none" and not values["source"]:
        return "source= is missing: the path of your clone of the repository, from which hosts install macdrop"
    return None


def zones_of_region(values: Mapping[str, Any]) -> str | None:
    """Refuse zones of another region."""
    elsewhere = [zone for zone in values["zones"] if zone[:-1] != values["region"]]
    return f"zones={elsewhere[0]} is not in region={values['region']}" if elsewhere else None


def one_role_per_host(values: Mapping[str, Any]) -> str | None:
    """Refuse a head that is also a worker, or no workers."""
    if not values["worker_ips"]:
        return "worker_ips is empty: the head takes no tasks, so nothing would run"
    twice = values["head_ip"] in values["worker_ips"]
    return f"worker_ips also lists the head, {values['head_ip']}: a host has one role" if twice else None


def one_recipe(values: Mapping[str, Any]) -> str | None:
    """Refuse two recipes, or none."""
    if values["recipe"] and values["config"]:
        return "recipe= and config= are both given: one names a shipped recipe, the other a file of this machine"
    return None if values["recipe"] or values["config"] else "recipe= or config= is missing: what the sweep runs"


def shared_by_nodes(values: Mapping[str, Any]) -> str | None:
    """Refuse several nodes without a file system that they share, or with two of them."""
    if values["nfs"] and values["volume"]:
        return "nfs= and volume= are both given: the folder of runs is on one of them"
    if values["nfs"] and values["image"]:
        return "nfs= cannot be mounted within a container: use volume=, or no image="
    if values["nodes"] > 1 and not (values["nfs"] or values["volume"]):
        return (
            f"nodes={values['nodes']}: all nodes write the run folder, and buckets that SkyPilot mounts neither append "
            "nor rename. Add nfs=HOST:/PATH, or volume=NAME (Kubernetes, ReadWriteMany)"
        )
    return None

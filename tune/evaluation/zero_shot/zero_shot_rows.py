"""Conversion of lm-eval's results to score rows, one of which always has the name of the benchmark entry."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

import lm_eval
from lm_eval.api.metrics import mean, mean_stderr, pooled_sample_stderr


@dataclass(frozen=True)
class ResidentTask:
    """A loaded benchmark entry: its name and lm-eval's, its tasks (several for a group or tag) and groups.

    `split` is that of the hub's data if it is not the task's own; `code` is the fingerprint of a task of the user's.
    """

    name: str
    target: str
    loaded: dict[str, Any]
    local: bool
    split: str | None = None
    code: str = ""


def rows_of(
    task: ResidentTask, result: Mapping[str, Any], cut: Mapping[str, int], middle: bool
) -> list[dict[str, Any]]:
    """Make one row per task and metric, with lm-eval's analytic standard errors.

    cut: documents per task of which a prompt was cut; middle: in the middle, not on the left.

    A single task, or the group that was asked for, has the name of the entry; members of a group are `entry/member`.
    Where lm-eval has no overall score (tags, groups without aggregation), the plain mean over members is added.
    """
    rows: list[dict[str, Any]] = []
    stderrs: dict[tuple[str, str], tuple[float | None, int]] = {}
    members = task.loaded.get("group_map") or {}
    data = "local" if task.local else "hub" + (f" split={task.split}" if task.split else "")
    for name, metrics in result["results"].items():
        for key, value in metrics.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            if name in members:
                stderr, n = _pooled(name, key, members, stderrs)
            else:
                values = [s[metric] for s in result["samples"][name] if s["filter"] == filter_name and metric in s]
                stderr, n = _stderr(task.loaded["tasks"][name], metric, values), len(values)
                stderrs[name, key] = (stderr, n)
            rows.append(
                {
                    "task": _named(task, name),
                    "version": str(result["versions"].get(name) or 0) + (f"+{task.code}" if task.code else ""),
                    "metric": metric if filter_name == "none" else key,
                    "value": float(value),
                    "stderr": stderr,
                    "n": n,
                    "higher_is_better": (result["higher_is_better"].get(name) or {}).get(metric),
                    "num_fewshot": result["n-shot"].get(name),
                    "settings": f"lm_eval={lm_eval.__version__} data={data}",
                    "cut": sum(cut.get(leaf, 0) for leaf in _leaves(name, members)),
                }
            )
    if not any(row["task"] == task.name for row in rows):
        rows = _means(task.name, rows) + rows
    words = "truncation=middle shortened" if middle else "prompts_cut_left"
    return [row | {"settings": f"{row['settings']} {words}={row.pop('cut')}"} for row in rows]


def _leaves(name: str, members: Mapping[str, list[str]]) -> list[str]:
    """Return the tasks of a group, through groups within it; a task is its own only one."""
    return [leaf for member in members[name] for leaf in _leaves(member, members)] if name in members else [name]


def _named(task: ResidentTask, name: str) -> str:
    whole = name == task.target or len(task.loaded["tasks"]) == 1
    return task.name if whole else f"{task.name}/{name}"


def _means(name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the plain mean over members, for the metrics that all of them have."""
    by_metric: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_metric.setdefault(row["metric"], []).append(row)
    count = len({row["task"] for row in rows})
    found = []
    for members in by_metric.values():
        if len(members) < count:
            continue
        known = all(row["stderr"] is not None for row in members)
        shared = {key: value for key, value in members[0].items() if all(row[key] == value for row in members)}
        found.append(
            {"version": "0", "higher_is_better": None, "num_fewshot": None}
            | shared
            | {
                "task": name,
                "value": math.fsum(row["value"] for row in members) / count,
                "stderr": math.hypot(*(row["stderr"] for row in members)) / count if known else None,
                "n": sum(row["n"] for row in members),
                "cut": sum(row["cut"] for row in members),
                "settings": f"{members[0]['settings']} mean_of={count}",
            }
        )
    return found


def _stderr(task: Any, metric: str, values: list[Any]) -> float | None:
    """Return lm-eval's analytic standard error, which it has for means; None for metrics that need a bootstrap."""
    if task.aggregation().get(metric) is not mean or len(values) < 2:
        return None
    return float(mean_stderr(values))


def _pooled(
    group: str, key: str, members: Mapping[str, list[str]], stderrs: Mapping[tuple[str, str], tuple[float | None, int]]
) -> tuple[float | None, int]:
    """Return the pooled standard error and number of items of a group, as lm-eval computes them from its leaf tasks."""
    leaves = [stderrs[leaf, key] for leaf in _leaves(group, members) if (leaf, key) in stderrs]
    n = sum(size for _, size in leaves)
    known = [(stderr, size) for stderr, size in leaves if stderr is not None]
    if not leaves or len(known) < len(leaves):
        return None, n
    return float(pooled_sample_stderr(*zip(*known, strict=True))), n


def items_of(samples: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return what is kept of every item: its metrics, the model's answers, and lm-eval's hash of the document."""
    return [
        {
            "task": name,
            "doc_id": sample["doc_id"],
            "doc_hash": sample["doc_hash"],
            "filter": sample["filter"],
            "metrics": {metric: sample[metric] for metric in sample["metrics"]},
            "answers": sample["filtered_resps"],
        }
        for name, found in samples.items()
        for sample in found
    ]

"""CPUs and memory that this process may use: of the machine, its affinity and the limits of its cgroups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def cpus(root: Path = Path("/")) -> int:
    """Return the CPUs that this process may use, at least 1; a cgroup's share of a CPU is rounded down, as by Ray.

    root: where /proc and /sys are.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = [float(count)]
    for folder in _cgroups(root, "cpu"):
        quota, period = _words(folder / "cpu.max") or (_word(folder / "cpu.cfs_quota_us"), "")
        try:
            share = int(quota) / int(period or _word(folder / "cpu.cfs_period_us"))
        except (ValueError, ZeroDivisionError):
            continue  # "max", or not there
        shares += [share] if share > 0 else []
    return max(1, int(min(shares)))


def memory(root: Path = Path("/")) -> tuple[int, int]:
    """Return (free, total) bytes; what the page cache would give back is free. root: where /proc and /sys are."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    try:
        text = (root / "proc/meminfo").read_text()
        fields = dict(line.split(":") for line in text.splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
        total = int(fields["MemTotal"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        free = page * os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else total
    for folder in _cgroups(root, "memory"):
        try:
            limit = int(_word(folder / "memory.max") or _word(folder / "memory.limit_in_bytes"))
            used = int(_word(folder / "memory.current") or _word(folder / "memory.usage_in_bytes"))
        except ValueError:
            continue  # "max", or not there
        total, free = min(total, limit), min(free, max(0, limit - used + _page_cache(folder)))
    return free, total


def _page_cache(folder: Path) -> int:
    """Return the bytes of a cgroup's page cache that it would give back."""
    try:
        rows = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(rows.get("total_inactive_file") or rows.get("inactive_file") or 0)
    except (OSError, ValueError):
        return 0


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's cgroup and of those around it that limit `controller`, in v1 and v2."""
    for kind, names, start, mounted in _mounts(root):
        for line in _lines(root / "proc/self/cgroup"):
            number, controllers, path = line.split(":", 2)
            mine = number == "0" and not controllers if kind == "cgroup2" else controller in controllers.split(",")
            if not mine or (kind == "cgroup" and controller not in names):
                continue
            # In a container the mount begins at its own group (`start`), whatever the path is outside.
            inside = os.path.relpath(path, start) if path.startswith(start) else "."
            folder = mounted / inside
            yield from (place for place in (folder, *folder.parents) if place.is_relative_to(mounted))


def _mounts(root: Path) -> Iterator[tuple[str, list[str], str, Path]]:
    """Yield the mounted hierarchies of cgroups: (cgroup or cgroup2, options, the group mounted, where)."""
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        kind, _, options = after.partition(" ")
        if kind in ("cgroup", "cgroup2"):
            start, where = before.split()[3:5]
            yield kind, options.split()[-1].split(","), start, root / where.lstrip("/")


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []  # not Linux


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []


def _word(file: Path) -> str:
    return next(iter(_words(file)), "")

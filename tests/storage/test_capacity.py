"""CPUs and memory that a process may use, by affinity and by the cgroups around it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tune.storage.capacity import cpus, memory

GIB = 2**30
MEMINFO = "MemTotal: 25165824 kB\nMemFree: 1 kB\nMemAvailable: 20971520 kB\n"
V2 = "36 31 0:33 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"
V1 = (
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
)


@pytest.fixture(autouse=True)
def many(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))


def machine(root: Path, mounts: str = "", groups: str = "", **files: str) -> Path:
    files = {"proc/meminfo": MEMINFO, "proc/self/mountinfo": mounts, "proc/self/cgroup": groups, **files}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_without_limits_it_is_the_affinity_and_the_machine(tmp_path):
    root = machine(tmp_path)
    assert cpus(root) == 16 and memory(root) == (20 * GIB, 24 * GIB)


def test_nested_groups_of_v2_count_with_their_smallest_limit(tmp_path):
    user = "sys/fs/cgroup/user.slice"
    limits = {
        f"{user}/cpu.max": "350000 100000\n",
        f"{user}/memory.max": f"{3 * GIB}\n",
        f"{user}/memory.current": f"{2 * GIB}\n",
        f"{user}/memory.stat": f"anon 1\ninactive_file {GIB}\n",
        f"{user}/job/cpu.max": "max 100000\n",
        f"{user}/job/memory.max": "max\n",
        f"{user}/job/memory.current": "5\n",
    }
    root = machine(tmp_path, V2, "0::/user.slice/job\n", **limits)
    assert cpus(root) == 3 and memory(root) == (2 * GIB, 3 * GIB)


def test_groups_of_v1_count(tmp_path):
    limits = {
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
        "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "50000\n",
        "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000\n",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{4 * GIB}\n",
        "sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{GIB}\n",
    }
    root = machine(tmp_path, V1, "4:memory:/job\n1:cpu,cpuacct:/job\n", **limits)
    assert cpus(root) == 1, "half a CPU is one worker's"
    assert memory(root) == (3 * GIB, 4 * GIB)


def test_group_of_a_container_is_the_root_of_its_mount(tmp_path):
    mounts = V2.replace("0:33 / ", "0:33 /docker/abc ")
    root = machine(tmp_path, mounts, "0::/docker/abc\n", **{"sys/fs/cgroup/cpu.max": "200000 100000\n"})
    assert cpus(root) == 2

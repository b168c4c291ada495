"""The rendered sbatch script: a sweep on two hosts of the lab hits its time limit and resumes when resubmitted.

Slurm is not installed: ssh stands in for srun, and a power loss of all hosts for the time limit.
"""

from __future__ import annotations

import shutil
import sys

import pytest
from netlab import HOME, PATH, SHARED, until

from cluster.render import render
from cluster.render.targets import TARGETS
from tune.storage.run_folder import RunFolder

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

#: Like srun, runs a command on every node with the node's number and the variables and functions of the script.
SRUN = """#!/bin/bash
while [ "${1#--}" != "$1" ]; do shift; done
words="$(printf '%q ' "$@")"
ssh -o StrictHostKeyChecking=accept-new h2 bash -s <<END &
$(export -p)
$(declare -f node)
export -f node
SLURM_NODEID=1 $words
END
SLURM_NODEID=0 "$@"; code=$?
wait
exit $code
"""
SWEEP = (
    "demo",
    "sweep.models=[zoo:planted-llama]",
    "sweep.arms=[plain, macdrop]",
    "sweep.seeds=0",
    "sweep.num_samples=1",
    "max_steps=100",
    "save_steps=10",
    "logging_steps=1",
    "ray.num_workers=2",
)


def test_resubmitted_job_resumes_after_its_time_limit_and_leaves_no_process(lab, tmp_path):
    first, second = hosts = lab.hosts[:2]
    srun = lab.shared / "tools/srun"
    srun.parent.mkdir()
    srun.write_text(SRUN)
    srun.chmod(0o755)
    words = f"nodes=2 gpus=0 cpus=1 venv={sys.prefix} storage={SHARED}".split()
    (lab.shared / "sweep.sbatch").write_text(render.render(TARGETS["slurm"], words))
    for host in hosts:
        home = host.root / HOME.removeprefix("/")
        shutil.copy(lab.state / "key", home / ".ssh/id_ed25519")
        (home / ".ray").mkdir()
        (home / ".ray/auth_token").write_text("0" * 64)
        (home / ".ray/auth_token").chmod(0o600)

    def sbatch(number: int):
        names = {"SLURM_JOB_ID": str(number), "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NAME": "job"}
        path = f"{SHARED}/tools:{PATH}"
        return first.start("bash", f"{SHARED}/sweep.sbatch", *SWEEP, log=tmp_path / "job.log", PATH=path, **names)

    run = lab.shared / "runs/job"

    def steps() -> int:
        assert job.poll() is None, (tmp_path / "job.log").read_text()[-3000:]
        return max((file.read_text().count("\n") for file in run.glob("trials/*/metrics.jsonl")), default=0)

    job = sbatch(7)
    until(lambda: steps() > 30, 200, "the first trial to be in training", 0.2)
    for host in hosts:
        lab.kill(host.name)
    assert job.wait(20) != 0
    for host in hosts:
        lab.boot(host.name)
    assert RunFolder.open(run).run()["status"] == "running"
    job = sbatch(8)
    assert job.wait(300) == 0, (tmp_path / "job.log").read_text()[-3000:]
    trials = RunFolder.open(run).trials()
    assert [trial.status for trial in trials] == ["done", "done"]
    assert max(trial.resumed_from or 0 for trial in trials) >= 10, "resumed from a checkpoint"
    assert RunFolder.open(run).run()["status"] == "done"
    assert [host.processes() for host in hosts] == [[], []]
    assert not list(lab.shared.glob(".slurm-8*")), "the file that stops the nodes is removed"

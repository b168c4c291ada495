"""Checks of sbatch scripts."""

from __future__ import annotations

import re
from collections.abc import Iterator

from cluster.check.finding import Finding, environment_findings, error, note
from cluster.core.launch_file import assignments
from cluster.core.slurm_file import SlurmFile, sbatch_lines
from cluster.errors import nearest

#: Long options of sbatch (Slurm 24).
OPTIONS = set(
    """
    account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment constraint container
    container-id contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline delay-boot
    dependency distribution error exclude exclusive export export-file extra extra-node-info get-user-env gid
    gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket gpus-per-task gres gres-flags help hint hold ignore-pbs
    input job-name kill-on-invalid-dep licenses mail-type mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu
    mincpus network nice no-kill no-requeue nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-gpu
    ntasks-per-node ntasks-per-socket open-mode output overcommit oversubscribe parsable partition power prefer
    priority profile propagate qos quiet reboot requeue reservation resv-ports segment signal sockets-per-node
    spread-job stepmgr switches test-only thread-spec threads-per-core time time-min tmp tres-bind tres-per-task
    uid usage use-min-nodes verbose wait wait-all-nodes wckey wrap
    """.split()
)


def findings(file: SlurmFile) -> Iterator[Finding]:
    """All findings of one script."""
    yield from _directives(file)
    given = file.directives
    if not re.search(r"ray (symmetric-run|start)\b", file.shell):
        yield error(
            "the script", "nothing starts Ray", "there would be nothing to run a sweep on", "ray symmetric-run ..."
        )
    if assignments(file.shell).get("RAY_AUTH_MODE") != "token":
        yield error(
            "the script",
            "RAY_AUTH_MODE=token is not set",
            "anyone who reaches a node could run code as you",
            "export RAY_AUTH_MODE=token",
        )
    yield from environment_findings(assignments(file.shell), "the script", "nodes")
    for name in ("ntasks-per-node", "ntasks"):
        wanted = "1" if name == "ntasks-per-node" else given.get("nodes", "1")
        if name in given and given[name] != wanted:
            yield error(
                f"#SBATCH --{name}",
                "asks for more than one task on a node",
                "each task would start its own Ray",
                f"--{name}={wanted}",
            )
    for ours, theirs in (("num-gpus", "gpus-per-node"), ("num-cpus", "cpus-per-task")):
        given_to_ray = re.search(rf"--{ours}[= ](\d+)", file.shell)
        if given_to_ray and given_to_ray[1] != given.get(theirs, "0" if ours == "num-gpus" else "1"):
            yield error(
                f"--{ours}",
                f"differs from #SBATCH --{theirs}",
                "Ray would use more than the job has, or leave some of it idle",
                "the same number in both",
            )
    least = re.search(r"--min-nodes[= ](\d+)", file.shell)
    if least and least[1] != given.get("nodes", "1"):
        yield error(
            "--min-nodes", "differs from #SBATCH --nodes", "the head would wait forever", '"$SLURM_JOB_NUM_NODES"'
        )
    if "exclusive" not in given:
        yield error(
            "#SBATCH --exclusive",
            "is missing",
            "`ray stop` ends all your Ray processes on a node, including those of another job",
            "#SBATCH --exclusive",
        )
    yield from _survival(file)


def _directives(file: SlurmFile) -> Iterator[Finding]:
    read = sbatch_lines(file.text)
    for number, name, _ in read:
        if name not in OPTIONS:
            hint = nearest(name, OPTIONS).strip() or "see `man sbatch`"
            yield error(f"line {number}", f"sbatch has no option --{name[:60]}", "sbatch rejects the job", hint)
    seen = max((number for number, _, _ in read), default=0)
    lines = file.text.splitlines()
    first = next((n for n, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")), len(lines) + 1)
    for number, line in enumerate(lines, 1):
        if number > max(seen, first) and re.match(r"#SBATCH\s", line):
            yield error(f"line {number}", "comes after the first command", "sbatch no longer reads it", "move it up")
        elif re.match(r"(# +|##)SBATCH\s", line, re.IGNORECASE) or re.match(r"#sbatch\s", line):
            yield note(
                f"line {number}", "is a comment to sbatch", "only lines that begin with #SBATCH count", "#SBATCH ..."
            )


def _survival(file: SlurmFile) -> Iterator[Finding]:
    given = file.directives
    if "time" not in given:
        yield note("#SBATCH --time", "is missing", "a partition may default to minutes", "#SBATCH --time=24:00:00")
    if given.get("nodes", "1") != "1" and "no-kill" not in given:
        yield note("#SBATCH --no-kill", "is missing", "a single dead node ends the job", "#SBATCH --no-kill")
    if "--resume" not in file.shell:
        yield note(
            "the script",
            "nothing resumes a run",
            "after a time limit it would start over",
            "macdrop sweep --resume",
        )
    if "symmetric-run" in file.shell and not re.search(r"ENDED|--wait[= ][1-9]", file.shell):
        yield note(
            "the script",
            "nothing stops the nodes other than the first",
            "`ray symmetric-run` does not return there after the sweep: the job would run until its time limit",
            "srun --wait=60, or a file that the nodes watch for",
        )

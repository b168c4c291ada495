"""The network lab itself: machines that can be killed, cut off and booted, and of which nothing is left."""

from __future__ import annotations

import subprocess
import sys

import pytest
from netlab import HOME, REPOSITORY, SHARED, Lab, until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(120)]
SSH = ("ssh", "-o", "StrictHostKeyChecking=accept-new", "-o", "ConnectTimeout=5")


def said(machine, *command: str) -> str:
    done = machine.run(*command)
    assert done.returncode == 0, done.stdout
    return done.stdout.strip()


def test_machines_have_names_addresses_files_and_processes_of_their_own(lab):
    first, second, third = lab.hosts
    assert said(lab.laptop, *SSH, "h1", "hostname").splitlines()[-1] == "h1"
    assert said(lab.laptop, *SSH, "h2", "pwd").splitlines()[-1] == HOME
    assert first.address in said(first, "ip", "-brief", "address")
    for folder in (HOME, "/tmp", "/dev/shm", "/run"):
        said(first, "touch", f"{folder}/only-here")
        assert second.run("test", "-e", f"{folder}/only-here").returncode, folder
    said(third, "bash", "-c", "sleep 77 >/dev/null & disown")
    assert third.processes() == ["sleep 77"] and second.processes() == []
    assert second.run("pgrep", "-x", "sleep", "-a").stdout.count("77") == 0


def test_all_see_the_shared_folder_the_packages_and_the_repository(lab):
    said(lab.hosts[0], "touch", f"{SHARED}/seen")
    assert (lab.shared / "seen").exists()
    for machine in lab.machines.values():
        assert "seen" in said(machine, "ls", str(SHARED))
        code = "import sys, cluster.core.launch_file, yaml; print(sys.executable, cluster.core.launch_file.__file__)"
        expected = f"{sys.prefix}/bin/python {REPOSITORY}/cluster/core/launch_file.py"
        assert said(machine, "python", "-c", code) == expected


def test_nothing_of_the_real_machine_can_be_written(lab):
    for folder in ("/etc", "/var/tmp", str(REPOSITORY), sys.prefix, sys.base_prefix):
        told = lab.hosts[1].run("touch", f"{folder}/written")
        assert told.returncode and "Read-only file system" in told.stdout


def test_a_host_is_killed_and_booted_again(lab):
    second = lab.hosts[1]
    said(second, "touch", "kept", "/tmp/gone")
    lab.kill("h2")
    assert lab.laptop.run(*SSH, "h2", "true").returncode
    with pytest.raises(RuntimeError, match="h2 is off"):
        second.run("true")
    lab.boot("h2")
    assert said(lab.laptop, *SSH, "h2", "ls", "kept").splitlines()[-1] == "kept"
    assert second.run("ls", "/tmp/gone").returncode


def test_a_cut_host_runs_on_alone(lab):
    lab.cut("h3")
    assert lab.laptop.run(*SSH, "h3", "true").returncode
    assert said(lab.hosts[2], "hostname") == "h3"
    lab.mend("h3")
    until(lambda: lab.laptop.run(*SSH, "h3", "true").returncode == 0, 30, "the link to h3")


def test_nothing_is_left_of_a_lab():
    with Lab(hosts=1) as lab:
        said(lab.hosts[0], "bash", "-c", "setsid sleep 77 >/dev/null & disown")
        assert lab.leftovers()
    assert lab.leftovers() == []


def test_a_lab_ends_with_the_process_that_made_it():
    code = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY / 'tests/launch')!r})\n"
        "import os, signal, netlab\n"
        "lab = netlab.Lab(hosts=1).__enter__()\n"
        "print(lab.state, *lab.namespaces, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    import netlab

    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout.split()
    state, namespaces = told[0], set(told[1:])
    until(lambda: not netlab.inhabitants(namespaces), 10, "the orphaned lab to end")
    netlab.shutil.rmtree(state)

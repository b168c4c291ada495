"""The network lab itself: its machines can be killed, cut off and booted, and leave nothing behind."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from netlab import HOME, REPOSITORY, SHARED, Lab, inhabitants, until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(120)]
SSH = ("ssh", "-o", "StrictHostKeyChecking=accept-new", "-o", "ConnectTimeout=5")


def output(machine, *command: str) -> str:
    done = machine.run(*command)
    assert done.returncode == 0, done.stdout
    return done.stdout.strip()


def test_machines_have_separate_names_addresses_files_and_processes(lab):
    first, second, third = lab.hosts
    assert output(lab.laptop, *SSH, "h1", "hostname").splitlines()[-1] == "h1"
    assert output(lab.laptop, *SSH, "h2", "pwd").splitlines()[-1] == HOME
    assert first.address in output(first, "ip", "-brief", "address")
    for folder in (HOME, "/tmp", "/dev/shm", "/run"):
        output(first, "touch", f"{folder}/only-here")
        assert second.run("test", "-e", f"{folder}/only-here").returncode, folder
    output(third, "bash", "-c", "sleep 77 >/dev/null & disown")
    assert third.processes() == ["sleep 77"] and second.processes() == []
    assert second.run("pgrep", "-x", "sleep", "-a").stdout.count("77") == 0


def test_shared_folder_packages_and_repository_are_visible_everywhere(lab):
    output(lab.hosts[0], "touch", f"{SHARED}/seen")
    assert (lab.shared / "seen").exists()
    for machine in lab.machines.values():
        assert "seen" in output(machine, "ls", str(SHARED))
        code = "import sys, cluster.core.launch_file, yaml; print(sys.executable, cluster.core.launch_file.__file__)"
        expected = f"{sys.prefix}/bin/python {REPOSITORY}/cluster/core/launch_file.py"
        assert output(machine, "python", "-c", code) == expected


def test_real_machine_is_read_only(lab):
    for folder in ("/etc", "/var/tmp", str(REPOSITORY), sys.prefix, sys.base_prefix):
        done = lab.hosts[1].run("touch", f"{folder}/written")
        assert done.returncode and "Read-only file system" in done.stdout


def test_killed_host_boots_again_with_its_home(lab):
    second = lab.hosts[1]
    output(second, "touch", "kept", "/tmp/gone")
    lab.kill("h2")
    assert lab.laptop.run(*SSH, "h2", "true").returncode
    with pytest.raises(RuntimeError, match="h2 is off"):
        second.run("true")
    lab.boot("h2")
    assert output(lab.laptop, *SSH, "h2", "ls", "kept").splitlines()[-1] == "kept"
    assert second.run("ls", "/tmp/gone").returncode


def test_disconnected_host_keeps_running(lab):
    lab.cut("h3")
    assert lab.laptop.run(*SSH, "h3", "true").returncode
    assert output(lab.hosts[2], "hostname") == "h3"
    lab.reconnect("h3")
    until(lambda: lab.laptop.run(*SSH, "h3", "true").returncode == 0, 30, "the link to h3")


def test_closed_lab_leaves_nothing_behind():
    with Lab(hosts=1) as lab:
        output(lab.hosts[0], "bash", "-c", "setsid sleep 77 >/dev/null & disown")
        assert lab.leftovers()
    assert lab.leftovers() == []


def test_lab_ends_with_the_process_that_created_it():
    code = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY / 'tests/launch')!r})\n"
        "import os, signal, netlab\n"
        "lab = netlab.Lab(hosts=1).__enter__()\n"
        "print(lab.state, *lab.namespaces, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    state, *namespaces = done.stdout.split()
    until(lambda: not inhabitants(set(namespaces)), 10, "the orphaned lab to end")
    shutil.rmtree(state)

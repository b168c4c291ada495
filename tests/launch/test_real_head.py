"""The verbs against a real Ray head with a token; `ray exec` is replaced by a local shell, all else is real."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import TOKEN

from cluster.backends.registry import open_backend

BIN = Path(sys.executable).parent
#: Runs the command of `ray exec FILE COMMAND` as the head would; no machine is started or copied to.
RAY = """#!/bin/bash
case $1 in
  exec) . {env}; exec bash -c "$3";;
  *) exec {ray} "$@";;
esac
"""
#: A fake sweep whose arguments decide how it ends.
MACDROP = """#!/bin/bash
[ "$1" = cluster ] && exec {python} -m tune.cli "$@"
echo "sweep $*"
case "$*" in
  *ends=well*) mkdir -p "$MACDROP_STORAGE/runs/demo"; echo '{{"status": "done", "created": "x"}}' \\
    > "$MACDROP_STORAGE/runs/demo/run.json";;
  *ends=badly*) exit 7;;
  *) trap 'echo saved; exit 130' INT; for i in $(seq 600); do sleep 0.1; done;;
esac
"""

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A head with its own folder, ports and home, in its own process session."""
    folder = Path(f"/tmp/mdh-{os.getpid()}")  # socket paths must be short
    folder.mkdir()
    home, gcs, web = tmp_path_factory.mktemp("home"), free_port(), free_port()
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(TOKEN)
    (home / "bin").mkdir()
    (home / "storage").mkdir()
    tree = Path(__file__).parents[2]
    lines = {
        "RAY_ADDRESS": f"127.0.0.1:{gcs}",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{web}",
        "MACDROP_STORAGE": home / "storage",
        "PYTHONPATH": tree,
    }
    env = home / "env.sh"
    env.write_text("".join(f"export {name}={value}\n" for name, value in lines.items()))
    for name, text in (("ray", RAY), ("macdrop", MACDROP)):
        program = home / "bin" / name
        program.write_text(text.format(env=env, ray=BIN / "ray", python=sys.executable))
        program.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    environment["MACDROP_STORAGE"] = str(home / "storage")
    environment |= {"PATH": f"{home / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(tree)}
    command = [BIN / "ray", "start", "--head", "--block", "--num-cpus=0", f"--port={gcs}", f"--dashboard-port={web}"]
    command += ["--dashboard-agent-listen-port=0"]  # agents of a Ray that has just died may hold the default port
    command += ["--dashboard-host=127.0.0.1", f"--temp-dir={folder}", "--node-ip-address=127.0.0.1"]
    with open(home / "head.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        yield home
    finally:
        mine = [pid for pid, words in processes() if str(folder) in words]
        for pid in [process.pid, *mine]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.wait()
        subprocess.run(["rm", "-rf", str(folder)])


def processes():
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield int(file.parent.name), file.read_bytes().decode(errors="replace")
        except OSError:
            continue


@pytest.fixture
def there(head, laptop, monkeypatch):
    """The laptop, connected to the running head."""
    monkeypatch.setenv("HOME", str(head))
    monkeypatch.setenv("PATH", f"{head / 'bin'}:{BIN}:/usr/bin:/bin")
    file = laptop.file("local")
    deadline = time.monotonic() + 120
    while "head alive" not in " ".join(laptop.out.split()) and time.monotonic() < deadline:
        laptop.run("status", file)
    assert "head alive" in " ".join(laptop.out.split()), laptop.out + laptop.err
    return laptop, file


def test_jobs_run_resume_and_are_listed(there):
    laptop, file = there
    assert laptop.run("submit", file, "demo", "ends=well") == 0, laptop.out + laptop.err
    assert re.search(
        r"^sweep sweep demo ends=well ray.address=auto output_dir=\S+/runs/demo$", laptop.out, re.MULTILINE
    )
    assert laptop.run("submit", file, "demo", "ends=badly") == 7
    assert re.search(r"^sweep sweep demo .* --resume$", laptop.out, re.MULTILINE), (
        "a run whose folder exists is resumed"
    )
    assert laptop.run("status", file) == 0
    assert re.search(r"demo-\S+ +demo +succeeded +0", laptop.out) and re.search(r"demo +failed +7", laptop.out)
    assert re.search(r"^demo +done", laptop.out, re.MULTILINE)
    assert laptop.run("logs", file, "demo") == 0 and "ends=badly" in laptop.out
    assert TOKEN not in laptop.out


def test_stopped_job_receives_sigint(there):
    laptop, file = there
    assert laptop.run("submit", file, "demo", "--name", "long", "--no-follow") == 0, laptop.out + laptop.err
    kind = open_backend(Path(file))
    job = kind.jobs()[-1]
    assert laptop.run("submit", file, "demo", "--name", "long") == 1 and "is running" in laptop.err
    kind.stop(job["id"])
    assert kind.jobs()[-1]["status"] == "STOPPED"
    assert laptop.run("logs", file, "long", "--follow") == 0 and "saved" in laptop.out


def test_missing_token_is_reported(there, monkeypatch, tmp_path):
    laptop, file = there
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert laptop.run("status", file) == 1
    assert (
        "lacks the token that its Ray wants" in laptop.out + laptop.err and "Traceback" not in laptop.out + laptop.err
    )

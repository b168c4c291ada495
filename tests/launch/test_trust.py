"""The way to the hosts: whose keys are trusted, and which requests go through no proxy."""

from __future__ import annotations

import os
import subprocess

import pytest
from launching import TOKEN
from recorder import head_output, node

from cluster.backends.base import DIRECT

NODES = [node("10.0.0.1", head=True), node("10.0.0.2", gpus=4), node("10.0.0.3", gpus=4)]
MAKES_TOKEN = f"mkdir -p ~/.ray && printf {TOKEN} | tee ~/.ray/auth_token"


@pytest.fixture(autouse=True)
def _files_are_good(monkeypatch):
    monkeypatch.setattr("cluster.commands.check.report", lambda file: 0)


def test_host_that_shows_another_key_gets_no_token(laptop):
    file = laptop.file("local")
    laptop.tools.answer("get-auth-token", {"run": MAKES_TOKEN})
    laptop.tools.answer("on-head jobs", {"out": "Head node of cluster (macdrop) not found!", "code": 1})
    laptop.tools.answer("ssh .*10.0.0.2", {"out": "Host key verification failed.", "code": 255})
    assert laptop.run("up", file) == 1
    assert "10.0.0.2 has a host key other than the known one" in laptop.err
    assert not [line for line in laptop.tools.lines if line.startswith("ray up")]
    ssh = laptop.tools.find("ssh -i")["line"]
    assert "StrictHostKeyChecking=accept-new" in ssh and "UserKnownHostsFile=/dev/null" not in ssh


def test_requests_of_the_head_to_itself_go_through_no_proxy(tmp_path):
    shown = 'printf "%s|" "$no_proxy" "$NO_PROXY"'
    done = subprocess.run(
        ["bash", "-c", f"{DIRECT}; {shown}"],
        env={"PATH": os.environ["PATH"], "NO_PROXY": ".site.org"},
        capture_output=True,
        text=True,
    )
    lower, upper, _ = done.stdout.split("|")
    assert lower.startswith("127.0.0.1,localhost,::1,") and upper == f"{lower}.site.org"


@pytest.mark.parametrize("words", [["status"], ["submit", "{file}", "demo"], ["logs"]])
def test_every_question_to_the_head_is_asked_directly(laptop, words):
    file = laptop.file("local")
    laptop.token()
    laptop.tools.answer("on-head", head_output(nodes=NODES, jobs=[], runs=[], log=[]))
    laptop.run(words[0], *([word.format(file=file) for word in words[1:]] or [file]))
    asked = [call["argv"][-1] for call in laptop.tools.calls if call["argv"][:2] == ["ray", "exec"]]
    assert asked and all(script.startswith(DIRECT) for script in asked)

"""On-premise hosts over ssh: what `ray up` and `ray down` do for the head only, or do not report."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cluster.backends import advice
from cluster.backends.advice import Origin
from cluster.core import token
from cluster.core.ray_file import RayFile
from cluster.core.shell import Result, Shell
from cluster.remote.ray_internals import PROCESSES

MARK = "macdrop-host: "
#: Timeouts in seconds: of a connection, and of a whole command.
CONNECT, ANSWER = 10, 90
#: Hosts contacted at once.
PARALLEL = 16
#: Seconds by which clocks may differ before it is reported.
SKEW = 30


def known_hosts() -> Path:
    """The file of the keys that on-premise hosts showed at the first contact."""
    return Path.home() / ".macdrop" / "known_hosts"


@dataclass(frozen=True)
class Ssh:
    """The way to log in to the hosts of a launch file: as Ray does but for host keys, and without prompts."""

    user: str
    key: str | None
    proxy: str | None = None
    container: str | None = None

    @classmethod
    def of(cls, file: RayFile) -> Ssh:
        return cls(
            user=file.ssh_user or os.environ.get("USER", "root"),
            key=str(file.ssh_key) if file.ssh_key else None,
            proxy=file.ssh_proxy,
            container=file.container,
        )

    def command(self, host: str, script: str, *, inside: bool = True) -> list[str]:
        """The ssh command that runs a script in the login environment of the host, in Ray's container if there is one.

        The key of a host is remembered at the first contact, and another one is refused from then on.
        """
        options = ["StrictHostKeyChecking=accept-new", f"UserKnownHostsFile={known_hosts()}", "LogLevel=ERROR"]
        options += ["BatchMode=yes"]
        options += [f"ConnectTimeout={CONNECT}", "ServerAliveInterval=5", "ServerAliveCountMax=3"]
        options += ["IdentitiesOnly=yes"] if self.key else []
        options += [f"ProxyCommand={self.proxy}"] if self.proxy else []
        words = ["bash", "--login", "-c", "-i", f"source ~/.bashrc; {script}"]
        if inside and self.container:
            words = ["docker", "exec", self.container, *words]
        key = ["-i", self.key] if self.key else []
        given = [word for option in options for word in ("-o", option)]
        return ["ssh", *key, *given, f"{self.user}@{host}", shlex.join(words)]

    def explain(self, host: str, result: Result) -> str:
        """The reason why a command on a host failed."""
        found = advice.find(Origin.SSH, result.text, host=host, user=self.user)
        return found or f"{host}: the command over ssh failed with exit code {result.code}: {_last(result.text)}"


def on_all(shell: Shell, ssh: Ssh, hosts: Iterable[str], script: str, inside: bool = True) -> dict[str, Result]:
    """Run a script on all hosts at once; host -> result. One of the commands is shown."""
    commands = {host: ssh.command(host, script, inside=inside) for host in hosts}
    for command in list(commands.values())[:1]:
        others = list(commands)[1:]
        shell.show(command, f"   # and on {', '.join(others)}" if others else "")
    if shell.dry_run:
        return {host: Result(0, "") for host in commands}
    known_hosts().parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with ThreadPoolExecutor(PARALLEL) as pool:
        results = pool.map(lambda command: shell.capture(command, shown=False, timeout=ANSWER), commands.values())
        return dict(zip(commands, results, strict=True))


# --- before `up` ---


def changed_host_keys(shell: Shell, ssh: Ssh, hosts: Iterable[str]) -> list[str]:
    """Contact hosts; the reasons of those whose key is not the known one. Ray itself checks no host key."""
    results = on_all(shell, ssh, hosts, "true", inside=False)
    return [ssh.explain(host, each) for host, each in results.items() if advice.HOST_KEY in each.text]


# --- after `down` ---


def stop_ray(shell: Shell, ssh: Ssh, hosts: Iterable[str]) -> dict[str, str]:
    """Run `ray stop --force` on hosts; host -> why it failed. A host without Ray has nothing to stop."""
    if ssh.container:
        script, inside = f"docker stop {shlex.quote(ssh.container)} 2>/dev/null || true", False
    else:
        script, inside = "ray stop --force", True
    results = on_all(shell, ssh, hosts, script, inside=inside)
    return {host: ssh.explain(host, each) for host, each in results.items() if not each.ok and each.code != 127}


def ray_processes(shell: Shell, ssh: Ssh, hosts: Iterable[str]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Ray processes that still run: host -> lines of pid and command; and host -> why it did not answer."""
    script = f"echo {MARK}asked; ps -eo pid=,args= | grep -E {shlex.quote(PROCESSES)}; true"
    running: dict[str, list[str]] = {}
    silent: dict[str, str] = {}
    for host, result in on_all(shell, ssh, hosts, script, inside=False).items():
        _, mark, after = result.text.partition(f"{MARK}asked")
        if mark:
            # What the login shell prints itself (no terminal, no job control) may arrive late.
            found = [line.strip()[:120] for line in after.splitlines() if re.match(r"\s*\d+ ", line)]
            running.update({host: found} if found else {})
        elif not shell.dry_run:
            silent[host] = ssh.explain(host, result)
    return running, silent


# --- after `up`: why a host is not a node ---


def probe_script(head: str) -> str:
    """Shell text that prints facts about a host, one per line, that explain a missing node."""
    facts = {
        "ray": "ray --version 2>&1 | tail -1",
        "mode": 'echo "${RAY_AUTH_MODE:-}"',
        "token": "sha256sum < ~/.ray/auth_token | cut -d' ' -f1",
        "clock": "date +%s",
        "raylets": "ps -eo args= | grep -c '[r]aylet/raylet '",
        "rsync": "command -v rsync",
        "storage": 'test -z "${MACDROP_STORAGE:-}" -o -w "${MACDROP_STORAGE:-/}" && echo writable',
        "head": f"timeout 5 bash -c 'exec 3<>/dev/tcp/{head}/6379' && echo reached",
        "refused": "grep -hiE 'unauthenticated|authentication ?(error|token)|invalid.*token' "
        "/tmp/ray/session_latest/logs/raylet.err /tmp/ray/session_latest/logs/raylet.out | tail -1 | cut -c1-200",
    }
    return "; ".join(f'echo "{MARK}{name} $({text} 2>/dev/null)"' for name, text in facts.items())


def probe(shell: Shell, ssh: Ssh, hosts: Iterable[str], head: str, version: str | None) -> dict[str, list[str]]:
    """Find out why hosts are not nodes: host -> causes, empty if none was found.

    Args:
        version: Ray's version on the head, None if unknown.
    """
    results = on_all(shell, ssh, hosts, probe_script(head))
    return {host: read_probe(ssh, host, result, head, version) for host, result in results.items()}


def read_probe(ssh: Ssh, host: str, result: Result, head: str, version: str | None) -> list[str]:
    """The causes in the answer of one host."""
    facts: dict[str, str] = {}
    for line in result.text.splitlines():
        _, mark, fact = line.partition(MARK)
        if mark:
            name, _, value = fact.partition(" ")
            facts[name] = value.strip()
    if not facts:
        return [ssh.explain(host, result)]
    found, ours = [], token.path()
    theirs = re.search(r"version (\S+)", facts.get("ray", ""))
    if not theirs:
        found.append(
            f"{host} has no `ray` on the PATH of a login shell: its setup_commands failed, or do not add it "
            "(export PATH in ~/.bashrc)."
        )
    elif version and theirs[1] != version:
        found.append(
            f"{host} has Ray {theirs[1]} and the head {version}: versions must be equal. Install ray=={version}."
        )
    if facts.get("mode") != "token":
        found.append(f"{host} does not set RAY_AUTH_MODE=token in ~/.bashrc: the head rejects it (setup_commands).")
    if not facts.get("token") or facts["token"] == hashlib.sha256(b"").hexdigest():
        found.append(f"{host} has no Ray token at ~/.ray/auth_token: add it to file_mounts, and run `up` again.")
    elif ours.is_file() and facts["token"] != hashlib.sha256(ours.read_bytes()).hexdigest():
        found.append(f"{host} has a different Ray token than this machine: run `up` again to copy it.")
    if facts.get("refused"):
        found.append(f"the head rejected the token of {host}: {facts['refused']}")
    skew = int(facts["clock"]) - time.time() if facts.get("clock", "").isdigit() else 0
    if abs(skew) > SKEW:
        found.append(f"the clock of {host} is {abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}: start NTP there.")
    if not facts.get("rsync"):
        found.append(f"{host} has no rsync, which Ray copies files with: apt install rsync.")
    if not facts.get("storage"):
        found.append(f"{host} cannot write to the folder of MACDROP_STORAGE: mount the shared storage there.")
    if not facts.get("head"):
        found.append(f"{host} cannot reach port 6379 of the head {head}: open it between the hosts (firewall).")
    if facts.get("raylets") == "0" and not found:
        found.append(f"{host} is fine, but Ray does not run on it (yet).")
    return found


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and "no job control" not in line]
    return lines[-1].strip()[:300] if lines else "no output"

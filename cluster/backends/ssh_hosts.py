"""On-premise hosts over ssh: what Ray's own command does for the head only, or does not tell."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from cluster.core import token
from cluster.core.launch_file import ClusterFile, as_dict
from cluster.core.shell import Done, Shell

MARK = "macdrop-host: "
#: Seconds for a connection, and for a whole command.
CONNECT, ANSWER = 10, 90
#: Hosts asked at once.
AT_ONCE = 16
#: Seconds by which clocks may differ before it is worth a line.
SKEW = 30
#: Ray's processes as `ps` shows them; dead ones that nobody waited for it shows in [brackets]. The brackets here keep
#: the search from finding itself.
PROCESSES = "|".join(
    (
        *(
            "[r]aylet/raylet ",
            "gcs/[g]cs_server ",
            "(^| )[r]ay::",
            "(^| )[r]ay-dashboard",
            "/[r]ay/_private/log_monitor\\.py",
        ),
        *("/[r]ay/dashboard/(agent|dashboard)\\.py", "/[r]ay/_private/runtime_env/agent/main\\.py"),
        *("/[r]ay/autoscaler/_private/monitor\\.py", "/[r]ay/autoscaler/v2/monitor\\.py"),
        *("/[r]ay/_private/workers/(default|setup)_worker\\.py", "/[r]ay/util/client/server"),
    )
)
#: What ssh says -> what it means and what to do. `{host}` and `{user}` are filled in; the first that is found counts.
WORDS: Mapping[str, str] = {
    r"Permission denied|Too many authentication failures": "does not take this key for user {user}: put its public "
    "part into ~/.ssh/authorized_keys there, and look at auth.ssh_user and auth.ssh_private_key in the launch file",
    r"UNPROTECTED PRIVATE KEY|bad permissions": "was not asked, because others may read the private key: chmod 600 it",
    r"Identity file .* not accessible|no such identity": "was not asked: the file of auth.ssh_private_key is not there",
    r"Host key verification failed|REMOTE HOST IDENTIFICATION HAS CHANGED": "has another host key than the known one: "
    "if it was set up anew, forget the old one with `ssh-keygen -R {host}`",
    r"Could not resolve hostname|Name or service not known": "has no address: the name is not known here",
    r"Connection refused": "refuses ssh: it is up, and no sshd listens on port 22",
    r"No route to host|Network is unreachable": "cannot be reached: it is off, or not in a network of this machine",
    r"[Cc]onnection timed out|Operation timed out|no answer within": "does not answer: it is off, cut off, or a "
    "firewall drops port 22",
    r"Connection (reset|closed)|kex_exchange_identification|Broken pipe": "closed the connection: look at sshd's log",
    r"No such container|is not running": "is up, and its container is not: the node was never set up, or has stopped",
}


@dataclass(frozen=True)
class Ssh:
    """How the hosts of a launch file are reached: as Ray reaches them, and with no question asked."""

    user: str
    key: str | None
    proxy: str | None = None
    container: str | None = None

    @classmethod
    def of(cls, file: ClusterFile) -> Ssh:
        auth = as_dict(file.content.get("auth"))
        return cls(
            user=file.ssh_user or os.environ.get("USER", "root"),
            key=str(file.ssh_key) if file.ssh_key else None,
            proxy=auth.get("ssh_proxy_command"),
            container=file.container,
        )

    def command(self, host: str, script: str, *, inside: bool = True) -> list[str]:
        """The ssh command that runs a script with the host's login environment, in Ray's container where there is one.

        Host keys are taken as Ray takes them: addresses of rented hosts come back with other keys.
        """
        options = ["StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "BatchMode=yes"]
        options += [f"ConnectTimeout={CONNECT}", "ServerAliveInterval=5", "ServerAliveCountMax=3"]
        options += ["IdentitiesOnly=yes"] if self.key else []
        options += [f"ProxyCommand={self.proxy}"] if self.proxy else []
        words = ["bash", "--login", "-c", "-i", f"source ~/.bashrc; {script}"]
        if inside and self.container:
            words = ["docker", "exec", self.container, *words]
        key = ["-i", self.key] if self.key else []
        return ["ssh", *key, *(word for option in options for word in ("-o", option)), f"{self.user}@{host}",
                shlex.join(words)]  # fmt: skip

    def told(self, host: str, done: Done) -> str:
        """Why a command on a host ended badly, in words."""
        for pattern, words in WORDS.items():
            if re.search(pattern, done.text):
                return f"{host} {words.format(host=host, user=self.user)}."
        return f"{host}: the command over ssh ended with {done.code}: {_last(done.text)}"


def on_all(shell: Shell, ssh: Ssh, hosts: Iterable[str], script: str, **more: bool) -> dict[str, Done]:
    """Run a script on all hosts at once; host -> how it ended. One of the commands is shown."""
    commands = {host: ssh.command(host, script, **more) for host in hosts}
    for command in list(commands.values())[:1]:
        others = list(commands)[1:]
        shell.show(command, f"   # and on {', '.join(others)}" if others else "")
    if shell.dry_run:
        return {host: Done(0, "") for host in commands}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        done = pool.map(lambda command: shell.ask(command, shown=False, timeout=ANSWER), commands.values())
        return dict(zip(commands, done, strict=True))


# --- after `down`: nothing is left ---


def stop_ray(shell: Shell, ssh: Ssh, hosts: Iterable[str]) -> dict[str, str]:
    """`ray stop --force` on these hosts; host -> why it could not be done, in words. Where no Ray is, none runs."""
    if ssh.container:
        script, inside = f"docker stop {shlex.quote(ssh.container)} 2>/dev/null || true", False
    else:
        script, inside = "ray stop --force", True
    ended = on_all(shell, ssh, hosts, script, inside=inside)
    return {host: ssh.told(host, done) for host, done in ended.items() if not done.ok and done.code != 127}


def left(shell: Shell, ssh: Ssh, hosts: Iterable[str]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Ray processes that still run: host -> lines of pid and command; and host -> why it could not be asked."""
    script = f"echo {MARK}asked; ps -eo pid=,args= | grep -E {shlex.quote(PROCESSES)}; true"
    running, silent = {}, {}
    for host, done in on_all(shell, ssh, hosts, script, inside=False).items():
        before, mark, after = done.text.partition(f"{MARK}asked")
        if mark:
            # What the login shell says on its own (no terminal, no job control) may come late.
            found = [line.strip()[:120] for line in after.splitlines() if re.match(r"\s*\d+ ", line)]
            running.update({host: found} if found else {})
        elif not shell.dry_run:
            silent[host] = ssh.told(host, done)
    return running, silent


# --- after `up`: why a host is not among the nodes ---


def probe_script(head: str) -> str:
    """Shell text that tells of a host what a missing node may come from, a line each."""
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
    """host -> causes for which it may not be a node, in words; empty where none was found.

    Args:
        version: Ray's on the head, None where that is not known.
    """
    ended = on_all(shell, ssh, hosts, probe_script(head))
    return {host: read_probe(ssh, host, done, head, version) for host, done in ended.items()}


def read_probe(ssh: Ssh, host: str, done: Done, head: str, version: str | None) -> list[str]:
    """What the answer of one host tells."""
    facts = {}
    for line in done.text.splitlines():
        _, mark, told = line.partition(MARK)
        if mark:
            name, _, value = told.partition(" ")
            facts[name] = value.strip()
    if not facts:
        return [ssh.told(host, done)]
    found, ours = [], token.path()
    theirs = re.search(r"version (\S+)", facts.get("ray", ""))
    if not theirs:
        found.append(
            f"{host} has no `ray` on the PATH of a login shell: its setup_commands failed, or do not put it there "
            "(export PATH in ~/.bashrc)."
        )
    elif version and theirs[1] != version:
        found.append(
            f"{host} has Ray {theirs[1]} and the head {version}: nodes must have the same. Install ray=={version}."
        )
    if facts.get("mode") != "token":
        found.append(f"{host} does not set RAY_AUTH_MODE=token in ~/.bashrc: the head refuses it (setup_commands).")
    if not facts.get("token") or facts["token"] == hashlib.sha256(b"").hexdigest():
        found.append(f"{host} has no Ray token at ~/.ray/auth_token: add it to file_mounts, and run `up` again.")
    elif ours.is_file() and facts["token"] != hashlib.sha256(ours.read_bytes()).hexdigest():
        found.append(f"{host} has another Ray token than this machine: run `up` again, which copies it.")
    if facts.get("refused"):
        found.append(f"the head refused the token of {host}: {facts['refused']}")
    skew = int(facts["clock"]) - time.time() if facts.get("clock", "").isdigit() else 0
    if abs(skew) > SKEW:
        found.append(f"the clock of {host} is {abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}: start NTP there.")
    if not facts.get("rsync"):
        found.append(f"{host} has no rsync, with which Ray copies files: apt install rsync.")
    if not facts.get("storage"):
        found.append(f"{host} cannot write the folder of MACDROP_STORAGE: mount the shared storage there.")
    if not facts.get("head"):
        found.append(f"{host} does not reach port 6379 of the head {head}: open it between the hosts (firewall).")
    if facts.get("raylets") == "0" and not found:
        found.append(f"{host} is fine, and Ray does not run on it (yet).")
    return found


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and "no job control" not in line]
    return lines[-1].strip()[:300] if lines else "it said nothing"

"""A laptop and several hosts on one Linux machine, each with its own address, ssh server, file system and processes.

Each machine of the lab is a set of namespaces (network, mounts, host name, IPC, processes) inside one outer set that
holds the bridge between them. They need separate addresses because Ray's cluster files have no ssh port, and separate
process namespaces because `ray stop` matches processes by name. The interpreter, its packages and the repository are
visible everywhere, read-only and at their usual paths; `SHARED` stands in for an NFS mount. The lab has no route to
the outside.

The whole lab hangs on one process: after `close()`, or when this process ends for any reason, no process, mount or
interface remains. Needs root; `missing()` reports what else is required, after trying to install it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pwd
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
INIT = Path(__file__).with_name("netlab_machine.sh")
HOME = pwd.getpwuid(os.getuid()).pw_dir
SHARED = Path("/srv")
#: If set in the environment, the lab's folder is kept, with the hosts' homes and logs.
KEEP = "NETLAB_KEEP"
NETWORK = "10.77.0"
LAPTOP = "laptop"
#: The namespaces that each machine has of its own; `nsenter` and `unshare` take the same options.
NAMESPACES = ("--net", "--mount", "--uts", "--ipc", "--pid")
#: Tool -> the Debian package that provides it.
PACKAGES = {
    **{"sshd": "openssh-server", "ssh": "openssh-client", "rsync": "rsync", "ip": "iproute2"},
    **{"unshare": "util-linux", "nsenter": "util-linux", "setpriv": "util-linux"},
}
PATH = f"{sys.prefix}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def lacking() -> list[str]:
    """Debian packages of the tools that are not installed."""
    return sorted({package for tool, package in PACKAGES.items() if not shutil.which(tool, path=PATH)})


@functools.cache
def missing() -> str | None:
    """The reason why no lab can run here, or None. Tries to install missing Debian packages."""
    if sys.platform != "linux":
        return "the network lab needs Linux namespaces"
    if os.geteuid() != 0:
        return "the network lab needs root"
    if lacking() and shutil.which("apt-get"):
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for line in (["update"], ["install", "-y", "--no-install-recommends", *lacking()]):
            subprocess.run(["apt-get", "-q", *line], env=environment, capture_output=True, timeout=300)
    if lacking():
        return f"the network lab needs the package(s) {', '.join(lacking())}"
    refused = subprocess.run(["unshare", *NAMESPACES, "--fork", "true"], capture_output=True).returncode
    return "this machine does not let root create namespaces" if refused else None


def until(holds: Callable[[], object], timeout: float, what: str, interval: float = 0.05) -> float:
    """Wait until `holds()` is true and return the seconds; the TimeoutError names `what` did not happen."""
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > timeout:
            raise TimeoutError(f"waited {timeout:g} s for {what}")
        time.sleep(interval)
    return time.monotonic() - began


def child(pid: int) -> int:
    """The only child of a process; waits until it is forked."""
    found = []

    def forked() -> bool:
        with contextlib.suppress(FileNotFoundError):
            found[:] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return bool(found)

    until(forked, 10, f"process {pid} to fork")
    return int(found[0])


def inhabitants(namespaces: set[str]) -> list[int]:
    """Processes in one of these network or process namespaces, by their ids on the real machine."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if {os.readlink(folder / "ns" / kind) for kind in ("net", "pid")} & namespaces:
                found.append(int(folder.name))
    return found


def _pairs(variables: Mapping[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in variables.items()]


@dataclass
class Machine:
    """One machine of the lab: `run` and `start` execute commands on it, as its user in a login environment."""

    name: str
    address: str
    state: Path
    init: int | None = None
    links: list[subprocess.Popen] = field(default_factory=list)

    def line(self, command: Sequence[str | os.PathLike], variables: Mapping[str, str]) -> list[str]:
        if self.init is None:
            raise RuntimeError(f"{self.name} is off")
        login = {"HOME": HOME, "USER": "root", "LANG": "C.UTF-8", "TERM": "dumb", "PYTHONUNBUFFERED": "1"}
        enter = ["nsenter", f"--target={self.init}", *NAMESPACES, "env", "-i", *_pairs(login)]
        shell = ["bash", "-c", 'cd; . ~/.bashrc; exec env "$@"', "bash", *_pairs(variables)]
        return [*enter, *shell, *map(str, command)]

    def start(self, *command: str | os.PathLike, log: Path, **variables: str) -> subprocess.Popen:
        """Start a command; its output is appended to `log`, as an unread pipe would block it."""
        with log.open("ab") as out:
            return subprocess.Popen(
                self.line(command, variables), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
            )

    def run(self, *command: str | os.PathLike, timeout: float = 60, **variables: str) -> subprocess.CompletedProcess:
        """Run a command to completion; `stdout` holds all its output."""
        with tempfile.TemporaryFile("w+") as out:
            line = self.line(command, variables)
            code = subprocess.run(
                line, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, timeout=timeout
            ).returncode
            out.seek(0)
            return subprocess.CompletedProcess(list(command), code, out.read(), "")

    def processes(self) -> list[str]:
        """Command lines of its processes, without its init, its sshd and their helpers."""
        if self.init is None:
            return []
        namespace = {os.readlink(f"/proc/{self.init}/ns/pid")}
        lines = []
        for pid in inhabitants(namespace):
            with contextlib.suppress(OSError):
                lines.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip())
        ours = (f"bash {INIT}", "sleep 1000", "sshd:", "/usr/sbin/sshd ")
        return sorted(line for line in lines if line and not line.startswith(ours))

    @property
    def root(self) -> Path:
        """Its file system, as seen from the real machine."""
        return Path(f"/proc/{self.init}/root")


class Lab:
    """`hosts` machines named h1, h2, ... with sshd, and the laptop. A context manager: enter it in the main thread."""

    def __init__(self, hosts: int = 3) -> None:
        self.state = Path(tempfile.mkdtemp(prefix="netlab-"))
        self.shared = self.state / "shared"
        names = {LAPTOP: 1} | {f"h{number}": 10 + number for number in range(1, hosts + 1)}
        self.machines = {name: Machine(name, f"{NETWORK}.{last}", self.state / name) for name, last in names.items()}
        self.laptop = self.machines[LAPTOP]
        self.hosts = [machine for name, machine in self.machines.items() if name != LAPTOP]
        self.namespaces: set[str] = set()
        # The kernel ends `unshare` with this process, `unshare` ends the outer process 1, and that ends everything.
        self.outer = subprocess.Popen(
            ["setpriv", "--pdeathsig=KILL", "unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc"]
            + ["sleep", "infinity"]
        )
        self.init = child(self.outer.pid)
        self._remember(self.init)

    def __enter__(self) -> Lab:
        try:
            self._make_folders()
            self._outside("ip", "link", "add", "switch", "type", "bridge")
            self._outside("ip", "link", "set", "switch", "up")
            for name in self.machines:
                self.boot(name)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def boot(self, name: str) -> None:
        """Boot a machine: its home folder persists, /tmp and memory-backed folders are empty."""
        machine = self.machines[name]
        shutil.rmtree(machine.state / "tmp", ignore_errors=True)
        (machine.state / "tmp").mkdir()
        (machine.state / "tmp").chmod(0o1777)
        log = (machine.state / "machine.log").open("ab")
        seen = sorted({sys.prefix, sys.base_prefix, str(REPOSITORY)})
        link = subprocess.Popen(
            ["nsenter", f"--target={self.init}", *NAMESPACES]
            + ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc"]
            + ["bash", str(INIT), name, machine.address, str(machine.state), HOME, *seen],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        log.close()
        machine.links.append(link)
        machine.init = child(child(link.pid))
        self._remember(machine.init)
        card = f"02:00:00:00:00:{int(machine.address.rpartition('.')[2]):02x}"  # the same after a reboot
        eth0 = ("name", "eth0", "address", card, "netns", str(machine.init))
        self._outside("ip", "link", "add", name, "type", "veth", "peer", *eth0)
        self._outside("ip", "link", "set", name, "master", "switch", "up")
        until((machine.root / "run/up").exists, 20, f"{name} to come up; see {machine.state}/machine.log")

    def kill(self, name: str) -> None:
        """Cut a machine's power: all its processes die at once, and its sockets are closed."""
        machine = self.machines[name]
        if machine.init is not None:
            os.kill(machine.init, signal.SIGKILL)
            machine.links.pop().wait(20)
            machine.init = None
            with contextlib.suppress(subprocess.CalledProcessError):  # removed along with its other end
                self._outside("ip", "link", "delete", name)

    def cut(self, name: str) -> None:
        """Unplug a machine's network cable: packets are dropped in both directions, and no connection is reset."""
        self._outside("ip", "link", "set", name, "down")

    def reconnect(self, name: str) -> None:
        """Plug the cable back in."""
        self._outside("ip", "link", "set", name, "up")

    def close(self) -> None:
        """Shut the lab down and wait until none of its processes is left on the real machine."""
        if self.init is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.init, signal.SIGKILL)
            self.outer.wait(20)
            for machine in self.machines.values():
                for link in machine.links:
                    link.wait(20)
                machine.init = None
            self.init = None
            until(lambda: not inhabitants(self.namespaces), 20, "the processes of the lab to end")
        if KEEP not in os.environ:
            shutil.rmtree(self.state, ignore_errors=True)

    def leftovers(self) -> list[str]:
        """Traces of this lab on the real machine: processes, mounts, interfaces, folders."""
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        interfaces = [folder.name for folder in Path("/sys/class/net").iterdir()]
        return [
            *(f"process {pid}" for pid in inhabitants(self.namespaces)),
            *(f"mount {line}" for line in mounts if str(self.state) in line),
            *(f"interface {name}" for name in interfaces if name in {*self.machines, "switch"}),
            *([f"folder {self.state}"] if self.state.exists() and KEEP not in os.environ else []),
        ]

    def _remember(self, init: int) -> None:
        self.namespaces |= {os.readlink(f"/proc/{init}/ns/{kind}") for kind in ("net", "pid")}

    def _outside(self, *command: str) -> None:
        """Run a command in the outer network namespace, which holds the bridge."""
        subprocess.run(["nsenter", f"--target={self.init}", "--net", *command], check=True, capture_output=True)

    def _make_folders(self) -> None:
        self.shared.mkdir()
        names = "".join(f"{machine.address} {name}\n" for name, machine in self.machines.items())
        key = self.state / "key"
        for path in (key, self.state / "machine_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
        for name, machine in self.machines.items():
            home = machine.state / "home"
            ssh = home / ".ssh"
            ssh.mkdir(parents=True, mode=0o700)
            (machine.state / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
            shutil.copy(self.state / "machine_key", machine.state)
            shutil.copy(f"{key}.pub", machine.state / "authorized_keys")
            if name == LAPTOP:
                shutil.copy(key, ssh / "id_ed25519")
            exports = {"PATH": PATH, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            lines = (f"export {key}={shlex.quote(value)}\n" for key, value in exports.items())
            (home / ".bashrc").write_text("".join(lines))
            (home / ".bash_profile").write_text(". ~/.bashrc\n")

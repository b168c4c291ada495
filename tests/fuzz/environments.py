"""A table of environments: in each of them `macdrop doctor` and a sweep of two trials work, or are refused in a word.

    python tests/fuzz/environments.py [--only NAME ...] [--doctor | --sweep] [--list]

An environment is a line of shell around the command. Both commands must end as the table says, without a traceback and
in time: a sweep that works leaves a finished run with both of its trials, one that is refused ends with exit code 3 and
a sentence, and doctor reports the same. What needs root (mounts, other users) is skipped without. Exit code 1 with any
surprise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCTOR_S, SWEEP_S = 200, 500
#: A user without an entry in the list of users.
NOBODY = 54321
AS_USER = f"chown -R {NOBODY} . && exec setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups"
#: The interpreter may lie in a folder that only root may enter.
AS_USER += " --inh-caps=+dac_read_search --ambient-caps=+dac_read_search"
#: Shell that makes the folder `ro` read-only, and `small` a full disk, for this command alone.
MOUNTED = "mount -t tmpfs -o ro none ro && mount -t tmpfs -o size=1M none small && "
CAPPED = "exec unshare -m bash -c '{}'"
LONG, ACCENTS = "t" * 80, "é x"
RECIPE = """
dataset: zoo:train
cutoff_len: 64
max_samples: 64
lora_rank: 4
max_steps: 2
per_device_train_batch_size: 4
sweep:
  models: [zoo:planted-llama]
  arms: [plain, macdrop]
  num_samples: 1
  seeds: 1
  parameters: {macdrop.p0: [0.6]}
eval:
  perplexity:
    text: {data: zoo:text, window: 64, limit: 2}
"""


@dataclass(frozen=True)
class Environment:
    """One row. `shell` runs the command as "$@"; `refused` and `ill` are words of the sweep's and doctor's complaint.

    Without `refused` the sweep works; without `ill` doctor finds nothing that it needs. `codes`: how a working sweep
    may end. A `cached` environment finds the cache filled.
    """

    name: str
    shell: str = 'exec "$@"'
    refused: str = ""
    ill: str = ""
    root: bool = False
    cached: bool = True
    codes: tuple[int, ...] = (0,)


def _inside(shell: str) -> str:
    """Shell text that runs with the mounts of `MOUNTED`."""
    return CAPPED.format(f'{MOUNTED}{shell} exec "$@"') + ' _ "$@"'


def _as_user(shell: str = "") -> str:
    return f'{shell} {AS_USER} "$@"'


TABLE = (
    Environment("as usual"),
    # home and cache
    Environment("HOME unset", 'unset HOME; exec "$@"'),
    Environment("HOME unset, unknown user", _as_user("unset HOME;"), "Set HOME", "Set HOME", root=True),
    Environment("HOME missing", 'HOME=$PWD/missing exec "$@"'),
    Environment("HOME read-only", _inside("HOME=$PWD/ro"), root=True),
    Environment("HOME and cache read-only", _inside("HOME=$PWD/ro; unset MACDROP_CACHE;"),
                "MACDROP_CACHE", "MACDROP_CACHE", root=True),
    Environment("cache read-only and empty", _inside("MACDROP_CACHE=$PWD/ro"),
                "MACDROP_CACHE", "MACDROP_CACHE", root=True),
    Environment("cache read-only and filled", CAPPED.format(
                'mount --bind "$MACDROP_CACHE" ro && mount -o remount,bind,ro ro && MACDROP_CACHE=$PWD/ro exec "$@"')
                + ' _ "$@"', ill="MACDROP_CACHE", root=True),
    Environment("cache missing", 'MACDROP_CACHE=$PWD/new/cache exec "$@"', cached=False),
    Environment("cache on a full disk", _inside("MACDROP_CACHE=$PWD/small; head -c 1M /dev/zero > small/x;"),
                "MACDROP_CACHE", "GiB", root=True),
    # temporary folders
    Environment("TMPDIR of 60 bytes", f'TMPDIR=/tmp/{"t" * 55}; mkdir -p $TMPDIR; export TMPDIR; exec "$@"'),
    Environment("TMPDIR of 85 bytes", f'TMPDIR=/tmp/{LONG}; mkdir -p $TMPDIR; export TMPDIR; exec "$@"',
                "TMPDIR=", "TMPDIR="),
    Environment("TMPDIR with é", f'TMPDIR="$PWD/{ACCENTS}"; mkdir -p "$TMPDIR"; export TMPDIR; exec "$@"'),
    Environment("TMPDIR with a space", 'TMPDIR="/tmp/mac drop"; mkdir -p "$TMPDIR"; export TMPDIR; exec "$@"'),
    Environment("TMPDIR read-only", _inside("export TMPDIR=$PWD/ro;"), root=True),
    Environment("TMPDIR missing", 'TMPDIR=/tmp/missing/folder exec "$@"'),
    Environment("RAY_TMPDIR of 85 bytes", f'RAY_TMPDIR=/tmp/{LONG} exec "$@"', "RAY_TMPDIR=", "RAY_TMPDIR="),
    Environment("RAY_TMPDIR with é", f'RAY_TMPDIR="/tmp/{ACCENTS}" exec "$@"', "not ASCII", "not ASCII"),
    Environment("RAY_TMPDIR missing", 'RAY_TMPDIR=/tmp/macdrop-new exec "$@"'),
    Environment("RAY_TMPDIR read-only", CAPPED.format('mount -t tmpfs -o ro none /mnt && RAY_TMPDIR=/mnt exec "$@"')
                + ' _ "$@"', "Set RAY_TMPDIR", "Set RAY_TMPDIR", root=True),
    Environment("RAY_TMPDIR on a full disk", CAPPED.format(
                'mount -t tmpfs -o size=5M none /mnt && RAY_TMPDIR=/mnt exec "$@"') + ' _ "$@"',
                "MiB free", "MiB free", root=True),
    # folders of the run
    Environment("run folder read-only", CAPPED.format('mkdir -p runs && mount -t tmpfs -o ro none runs && exec "$@"')
                + ' _ "$@"', "output_dir", "output_dir", root=True),
    Environment("run folder on a full disk", CAPPED.format(
                'mkdir -p runs && mount -t tmpfs -o size=4k none runs && exec "$@"') + ' _ "$@"',
                "disk is full", "GiB", root=True),
    Environment("current folder deleted", 'mkdir gone; cd gone; rmdir ../gone; exec "$@"', "is gone", "is gone"),
    # locale and terminal
    Environment("LC_ALL=C", 'LC_ALL=C exec "$@"'),
    Environment("LC_ALL=C without UTF-8 mode", 'LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 exec "$@"'),
    Environment("ASCII output", 'PYTHONIOENCODING=ascii exec "$@"'),
    Environment("stdin closed", 'exec "$@" <&-'),
    Environment("stdout closed", 'exec "$@" >&-'),
    Environment("stderr closed", 'exec "$@" 2>&-'),
    Environment("all three closed", 'exec "$@" <&- >&- 2>&-'),
    Environment("stdout on a full disk", 'exec "$@" >/dev/full'),
    Environment("stdout into a closed pipe", '"$@" | true; exit ${PIPESTATUS[0]}'),
    Environment("no terminal, SIGHUP ignored", 'exec nohup setsid "$@" </dev/null'),
    Environment("narrow dumb terminal", 'TERM=dumb COLUMNS=10 LINES=2 exec "$@"'),
    # limits and resources
    Environment("one CPU", 'exec taskset -c 0 "$@"'),
    Environment("60 processes", _as_user("ulimit -u 60;"), "ulimit -u", "ulimit -u", root=True),
    Environment("64 open files", 'ulimit -n 64; exec "$@"', "ulimit -n", "ulimit -n"),
    Environment("1024 open files", 'ulimit -n 1024; exec "$@"'),
    Environment("/dev/shm of 64 MiB", CAPPED.format('mount -t tmpfs -o size=64M none /dev/shm && exec "$@"')
                + ' _ "$@"', root=True),
    Environment("no /dev/shm to write to", CAPPED.format('mount -t tmpfs -o ro none /dev/shm && exec "$@"')
                + ' _ "$@"', root=True),
    # network
    Environment("dead proxy", 'export HTTP_PROXY=http://127.0.0.1:9 http_proxy=http://127.0.0.1:9; exec "$@"'),
    Environment("no network, not even loopback", 'exec unshare -n "$@"', "ip link set lo up", "ip link set lo up",
                root=True),
    Environment("no network but loopback", """exec unshare -n bash -c 'ip link set lo up && exec "$@"' _ "$@" """,
                root=True),
    Environment("host name that has no address", """exec unshare -u bash -c 'hostname nowhere && exec "$@"' _ "$@" """,
                root=True),
    # users and rights
    Environment("unknown user with a home", _as_user("export HOME=$PWD;"), root=True),
    Environment("umask 000", 'umask 000; exec "$@"'),
    Environment("umask 077", 'umask 077; exec "$@"'),
    # what other tools leave in the environment
    Environment("RAY_AUTH_MODE=disabled", 'RAY_AUTH_MODE=disabled exec "$@"'),
    Environment("RAY_AUTH_MODE=token without one", 'RAY_AUTH_MODE=token exec "$@"'),
    Environment("RAY_AUTH_TOKEN chosen", 'RAY_AUTH_MODE=token RAY_AUTH_TOKEN=chosen-by-hand exec "$@"'),
    Environment("RAY_ADDRESS of a dead cluster", 'RAY_ADDRESS=127.0.0.1:9 exec "$@"'),
    Environment("PYTHONOPTIMIZE", 'PYTHONOPTIMIZE=2 exec "$@"'),
)  # fmt: skip


@dataclass(frozen=True)
class Ended:
    """How a command ended; `code` is None if it had to be killed."""

    code: int | None
    text: str
    seconds: float


def run(environment: Environment, folder: Path, limit: float, *arguments: str) -> Ended:
    """Run a command of macdrop in an environment, in `folder`; its children end with it."""
    command = [sys.executable, "-m", "tune.cli", *arguments]
    outside = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    variables = {
        **outside, "HOME": str(folder), "MACDROP_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8",
    }  # fmt: skip
    began = time.monotonic()
    with open(folder / "output", "w+b") as output:
        process = subprocess.Popen(
            ["bash", "-c", environment.shell, "_", *command],
            cwd=folder, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
        code: int | None
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        output.seek(0)
        return Ended(code, output.read().decode(errors="replace"), time.monotonic() - began)


def surprises_of_doctor(environment: Environment, ended: Ended) -> Iterator[str]:
    """Yield how doctor did not do what the table says."""
    yield from _never(ended)
    shown = not any(word in environment.name for word in ("closed", "full disk")) or bool(environment.ill)
    if environment.ill and environment.ill not in ended.text:
        yield f"does not say {environment.ill!r}"
    healthy = ended.code == 0
    if healthy == bool(environment.ill) and (shown or not healthy):
        yield f"ends with {ended.code}"


def surprises_of_sweep(environment: Environment, ended: Ended, run_dir: Path) -> Iterator[str]:
    """Yield how the sweep did not do what the table says."""
    yield from _never(ended)
    if environment.refused:
        if ended.code != 3:
            yield f"ends with {ended.code} instead of 3"
        if environment.refused not in ended.text:
            yield f"does not say {environment.refused!r}"
        return
    if ended.code not in environment.codes:
        yield f"ends with {ended.code}"
    trials = [json.loads(file.read_text())["status"] for file in run_dir.glob("trials/*/trial.json")]
    status = json.loads((run_dir / "run.json").read_text())["status"] if (run_dir / "run.json").is_file() else None
    if status != "done" or trials != ["done"] * 2:
        yield f"leaves a run that is {status}, with trials {trials}"
    if not (run_dir / "report.html").is_file():
        yield "leaves no report"


def _never(ended: Ended) -> Iterator[str]:
    if ended.code is None:
        yield f"does not end within {ended.seconds:.0f} s"
    if "Traceback (most recent call last)" in ended.text:
        yield "shows a traceback"


@contextlib.contextmanager
def scene(environment: Environment, cache: Path | None) -> Iterator[Path]:
    """Make a folder for one command, with its recipe, a filled cache where there is one, and what is mounted over."""
    with tempfile.TemporaryDirectory(prefix="env-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)
        for child in ("ro", "small", "cache"):
            (folder / child).mkdir()
        (folder / "two.yaml").write_text(RECIPE)
        if cache is not None and environment.cached:
            subprocess.run(["cp", "-r", f"{cache}/.", str(folder / "cache")], check=True)
        yield folder


def try_one(environment: Environment, what: tuple[str, ...], cache: Path | None) -> list[str]:
    """Try doctor, a sweep, or both in an environment, print a line of each, and return the surprises."""
    found = []
    for verb in what:
        with scene(environment, cache) as folder:
            if verb == "doctor":
                ended = run(environment, folder, DOCTOR_S, "doctor")
                surprises = list(surprises_of_doctor(environment, ended))
            else:
                run_dir = folder / "runs" / "two"
                recipe = str(folder / "two.yaml")
                ended = run(environment, folder, SWEEP_S, "sweep", recipe, f"output_dir={run_dir}")
                surprises = list(surprises_of_sweep(environment, ended, run_dir))
                if cache is not None and not surprises and not list(cache.iterdir()):
                    subprocess.run(["cp", "-r", f"{folder}/cache/.", str(cache)], check=True)
        expected = (environment.ill if verb == "doctor" else environment.refused) and "refused"
        words = "; ".join(surprises) or expected or "works"
        print(f"{'FAIL' if surprises else 'ok  '}  {verb:<6}  {environment.name:<32}  {ended.seconds:4.0f} s  {words}")
        sys.stdout.flush()
        if surprises:
            print("      " + "\n      ".join(ended.text.strip().splitlines()[-12:]), flush=True)
        found += surprises
    return found


def main() -> int:
    """Try the environments and print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these alone")
    parser.add_argument("--doctor", action="store_true", help="doctor alone")
    parser.add_argument("--sweep", action="store_true", help="the sweep alone")
    parser.add_argument("--cache", type=Path, help="a folder that keeps scans and data between calls")
    parser.add_argument("--list", action="store_true", help="print the names")
    given = parser.parse_args()
    unknown = set(given.only or ()) - {each.name for each in TABLE}
    if unknown:
        parser.error(f"no such environment: {', '.join(sorted(unknown))}; --list has the names")
    chosen = [each for each in TABLE if not given.only or each.name in given.only]
    if given.list:
        print("\n".join(each.name for each in chosen))
        return 0
    what = tuple(verb for verb in ("doctor", "sweep") if getattr(given, verb)) or ("doctor", "sweep")
    skipped = [each for each in chosen if each.root and os.getuid()]
    with tempfile.TemporaryDirectory() as folder:
        cache = given.cache or Path(folder)
        cache.mkdir(parents=True, exist_ok=True)
        surprising = [each.name for each in chosen if each not in skipped and try_one(each, what, cache)]
    tried = len(chosen) - len(skipped)
    print(f"{tried} environments tried, {len(skipped)} skipped without root, {len(surprising)} with a surprise")
    return 1 if surprising else 0


if __name__ == "__main__":
    sys.exit(main())

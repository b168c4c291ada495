"""Stand-ins on the PATH for programs that cannot run in a test (`ray up`, kubectl, sbatch, ssh).

Each call is recorded with its arguments, standard input and environment, and answered by rules.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from cluster.remote.head import MARK

PROGRAM = """#!{python} -SE
import json, os, re, sys
folder = {folder!r}
stdin = "" if os.environ.get("RECORDER_NO_STDIN") or sys.stdin.isatty() else sys.stdin.read()
name = os.path.basename(sys.argv[0])
line = " ".join([name, *sys.argv[1:]])
rules = json.load(open(folder + "/rules.json"))
number, rule = next(((n, r) for n, r in enumerate(rules) if re.search(r["when"], line, re.S)), (-1, None))
path = folder + "/calls.jsonl"
before = 0
if os.path.exists(path):
    before = sum(json.loads(call)["rule"] == number for call in open(path))
with open(path, "a") as file:
    call = dict(line=line, argv=[name, *sys.argv[1:]], stdin=stdin, environment=dict(os.environ), rule=number)
    file.write(json.dumps(call) + "\\n")
if rule is None:
    sys.exit(0)
answer = rule["answers"][min(before, len(rule["answers"]) - 1)]
if answer.get("run"):
    os.execvp("bash", ["bash", "-c", answer["run"], name, *sys.argv[1:]])
sys.stdout.write(answer.get("out", ""))
sys.exit(answer.get("code", 0))
"""


class Recorder:
    """Stand-ins for `tools` and their recorded calls. The first rule whose pattern matches a call answers it."""

    def __init__(self, folder: Path, tools: tuple[str, ...]) -> None:
        self.folder, self.rules = folder, []
        (folder / "bin").mkdir(parents=True)
        for tool in tools:
            file = folder / "bin" / tool
            file.write_text(PROGRAM.format(python=sys.executable, folder=str(folder)))
            file.chmod(0o755)
        self._write()

    @property
    def path(self) -> str:
        """A PATH with these programs and the system's, but without this environment's `ray`."""
        return os.pathsep.join([str(self.folder / "bin"), "/usr/bin", "/bin"])

    def answer(self, when: str, *answers: str | dict) -> None:
        """Answer calls that match `when` with these in turn: text, or {out, code, run}; the last one repeats."""
        given = [{"out": answer} if isinstance(answer, str) else answer for answer in answers] or [{}]
        self.rules.insert(0, {"when": when, "answers": given})
        (self.folder / "calls.jsonl").unlink(missing_ok=True)
        self._write()

    @property
    def calls(self) -> list[dict]:
        file = self.folder / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def lines(self) -> list[str]:
        return [call["line"] for call in self.calls]

    def find(self, part: str) -> dict:
        return next(call for call in self.calls if part in call["line"])

    def _write(self) -> None:
        (self.folder / "rules.json").write_text(json.dumps(self.rules))


def head_output(**topics) -> str:
    """An answer of the head, amid the lines that a remote terminal adds."""
    return (
        f"Fetched IP: 10.0.0.1\r\n{MARK}{json.dumps({'problems': {}, **topics})}\r\nShared connection to x closed.\r\n"
    )


def node(address: str, *, head: bool = False, alive: bool = True, reason: str = "", gpus: int = 0) -> dict:
    resources = {"GPU": gpus} if gpus else {}
    return {
        "id": address,
        "address": address,
        "host": f"h{address[-1]}",
        "alive": alive,
        "head": head,
        "draining": False,
        "reason": reason,
        "resources": resources,
        "ray": "2.60.0",
    }


def job(run: str, status: str, code: int | None = None, number: int = 1) -> dict:
    return {
        "id": f"{run}-{number}",
        "run": run,
        "status": status,
        "start": number,
        "end": None,
        "message": "",
        "code": code,
    }


def run(name: str, status: str, created: str = "2026-01-01", folder: str = "/shared/runs") -> dict:
    return {
        "run": name,
        "folder": f"{folder}/{name}",
        "status": status,
        "created": created,
        "finished": None,
        "trials": {"done": 3},
    }

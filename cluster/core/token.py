"""Ray's authentication token: made on the laptop by Ray itself, carried to the hosts by the file's file mounts."""

from __future__ import annotations

import os
from pathlib import Path

from cluster.core.shell import Shell
from cluster.errors import Missing

#: What every child process gets: the mode is not taken from the file's being there (job commands, workers).
ENVIRONMENT = {"RAY_AUTH_MODE": "token"}


def path() -> Path:
    """Where Ray keeps the token, and the launch files' file mounts take it from."""
    return Path.home() / ".ray" / "auth_token"


def ensure(shell: Shell) -> Path:
    """Make the token if there is none, and let nobody but its owner read it.

    Raises:
        Missing: it cannot be made, or is empty.
    """
    file, command = path(), ["ray", "get-auth-token", "--generate"]
    if not file.exists():
        shell.show(command, "   # makes ~/.ray/auth_token")
        # It prints the token, so the answer is thrown away.
        done = None if shell.dry_run else shell.ask(command, shown=False, umask=0o077)
        if done is not None and (not done.ok or not file.exists()):
            raise Missing(f"Ray made no token at {file} (`ray get-auth-token --generate` ended with {done.code}).")
    if not shell.dry_run:
        check(file)
    if file.exists() and file.stat().st_mode & 0o077:
        shell.say(f"$ chmod 600 {file}")
        if not shell.dry_run:
            file.chmod(0o600)
    return file


def check(file: Path | None = None) -> None:
    """Raises Missing: this machine has no token that can be used, with the remedy."""
    file = file or path()
    remedy = "Make one with `ray get-auth-token --generate`, or copy that of the machine that started the cluster"
    if not file.is_file():
        raise Missing(f"this machine has no Ray token at {file}. {remedy}.")
    if not os.access(file, os.R_OK):
        raise Missing(f"the Ray token {file} cannot be read by this user. Give it back: chown and chmod 600.")
    if not file.read_text(encoding="utf-8").strip():
        raise Missing(f"the Ray token {file} is empty. Remove the file. {remedy}.")

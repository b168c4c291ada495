"""Ray's authentication token: generated here by Ray itself, copied to the hosts by the launch file."""

from __future__ import annotations

import os
from pathlib import Path

from cluster.core.shell import Shell
from cluster.errors import Missing

#: For every child process: job commands and workers do not turn authentication on because the file exists.
ENVIRONMENT = {"RAY_AUTH_MODE": "token"}


def path() -> Path:
    """The file in which Ray keeps the token, and from which launch files copy it."""
    return Path.home() / ".ray" / "auth_token"


def ensure(shell: Shell) -> Path:
    """Generate the token if it is missing, and make it readable by its owner only.

    Raises:
        Missing: it cannot be generated, or is empty.
    """
    file, command = path(), ["ray", "get-auth-token", "--generate"]
    if not file.exists():
        shell.show(command, "   # generates ~/.ray/auth_token")
        # It prints the token, so its output is discarded.
        result = None if shell.dry_run else shell.capture(command, shown=False, umask=0o077)
        if result is not None and (not result.ok or not file.exists()):
            raise Missing(
                f"Ray generated no token at {file} (exit code {result.code} of `ray get-auth-token --generate`)."
            )
    if not shell.dry_run:
        check(file)
    if file.exists() and file.stat().st_mode & 0o077:
        shell.say(f"$ chmod 600 {file}")
        if not shell.dry_run:
            file.chmod(0o600)
    return file


def check(file: Path | None = None) -> None:
    """Check that this machine has a usable token. Raises Missing, with the remedy."""
    file = file or path()
    remedy = "Generate one with `ray get-auth-token --generate`, or copy that of the machine that started the cluster"
    if not file.is_file():
        raise Missing(f"this machine has no Ray token at {file}. {remedy}.")
    if not os.access(file, os.R_OK):
        raise Missing(f"the Ray token {file} cannot be read by this user. Fix its owner and mode: chown, chmod 600.")
    if not file.read_text(encoding="utf-8").strip():
        raise Missing(f"the Ray token {file} is empty. Remove the file. {remedy}.")

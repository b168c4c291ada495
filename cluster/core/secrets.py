"""Secrets, passed by name: the launch file lists names, and the values come from the environment of this machine.

They are written to one file that only its owner can read (Ray, by a file mount), or passed through standard input
(Kubernetes) or by name (Slurm); never in arguments, a YAML, a log or a run folder.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path

from cluster.errors import BadLaunchFile, Missing

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def path() -> Path:
    """The file that launch files copy to every host."""
    return Path.home() / ".macdrop" / "secrets.env"


def values(names: Iterable[str], environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Look up secrets in the environment.

    Raises:
        BadLaunchFile: a name is not valid for an environment variable.
        Missing: some are not set here; the message names them.
    """
    environment = os.environ if environment is None else environment
    names = list(dict.fromkeys(names))
    for name in names:
        if not _NAME.fullmatch(name):
            raise BadLaunchFile(f"MACDROP_SECRETS names {name!r}, which is not a valid environment variable name.")
    missing = [name for name in names if not environment.get(name)]
    if missing:
        names_them = "the name" if len(missing) == 1 else "the names"
        raise Missing(
            f"the launch file needs {', '.join(missing)} from this machine's environment (MACDROP_SECRETS), and "
            f"{'they are' if len(missing) > 1 else 'it is'} not set. Set and try again: export {missing[0]}=..."
            f"; or remove {names_them} from the launch file."
        )
    return {name: environment[name] for name in names}


def write(found: Mapping[str, str], file: Path | None = None) -> Path:
    """Write `export NAME=value` lines atomically, readable by the owner only from the first byte."""
    file = file or path()
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(handle, "w", encoding="utf-8") as stream:
            stream.write("".join(f"export {name}={shlex.quote(value)}\n" for name, value in found.items()))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return file


def manifest(name: str, namespace: str | None, found: Mapping[str, str], labels: Mapping[str, str]) -> str:
    """A Kubernetes Secret, for `kubectl apply -f -`."""
    metadata = {"name": name, "labels": dict(labels), **({"namespace": namespace} if namespace else {})}
    data = {key: base64.b64encode(value.encode()).decode() for key, value in found.items()}
    return json.dumps({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": "Opaque", "data": data})

"""A laptop on which tests type `macdrop cluster` verbs: recorded tools and an empty home."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from recorder import Recorder

from cluster.backends import kuberay, slurm
from cluster.commands import jobs, up
from tune.cli.main import main

EXAMPLES = Path(__file__).parents[2] / "cluster" / "render" / "examples"
TOOLS = ("ray", "ssh", "rsync", "kubectl", "sbatch", "squeue", "scancel", "sacct", "scontrol")
TOKEN = "0123456789abcdef0123456789abcdef"
SECRETS = {"HF_TOKEN": "hf_SECRETSECRET1", "WANDB_API_KEY": "wandb-SECRETSECRET2"}


class Laptop:
    """`run` types a command; `tools` records what it called."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self.folder, self.home, self._patch, self._capture = folder, folder / "home", patch, capture
        self.tools = Recorder(folder / "tools", TOOLS)
        self.home.mkdir()
        patch.chdir(folder)
        patch.setenv("HOME", str(self.home))
        patch.setenv("PATH", self.tools.path)
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
            patch.delenv(name, raising=False)
        for module, name in ((jobs, "RETRY"), (up, "POLL"), (kuberay, "POLL"), (slurm, "POLL")):
            patch.setattr(module, name, 0.01)
        self.out = self.err = ""

    def file(self, target: str) -> str:
        """A shipped example, copied to where a user would have it."""
        source = next(EXAMPLES.glob(f"{target}.*"))
        copy = self.folder / source.name
        copy.write_bytes(source.read_bytes())
        return copy.name

    def token(self) -> Path:
        file = self.home / ".ray" / "auth_token"
        file.parent.mkdir(exist_ok=True)
        file.write_text(TOKEN)
        file.chmod(0o600)
        return file

    def run(self, *arguments: str) -> int:
        self._capture.readouterr()
        self._patch.setattr(sys, "argv", ["macdrop", "cluster", *arguments])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        self.out, self.err = self._capture.readouterr()
        return code

    def hides_secrets(self) -> None:
        """Assert that secrets and token are neither printed nor among arguments, nor in any file but their own."""
        arguments = "\n".join(self.tools.lines)
        for value in (*SECRETS.values(), TOKEN):
            assert value not in self.out + self.err, "printed"
            assert value not in arguments, "among arguments"
            for file in self.folder.rglob("*"):
                known = (self.home / ".macdrop" / "secrets.env", self.home / ".ray" / "auth_token")
                if file.is_file() and file not in known and self.tools.folder not in file.parents:
                    assert value not in file.read_text(errors="replace"), file

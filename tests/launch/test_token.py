"""Token and secrets: who may read them, and what is refused."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path

import pytest
from launching import SECRETS, TOKEN

from cluster.core import secrets, token
from cluster.core.shell import HIDDEN_LENGTH, Shell
from cluster.errors import BadLaunchFile, Missing


def rights(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def test_token_is_generated_by_ray_and_never_printed(laptop, capsys):
    laptop.tools.answer("get-auth-token", {"run": f"mkdir -p ~/.ray; printf {TOKEN} | tee ~/.ray/auth_token"})
    assert rights(token.ensure(Shell())) == 0o600
    assert TOKEN not in capsys.readouterr().out
    token.ensure(Shell())
    assert len(laptop.tools.calls) == 1, "one that is there is kept"


def test_readable_token_is_restricted_to_its_owner(laptop, capsys):
    laptop.token().chmod(0o644)
    assert rights(token.ensure(Shell())) == 0o600
    assert "chmod 600" in capsys.readouterr().out


def test_unusable_token_is_reported(laptop):
    laptop.tools.answer("get-auth-token", {"code": 1})
    with pytest.raises(Missing, match="Ray generated no token"):
        token.ensure(Shell())
    laptop.token().write_text("\n")
    with pytest.raises(Missing, match="is empty"):
        token.ensure(Shell())


def test_secrets_survive_a_shell_and_are_private(tmp_path):
    hostile = {"A": "a b", "B": "'; touch stolen; '", "C": '$(touch stolen) "`x`" \\', "D": "two\nlines"}
    file = secrets.write(hostile, tmp_path / "new" / "secrets.env")
    assert rights(file) == 0o600 and rights(file.parent) == 0o700 and list(file.parent.iterdir()) == [file]
    shown = "".join(f"printf '%s|' \"${name}\"; " for name in hostile)
    done = subprocess.run(["bash", "-c", f". {file}; {shown}"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "".join(f"{value}|" for value in hostile.values())
    assert not (tmp_path / "stolen").exists()
    assert secrets.write({}, file).read_text() == ""


def test_secrets_are_looked_up_by_name():
    assert secrets.values(["HF_TOKEN"], SECRETS) == {"HF_TOKEN": SECRETS["HF_TOKEN"]}
    with pytest.raises(Missing, match="A, B .*they are not set"):
        secrets.values(["A", "HF_TOKEN", "B"], {**SECRETS, "B": ""})
    with pytest.raises(BadLaunchFile, match="not a valid environment variable name"):
        secrets.values(["A=1"], {"A=1": "x"})


def test_hidden_values_are_never_printed(capsys):
    shell = Shell(hidden=(SECRETS["HF_TOKEN"], "abc"))
    assert len("abc") < HIDDEN_LENGTH
    shell.run(["bash", "-c", f"echo abc {SECRETS['HF_TOKEN']}"])
    assert shell.capture(["bash", "-c", f"echo {SECRETS['HF_TOKEN']}"], shown=False).text == "***"
    assert SECRETS["HF_TOKEN"] not in capsys.readouterr().out


def test_timeout_kills_a_command_with_its_children():
    done = Shell().capture(["bash", "-c", "echo first; sleep 987.5 & sleep 987.5"], shown=False, timeout=0.3)
    assert done.code == 124 and done.text == "first\nno answer within 0 s"
    left = subprocess.run(["pgrep", "-f", "^sleep 987.5"], capture_output=True, text=True).stdout
    assert left == ""


def test_lingering_child_does_not_delay_the_result():
    """Like the connection master that ssh leaves behind, which keeps the output open."""
    done = Shell().capture(["bash", "-c", "sleep 5 & echo said"], shown=False)
    assert done.ok and done.text == "said"

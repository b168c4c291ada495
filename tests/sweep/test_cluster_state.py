"""What is said of a cluster that cannot be joined."""

from __future__ import annotations

import pytest

from tune.cluster_state import token_hint


@pytest.mark.parametrize(
    ("mode", "file", "value", "told"),
    [
        (None, True, None, "wants RAY_AUTH_MODE=token here"),
        ("disabled", False, None, "wants RAY_AUTH_MODE=token here"),
        ("token", False, None, "There is no token in"),
        ("token", True, None, "Is the token of this machine the cluster's?"),
        ("token", False, "secret", "Is the token of this machine the cluster's?"),
    ],
)
def test_what_the_machine_lacks_is_told_and_the_token_is_not(tmp_path, monkeypatch, mode, file, value, told):
    token = tmp_path / "auth_token"
    if file:
        token.write_text("secret")
    for name, setting in {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": value, "RAY_AUTH_TOKEN_PATH": str(token)}.items():
        monkeypatch.delenv(name, raising=False)
        if setting is not None:
            monkeypatch.setenv(name, setting)
    assert told in token_hint() and "secret" not in token_hint()

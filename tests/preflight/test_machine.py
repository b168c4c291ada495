"""tune.preflight.machine: every check reports its finding and a remedy."""

from __future__ import annotations

import pytest

from tune.preflight import machine as doctor
from tune.preflight.machine import Check


@pytest.fixture(scope="module")
def found() -> dict[str, Check]:
    return {check.name: check for check in doctor.checks(ray=False)}


def test_machine_that_runs_the_tests_passes(found):
    broken = [check for check in found.values() if not check.ok and check.needed and check.name != "memory"]
    assert not broken, doctor.lines(broken)
    for name in (*doctor.MAIN_PACKAGES, "python", "gloo", "deepspeed import", "built-in models", "output folder"):
        assert found[name].found
    assert "offline" in found["hub"].found  # conftest's setting
    assert all(bool(check.fix) != check.ok for check in found.values())


def test_versions_are_checked_against_the_metadata(monkeypatch):
    real = doctor.metadata.version

    def version(name):
        if name == "peft":
            raise doctor.metadata.PackageNotFoundError(name)
        return "9.9.9" if name in ("ray", "pandas") else real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    found = {check.name: check for check in doctor.package_checks()}
    assert not found["ray"].ok and "==2.60.*" in found["ray"].found and "pip install" in found["ray"].fix
    assert not found["peft"].ok and "not installed" in found["peft"].found
    assert found["other packages"].ok  # pandas has no upper bound
    assert not next(doctor.package_checks("no-such-distribution")).ok


def test_unwritable_folder_is_found(tmp_path):
    (tmp_path / "file").write_text("")
    assert doctor.writable("x", tmp_path / "a" / "b", "fix it").ok
    check = doctor.writable("x", tmp_path / "file" / "run", "fix it")
    assert not check.ok and check.fix == "fix it"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "DISK_GIB", 1e9)
    assert "Free" in doctor.writable("x", tmp_path, "fix it").fix


def test_failing_or_hanging_probe_is_reported(monkeypatch):
    assert doctor._probe("raise RuntimeError('gloo is broken')") == ({}, "RuntimeError: gloo is broken")
    assert doctor._probe("import os; os._exit(3)") == ({}, "exit code 3")
    monkeypatch.setattr(doctor, "PROBE_TIMEOUT_S", 0.2)
    assert "no answer" in doctor._probe("import time; time.sleep(20)")[1]


def test_broken_probes_become_checks_with_a_remedy(monkeypatch):
    nothing = ({}, "it broke")
    for check in [*doctor._torch_and_gloo(*nothing), doctor._deepspeed(*nothing), doctor._ray(*nothing)][1:]:
        assert not check.ok and check.found == "it broke" and check.fix.endswith(".")
    monkeypatch.setattr(doctor, "gpu_names", lambda: ["H100"])
    gpus, gloo = doctor._torch_and_gloo({"cuda": False, "gloo": True}, "")
    assert not gpus.ok and "H100" in gpus.found and gloo.ok


def test_unreachable_hub_is_only_a_note(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    check = doctor._hub()
    assert not check.ok and not check.needed and check.fix
    assert doctor.lines([check])[0].startswith("note")


def test_remedy_is_shown_below_its_line():
    text = doctor.lines([Check("a", True, "fine"), Check("longer", False, "broken", "Mend it.")])
    assert text == ["ok    a       fine", "FAIL  longer  broken", "              -> Mend it."]

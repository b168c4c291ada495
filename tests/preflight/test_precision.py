"""bf16: what hardware has it, by its flags, and the sentence that doctor and plan print."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tune.config.run_spec import TrainSpec
from tune.preflight import machine, precision
from tune.preflight.inputs import precision_note
from tune.preflight.step_memory import Room

CPUS = [
    ("flags\t\t: fpu avx2 avx512f avx512_bf16\n", True),
    ("flags\t\t: fpu avx2 amx_bf16 amx_tile\n", True),
    ("Features\t: fp asimd bf16 sve\n", True),
    ("flags\t\t: fpu avx2 avx512f avx512_vnni\n", False),
    ("Features\t: fp asimd\n", False),
    ("", False),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for the GPU")
@pytest.mark.parametrize(("text", "native"), CPUS)
def test_cpus_are_known_by_their_flags(text, native, tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(f"processor\t: 0\n{text}")
    assert precision.native_bf16(tmp_path) is native


@pytest.fixture(autouse=True)
def _small_products(monkeypatch):
    """A CPU without native bf16 takes seconds for one product of a model's size."""
    monkeypatch.setattr(precision, "SHAPE", (8, 16, 32))
    monkeypatch.setattr(precision, "SECONDS", 0.0)


def test_the_sentence_says_what_was_measured(monkeypatch):
    assert np.isfinite(precision.bf16_speedup()) and precision.bf16_speedup() > 0
    monkeypatch.setattr(precision, "native_bf16", lambda: True)
    for factor, words in (
        (2.44, "native here; matrix products run 2.4x as fast as fp32: set bf16: true"),
        (0.9, "native here, but matrix products run only 0.9x as fast as fp32"),
    ):
        monkeypatch.setattr(precision, "bf16_speedup", lambda factor=factor: factor)
        assert precision.bf16_sentence() == words
    monkeypatch.setattr(precision, "native_bf16", lambda: False)
    assert precision.bf16_sentence() == "no native bf16: fp32 is faster here"


def test_doctor_has_a_line_on_it():
    check = machine.bf16_check()
    assert check.name == "bf16" and check.ok and not check.needed and "fp32" in check.found


def test_half_precision_without_hardware_for_it_is_noted(monkeypatch):
    from tune.preflight import inputs

    spec = TrainSpec(model_name_or_path="m", bf16=True)
    monkeypatch.setattr(inputs, "native_bf16", lambda: False)
    (note,) = precision_note(spec, {}, Room(1, gpu=False))
    assert note.startswith("bf16: true, but this machine has no native bf16")
    assert precision_note(spec.model_copy(update={"bf16": False}), {}, Room(1, gpu=False)) == []
    assert precision_note(spec, {}, None) == []  # other machines train
    monkeypatch.setattr(inputs, "native_bf16", lambda: True)
    assert precision_note(spec, {}, Room(1, gpu=False)) == []

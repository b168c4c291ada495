"""The part on second moments: SNRs, rules, and the bytes that they save against AdamW."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tune.report.sections.moments import second_moments
from tune.storage.atomic import atomic_write_json
from tune.storage.run_folder import RunFolder
from tune.training.optimizers.snr_record import AdapterSnr, KindSnr, SnrRecord, TensorsSnr

A = {"tensors": 2, "entries": 2 * 16 * 64, "both": 0.5, "fan_in": 0.9, "fan_out": 12.5}
B = {"tensors": 2, "entries": 2 * 64 * 16, "both": None, "fan_in": 0.25, "fan_out": None}


def adapter(**settings) -> AdapterSnr:
    own = {"use_dora": False, "use_rslora": False, "lora_target": "all", "lora_rank": 16, "trial": "t", "data": "d"}
    kinds = {"q_proj/A": KindSnr(**A, rule="fan_out", kept=128), "q_proj/B": KindSnr(**B, rule="none", kept=2048)}
    factors = {"A": TensorsSnr(**A), "B": TensorsSnr(**B)}
    return AdapterSnr(**{**own, **settings}, kinds=kinds, factors=factors)


@pytest.fixture
def subject(tmp_path) -> SimpleNamespace:
    return SimpleNamespace(run_folder=RunFolder(tmp_path), model=SimpleNamespace(name="m"))


def write(subject: SimpleNamespace, *adapters: AdapterSnr) -> None:
    record = SnrRecord(model="m", fingerprint="f", steps=20, skipped=10, cutoff=1.0, adapters=list(adapters)).sealed()
    atomic_write_json(subject.run_folder.snr_file("m"), record.model_dump(mode="json"))


def test_a_run_without_a_measurement_has_no_part(subject):
    assert not second_moments(subject)


def test_the_table_has_each_kind_with_its_rule_and_the_sentence_the_bytes(subject):
    write(subject, adapter())
    part = second_moments(subject)
    (table,) = part.tables
    assert table.title == "SNR by kind of tensor, LoRA, r = 16"
    assert table.rows == [
        ["q_proj/A", "2", "0.9000", "12.50", "0.5000", "fan_out", "6.25%"],
        ["q_proj/B", "2", "0.2500", "", "", "none", "100.00%"],
        ["all A", "2", "0.9000", "12.50", "0.5000", "", ""],
        ["all B", "2", "0.2500", "", "", "", ""],
    ]
    assert "steps 11 to 20" in part.lines[0] and "above 1" in part.lines[1]
    saved = 4 * (2048 - 128)
    assert f"({saved} bytes), 46.9% of AdamW's second moments and 23.4% of its whole state" in part.lines[2]
    assert "q_proj/A" in table.markdown() and "fan_out" in table.html()


def test_kinds_of_adapter_have_a_table_each(subject):
    write(subject, adapter(), adapter(use_dora=True), adapter(use_rslora=True, lora_target=["q_proj"]))
    assert [table.title.partition(", ")[2] for table in second_moments(subject).tables] == [
        "LoRA, r = 16, on all",
        "DoRA, r = 16, on all",
        "LoRA, r = 16, rank-stabilised, on q_proj",
    ]

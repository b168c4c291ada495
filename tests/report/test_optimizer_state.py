"""The sentence on the size of optimizer state."""

from __future__ import annotations

from types import SimpleNamespace

from tune.report.sections.cost import optimizer_state


def lines(*sizes: tuple[int | None, int]) -> list:
    return [SimpleNamespace(info={"optimizer_bytes": kept, "adamw_bytes": whole}) for kept, whole in sizes]


def test_what_is_saved_against_adamw_is_said_once_for_each_size():
    said = optimizer_state(lines((3 * 2**20, 4 * 2**20), (3 * 2**20, 4 * 2**20), (2**20, 4 * 2**20), (2**22, 2**22)))
    assert said == [
        "Optimizer state of a trial: 1 MiB, 75% less than AdamW's 4 MiB.",
        "Optimizer state of a trial: 3 MiB, 25% less than AdamW's 4 MiB.",
    ]


def test_records_without_sizes_say_nothing():
    assert optimizer_state([*lines((None, 0), (0, 0)), SimpleNamespace(info={})]) == []

"""Helpers of parsing that other packages use."""

from __future__ import annotations

from tune.config.parse import flatten


def test_flatten_writes_blocks_as_dotted_keys_and_keeps_lists_and_empty_blocks():
    content = {"a": {"b": 1, "c": {"d": [{"e": 2}]}}, "f": {}, "g": None}
    assert flatten(content) == {"a.b": 1, "a.c.d": [{"e": 2}], "f": {}, "g": None}

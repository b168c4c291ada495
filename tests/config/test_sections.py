"""The blocks of a run file that mirror the method's own configuration."""

from __future__ import annotations

import dataclasses

from macdrop.config import MacDropConfig
from tune.config.sections import MacDropSpec


def test_the_block_macdrop_has_the_keys_and_defaults_of_the_method_but_for_the_seed():
    method = {field.name: field.default for field in dataclasses.fields(MacDropConfig) if field.name != "seed"}
    assert {name: field.default for name, field in MacDropSpec.model_fields.items()} == method
    assert MacDropSpec().config(seed=3) == MacDropConfig(seed=3)

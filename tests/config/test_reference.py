"""The tables of keys: every field has a description, and the file has what is generated."""

from __future__ import annotations

from helpers.config_models import config_models

from tune.config.reference import FILE, MARKER, configuration_reference


def test_every_field_has_a_description():
    for kind in config_models():
        for name, field in kind.model_fields.items():
            assert field.description and field.description.endswith((".", ")")), f"{kind.__name__}.{name}"


def test_the_file_has_the_generated_tables():
    _, _, below = FILE.read_text(encoding="utf-8").partition(MARKER)
    tables = below.partition("-->")[2].strip()
    assert tables == configuration_reference().strip(), "out of date: run python -m tune.config.reference"

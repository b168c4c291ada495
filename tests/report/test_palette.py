"""Contrast of the page's colours in both schemes (WCAG 2.2, AA)."""

from __future__ import annotations

import pytest

from tune.report.html.palette import DARK, LIGHT, STEPS
from tune.report.html.select import ARMS

TEXT = ("ink", "soft", "link", *ARMS, "helps", "hurts", "unsure", "warn")


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """WCAG 2.2 contrast ratio of two `#rrggbb` colours, 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_wcag():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_has_enough_contrast_in_both_schemes(scheme):
    assert list(scheme) == list(LIGHT)
    for name in TEXT:
        assert min(contrast(scheme[name], scheme[ground]) for ground in ("card", "page")) >= 4.5, name
    for step in range(STEPS):
        assert contrast(scheme[f"seq-{step}"], scheme[f"seq-ink-{step}"]) >= 4.5, step

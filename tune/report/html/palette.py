"""Colours of the page by name, for both schemes: hues after Okabe and Ito, with lightness adjusted for text.

Colours of text have a contrast of at least 4.5 : 1 against card and page (WCAG 2.2, AA), and every `seq` step against
the ink written on it: a test measures it, so change a colour and run tests/report/test_palette.py.
"""

from __future__ import annotations

STEPS = 9
"""Steps of the sequential scale, `seq-0` (worst) to `seq-8` (best)."""
_BLUES = ("#edf3fa", "#d8e5f3", "#bdd5ea", "#96c1e0", "#6aa8d3", "#2f77b5", "#1d62a3", "#0f4c8a", "#08306b")
_NIGHT = ("#1b2733", "#1f3345", "#24425c", "#285376", "#2b6592", "#5fa3d6", "#86bbe6", "#aed2f2", "#d6e9fb")
_DARK_INK, _LIGHT_INK = "#14181f", "#ffffff"


def _steps(scale: tuple[str, ...], first: str, then: str) -> dict[str, str]:
    """The scale and the ink on it: `first` on its first five steps, `then` on the others."""
    inks = {f"seq-ink-{i}": first if i < 5 else then for i in range(STEPS)}
    return {f"seq-{i}": tone for i, tone in enumerate(scale)} | inks


LIGHT = {
    "page": "#f4f6f9",
    "card": "#ffffff",
    "ink": "#181c24",
    "soft": "#535c6b",
    "line": "#d6dce5",
    "grid": "#e6eaf0",
    "band": "#e9edf3",
    "link": "#0a5ca8",
    "base": "#5d6674",
    "plain": "#0067a5",
    "macdrop": "#b04a00",
    "random_rows": "#7440ad",
    "all_rows": "#00737c",
    "activations": "#7d5f00",
    "helps": "#17713a",
    "hurts": "#b3261e",
    "unsure": "#5d6674",
    "warn": "#7d5200",
    **_steps(_BLUES, _DARK_INK, _LIGHT_INK),
}
DARK = {
    "page": "#0e1115",
    "card": "#171b21",
    "ink": "#e9ecf1",
    "soft": "#a7b0bd",
    "line": "#2d3540",
    "grid": "#262d37",
    "band": "#252c36",
    "link": "#74b7f5",
    "base": "#a7b0bd",
    "plain": "#56b4e9",
    "macdrop": "#f58f45",
    "random_rows": "#c5a5f2",
    "all_rows": "#46c8c0",
    "activations": "#e3c050",
    "helps": "#53c878",
    "hurts": "#ff8f85",
    "unsure": "#a7b0bd",
    "warn": "#f0c05a",
    **_steps(_NIGHT, _LIGHT_INK, _DARK_INK),
}


def stylesheet() -> str:
    """Both schemes as CSS custom properties; dark where the reader prefers it, never on paper."""
    return (
        f":root{{color-scheme:light dark;{_properties(LIGHT)}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{_properties(DARK)}}}}}\n"
    )


def _properties(scheme: dict[str, str]) -> str:
    return ";".join(f"--{name}:{value}" for name, value in scheme.items())

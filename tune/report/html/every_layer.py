"""The figure of a proof of every layer: what zeroing and retaining each layer's own rows does to perplexity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tune.report.html.drawing import colour, plain_log, tidy

HEIGHT = 330
HEAD = ["layer", "rows", "largest", "zeroed", "zeroed_low", "zeroed_high", "retained", "retained_low", "retained_high"]
_MOST = 1e12  # drawn for "inf"


def layers_caption(found: dict[str, Any]) -> str:
    """Caption of the figure, with the finding."""
    on = f" ({found['measured_on']})" if found.get("measured_on") else ""
    return (
        f"Perplexity relative to the untouched model, log scale, with each layer's own top {found['k']} rows at bos "
        f"zeroed, and with only these retained; bars: 95 % over {found['blocks']} blocks of text{on}. Dotted: layer "
        f"{found['layer']}, by the scan's rule; dashed: the line at 2. {found['text'][:1].upper()}{found['text'][1:]}."
    )


def layers_rows(found: dict[str, Any]) -> list[list[Any]]:
    """The plotted numbers, one list for each layer, under HEAD."""
    return [
        [row["layer"], " ".join(map(str, row["rows"])), row["top"], *row["zeroed"], *row["retained"]]
        for row in found["rows"]
    ]


def layers_painter(found: dict[str, Any]) -> Callable[[Any], None]:
    """Return the function that paints a proof of every layer (the content of layers.json) on an empty figure."""

    def paint(canvas: Any) -> None:
        panels = canvas.subplots(2, 1, sharex=True)
        layers = [row["layer"] for row in found["rows"]]
        for axes, what, tone, title in (
            (panels[0], "zeroed", "macdrop", f"the layer's top {found['k']} rows zeroed"),
            (panels[1], "retained", "plain", f"only the layer's top {found['k']} rows retained"),
        ):
            value, low, high = ([_finite(row[what][i]) for row in found["rows"]] for i in range(3))
            axes.vlines(layers, low, high, color=colour(tone), linewidth=1.4)
            axes.plot(layers, value, "o", color=colour(tone), markersize=4.5)
            axes.axhline(1, color=colour("soft"), linewidth=0.7, zorder=0)
            if what == "zeroed":
                axes.axhline(2, color=colour("soft"), linewidth=0.9, linestyle=(0, (5, 3)), zorder=0)
                axes.set_ylim(bottom=min(0.9, *low), top=max(2.4, 1.15 * max(high)))
            axes.axvline(found["layer"], color=colour("soft"), linewidth=0.9, linestyle=(0, (2, 2)), zorder=0)
            plain_log(axes)
            axes.locator_params(axis="x", integer=True)
            axes.margins(x=0.04)
            tidy(axes, title=title, y="perplexity ratio")
        panels[0].annotate(
            "the rule's layer",
            (found["layer"], 0.98),
            (4, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="top",
            fontsize=10,
            color=colour("soft"),
        )
        panels[1].set_xlabel("decoder layer (counted from 0)")

    return paint


def _finite(value: float | str | None) -> float:
    return min(float(value), _MOST) if value is not None else float("nan")

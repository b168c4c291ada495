"""Scan figures: magnitudes at BOS by layer, the largest rows of the massive layer, and the model's sensitivity."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tune.analysis.results import ModelResults
from tune.analysis.verdict import Verdict
from tune.report.html.drawing import colour, draw, plain_log, tidy
from tune.report.html.every_layer import HEAD, HEIGHT, layers_caption, layers_painter, layers_rows
from tune.report.html.figure import Figure
from tune.report.html.training import Logs
from tune.report.svg_canvas import Canvas
from tune.report.text import factor_words

TOP_ROWS = 20


def scan_figures(logs: Logs, model: ModelResults, verdicts: list[Verdict]) -> Iterator[Figure]:
    """Draw magnitudes by layer, the top rows, and perplexity with and without them."""
    if not model.weights:
        yield Figure("scan-layers", "weights", "Magnitudes by layer", "The model has not been scanned yet.")
        return
    yield _layers(model, model.weights)
    yield _rows(model, model.weights)
    yield _proof(model)
    if model.layers:
        caption, painter = layers_caption(model.layers), layers_painter(model.layers)
        svg = draw(_id(model, "every-layer"), HEIGHT, painter, says=caption)
        title = "Is it this layer that matters?"
        yield Figure("scan-every-layer", "weights", title, caption, svg, HEAD, layers_rows(model.layers))


def _layers(model: ModelResults, found: dict[str, Any]) -> Figure:
    layers = found["layers"]
    head = ["layer", "hidden_max", "hidden_median", "intermediate_max", "intermediate_median"]

    def paint(canvas: Canvas) -> None:
        top, bottom = canvas.subplots(2, 1, sharex=True)
        for axes, what, title in (
            (top, "hidden", "hidden state after the layer"),
            (bottom, "intermediate", "intermediate state of the FFN"),
        ):
            for size, name, dashes in (("max", "macdrop", "-"), ("median", "plain", (0, (4, 2)))):
                points = [(row["layer"], row[f"{what}_{size}"]) for row in layers if row[f"{what}_{size}"] > 0]
                if not points:
                    continue
                x, y = zip(*points, strict=True)
                marker = "o" if len(layers) < 50 else None
                axes.plot(x, y, color=colour(name), linestyle=dashes, marker=marker, markersize=3.5)
                words = "largest" if size == "max" else "median"
                axes.annotate(
                    words,
                    (x[-1], y[-1]),
                    (5, 0),
                    textcoords="offset points",
                    va="center",
                    color=colour(name),
                    fontsize=10,
                )
            axes.axvline(found["layer"], color=colour("soft"), linewidth=0.9, linestyle=(0, (2, 2)), zorder=0)
            plain_log(axes)
            axes.locator_params(axis="x", integer=True)
            axes.margins(x=0.04)
            tidy(axes, title=title, y="|activation| at BOS")
        bottom.set_xlabel("decoder layer (counted from 0)")

    confidence = found.get("confidence") or {}
    expert = "" if found.get("expert") is None else f", expert {found['expert']}"
    caption = (
        f"Largest and median |activation| at BOS, log scale. Dotted: the massive layer, {found['layer']}{expert}"
        + (f" ({confidence['level']} evidence)." if confidence.get("level") else ".")
    )
    rows = [[row.get(key) for key in head] for row in layers]
    title = "Where the massive activations start"
    return Figure(
        "scan-layers", "weights", title, caption, draw(_id(model, "layers"), 310, paint, says=caption), head, rows
    )


def _rows(model: ModelResults, found: dict[str, Any]) -> Figure:
    largest = list(zip(found["indices"], found["magnitudes"], strict=True))[:TOP_ROWS]
    median = found["magnitudes"][len(found["magnitudes"]) // 2]

    def paint(canvas: Canvas) -> None:
        axes = canvas.subplots()
        places = range(1, len(largest) + 1)
        sizes = [size for _, size in largest]
        axes.vlines(places, median, sizes, color=colour("macdrop"), linewidth=1.4)
        axes.plot(places, sizes, "o", color=colour("macdrop"), markersize=5)
        for place, (row, size) in enumerate(largest[:5], 1):
            axes.annotate(str(row), (place, size), (6, 1), textcoords="offset points", fontsize=10, va="bottom")
        axes.axhline(median, color=colour("plain"), linestyle=(0, (4, 2)))
        axes.annotate(
            "median of all rows",
            (len(largest), median),
            (0, -5),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=10,
            color=colour("plain"),
        )
        axes.set_ylim(bottom=median / 3, top=sizes[0] * 3)
        plain_log(axes)
        axes.set_xticks([1, 5, 10, 15, 20][: 1 + len(largest) // 5])
        tidy(axes, x="rank of the row", y="|intermediate state| at BOS")

    caption = (
        f"The {len(largest)} largest rows of {len(found['indices'])} in layer {found['layer']}, log scale; "
        "the top five are labelled with their row numbers."
    )
    rows = [[place, row, size] for place, (row, size) in enumerate(largest, 1)]
    svg = draw(_id(model, "rows"), 310, paint, says=caption)
    return Figure("scan-rows", "weights", "The massive rows", caption, svg, ["rank", "row", "magnitude"], rows)


def _proof(model: ModelResults) -> Figure:
    title, found = "Does the model depend on them?", model.proof
    if not found:
        return Figure("scan-proof", "weights", title, "Perplexity without these rows has not been measured yet.")
    k, drawn = found["k"], [value for value in found.get("random") or []]
    measured = [
        ("untouched", found["untouched"], "base"),
        (f"top {k} zeroed", found["zeroed"], "macdrop"),
        (f"only top {k} kept", found["retained"], "plain"),
    ]
    measured += [(f"{k} random rows zeroed", value, "random_rows") for value in drawn]
    rows = [[words, _finite(value)] for words, value, _ in measured]
    names = list(dict.fromkeys(words for words, _, _ in measured))

    def paint(canvas: Canvas) -> None:
        axes = canvas.subplots()
        untouched = _finite(found["untouched"])
        for words, value, tone in measured:
            place, value = names.index(words), _finite(value)
            axes.plot([untouched, value], [place + 0.18] * 2, color=colour(tone), linewidth=1.4)
            axes.plot(value, place + 0.18, "o", color=colour(tone), markersize=8)
        for place, words in enumerate(names):
            value = max(_finite(value) for name, value, _ in measured if name == words)
            axes.annotate(words, (0.02, place - 0.2), xycoords=("axes fraction", "data"), fontsize=10.5)
            axes.annotate(f"{value:.4g}", (1, place - 0.2), xycoords=("axes fraction", "data"), ha="right")
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_yticks([])
        plain_log(axes, "x")
        axes.margins(x=0.08)
        tidy(axes, x="perplexity, log scale (lower is better)", grid="x")
        axes.spines["left"].set_visible(False)

    caption = f"Perplexity of the base model on {found['tokens']} tokens. {found['verdict'].capitalize()}"
    if found.get("factor"):
        caption += f", factor {factor_words(found['factor'])}"
    caption += f"; {len(drawn)} draws of random rows." if drawn else "."
    return Figure(
        "scan-proof",
        "weights",
        title,
        caption,
        draw(_id(model, "proof"), 310, paint, says=caption),
        ["what", "perplexity"],
        rows,
    )


def _finite(value: float | str) -> float:
    """The number to draw; "inf" (a broken model's perplexity) becomes the largest that fits on the axis."""
    return min(float(value), 1e12)


def _id(model: ModelResults, name: str) -> str:
    return f"{model.name}-scan-{name}"

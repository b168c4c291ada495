"""Figures of the page, written straight to SVG under the few names of matplotlib's `Axes` that they use."""

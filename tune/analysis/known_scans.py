"""Massive weights that others have published (`published.yaml`), and whether a scan agrees with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from macdrop.sensitivity import NOT_SENSITIVE, SENSITIVE
from tune.analysis.published import is_one_of
from tune.config.parse import read_yaml

FILE = Path(__file__).with_name("published.yaml")


@cache
def published() -> dict[str, Any]:
    """The content of published.yaml."""
    return read_yaml(FILE)


@dataclass(frozen=True)
class Agreement:
    """One published finding beside ours. `agrees` is None where nothing is settled (a borderline verdict)."""

    agrees: bool | None
    text: str


def agreements(weights: Mapping[str, Any], verdict: str | None = None) -> list[Agreement]:
    """Compare a scan with what was published of the same model; nothing where nothing was.

    weights: the content of massive_weights.json. verdict: that of its proof, None if there is none.

    A model is known by its hub id, or as a folder of that name (`is_one_of`), and only if layers, hidden size and rows
    are the published model's. A scan agrees with a source that names its layer, and lists its first row there; the
    expert is shown, and not compared. A verdict agrees with one of the same sign; published sizes depend on the text
    and are not compared.
    """
    found: list[Agreement] = []
    for entry in _entries(str(weights["model"])):
        if list(entry["shape"]) != _shape(weights):
            layers, hidden, rows = entry["shape"]
            text = (
                f"differs: {entry['ids'][0]} has {layers} layers, hidden size {hidden} and {rows} rows a layer; this "
                f"model has {', '.join(map(str, _shape(weights)))}. It is another model of that name"
            )
            return [Agreement(False, text)]
        for source, rows in entry.get("rows", {}).items():
            found.append(_rows(weights, source, _by_layer(rows), entry.get("expert", {}).get(source)))
        found += [_none(source) for source in entry.get("none", [])]
        if verdict is not None:
            found += [_verdict(verdict, source, theirs) for source, theirs in entry.get("sensitive", {}).items()]
    return found


def _entries(model: str) -> list[dict[str, Any]]:
    return [entry for entry in published()["models"] if is_one_of(model, entry["ids"])]


def _by_layer(rows: Mapping[str, list[int]]) -> dict[int, list[int]]:
    return {int(layer): found for layer, found in rows.items()}


def _shape(weights: Mapping[str, Any]) -> list[int]:
    return [len(weights["layers"]), weights["hidden_size"], weights["intermediate_size"]]


def _rows(weights: Mapping[str, Any], source: str, layers: Mapping[int, list[int]], expert: int | None) -> Agreement:
    about, layer, first = published()["sources"][source], weights["layer"], weights["indices"][0]
    theirs = "; ".join(f"layer {at}, rows {', '.join(map(str, rows))}" for at, rows in layers.items())
    theirs += "" if expert is None else f", of its expert {expert}"
    if layer not in layers:
        return Agreement(False, f"differs: {theirs}, not layer {layer} (source: {about})")
    if first not in layers[layer]:
        return Agreement(False, f"differs: {theirs}, without row {first}, the first one here (source: {about})")
    listed = layers[layer]
    shared = len(set(listed) & set(weights["indices"][: len(listed)]))
    return Agreement(True, f"agrees: {theirs}; {shared} of {len(listed)} are the first ones here (source: {about})")


def _none(source: str) -> Agreement:
    about = published()["sources"][source]
    return Agreement(None, f"cannot be compared: no massive activations found (source: {about})")


def _verdict(verdict: str, source: str, theirs: Mapping[str, Any]) -> Agreement:
    said = SENSITIVE if theirs["verdict"] else NOT_SENSITIVE
    numbers = theirs.get("perplexity")
    size = f", perplexity {numbers[0]:g} to {numbers[1]:g}" if numbers else ""
    agrees = None if verdict not in (SENSITIVE, NOT_SENSITIVE) else verdict == said
    word = "cannot be compared" if agrees is None else "agrees" if agrees else "differs"
    return Agreement(agrees, f"{word}: {said}{size} (source: {published()['sources'][source]})")

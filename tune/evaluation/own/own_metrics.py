"""Metrics of the user's own: functions (answer, row) -> a number, or a mapping of names to numbers.

A function that fails on an answer costs that value alone: it is kept as missing, with the error beside it.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import math
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from macdrop.errors import ConfigError, nearest
from tune.evaluation.own.code_files import CodeFiles, code_of

#: Characters of an error that are kept with an answer.
ERROR_LENGTH = 200
#: Top-level modules imported from users' folders -> the fingerprint of the files they came with.
_imported: dict[str, str] = {}


@dataclass(frozen=True)
class OwnMetric:
    """A metric MODULE:FUNCTION; `version` is the fingerprint of its files.

    The function may have an attribute `higher_is_better`: a bool, by default True, or a mapping for a function that
    returns one.
    """

    name: str
    function: Callable[[str, dict[str, Any]], Any]
    version: str

    @property
    def title(self) -> str:
        """The name of its scores; a value `key` of a mapping is `title.key`."""
        return self.name.partition(":")[2]

    def higher_is_better(self, metric: str) -> bool | None:
        """Return whether more is better in a score of this metric."""
        given = getattr(self.function, "higher_is_better", True)
        if isinstance(given, Mapping):
            given = given.get(metric.removeprefix(f"{self.title}."), True)
        return given if isinstance(given, bool) else None

    def owns(self, metric: str) -> bool:
        """Return whether a score of this name is of this metric."""
        return metric == self.title or metric.startswith(f"{self.title}.")

    def values(self, answer: str, row: Mapping[str, Any]) -> dict[str, float]:
        """Return the scores of one answer by name.

        Raises:
            Exception: whatever the function raises, and TypeError or ValueError for what it must not return.
        """
        returned = self.function(answer, copy.deepcopy(dict(row)))
        if not isinstance(returned, Mapping):
            return {self.title: _number(returned)}
        if not returned:
            raise ValueError("it returned an empty mapping")
        for key in returned:
            if not isinstance(key, str) or not re.fullmatch(r"[\w.-]+", key):
                raise ValueError(f"it returned the name {key!r:.40}: use letters, digits and _ . -")
        return {f"{self.title}.{key}": _number(value) for key, value in returned.items()}


def _number(value: Any) -> float:
    if not isinstance(value, Real) and callable(item := getattr(value, "item", None)):
        value = item()  # a scalar of numpy or torch
    if not isinstance(value, Real):
        raise TypeError(f"it returned {value!r:.60}, a {type(value).__name__}, where a number is wanted")
    if not math.isfinite(number := float(value)):
        raise ValueError(f"it returned {number}, which is not finite")
    return number


@dataclass
class Measured:
    """The values of one question by metric, one per answer (None: the metric failed), and errors by metric."""

    values: dict[str, Sequence[float | None]] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)


def measure(
    metrics: Sequence[OwnMetric], answered: Sequence[tuple[Sequence[str], Mapping[str, Any]]]
) -> list[Measured]:
    """Put every answer of (answers, row) to every metric; all questions get the same metrics.

    Without any value a metric is called by its function's name.
    """
    measured = [Measured() for _ in answered]
    for metric in metrics:
        found = [[_one(metric, answer, row) for answer in answers] for answers, row in answered]
        names = dict.fromkeys(name for rows in found for values, _ in rows for name in values)
        for own, rows in zip(measured, found, strict=True):
            for name in names or {metric.title: None}:
                own.values[name] = [values.get(name) for values, _ in rows]
            missing = [name for name in names if None in own.values[name]]
            errors = [error for _, error in rows if error]
            if errors or missing:
                own.errors[metric.name] = errors[0] if errors else f"it returned no {missing[0]} here"
    return measured


def _one(metric: OwnMetric, answer: str, row: Mapping[str, Any]) -> tuple[dict[str, float], str]:
    try:
        return metric.values(answer, row), ""
    except (Exception, SystemExit) as error:  # it is the user's: anything
        return {}, f"{type(error).__name__}: {' '.join(str(error).split())}"[:ERROR_LENGTH]


def item_notes(where: str, items: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return sentences on kept items: metrics that failed, and a server's answers that differ from our own decoding."""
    items = list(items)
    failed: dict[str, list[tuple[Any, str]]] = {}
    for item in items:
        for name, error in item.get("errors", {}).items():
            failed.setdefault(name, []).append((item.get("question_id"), error))
    return [
        f"{where}: {name} failed on {len(found)} of {len(items)} questions, first on {found[0][0]}: {found[0][1]}"
        for name, found in failed.items()
    ] + _differing(where, items)


def _differing(where: str, items: Sequence[Mapping[str, Any]]) -> list[str]:
    compared = [item for item in items if "same" in item]
    other = [item.get("question_id") for item in compared if not item["same"]]
    if not other:
        return []
    return [
        f"{where}: {len(other)} of {len(compared)} answers of the server differ from our own decoding, first on "
        f"{other[0]}; rounding can do that, and so can other weights"
    ]


# --- from files to functions ---


def load_metrics(code_path: str | None, names: Sequence[str]) -> list[OwnMetric]:
    """Import own metrics (MODULE:FUNCTION) from a folder.

    Raises:
        ConfigError: a module cannot be imported or has a name that is taken, or the function is missing or does not
            take an answer and a row.
    """
    folder = Path.cwd() if code_path is None else Path(code_path)
    found = []
    for name in names:
        module_name, _, function = name.partition(":")
        code = code_of(folder, [module_name])
        module = _import(folder, module_name, code)
        found.append(OwnMetric(name, _function(module, name, function), code.version))
    return found


def _import(folder: Path, name: str, code: CodeFiles) -> ModuleType:
    tops = dict.fromkeys(file.partition("/")[0].removesuffix(".py") for file in code.files)
    for top in tops:
        if _imported.get(top) == code.version and top in sys.modules:
            continue
        _check_free(top, folder)
        for stale in [each for each in sys.modules if each.partition(".")[0] == top]:
            del sys.modules[stale]
    importlib.invalidate_caches()
    place = str(folder.resolve())
    sys.path.insert(0, place)
    try:
        found = importlib.import_module(name)
    except (Exception, SystemExit) as error:  # it is the user's: anything
        raise ConfigError(f"{name} in {folder} cannot be imported: {type(error).__name__}: {error}") from None
    finally:
        sys.path.remove(place)
    _imported.update(dict.fromkeys(tops, code.version))
    if place not in sys.path:
        sys.path.append(place)  # for imports inside functions; last, where it hides nothing
    return found


def _check_free(top: str, folder: Path) -> None:
    """Refuse a module that would hide an installed one of the same name."""
    if top in _imported:
        return
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    installed = tuple(sysconfig.get_path(key) for key in ("stdlib", "platstdlib", "purelib", "platlib"))
    origin = getattr(spec, "origin", None)
    lies_here = origin is not None and Path(origin).resolve().is_relative_to(folder.resolve())
    taken = top in ("macdrop", "tune", "cluster", *sys.stdlib_module_names)
    if taken or (spec is not None and not lies_here and (origin or "").startswith(installed)):
        raise ConfigError(f"{folder}/{top} has the name of an installed package, which it would hide. Rename it.")


def _function(module: ModuleType, name: str, function: str) -> Callable[..., Any]:
    found = getattr(module, function, None)
    if not callable(found):
        there = [each for each, value in vars(module).items() if inspect.isfunction(value) and each[0] != "_"]
        raise ConfigError(
            f"{module.__file__} has no function {function!r}.{nearest(function, there)} "
            f"There: {', '.join(there) or 'none'}."
        )
    try:
        inspect.signature(found).bind("answer", {})
    except TypeError as error:
        raise ConfigError(f"{name} must take two arguments, an answer and its row: {error}.") from None
    except ValueError:
        pass  # written in C: it has no signature
    return found

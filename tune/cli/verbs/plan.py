"""What `macdrop plan` does: hours, memory, disk and cost of a sweep, from a short probe of each model.

The arithmetic is pure (`forecast_study`, `Total`); `tune.preflight.probe` measures. A forecast says what it assumes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from macdrop.errors import ConfigError
from tune.config.run_spec import RunSpec
from tune.preflight.forecast import (
    ASK_COST,
    ASK_HOURS,
    ASSUMED,
    Forecast,
    Total,
    forecast_study,
    price_of,
    read_prices,
    total,
)
from tune.scheduling.resources import resources

# --- the command ---


def plan(file: str | None, overrides: list[str], *, prices: Path | None, start: bool, yes: bool) -> int:
    """Probe, tell, and with `start` run the sweep; returns the exit code."""
    from tune.cli.console import console
    from tune.cli.verbs.sweep import sweep
    from tune.config.recipes import DEMO, recipe
    from tune.config.run_spec import load
    from tune.preflight.inputs import check_inputs
    from tune.preflight.probe import device_name, probe
    from tune.scheduling.resources import check_local
    from tune.scheduling.study import studies
    from tune.training.quiet import quiet_libraries

    known = read_prices(prices)
    spec = load(recipe(file or DEMO), overrides)
    planned = studies(spec)
    check_local(spec.ray)
    quiet_libraries()
    with console.status("Reading models' settings, data and benchmark files"):
        checked = check_inputs(spec, planned)
    parts = []
    for study in planned:
        with console.status(f"Probing {study.name}"):
            found = probe(spec, study)
        parts.append(forecast_study(study, checked[study.name].steps, found, spec.ray))
    device = device_name()
    whole = total(parts, _devices(spec, device), device, price_of(known, device))
    _show(parts, whole, known)
    if not start:
        return 0
    if whole.large and not yes and not _agreed(whole):
        return 0
    return 1 if sweep(file, overrides, dry_run=False, resume=False) else 0


def _devices(spec: RunSpec, device: str) -> float:
    """GPUs that the run holds; without GPUs it is one machine."""
    return 1.0 if device == "cpu" else resources(spec.ray, cluster_gpus=1).gpus


def _show(parts: list[Forecast], whole: Total, prices: dict[str, Any]) -> None:
    from tune.cli.console import console, line, table

    head = ("trials", "steps", "training h", "scoring h", "wall h", "memory GiB", "disk GiB")
    shown = table("model", *head, left=["model"])
    for part in parts:
        numbers = (part.training_h, part.scoring_h, part.hours, part.memory / 2**30, part.disk / 2**30)
        shown.add_row(part.name, str(part.trials), str(part.steps), *(f"{number:.3g}" for number in numbers))
    console.print(shown)
    line("wall clock", f"{whole.hours:.3g} hours ({whole.low:.3g} to {whole.high:.3g})")
    line("devices", f"{whole.devices:g} x {whole.device}: {whole.device_hours:.3g} device-hours")
    line("disk", f"{whole.disk / 2**30:.3g} GiB")
    if whole.cost is None:
        line("cost", f"unknown: the price file has no {whole.device!r}. Give one with --prices FILE.")
    else:
        told = f"{whole.cost:.2f} {prices['currency']}, at {whole.price:g} an hour and device"
        line("cost", f"{told} (example prices of {prices['date']}; give yours with --prices FILE)")
    console.print(ASSUMED, highlight=False)


def _agreed(whole: Total) -> bool:
    """Ask a person.

    Raises:
        ConfigError: there is nobody at a terminal to ask.
    """
    cost = "" if whole.cost is None else f" and cost {whole.cost:.2f}"
    limits = f"asked above {ASK_HOURS:g} hours or a cost of {ASK_COST:g}"
    told = f"The run is forecast to take {whole.hours:.3g} hours{cost} ({limits})."
    if not sys.stdin.isatty():
        raise ConfigError(f"{told}\nNobody can be asked here. Add --yes to start it, or make it smaller.")
    return input(f"{told} Start it? [y/N] ").strip().lower() in ("y", "yes")

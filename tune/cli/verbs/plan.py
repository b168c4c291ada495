"""`macdrop plan`: hours, memory, disk and cost of a sweep, forecast from a short probe of each model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from macdrop.errors import ConfigError
from tune.cli.console import asked_by, console, line, table
from tune.cli.options import Config, load_run_file, split_config

if TYPE_CHECKING:
    from tune.config.run_spec import RunSpec
    from tune.preflight.forecast import Forecast, Price, Total
    from tune.scheduling.simulation import StudyTimes, Timeline

app = typer.Typer()


@app.command(epilog="Example: macdrop plan llama-3.2-1b sweep.num_samples=40")
def plan(
    config: Config = None,
    prices: Annotated[
        Path | None,
        typer.Option(help="YAML of prices by device.", show_default="SkyPilot's catalogue here, else the shipped one"),
    ] = None,
    start: Annotated[bool, typer.Option("--start", help="Then start the sweep; asks first if it is large.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Forecast a sweep from a short probe of each model: hours, memory, disk and cost."""
    from tune.config.recipes import DEMO, recipe
    from tune.preflight.forecast import find_price, forecast_study, read_prices, total
    from tune.preflight.inputs import check_inputs
    from tune.preflight.order import order, study_times
    from tune.preflight.precision import bf16_sentence
    from tune.preflight.probe import device_name, probe
    from tune.scheduling.study import check_local_lanes, studies
    from tune.training.quiet import quiet_libraries

    file, overrides = split_config(config)
    known = read_prices(prices)
    spec = load_run_file(recipe(file or DEMO), overrides)
    planned = studies(spec)
    check_local_lanes(planned)
    quiet_libraries()
    with console.status("Reading model settings, data and benchmark files"):
        checked = check_inputs(spec, planned)
    for name, inputs in checked.items():
        for note in inputs.notes:
            line("note", f"{name}: {note}")
    parts, times = [], []
    for study in planned:
        with console.status(f"Probing {study.name}"):
            found = probe(spec, study)
        steps = checked[study.name].steps
        parts.append(forecast_study(study, steps, found, study.ray))
        times.append(study_times(spec, study, steps, found))
    for name, each in checked.items():
        for words in each.data:
            line("data", f"{name}: {words}")
        if each.packing:
            line("packing", f"{name}: {each.packing}")
    line("bf16", bf16_sentence())
    device = device_name()
    timeline = order(spec, times)
    overlapping = timeline.end if len(parts) > 1 else None
    price = find_price(known, device, given=prices is not None)
    whole = total(parts, _devices(spec, device), device, None if price is None else price.per_hour, overlapping)
    _show(parts, whole, price)
    if len(parts) > 1:
        _show_order(times, timeline)
    if start and (yes or not whole.large or _agreed(whole)):
        from tune.cli.verbs.sweep import sweep

        sweep(config)


def _devices(spec: RunSpec, device: str) -> float:
    """Return the number of GPUs that the run holds; without GPUs it is one machine."""
    from tune.scheduling.resources import resources

    return 1.0 if device == "cpu" else max(resources(ray, cluster_gpus=1).gpus for ray in spec.rays())


def _show_order(times: list[StudyTimes], timeline: Timeline) -> None:
    shown = table("model", "lanes", "begins h", "ends h", left=["model", "lanes"])
    for each in sorted(times, key=lambda each: timeline.studies[each.name]):
        begin, end = (f"{seconds / 3600:.3g}" for seconds in timeline.studies[each.name])
        shown.add_row(each.name, str(each.kind), begin, end)
    console.print(shown)
    line("lanes", f"busy for {timeline.utilisation('lane'):.0%} of the time that they are held")


def _show(parts: list[Forecast], whole: Total, price: Price | None) -> None:
    from tune.preflight.forecast import ASSUMED

    head = ("trials", "steps", "training h", "scoring h", "wall h", "memory GiB", "disk GiB")
    shown = table("model", *head, left=["model"])
    for part in parts:
        numbers = (part.training_h, part.scoring_h, part.hours, part.memory / 2**30, part.disk / 2**30)
        shown.add_row(part.name, str(part.trials), str(part.steps), *(f"{number:.3g}" for number in numbers))
    console.print(shown)
    line("wall clock", f"{whole.hours:.3g} hours ({whole.low:.3g} to {whole.high:.3g})")
    line("devices", f"{whole.devices:g} x {whole.device}: {whole.device_hours:.3g} device-hours")
    line("disk", f"{whole.disk / 2**30:.3g} GiB")
    if price is None:
        line("cost", f"unknown: the price file has no {whole.device!r}. Give one with --prices FILE.")
    else:
        line("cost", price_line(whole.device_hours, price))
    console.print(ASSUMED)


def price_line(device_hours: float, price: Price) -> str:
    """Say what device-hours cost, and whose price that is."""
    cost = f"{device_hours * price.per_hour:.2f} {price.currency}, at {price.per_hour:.3g} per device-hour"
    return f"{cost} ({price.source}; give yours with --prices FILE)"


def _agreed(whole: Total) -> bool:
    """Ask whether to start.

    Raises:
        ConfigError: the standard input is not a terminal.
    """
    from tune.preflight.forecast import ASK_COST, ASK_HOURS

    cost = "" if whole.cost is None else f" and cost {whole.cost:.2f}"
    limits = f"asked above {ASK_HOURS:g} hours or a cost of {ASK_COST:g}"
    forecast = f"The run is forecast to take {whole.hours:.3g} hours{cost} ({limits})."
    agrees = asked_by()
    if agrees is None:
        raise ConfigError(f"{forecast}\nThere is no terminal to ask at. Add --yes to start it, or make it smaller.")
    return agrees(f"{forecast} Start it?")

"""Forecast of a sweep: hours, memory, disk and cost, from a probe of each model. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from macdrop.errors import ConfigError
from tune.config.run_spec import RaySpec
from tune.config.syntax.yaml_core import parse_yaml
from tune.data.batching import save_interval
from tune.preflight.sky_catalog import catalogues, offers
from tune.scheduling.study import Study
from tune.storage.sealed_folder import KEPT
from tune.training.optimizers.method import relative_state
from tune.training.optimizers.methods import method_of

#: `--start` asks before a sweep that is forecast to take longer, or to cost more.
ASK_HOURS, ASK_COST = 4.0, 20.0
#: Seconds to start Ray, lanes and evaluators once, and to hand over each trial.
START_S, TRIAL_S = 30.0, 1.0
#: The upper end of the range allows for waiting, slow disks and longer texts than the probe's.
SLACK = 1.5
ANSWER_BYTES = 2000
PRICES = Path(__file__).with_name("prices.yaml")
ASSUMED = (
    f"Assumed: {START_S:.0f} s to start and {TRIAL_S:.0f} s per trial to hand over; lanes and evaluators run in "
    "parallel, every device is as fast as the one probed, and more workers add no time for communication; nothing is "
    "stopped early and no trial is drawn twice. The range is the spread of the probe's steps, its upper end times "
    f"{SLACK:g}. Judging is not included."
)


@dataclass(frozen=True)
class Measured:
    """Findings of a probe of one model. Times in seconds, memory and disk in bytes; `slow` is the upper quartile."""

    load: float
    step: float
    fast: float
    slow: float
    validation: float
    memory: int
    adapter: int
    data: int
    tests: float  # all test benchmarks of one adapter, plain and attacked
    validations: float  # the same for the validation benchmarks
    answers: int  # items scored for one adapter


@dataclass(frozen=True)
class Forecast:
    """Forecast of one study alone. `hours` is wall-clock time; `low` and `high` are its range."""

    name: str
    trials: int
    steps: int
    training_h: float
    scoring_h: float
    hours: float
    low: float
    high: float
    memory: int
    disk: int


def forecast_study(study: Study, steps: int, found: Measured, ray: RaySpec) -> Forecast:
    """Forecast a study: its two stages in sequence, training and scoring in parallel within each."""
    one = trial_seconds(study, steps, found)
    compared = study.final_count
    if study.search and not study.reseeded:
        compared += study.cells * (bool(study.plain) + study.finalists * study.drops)
    stages = [
        (study.searched_count, study.searched_count * found.validations),
        (study.final_count, compared * found.tests),
    ]
    seconds = found.load + study.base * (found.tests + (found.validations if study.search else 0.0)) / ray.evaluators
    for trials, scoring in stages:
        # Whole rounds of the lanes; the last adapter is scored after all training has ended.
        rounds = -(-trials // ray.lanes) * one
        tail = scoring / max(trials, 1)
        seconds += max(rounds + tail, scoring / ray.evaluators) if trials else scoring / ray.evaluators
    trained, scored = study.count * one, sum(scoring for _, scoring in stages) + study.base * found.tests
    disk = study.count * found.adapter + found.data
    if save_interval(study.spec, steps):
        # Only trials in training keep checkpoints: the kept ones and one being written, with weights in fp32.
        whole = (1 + relative_state(method_of(study.spec))) * found.adapter * (2 if study.spec.bf16 else 1)
        disk += min(ray.lanes, study.count) * (KEPT + 1) * int(whole)
    disk += (study.count + study.base) * found.answers * ANSWER_BYTES
    hours = seconds / 3600
    return Forecast(
        name=study.name,
        trials=study.count,
        steps=steps,
        training_h=trained / 3600,
        scoring_h=scored / 3600,
        hours=hours,
        low=hours * found.fast / found.step,
        high=hours * SLACK * found.slow / found.step,
        memory=found.memory,
        disk=disk,
    )


def trial_seconds(study: Study, steps: int, found: Measured) -> float:
    """Return the seconds of one fine-tuning, with its validations."""
    evals = study.spec.eval_steps
    validations = steps // evals + 1 if evals else 1
    return steps * found.step + validations * found.validation + TRIAL_S


@dataclass(frozen=True)
class Total:
    """Forecast of the whole run on its devices; `cost` is None without a known price."""

    hours: float
    low: float
    high: float
    disk: int
    devices: float
    device: str
    price: float | None

    @property
    def device_hours(self) -> float:
        return self.hours * self.devices

    @property
    def cost(self) -> float | None:
        return None if self.price is None else self.device_hours * self.price

    @property
    def large(self) -> bool:
        """Return whether `--start` asks before starting."""
        return self.hours > ASK_HOURS or (self.cost or 0.0) > ASK_COST


def total(
    parts: list[Forecast], devices: float, device: str, price: float | None, overlapping_s: float | None = None
) -> Total:
    """Add up studies that run one after the other; `overlapping_s` are their seconds in all where they overlap."""
    start = START_S / 3600
    hours, low, high = (sum(getattr(part, name) for part in parts) for name in ("hours", "low", "high"))
    share = 1.0 if overlapping_s is None or not hours else overlapping_s / 3600 / hours
    hours, low, high = (start + share * each for each in (hours, low, high))
    return Total(hours, low, high, sum(part.disk for part in parts), devices, device, price)


def read_prices(file: Path | None) -> dict[str, Any]:
    """Read a price file (default: the shipped one).

    Raises:
        ConfigError: there is none, or it is not a list of devices with prices.
    """
    path = file or PRICES
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
        devices = [(str(row["match"]), float(row["per_hour"])) for row in content["devices"]]
    except OSError as error:
        raise ConfigError(f"--prices {path} cannot be read: {error.strerror}.") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"--prices {path} is not a price file ({error}). Write, for example\n  date: 2026-11\n  currency: USD\n"
            "  devices:\n    - {match: H100, per_hour: 3.00}"
        ) from error
    wrong = [name for name, price in devices if not price >= 0]
    if wrong:
        raise ConfigError(f"--prices {path}: the price of {wrong[0]} must be at least 0.")
    return {"devices": devices, "date": content.get("date", "no date"), "currency": content.get("currency", "USD")}


@dataclass(frozen=True)
class Price:
    """The price of one device and hour; `source` says whose it is, for a person."""

    per_hour: float
    currency: str
    source: str


def find_price(prices: dict[str, Any], device: str, *, given: bool) -> Price | None:
    """Return a device's price: of the user's own file, else of SkyPilot's catalogue here, else of the shipped file.

    given: `prices` are of the user's own file.
    """
    found = None if given or device == "cpu" else offers(device, catalogues())
    if found is not None:
        spot = f"; spot from {found.spot.price:.3g}, {found.spot.place}" if found.spot else ""
        source = f"{found.accelerator} on demand, {found.on_demand.place}, in SkyPilot's catalogue of "
        return Price(found.on_demand.price, "USD", f"{source}{found.on_demand.date}{spot}")
    price = price_of(prices, device)
    kind = "prices of your file of" if given else "example prices of"
    return None if price is None else Price(price, prices["currency"], f"{kind} {prices['date']}")


def price_of(prices: dict[str, Any], device: str) -> float | None:
    """Return the price of the first pattern that is part of the device's name; None without one."""
    return next((price for match, price in prices["devices"] if match.lower() in device.lower()), None)

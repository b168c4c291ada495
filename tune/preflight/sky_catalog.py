"""Prices of GPUs in SkyPilot's catalogue, where it lies on this machine; nothing is ever fetched.

SkyPilot keeps a CSV file for each cloud, `~/.sky/catalogs/VERSION/CLOUD/vms.csv`, with a row for each machine type and
place. All functions but the reading are pure.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

#: SkyPilot's variable for the folder that holds its `.sky`.
ROOT = "SKY_RUNTIME_DIR"


@dataclass(frozen=True)
class Offer:
    """The price of one GPU and hour in USD: of a machine's price its share. `date`: of the file that has it."""

    price: float
    place: str
    date: str


@dataclass(frozen=True)
class Offers:
    """The lowest offers of a GPU: on demand, and at the spot price (None where there is none)."""

    accelerator: str
    on_demand: Offer
    spot: Offer | None


def catalogues() -> list[Path]:
    """Return the CSV files of machine types on this machine, of the newest layout that has any."""
    root = Path(os.environ.get(ROOT) or "~").expanduser() / ".sky" / "catalogs"
    layouts = sorted(root.glob("v[0-9]*"), key=lambda path: int(re.sub(r"\D", "", path.name) or 0), reverse=True)
    return next((files for layout in layouts if (files := sorted(layout.glob("*/vms.csv")))), [])


def offers(device: str, files: Iterable[Path]) -> Offers | None:
    """Return the lowest offers for a device, by its name in torch; None where the files have none.

    Of names that fit a device the one that says most counts: A100-80GB before A100.
    """
    found: dict[str, tuple[list[Offer], list[Offer]]] = {}
    for file in files:
        for name, on_demand, spot in _rows(file):
            if fits(name, device):
                both = found.setdefault(name, ([], []))
                both[0].extend(on_demand)
                both[1].extend(spot)
    for name in sorted(found, key=lambda name: (-len(_words(name)), name)):
        on_demand, spot = (sorted(each, key=lambda offer: (offer.price, offer.place)) for each in found[name])
        if on_demand:
            return Offers(name, on_demand[0], spot[0] if spot else None)
    return None


def fits(accelerator: str, device: str) -> bool:
    """Return whether a device, by its name in torch, is an accelerator of SkyPilot's: NVIDIA A100-SXM4-80GB, A100-80GB.

    Each word of the accelerator's name is one of the device's, or two of them together (RTX4090, RTX 4090).
    """
    words = _words(device)
    known = {*words, *(first + second for first, second in zip(words, words[1:], strict=False))}
    return bool(_words(accelerator)) and all(word in known for word in _words(accelerator))


def _words(name: str) -> list[str]:
    return re.findall(r"[A-Z0-9]+", name.upper())


def _rows(file: Path) -> Iterator[tuple[str, list[Offer], list[Offer]]]:
    """Yield the accelerator, and the offers of a row; of a file that cannot be read, none.

    Rows without a machine type are GPUs alone, to which a machine's price would have to be added.
    """
    try:
        date = datetime.fromtimestamp(file.stat().st_mtime, UTC).strftime("%Y-%m-%d")
        with file.open(encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                count, machine = _number(row, "AcceleratorCount"), (row.get("InstanceType") or "").strip()
                if not count or not machine:
                    continue
                place = f"{machine} in {row.get('AvailabilityZone') or row.get('Region') or '?'} of {file.parent.name}"
                prices = (_number(row, "Price"), _number(row, "SpotPrice"))
                made = [[Offer(price / count, place, date)] if price else [] for price in prices]
                yield (row.get("AcceleratorName") or "").strip(), made[0], made[1]
    except (OSError, UnicodeDecodeError, csv.Error):
        return


def _number(row: Mapping[str, str | None], key: str) -> float | None:
    """Return a number above 0; None where there is none."""
    try:
        value = float(row.get(key) or "nan")
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None

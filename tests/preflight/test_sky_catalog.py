"""Prices of SkyPilot's catalogue: which GPU is which, the lowest of a place, and what happens without one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tune.cli.verbs.plan import price_line
from tune.preflight.forecast import Price, find_price, read_prices
from tune.preflight.sky_catalog import catalogues, fits, offers

HEAD = "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,Price,Region,GpuInfo,SpotPrice,AvailabilityZone\n"
AWS = (
    HEAD
    + """p4d.24xlarge,A100,8,96,1152,32.8,us-east-1,,16.0,us-east-1a
p4d.24xlarge,A100,8,96,1152,36.0,eu-west-1,,,eu-west-1a
p4de.24xlarge,A100-80GB,8,96,1152,40.0,us-east-1,,24.0,us-east-1b
g6.xlarge,L4,1,4,16,0.8,us-east-1,,0.4,
m6i.large,,,2,8,0.1,us-east-1,,0.05,us-east-1a
"""
)
GCP = HEAD + ",A100-80GB,1,,,2.5,us-central1,,1.2,\na2-x,A100-80GB,1,12,170,4.5,us-central1,,nan,us-central1-a\n"
A100 = "NVIDIA A100-SXM4-80GB"


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A home with two layouts of the catalogue, of which the newer one counts."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SKY_RUNTIME_DIR", raising=False)
    for place, text in (("v9/aws", HEAD + "x,L4,1,4,16,0.01,us,,,\n"), ("v10/aws", AWS), ("v10/gcp", GCP)):
        folder = tmp_path / ".sky/catalogs" / place
        folder.mkdir(parents=True)
        (folder / "vms.csv").write_text(text)
        os.utime(folder / "vms.csv", (1_790_000_000, 1_790_000_000))
    return tmp_path


@pytest.mark.parametrize(
    ("accelerator", "device", "same"),
    [
        ("A100-80GB", A100, True),
        ("A100", A100, True),
        ("A100-80GB", "NVIDIA A100-SXM4-40GB", False),
        ("A10", A100, False),
        ("L4", "NVIDIA L40S", False),
        ("L40S", "NVIDIA L40S", True),
        ("RTX4090", "NVIDIA GeForce RTX 4090", True),
        ("H100", "NVIDIA H100 80GB HBM3", True),
        ("V100-32GB", "Tesla V100-SXM2-32GB", True),
        ("A10G", "NVIDIA A10G", True),
        ("", "NVIDIA L4", False),
    ],
)
def test_a_device_is_found_by_the_words_of_its_name(accelerator, device, same):
    assert fits(accelerator, device) is same


def test_the_lowest_price_of_a_gpu_is_its_share_of_a_machine(root):
    found = offers(A100, catalogues())
    assert found.accelerator == "A100-80GB", "the name that says most"
    assert (found.on_demand.price, found.on_demand.place) == (4.5, "a2-x in us-central1-a of gcp")
    assert (found.spot.price, found.spot.date) == (3.0, "2026-09-21"), "a GPU alone has no machine in its price"
    assert offers("NVIDIA A100-SXM4-40GB", catalogues()).on_demand.price == pytest.approx(4.1)
    assert offers("NVIDIA L4", catalogues()).on_demand.price == 0.8, "not that of the older layout"
    assert offers("NVIDIA B200", catalogues()) is None


def test_plan_says_whose_price_it_is(root):
    ours = read_prices(None)
    sky = find_price(ours, A100, given=False)
    assert sky.per_hour == 4.5 and "SkyPilot's catalogue of 2026-09-21" in sky.source and "spot from 3" in sky.source
    shipped = find_price(ours, "NVIDIA B200", given=False)
    assert shipped.per_hour == 6.0 and "example prices of 2026-11" in shipped.source
    assert find_price(ours, "cpu", given=False).per_hour == 0.2, "the catalogue does not know which machine this is"
    assert find_price(ours, A100, given=True).per_hour == 1.8, "--prices comes first"
    assert find_price(ours, "Unheard-of 9000", given=False) is None
    assert (
        price_line(2.0, Price(4.5, "USD", "X")) == "9.00 USD, at 4.5 per device-hour (X; give yours with --prices FILE)"
    )


def test_a_damaged_or_missing_catalogue_is_as_none(root, monkeypatch, tmp_path):
    for file in catalogues():
        file.write_bytes(b"\xff\xfe\x00InstanceType")
    assert offers(A100, catalogues()) is None
    monkeypatch.setenv("SKY_RUNTIME_DIR", str(tmp_path / "elsewhere"))
    assert catalogues() == [] and offers(A100, []) is None

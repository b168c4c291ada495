"""A packed optimizer step is the padded one and the examples one by one, on any number of ranks, masks included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.packing_cases import TIGHT, WIDE, Case, by_listing, by_product, examples, spec, worst, write_model
from helpers.ranks import run_ranks

from macdrop.errors import ConfigError

pytestmark = [pytest.mark.long, pytest.mark.zero]

#: Of the loss, and every gradient, relative to the largest entry of its tensor.
CLOSE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def group() -> None:
    """A process group of this process alone."""
    from tune.training.process_group import prepare_process

    prepare_process(1)


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packing")
    for family in tiny.FAMILIES:
        write_model(family, folder / "models")
    return folder


@pytest.fixture(scope="module")
def listing(out) -> Callable[..., tuple]:
    """What the paper's listing computes of a case, example by example; once for each kind of adapter."""
    from tune.training.engine import Engine

    known: dict[tuple, tuple] = {}

    def compute(case: Case) -> tuple:
        key = (case.family, case.dora, case.masks)
        if key not in known:
            plain = Case(case.family, dora=case.dora, masks=case.masks)
            known[key] = by_listing(plain, Engine(spec(plain, out / "models", 1)))
        return known[key]

    return compute


@pytest.fixture(scope="module")
def ranks(out) -> Callable[[int], dict]:
    """Results of rank 0 of so many processes; started once."""
    known: dict[int, dict] = {}

    def run(world: int) -> dict:
        if world not in known:
            known[world] = _run(world, out)
        return known[world]

    return run


def _run(world: int, out: Path) -> dict:
    run_ranks("packing_worker", world, out, out, timeout=550)
    return torch.load(out / f"results-{world}.pt")


def check(found: dict, expected: tuple) -> None:
    loss, gradients, dropped = expected
    assert found["losses"][0] == pytest.approx(loss, rel=CLOSE)
    assert found["dropped"][0] == dropped
    assert worst(gradients, found["gradients"]) <= CLOSE


@pytest.mark.parametrize("budget", [None, TIGHT, WIDE], ids=["padded", "packed", "one row"])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_step_equals_the_listing_example_by_example(out, listing, family, dora, budget):
    if family in tiny.EXPERTS and dora:
        pytest.skip("PEFT has no DoRA on the parameters of experts")
    case = Case(family, dora=dora, budget=budget)
    check(by_product(case, out / "models", 1), listing(case))


@pytest.mark.parametrize(
    "case",
    [Case(checkpointing=True), Case(checkpointing=True, dora=True, budget=WIDE), Case(masks=False), Case(apart=True)],
    ids=["recomputed", "recomputed dora", "no masks", "slices apart"],
)
def test_variants_of_a_step_equal_the_listing(out, listing, case):
    check(by_product(case, out / "models", 1), listing(case))


@pytest.mark.parametrize(
    "name",
    [
        *(
            f"zero{stage} {kind} {layout}"
            for stage in range(4)
            for kind in ("lora", "dora")
            for layout in ("packed", "padded")
        ),
        "wide",
        "a rank without examples, zero2",
        "a rank without examples, zero3",
        "experts",
    ],
)
def test_two_ranks_equal_the_listing(ranks, listing, name):
    check(ranks(2)[name], listing(Case("mixtral" if name == "experts" else "llama", dora="dora" in name)))


@pytest.mark.parametrize(
    ("name", "case"),
    [("lora", Case()), ("dora", Case(dora=True)), ("padded", Case(budget=None))],
    ids=["lora", "dora", "padded"],
)
def test_the_number_of_ranks_changes_no_loss(out, ranks, name, case):
    alone, four = by_product(case, out / "models", 1, steps=3), ranks(4)[name]
    assert four["losses"] == pytest.approx(alone["losses"], rel=CLOSE)
    assert four["norms"] == pytest.approx(alone["norms"], rel=1e-4)
    assert four["eval_loss"] == pytest.approx(alone["eval_loss"], rel=CLOSE)
    assert four["dropped"] == alone["dropped"]


@pytest.mark.parametrize("scope", ["random", "all", "activations"])
def test_what_a_placebo_drops_does_not_depend_on_packing(out, scope):
    padded, tight, wide = (
        by_product(Case(budget=budget, scope=scope), out / "models", 1) for budget in (None, TIGHT, WIDE)
    )
    for packed in (tight, wide):
        assert packed["dropped"] == padded["dropped"] and padded["dropped"][0] > 0
        assert packed["losses"] == pytest.approx(padded["losses"], rel=CLOSE)
        assert worst(padded["gradients"], packed["gradients"]) <= CLOSE


def test_a_step_repeats_to_the_bit(out):
    one, other = (by_product(Case(dora=True), out / "models", 1, steps=2) for _ in range(2))
    assert one["losses"] == other["losses"] and one["eval_loss"] == other["eval_loss"]
    assert all(torch.equal(one["gradients"][name], other["gradients"][name]) for name in one["gradients"])


def test_a_step_with_one_answer_token(out):
    data = examples((8,) * 8)
    labels = data.labels.copy()
    labels[:] = -100
    picked = 5 * 8 + 4
    labels[picked] = data.tokens[picked]
    data.labels = labels
    assert int(np.sum(data.label_counts)) == 1
    packed, padded = (by_product(Case(budget=budget), out / "models", 1, data=data) for budget in (TIGHT, None))
    assert packed["losses"] == pytest.approx(padded["losses"], rel=CLOSE)
    assert worst(padded["gradients"], packed["gradients"]) <= CLOSE


def test_examples_that_fill_a_micro_batch_alone(out, listing):
    case = Case(budget=14)  # as long as the longest example
    check(by_product(case, out / "models", 1), listing(case))


def test_an_example_longer_than_the_budget_is_refused(out):
    with pytest.raises(ConfigError, match=r"13, but the longest example has 14 tokens.*(?s:.)Set it to 14 or more"):
        by_product(Case(budget=13), out / "models", 1)


def test_packing_that_a_model_cannot_do_is_refused_or_reported(tmp_path):
    from helpers.small import SMALL
    from helpers.zoo_of_families import build_family

    from tune.forward.head import UNSPLIT
    from tune.training.finetune import slow_paths
    from tune.training.single import train_here

    build_family("bloom").save_pretrained(tmp_path / "bloom")
    tiny.tokenizer().save_pretrained(tmp_path / "bloom")
    bloom = {**SMALL, "model_name_or_path": str(tmp_path / "bloom"), "lora_target": "all", "max_steps": 2}
    from tune.config.run_spec import TrainSpec

    settings = {**bloom, "zero_stage": 0, "macdrop": {"p0": 0.0}}
    with pytest.raises(ConfigError, match="packing is on, but .*bloom cannot run packed rows.*(?s:.)Set packing to"):
        train_here(TrainSpec(**settings, packing="on"), tmp_path / "on", observe=None, threads=1)
    assert list((tmp_path / "on").iterdir()) == []
    done = train_here(TrainSpec(**settings, packing="auto"), tmp_path / "auto", observe=None, threads=1)
    assert done.unpacked == "its attention cannot be replaced" and not done.unsplit
    (said,) = slow_paths(asdict(done))
    assert said == "micro-batches were padded, as the model cannot run packed rows: its attention cannot be replaced"
    assert slow_paths({"unsplit": True}) == [UNSPLIT]
    padded = train_here(TrainSpec(**settings, packing="off"), tmp_path / "off", observe=None, threads=1)
    assert padded.unpacked is None and padded.train_loss == done.train_loss

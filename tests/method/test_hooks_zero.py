"""MacDrop under DeepSpeed ZeRO-3 on two gloo processes equals the paper's listing on one."""

import functools

import pytest
import torch
from helpers import reference, tiny
from helpers.ranks import run_ranks
from helpers.zero_cases import ACCUMULATION, CASES, SEED, WORLD, P, build, masks, micro_batch

from macdrop.attack import random_rows
from macdrop.hooks import keep_mask

pytestmark = pytest.mark.zero
K = len(tiny.ROWS)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    run_ranks("zero_worker", WORLD, folder, folder / "out.pt", timeout=480, OMP_NUM_THREADS="1")
    return torch.load(folder / "out.pt", weights_only=True)


def by_listing(model, batch, case, rows, numbers, divide):
    """One micro-batch as the listing makes it: whole under one mask, else each row alone under its own."""
    keeps = [keep_mask(SEED, number, case.p, (K, tiny.HIDDEN)) for number in numbers]
    if not case.by_rows:
        return reference.training_step(model, batch, case.family, rows, keeps[0], divide=divide)
    losses = []
    for row, keep in enumerate(keeps):
        alone = {name: tensor[row : row + 1] for name, tensor in batch.items()}
        losses.append(reference.training_step(model, alone, case.family, rows, keep, divide=divide * len(keeps)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("name", [name for name in CASES if name != "experts"])
def test_equals_the_listing_on_whole_weights(results, name):
    case, found = CASES[name], results[name]
    total: dict[str, torch.Tensor] = {}
    for rank in range(WORLD):
        model = build(case)
        if case.untrained:
            reference.with_dora_by_hand(model)
        rows = random_rows(tiny.massive_weights(), K, spared=10, seed=SEED) if case.scope == "random" else tiny.ROWS
        for index in range(ACCUMULATION):
            torch.manual_seed(1000 * rank + index)
            batch, divide = micro_batch(rank, index), ACCUMULATION * WORLD
            if case.scope == "activations":
                draw = functools.partial(keep_mask, SEED, index, P)
                loss = reference.dropout_step(model, batch, case.family, draw, P, divide=divide)
            else:
                loss = by_listing(model, batch, case, rows, masks(case, index), divide)
            assert found["ranks"][rank]["losses"][index] == pytest.approx(loss, rel=1e-6)
        for parameter_name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[parameter_name] = total.get(parameter_name, 0) + parameter.grad
    assert found["partitioned"]
    assert total.keys() == found["gradients"].keys()
    for parameter_name, gradient in total.items():
        difference = (gradient - found["gradients"][parameter_name]).abs().max()
        assert difference <= 1e-5 * gradient.abs().max(), parameter_name


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.scope == "massive" and n != "experts"])
def test_all_ranks_draw_one_mask_and_each_micro_step_another(results, name):
    drawn = [rank["masks"] for rank in results[name]["ranks"]]
    for index in range(ACCUMULATION):
        assert all(torch.equal(first, second) for first, second in zip(*(rank[index] for rank in drawn), strict=True))
        assert len(drawn[0][index]) == len(set(masks(CASES[name], index)))
    assert not torch.equal(drawn[0][0][0], drawn[0][1][0])


def test_partitioned_fused_experts_are_refused(results):
    assert "partitioned by DeepSpeed ZeRO-3" in results["experts"]["refused"]
    assert "stage 0, 1 or 2" in results["experts"]["refused"]

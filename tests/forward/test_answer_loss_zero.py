"""The loss of answer tokens on two ranks under every ZeRO stage, which have different numbers of chunks."""

from __future__ import annotations

import pytest
import torch
from helpers.answer_loss_cases import CASES, STEPS, WORLD, build, micro_batch
from helpers.ranks import run_ranks
from torch.nn.functional import cross_entropy

pytestmark = pytest.mark.zero
every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What two processes computed, all cases in one start."""
    out = tmp_path_factory.mktemp("answer-loss")
    run_ranks("answer_loss_worker", WORLD, out, out / "found.pt", timeout=400)
    return torch.load(out / "found.pt", weights_only=False)


def reference(name: str, step: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of the ranks, and the mean of their gradients, from all logits."""
    model = build(CASES[name])
    losses = []
    for rank in range(WORLD):
        inputs, positions, targets = micro_batch(rank, step)
        nats = cross_entropy(model(**inputs).logits.flatten(0, 1)[positions], targets, reduction="sum")
        (nats / WORLD).backward()
        losses.append(nats.item())
    return losses, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@every_case
def test_loss_and_gradients_are_those_of_all_logits(found, name):
    for step in range(STEPS):
        losses, gradients = reference(name, step)
        for kind in ("losses", "validation"):
            assert [rank[kind][step] for rank in found[name]["ranks"]] == pytest.approx(losses, rel=1e-5), kind
        ours = found[name]["gradients"][step]
        assert ours.keys() == gradients.keys()
        for parameter, gradient in gradients.items():
            bound = 1e-5 * max(1.0, gradient.abs().max().item())
            torch.testing.assert_close(ours[parameter], gradient, atol=bound, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.stage == 3])
def test_deepspeed_sees_the_same_modules_in_every_step(found, name):
    assert found[name]["traced"]

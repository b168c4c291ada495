"""DoRA with kept norms is PEFT's: loss, gradients, masks, steps; and a norm is never older than the adapter."""

from contextlib import nullcontext

import pytest
import torch
from helpers import tiny
from helpers.hook_cases import DENSE, P, accumulate, adapted, by_macdrop, dropping, gradients, worst
from helpers.small import SMALL
from helpers.span_cases import by_spans, lay
from peft.tuners.lora.layer import Linear

from tune.config.run_spec import TrainSpec
from tune.training import dora_norms
from tune.training.dora_norms import DoraNorms
from tune.training.single import train_here


def trained(model, steps=3, norms=None, drop=None):
    """Losses and gradients of some optimizer steps of two micro-batches."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses, found = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        step = by_macdrop(model, drop, P) if drop else None
        if norms is None:
            more, last = accumulate(model, step)
        else:
            with norms.for_step():
                more, last = accumulate(model, step)
        losses, found = losses + more, [*found, last]
        optimizer.step()
    return losses, found


CASES = [
    *((family, dropout, None, masked) for family in DENSE for dropout in (0.0, 0.3) for masked in (False, True)),
    *(("llama", dropout, reentrant, True) for dropout in (0.0, 0.3) for reentrant in (True, False)),
]


@pytest.mark.parametrize(("family", "dropout", "checkpointing", "masked"), CASES)
def test_equals_peft_over_several_steps(family, dropout, checkpointing, masked):
    """In double precision, where the two differ by nothing else than a wrong formula."""
    settings = {"use_dora": True, "lora_dropout": dropout, "checkpointing": checkpointing, "dtype": torch.float64}
    slow, model = adapted(family, **settings), adapted(family, **settings)
    losses, expected = trained(slow, drop=dropping(slow, family) if masked else None)
    norms = DoraNorms(model)
    drop = dropping(model, family) if masked else None
    found_losses, found = trained(model, norms=norms, drop=drop)
    assert found_losses == pytest.approx(losses, rel=1e-9)
    assert max(worst(*pair) for pair in zip(expected, found, strict=True)) < 1e-6


@pytest.mark.parametrize("checkpointing", [None, True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("family", DENSE)
def test_equals_peft_in_fp32(family, masked, checkpointing):
    slow, model = (adapted(family, use_dora=True, checkpointing=checkpointing) for _ in range(2))
    losses, expected = trained(slow, 1, drop=dropping(slow, family) if masked else None)
    norms = DoraNorms(model)
    found_losses, found = trained(model, 1, norms, dropping(model, family) if masked else None)
    assert found_losses == pytest.approx(losses, rel=1e-5)
    assert worst(expected[0], found[0]) < 1e-5


@pytest.mark.parametrize("scaling", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("family", DENSE)
def test_the_norm_is_that_of_the_dense_sum(family, scaling):
    model = adapted(family, use_dora=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(scaling)
    norms = DoraNorms(model)
    assert norms._layers
    with norms.for_step():
        for layer in norms._layers:
            base, a, b = layer._parts
            weight = base.weight.T if layer.fan_in_fan_out else base.weight
            dense = weight.double() + layer._scaling[layer._adapter] * (b.weight.double() @ a.weight.double())
            assert torch.allclose(layer.norm.double(), dense.norm(dim=1), rtol=1e-6)
    assert all(layer.norm is None for layer in norms._layers)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_bf16_rounds_no_more_than_peft(family):
    exact, slow, model = (adapted(family, use_dora=True).to(torch.bfloat16) for _ in range(3))
    _, expected = accumulate(exact.float(), None)
    _, rounded = accumulate(slow, None)
    with DoraNorms(model).for_step():
        _, found = accumulate(model, None)
    assert worst(expected, found) < 1.2 * worst(expected, rounded)


def test_packed_examples_with_masks_of_their_own():
    results = []
    for keep in (False, True):
        model = adapted(use_dora=True)
        norms = DoraNorms(model)
        drop = dropping(model)
        if keep:
            with norms.for_step():
                results.append(by_spans(model, drop, lay("packed")))
        else:
            results.append(by_spans(model, drop, lay("packed")))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-6)
    assert worst(results[0][1], results[1][1]) < 1e-5


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_outside_of_a_step_and_in_eval_mode_peft_runs(dropout):
    plain, model = (adapted(use_dora=True, lora_dropout=dropout) for _ in range(2))
    norms = DoraNorms(model)
    losses, expected = accumulate(plain, None)
    found_losses, found = accumulate(model, None)
    assert losses == found_losses and all(torch.equal(expected[name], found[name]) for name in expected)
    batch = tiny.batch(0)
    with norms.for_step(), torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, plain.eval()(**batch).logits)
    merged = [each.merge_and_unload()(**batch).logits for each in (plain, model)]
    assert torch.equal(*merged)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_norm_older_than_the_adapter_is_an_error(dropout, factor):
    model = adapted(use_dora=True, lora_dropout=dropout)
    norms = DoraNorms(model)
    with norms.for_step(), torch.no_grad():
        next(p for name, p in model.named_parameters() if factor in name).add_(1)
        with pytest.raises(AssertionError, match="changed since its norms"):
            model(**tiny.batch(0))


def test_every_layer_runs_in_one_go_while_there_are_norms(monkeypatch):
    model = adapted("llama", use_dora=True)
    norms, ran, run = DoraNorms(model), [], dora_norms._FusedDora.run_fused
    monkeypatch.setattr(dora_norms._FusedDora, "run_fused", lambda self, *given: ran.append(self) or run(self, *given))
    with norms.for_step():
        model(**tiny.batch(0))
    assert len(ran) == sum(isinstance(module, Linear) for module in model.modules()) > 0
    model(**tiny.batch(0))
    assert len(ran) == len(norms._layers)


def test_steps_repeat_to_the_bit():
    runs = []
    for _ in range(2):
        model = adapted(use_dora=True)
        runs.append(trained(model, norms=DoraNorms(model), drop=dropping(model)))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(runs[0][1][-1][name], runs[1][1][-1][name]) for name in runs[0][1][-1])


def test_an_adapter_without_dora_is_left_alone():
    plain, model = adapted(), adapted()
    with DoraNorms(model).for_step():
        model(**tiny.batch(0)).loss.backward()
    plain(**tiny.batch(0)).loss.backward()
    assert all(torch.equal(gradient, gradients(plain)[name]) for name, gradient in gradients(model).items())


@pytest.mark.parametrize("stage", range(4))
def test_a_fine_tuning_has_the_losses_of_peft_s_own_norms(tmp_path, stage, monkeypatch):
    def losses(folder):
        rows = []
        settings = {**SMALL, "use_dora": True, "zero_stage": stage, "max_steps": 4, "macdrop": {"k": 5, "p0": 0.8}}
        train_here(TrainSpec(**settings), tmp_path / folder, observe=lambda row: rows.append(row) or "go_on", threads=1)
        return [row["loss"] for row in rows if "loss" in row]

    found = losses("ours")
    monkeypatch.setattr(DoraNorms, "for_step", lambda norms: nullcontext())
    assert found == pytest.approx(losses("peft"), rel=1e-5)

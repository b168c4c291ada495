"""LoRA in one go is PEFT's: outputs, gradients, masks, the same bits again; what it does not know is left to PEFT."""

import pytest
import torch
from helpers import tiny
from helpers.hook_cases import DENSE, P, accumulate, adapted, by_macdrop, dropping, gradients, worst
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from torch.nn.functional import cross_entropy

from tune.forward.answer_loss import AnswerLoss
from tune.forward.fused_linear import fuse_linears


def both(family="llama", **settings):
    """The same adapted model twice: PEFT's own, and the one with linear layers in one go."""
    plain, model = adapted(family, **settings), adapted(family, **settings)
    fuse_linears(model)
    return plain, model


def ran_fused(model, run):
    """Run something; returns how many LoRA layers there are on linear ones, and how many of them ran in one go."""
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    outputs = {}
    handles = [layer.register_forward_hook(lambda each, _, out: outputs.update({each: out})) for layer in layers]
    run()
    for handle in handles:
        handle.remove()
    return len(layers), sum(type(out.grad_fn).__name__ == "_AddedLoraBackward" for out in outputs.values())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("checkpointing", [None, True, False])
@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_losses_and_gradients_are_those_of_peft(family, checkpointing, masked, dtype, bound):
    plain, model = both(family, checkpointing=checkpointing, dtype=dtype)
    steps = [by_macdrop(each, dropping(each, family), P) if masked else None for each in (plain, model)]
    losses, expected = accumulate(plain, steps[0])
    found_losses, found = accumulate(model, steps[1])
    assert found_losses == pytest.approx(losses, rel=bound)
    assert worst(expected, found) < bound


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_bf16_rounds_no_more_than_peft(family):
    exact = adapted(family).to(torch.bfloat16).float()
    plain, model = (each.to(torch.bfloat16) for each in both(family))
    _, expected = accumulate(exact, None)
    _, rounded = accumulate(plain, None)
    _, found = accumulate(model, None)
    assert worst(expected, found) < 1.2 * worst(expected, rounded)


def test_gradients_repeat_to_the_bit():
    runs = [accumulate(both()[1], None) for _ in range(2)]
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(gradient, runs[1][1][name]) for name, gradient in runs[0][1].items())


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_all_linear_layers_run_in_one_go_but_those_of_masked_rows(family):
    _, model = both(family)
    layers, fused = ran_fused(model, lambda: model(**tiny.batch(0)))
    assert fused == layers > 0
    drop = dropping(model, family)
    assert ran_fused(model, lambda: model(**tiny.batch(0)))[1] == layers - len(drop._sites)
    drop.detach()
    assert ran_fused(model, lambda: model(**tiny.batch(0)))[1] == layers


def add_another(model):
    torch.manual_seed(2)
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])


def train_the_base(model):
    for name, parameter in model.named_parameters():
        if "base_layer" in name:
            parameter.requires_grad_()


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ({"lora_dropout": 0.3}, lambda model: None),
        ({"lora_bias": True, "family": "opt"}, lambda model: None),
        ({"family": "gpt2"}, lambda model: None),
        ({}, add_another),
        ({}, train_the_base),
        ({}, lambda model: model.base_model.merge_adapter()),
        ({}, lambda model: model.base_model.disable_adapter_layers()),
    ],
    ids=["dropout", "bias", "Conv1D", "two adapters", "trained base", "merged", "switched off"],
)
def test_what_it_does_not_know_is_left_to_peft(settings, change):
    logits = []
    for model in both(**settings):
        change(model)
        torch.manual_seed(5)
        layers, fused = ran_fused(model, lambda model=model: logits.append(model(**tiny.batch(0)).logits))
        assert layers and not fused
    assert torch.equal(*logits)


def test_autocast_is_left_to_peft():
    plain, model = both()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(**tiny.batch(0)).logits, plain(**tiny.batch(0)).logits)


def test_an_adapted_head_learns_from_logits_in_chunks():
    plain, model = both(targets=["lm_head", "q_proj"])
    batch = tiny.batch(0)
    logits = plain(input_ids=batch["input_ids"]).logits
    cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum").backward()
    rows, length = batch["labels"].shape
    positions = torch.arange(rows * length).view(rows, length)[:, :-1].flatten()
    loss = AnswerLoss(model, chunk_bytes=1024)
    assert loss.split is not None
    loss(positions, batch["labels"][:, 1:].flatten(), input_ids=batch["input_ids"]).backward()
    assert worst(gradients(plain), gradients(model)) < 1e-5

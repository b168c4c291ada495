"""Micro-steps of tiny adapted models, by MacDrop and by the slow reference, and how far their gradients differ."""

import contextlib
from collections import OrderedDict

import torch

from helpers import reference, tiny
from macdrop.config import MacDropConfig
from macdrop.hooks import MacDrop, keep_mask

K, P, SEED, ACCUMULATION = len(tiny.ROWS), 0.7, 3, 2
DENSE = ("llama", "phi3", "opt", "gpt2")
SHAPE = (K, tiny.HIDDEN)


def adapted(family="llama", *, checkpointing=None, dtype=torch.float32, **settings):
    if family == "gpt_oss":  # PEFT puts no adapter on its experts
        settings["targets"] = ["q_proj", "v_proj"]
    model = tiny.lora(tiny.build(family, dtype=dtype), **settings)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    return model


def dropping(model, family="llama", **config) -> MacDrop:
    drop = MacDrop(model, tiny.massive_weights(family), MacDropConfig(**{"k": K, "seed": SEED, **config}))
    drop.attach()
    return drop


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def accumulate(model, step, context=contextlib.nullcontext):
    """Losses and gradients of two micro-batches; `step` makes each, or the plain forward and backward pass does."""
    losses = []
    for index in range(ACCUMULATION):
        torch.manual_seed(50 + index)  # for LoRA dropout
        batch = tiny.batch(index)
        with context():
            if step is None:
                loss = model(**batch).loss
                (loss / ACCUMULATION).backward()
                losses.append(loss.item())
            else:
                losses.append(step(batch, index))
    return losses, gradients(model)


def by_macdrop(model, drop, p=P):
    def step(batch, index):
        with drop.micro_step(p, index):
            loss = model(**batch).loss
            (loss / ACCUMULATION).backward()
        return loss.item()

    return step


def by_reference(model, family, p=P):
    def step(batch, index):
        mask = keep_mask(SEED, index, p, SHAPE)
        expert = tiny.massive_weights(family).expert
        return reference.training_step(model, batch, family, tiny.ROWS, mask, expert=expert, divide=ACCUMULATION)

    return step


def worst(expected, found):
    """Largest difference of any gradient entry, relative to the largest entry of its tensor."""
    assert expected.keys() == found.keys() and expected
    return max(((expected[n] - found[n]).abs().max() / expected[n].abs().max()).item() for n in expected)


def traces(model):
    """Every hook and every function put on an instance, by module."""
    found = {}
    for name, module in model.named_modules():
        state = vars(module)
        hooks = [key for key, value in state.items() if isinstance(value, OrderedDict) and "hooks" in key and value]
        patched = [key for key in ("forward", "get_weight_norm") if key in vars(module)]
        if hooks or patched:
            found[name] = (hooks, patched)
    return found

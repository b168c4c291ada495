"""Packed rows of real models: loss and every adapter gradient are those of the examples one at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import packed_rows, tiny
from helpers.real_models import gemma3, smollm2

from tune.forward.packing_check import check_packing

pytestmark = [pytest.mark.long, pytest.mark.real]

LENGTHS, WINDOW = (90, 23, 48), 32


@pytest.fixture(params=[smollm2, pytest.param(gemma3, marks=pytest.mark.slow)], ids=["smollm2", "gemma3"])
def base(request) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    folder = request.param()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if getattr(model.config, "sliding_window", None):
        for part in model.modules():  # shorter than the examples
            for holder in (part, getattr(part, "config", None)):
                if isinstance(getattr(holder, "sliding_window", None), int):
                    holder.sliding_window = WINDOW
    return model


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_gradients_of_a_packed_row_are_those_of_the_examples_alone(base, dora):
    model = tiny.lora(base, use_dora=dora)
    check_packing(model, "cpu", np.arange(100, 300), max(LENGTHS))
    each = packed_rows.examples(LENGTHS, vocabulary=10_000)
    found = {}
    for packed in (False, True):
        model.zero_grad()
        loss = packed_rows.loss(model, each, packed=packed)
        found[packed] = loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    (alone, expected), (loss, gradients) = found[False], found[True]
    assert loss == pytest.approx(alone, rel=1e-5)
    assert expected.keys() == gradients.keys() and expected
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name

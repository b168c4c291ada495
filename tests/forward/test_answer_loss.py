"""The loss of answer tokens in chunks: equal to the loss of all logits, with every gradient, in bounded memory."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny
from helpers.zoo_of_families import FAMILIES, build_family, with_lora
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tune.forward.answer_loss import AnswerLoss

#: Bytes of a chunk of three positions of the tiny models.
CHUNK = 3 * tiny.VOCAB * 4
HEADS = {
    "tied": lambda: tiny.lora(build_family("llama", tie_word_embeddings=True), targets=["q_proj", "down_proj"]),
    "untied": lambda: tiny.lora(build_family("llama", tie_word_embeddings=False), targets=["q_proj", "down_proj"]),
    "adapted": lambda: tiny.lora(tiny.build(), targets=["q_proj", "lm_head"]),
    "adapted, dora": lambda: tiny.lora(tiny.build(), targets=["q_proj", "lm_head"], use_dora=True),
    "adapted alone": lambda: tiny.lora(tiny.build(), targets=["lm_head"]),
    "trained whole": lambda: tiny.lora(tiny.build(), targets=["q_proj"], modules_to_save=["lm_head"]),
    "dora": lambda: tiny.lora(tiny.build(), targets=["q_proj", "up_proj"], use_dora=True),
    "soft cap": lambda: tiny.lora(build_family("gemma2", final_logit_softcapping=2.0)),
    "soft cap, adapted": lambda: tiny.lora(build_family("gemma2", final_logit_softcapping=2.0), targets=["lm_head"]),
    "logit scale": lambda: tiny.lora(build_family("cohere", logit_scale=0.3)),
    "fully trained": lambda: tiny.build("phi3").requires_grad_(),
}


def padded(answers: int | None = None) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Two rows of 12 tokens, one with padding: inputs, and positions and targets of the answers."""
    inputs = tiny.batch(5)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, 9:] = 0
    labels = inputs.pop("labels")
    labels[:, :4] = -100
    labels[1, 9:] = -100
    rows, columns = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    return inputs, (rows * 12 + columns)[:answers], labels[rows, columns + 1][:answers]


def reference(model: nn.Module, inputs: dict, positions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss of all logits at once."""
    logits = model(**inputs).logits.flatten(0, 1).float()
    labels = torch.full((len(logits),), -100).index_put((positions,), targets)
    return cross_entropy(logits, labels, reduction="sum")


def gradients(model: nn.Module, nats: torch.Tensor, scale: float = 0.25) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (nats * scale).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model: nn.Module, loss: AnswerLoss, answers: int | None = None, tolerance: float = 1e-5) -> None:
    inputs, positions, targets = padded(answers)
    expected = reference(model, inputs, positions, targets)
    wanted = gradients(model, expected)
    nats = loss(positions, targets, **inputs)
    assert nats.dtype == torch.float32 and nats.shape == ()
    assert nats.item() == pytest.approx(expected.item(), rel=tolerance)
    found = gradients(model, nats)
    assert found.keys() == wanted.keys() and found
    for name, gradient in wanted.items():
        bound = tolerance * max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(found[name], gradient, atol=bound, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("chunk", [1, CHUNK, 2**20])
@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradients_are_those_of_all_logits(head, chunk):
    model = HEADS[head]()
    loss = AnswerLoss(model, chunk)
    assert loss.split is not None
    assert_same(model, loss)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family):
    model = with_lora(family, build_family(family))
    assert_same(model, AnswerLoss(model, CHUNK), tolerance=2e-5)


@pytest.mark.parametrize("head", ["tied", "adapted", "soft cap"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_with_gradient_checkpointing(head, reentrant):
    model = HEADS[head]()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(model, AnswerLoss(model, CHUNK))


@pytest.mark.parametrize("answers", [0, 1, 2])
@pytest.mark.parametrize("head", ["tied", "adapted"])
def test_few_answers(head, answers):
    """Without any the loss is 0 and still depends on the adapter: every rank must take part in the backward pass."""
    model = HEADS[head]()
    assert_same(model, AnswerLoss(model, CHUNK), answers)


def test_in_bf16_the_loss_is_fp32():
    exact, rough = HEADS["tied"](), HEADS["tied"]().bfloat16()
    inputs, positions, targets = padded()
    nats = AnswerLoss(rough, CHUNK)(positions, targets, **inputs)
    assert nats.dtype == torch.float32
    assert nats.item() == pytest.approx(AnswerLoss(exact)(positions, targets, **inputs).item(), rel=0.03)
    logits = rough(**inputs).logits.flatten(0, 1)[positions].float()
    assert nats.item() == pytest.approx(cross_entropy(logits, targets, reduction="sum").item(), rel=1e-5)
    found = gradients(rough, nats)
    wanted = gradients(rough, reference(rough, inputs, positions, targets))
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 0.05 * gradient.norm(), name


def test_targets_may_be_in_any_order_and_positions_repeat():
    model = HEADS["untied"]()
    inputs, positions, targets = padded()
    loss = AnswerLoss(model, CHUNK)
    order = torch.randperm(len(positions), generator=torch.Generator().manual_seed(0))
    once = loss(positions, targets, **inputs)
    assert loss(positions[order], targets[order], **inputs).item() == pytest.approx(once.item(), rel=1e-6)
    twice = loss(positions.repeat(2), targets.repeat(2), **inputs)
    assert twice.item() == pytest.approx(2 * once.item(), rel=1e-6)


def test_repeats_to_the_bit_and_without_gradients_too():
    model = HEADS["adapted"]()
    inputs, positions, targets = padded()
    loss = AnswerLoss(model, CHUNK)
    first, second = (gradients(model, loss(positions, targets, **inputs)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with torch.no_grad():
        silent = loss(positions, targets, **inputs)
    assert not silent.requires_grad
    assert torch.equal(silent, loss(positions, targets, **inputs).detach())


class Largest(TorchDispatchMode):
    """Records the most elements that any tensor made inside has."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [each.numel() for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        self.numel = max([self.numel, *made])
        return result


@pytest.mark.parametrize("head", ["tied", "adapted", "soft cap"])
@pytest.mark.parametrize("learning", [False, True])
def test_no_tensor_of_all_positions_by_the_vocabulary_exists(head, learning):
    model = {
        "tied": lambda: tiny.lora(build_family("llama", vocab_size=512), targets=["q_proj"]),
        "adapted": lambda: tiny.lora(build_family("llama", vocab_size=512), targets=["q_proj", "lm_head"]),
        "soft cap": lambda: tiny.lora(build_family("gemma2", vocab_size=512), targets=["q_proj"]),
    }[head]()
    ids = torch.randint(3, 512, (2, 60), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(118)
    loss = AnswerLoss(model, 20 * 512 * 4)

    def largest(run) -> int:
        with Largest() as seen, torch.set_grad_enabled(learning):
            nats = run()
            if learning:
                nats.backward()
        return seen.numel

    whole = largest(lambda: reference(model, {"input_ids": ids}, positions, ids.flatten()[positions]))
    parts = largest(lambda: loss(positions, ids.flatten()[positions], input_ids=ids))
    assert whole >= 120 * 512
    # The weights of the head (512 x 32) and the scores of attention (2 x 4 x 60 x 60) are larger than a chunk.
    assert parts <= max(20 * 512, 512 * 32, 2 * 4 * 60 * 60)


def test_a_model_that_cannot_be_split_is_run_whole():
    class Skipping(type(tiny.build())):
        def forward(self, input_ids=None, **kwargs):
            output = super().forward(input_ids=input_ids, **kwargs)
            output.logits = output.logits + self.lm_head(self.model.embed_tokens(input_ids))
            return output

    model = tiny.lora(Skipping(tiny.build().config), targets=["q_proj"])
    loss = AnswerLoss(model, CHUNK)
    assert loss.split is None
    assert_same(model, loss)
    assert_same(model, loss, answers=0)


def test_refuses_targets_outside_of_the_vocabulary():
    inputs, positions, targets = padded()
    model = HEADS["tied"]()
    with pytest.raises((IndexError, RuntimeError)):
        AnswerLoss(model)(positions, targets + tiny.VOCAB, **inputs)
    with pytest.raises((IndexError, RuntimeError)):
        AnswerLoss(model)(positions + 24, targets, **inputs)

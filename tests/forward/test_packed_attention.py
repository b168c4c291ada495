"""tune.forward.packed_attention: an example of a packed row computes what it computes alone, at the cost of that."""

from __future__ import annotations

import pytest
import torch
from helpers import packed_rows, tiny
from helpers.packed_rows import LENGTHS, WINDOW
from helpers.zoo_of_families import FAMILIES, build_family, with_lora
from torch.utils._python_dispatch import TorchDispatchMode

from macdrop.errors import MacDropError
from tune.forward.packed_attention import PackedAttention

#: Families whose attention is not taken from transformers' table of functions, and those that have no sdpa.
OF_THEIR_OWN, EAGER_ONLY = {"falcon", "bloom"}, {"gemma2", "gpt_oss"}
PACKED = sorted(set(FAMILIES) - OF_THEIR_OWN)
#: Families with windows, and the settings that make them shorter than the examples.
WINDOWS = {
    "gemma2": {"sliding_window": WINDOW},
    "gemma3": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gpt_oss": {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "mistral": {"sliding_window": WINDOW},
    "llama4": {
        "attention_chunk_size": WINDOW,
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
    },
}

NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def implementations(family: str) -> list[str]:
    return ["eager"] if family in EAGER_ONLY else ["eager", "sdpa"]


def build(family: str, implementation: str = "eager", **settings) -> torch.nn.Module:
    model = build_family(family, **settings)
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    return model


def difference(model: torch.nn.Module) -> float:
    """Largest difference of a logit in a packed row from the example's alone, over the largest logit."""
    each = packed_rows.examples()
    with torch.no_grad():
        alone = torch.cat([model(input_ids=ids[None]).logits[0] for ids in each])
        with PackedAttention(model).segments(LENGTHS) as arguments:
            packed = model(**packed_rows.row(each), **arguments).logits[0]
    return float((packed - alone).abs().max() / alone.abs().max())


@pytest.mark.parametrize("family", PACKED)
def test_an_example_in_a_packed_row_has_the_logits_that_it_has_alone(family):
    for implementation in implementations(family):
        assert difference(build(family, implementation)) < 1e-5


@pytest.mark.parametrize("family", sorted(WINDOWS))
def test_windows_and_chunks_restart_with_each_example(family):
    for implementation in implementations(family):
        model = build(family, implementation, **WINDOWS[family])
        wide = build(family, implementation, **{**WINDOWS[family], _size(family): 64})
        ids = packed_rows.examples()[0][None]
        with torch.no_grad():
            assert not torch.allclose(model(ids).logits, wide(ids).logits, atol=1e-3), "the window must matter here"
        assert difference(model) < 1e-5


def _size(family: str) -> str:
    return "attention_chunk_size" if family == "llama4" else "sliding_window"


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "recomputed", "recomputed re-entrantly"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss", "gpt2", "mixtral"])
def test_gradients_of_a_packed_row_are_those_of_the_examples_alone(family, checkpointing):
    def gradients(packed: bool) -> tuple[float, dict[str, torch.Tensor]]:
        model = with_lora(family, build(family, **{**WINDOWS, "gpt2": NO_DROPOUT}.get(family, {})))
        if checkpointing is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        model.train()
        loss = packed_rows.loss(model, packed_rows.examples(), packed=packed)
        return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    (alone, expected), (packed, found) = gradients(False), gradients(True)
    assert packed == pytest.approx(alone, rel=1e-6)
    assert expected.keys() == found.keys() and expected
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


class _Largest(TorchDispatchMode):
    """Records the most entries that any tensor had that was made under it."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return found


@pytest.mark.parametrize(("family", "implementation"), [("llama", "sdpa"), ("llama", "eager"), ("gemma3", "eager")])
def test_attention_costs_no_square_of_the_row(family, implementation):
    """Twice as many examples: tensors twice as large, not four times."""
    model = build(family, implementation, **WINDOWS.get(family, {}))

    def largest(count: int) -> int:
        each = packed_rows.examples([40] * count)
        with torch.no_grad(), PackedAttention(model).segments([40] * count) as arguments, _Largest() as seen:
            model(**packed_rows.row(each), **arguments)
        return seen.entries

    assert largest(16) <= 2 * largest(8)


def test_the_model_has_its_own_attention_back_after_a_row_and_after_an_error():
    model = tiny.build("llama")
    attention = PackedAttention(model)
    ids = packed_rows.examples()[0][None]
    before = model(ids).logits
    with pytest.raises(ZeroDivisionError), attention.segments(LENGTHS):
        assert model.config._attn_implementation != "eager"
        raise ZeroDivisionError
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(ids).logits, before)
    with attention.segments(LENGTHS) as arguments:
        model(**packed_rows.row(packed_rows.examples()), **arguments)


@pytest.mark.parametrize("family", sorted(OF_THEIR_OWN))
def test_attention_that_cannot_be_replaced_is_refused(family):
    with pytest.raises(MacDropError, match="cannot be replaced"):
        PackedAttention(build_family(family))


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_varlen_attention_on_a_gpu_computes_what_examples_alone_do(family):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = build(family, "sdpa", **WINDOWS.get(family, {})).to("cuda", torch.bfloat16)
    each = [ids.cuda() for ids in packed_rows.examples((300, 7, 129))]
    row = {name: tensor.cuda() for name, tensor in packed_rows.row([ids.cpu() for ids in each]).items()}
    lengths = [len(ids) for ids in each]
    with torch.no_grad():
        alone = torch.cat([model(input_ids=ids[None]).logits[0] for ids in each]).float()
        with PackedAttention(model).segments(lengths, "cuda") as arguments:
            packed = model(**row, **arguments).logits[0].float()
    assert (packed - alone).norm() / alone.norm() < 0.05

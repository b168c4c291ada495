"""The parts of a model against the whole of it, for every family, adapter and precision."""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers import tiny, zoo_of_families
from helpers.zoo_of_families import FAMILIES, build_family, with_lora
from torch import nn

from tune.forward.head import SplitModel

MORE = {
    "gemma2, soft cap": ("gemma2", {"final_logit_softcapping": 2.0}),
    "cohere, logit scale": ("cohere", {"logit_scale": 0.3}),
    "granite, logits scaled": ("granite", {"logits_scaling": 3.0}),
    "opt, narrow embeddings": ("opt", {"word_embed_proj_dim": 16}),
    "mixtral, router logits": ("mixtral", {"output_router_logits": True}),
    "llama, untied": ("llama", {"tie_word_embeddings": False}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "phi, head with bias": ("phi", {"tie_word_embeddings": False}),
}
EVERY = {**{name: (name, {}) for name in FAMILIES}, **MORE}


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, zoo_of_families.VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def assert_parts_are_the_whole(model: nn.Module, tolerance: float = 1e-5) -> None:
    inputs = batch()
    whole = model(**inputs).logits
    split = SplitModel.of(model)
    assert split is not None
    chosen = inputs["attention_mask"].bool()
    logits = split.logits(split.hidden(**inputs)[chosen])
    assert logits.dtype == whole.dtype
    torch.testing.assert_close(logits, whole[chosen], atol=tolerance * whole.abs().max().item(), rtol=0)
    again = model(**inputs).logits
    assert torch.equal(again, whole), "splitting a model must leave it as it was"


@pytest.mark.parametrize("case", EVERY)
def test_parts_are_the_whole(case):
    family, settings = EVERY[case]
    assert_parts_are_the_whole(build_family(family, **settings))


@pytest.mark.parametrize("case", EVERY)
def test_parts_are_the_whole_with_an_adapter(case):
    family, settings = EVERY[case]
    assert_parts_are_the_whole(with_lora(family, build_family(family, **settings)))


@pytest.mark.parametrize("case", ["llama", "gemma2, soft cap", "gpt2", "mixtral"])
def test_parts_are_the_whole_in_bf16(case):
    family, settings = EVERY[case]
    assert_parts_are_the_whole(build_family(family, **settings).bfloat16(), tolerance=0.01)


@pytest.mark.parametrize("settings", [{"targets": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("dora", [False, True])
def test_an_adapted_head_is_part_of_the_head(settings, dora):
    model = tiny.lora(tiny.build(), use_dora=dora, **settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
    assert_parts_are_the_whole(model)


def test_gradients_go_through_both_parts():
    model = tiny.lora(tiny.build(), targets=["q_proj", "lm_head"]).eval()
    split = SplitModel.of(model)
    inputs = batch()
    parameters = [p for p in model.parameters() if p.requires_grad]
    whole = torch.autograd.grad(model(**inputs).logits.logsumexp(-1).sum(), parameters)
    parts = torch.autograd.grad(split.logits(split.hidden(**inputs).flatten(0, 1)).logsumexp(-1).sum(), parameters)
    torch.testing.assert_close(parts, whole)


def test_run_calls_the_model_once_and_hands_on_what_is_returned():
    model = tiny.lora(tiny.build())
    split = SplitModel.of(model)
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append("model"))
    split.bare.lm_head.register_forward_pre_hook(lambda *_: calls.append("head"))
    assert split.run(lambda hidden: tuple(hidden.shape), **batch()) == (2, 9, tiny.HIDDEN)
    assert calls == ["model"]
    assert model.training, "the check must not leave the model in another mode"


def test_an_error_inside_leaves_the_model_as_it_was():
    model = tiny.build()
    split = SplitModel.of(model)

    def fail(hidden):
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        split.run(fail, **batch())
    with pytest.raises(RuntimeError):
        split.logits(torch.zeros(3, tiny.HIDDEN + 1))
    assert_parts_are_the_whole(model)


def test_models_that_cannot_be_split_are_left_whole():
    """Logits that depend on more than the last hidden state, and a model that never calls its decoder."""

    class Skipping(transformers.LlamaForCausalLM):
        def forward(self, input_ids=None, **kwargs):
            output = super().forward(input_ids=input_ids, **kwargs)
            output.logits = output.logits + self.lm_head(self.model.embed_tokens(input_ids))
            return output

    config = tiny.build().config
    assert SplitModel.of(transformers.LlamaForCausalLM(config)) is not None
    assert SplitModel.of(Skipping(config)) is None

    class Flat(transformers.LlamaForCausalLM):
        """Uses modules of its decoder, which it never calls."""

        def forward(self, input_ids=None, **kwargs):
            hidden = self.model.norm(self.model.embed_tokens(input_ids))
            return transformers.modeling_outputs.CausalLMOutput(logits=self.lm_head(hidden))

    assert SplitModel.of(Flat(config)) is None


def test_a_longer_list_of_layers_that_is_no_decoder_is_passed_over():
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(9))

        def forward(self, input_ids, **kwargs):
            return self.layers[0](input_ids.float()[:, :1])

    model = tiny.build()
    model.tower = Tower()
    with pytest.raises(RuntimeError):
        model.tower(torch.zeros(2, 3))
    split = SplitModel.of(model)
    assert split is not None and split.decoder is model.model


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_on_a_gpu(dtype):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = build_family("gemma2", final_logit_softcapping=2.0).to("cuda", dtype)
    split = SplitModel.of(model)
    inputs = {name: tensor.cuda() for name, tensor in batch().items()}
    with torch.no_grad():
        whole = model(**inputs).logits.flatten(0, 1)
        parts = split.logits(split.hidden(**inputs).flatten(0, 1))
    torch.testing.assert_close(parts, whole, atol=0.02, rtol=0.02)

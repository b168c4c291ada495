"""The rows of every family: found by structure, bare and PEFT-wrapped, and shown to make the entries they should."""

import copy

import pytest
import torch
import transformers
from helpers import zoo_of_families
from helpers.zoo_of_families import FAMILIES, HIDDEN, LAYERS, build_family, with_lora
from torch import nn

from macdrop.errors import UnsupportedModel
from macdrop.families import FFN, find_ffn, find_ffns, peel
from macdrop.scan.states import bos_states

DENSE = [name for name, family in FAMILIES.items() if family.kind != "experts"]
ROUTED = [name for name, family in FAMILIES.items() if family.kind == "experts"]
TOKENS = torch.tensor([[1, 5, 9, 33]])


def zero_rows(ffn: FFN, entries: list[int]) -> None:
    with torch.no_grad():
        for projection in ffn.projections:
            projection.matrix()[projection.features(entries)] = 0


def intermediate(model: nn.Module, ffn: FFN) -> torch.Tensor:
    """The input of the down projection in a forward pass of the whole model: (tokens, I)."""
    seen = []
    handle = ffn.down.register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(input_ids=TOKENS)
    handle.remove()
    return seen[0].reshape(-1, ffn.intermediate_size)


def check_roles_are_apart(ffn: FFN) -> None:
    """Gate and up rows of one fused matrix are different rows, and all of it. (Either alone silences an entry.)"""
    gate, up = ffn.projections
    every = range(ffn.intermediate_size)
    if gate.tensor is up.tensor:
        assert sorted(gate.features(every) + up.features(every)) == list(range(2 * ffn.intermediate_size))


def check_silenced(before: torch.Tensor, after: torch.Tensor, entries: list[int], biased: bool) -> None:
    others = [i for i in range(before.shape[1]) if i not in entries]
    assert (before[:, entries].abs().amax(0) > 1e-6).all(), "entries that were zero before prove nothing"
    torch.testing.assert_close(after[:, others], before[:, others])
    if biased:  # act(bias), whatever the token is
        torch.testing.assert_close(after[:, entries], after[:1, entries].expand(len(after), -1))
    else:
        assert (after[:, entries] == 0).all()


@pytest.mark.parametrize("name", DENSE)
def test_found_rows_produce_exactly_their_entries_of_a_dense_ffn(name):
    model = build_family(name)
    ffns = find_ffns(model)
    assert [ffn.layer for ffn in ffns] == list(range(LAYERS))
    ffn = ffns[2]
    assert (ffn.kind, ffn.path, ffn.hidden_size) == (FAMILIES[name].kind, FAMILIES[name].path, HIDDEN)
    assert model.get_submodule(ffn.path) is ffn.module
    if ffn.gated:
        check_roles_are_apart(ffn)
    assert {p.role for p in ffn.projections} == ({"up"} if ffn.kind in ("plain", "conv1d") else {"gate", "up"})
    before = intermediate(model, ffn)
    live = [i for i in range(ffn.intermediate_size) if before[:, i].abs().max() > 1e-6]  # ReLU silences the others
    entries = [live[0], live[3], live[-1]]
    zero_rows(ffn, entries)
    check_silenced(before, intermediate(model, ffn), entries, any(p.bias is not None for p in ffn.projections))


@pytest.mark.parametrize("name", ROUTED)
@pytest.mark.parametrize("size", [zoo_of_families.EXPERT_FFN, HIDDEN], ids=["half", "square"])
def test_found_rows_produce_exactly_their_entries_of_one_expert(name, size):
    """With the identity as down projection, the experts' output shows the intermediate state itself."""
    key = "moe_intermediate_size" if "qwen" in name else "intermediate_size"
    model = build_family(name, **{key: size})
    ffn = find_ffns(model)[2]
    assert (ffn.kind, ffn.path, ffn.num_experts, ffn.intermediate_size) == ("experts", FAMILIES[name].path, 4, size)
    check_roles_are_apart(ffn)
    experts = ffn.module
    with torch.no_grad():
        experts.down_proj.zero_()
        experts.down_proj[:, range(size), range(size)] = 1
        for parameter_name, parameter in experts.named_parameters():
            if parameter_name == "down_proj_bias":
                parameter.zero_()
    tokens = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(3))

    def run(expert: int) -> torch.Tensor:
        with torch.no_grad():
            if name == "llama4":
                return experts(tokens.repeat(4, 1)).view(4, 5, HIDDEN)[expert, :, :size]
            return experts(tokens, torch.full((5, 1), expert), torch.ones(5, 1))[:, :size]

    before, before_other = run(2), run(1)
    entries = [0, 3, size - 1]
    zero_rows(find_ffn(model, ffn.path, expert=2), entries)
    check_silenced(before, run(2), entries, biased=name == "gpt_oss")
    assert torch.equal(run(1), before_other)


def test_gpt_oss_is_read_as_transposed_and_interleaved():
    gate, up = find_ffns(build_family("gpt_oss"))[0].projections
    assert (gate.offset, gate.stride, gate.transposed) == (0, 2, True)
    assert (up.offset, up.stride, up.features([0, 3])) == (1, 2, [1, 7])


def test_interleaved_layout_is_known_without_the_gating_function(monkeypatch):
    """Releases of transformers before the experts interface have no `_apply_gate`."""
    model = build_family("gpt_oss")
    monkeypatch.delattr(type(find_ffns(model)[0].module), "_apply_gate")
    assert find_ffns(model)[0].projections[1].stride == 2


@pytest.mark.parametrize("name", list(FAMILIES))
def test_bare_and_peft_wrapped_models_give_the_same_ffns(name):
    model = build_family(name)
    bare = find_ffns(model)
    wrapped = find_ffns(with_lora(name, model))
    for one, other in zip(bare, wrapped, strict=True):
        for a, b in [(one, other), *([(one.shared, other.shared)] if one.shared else [])]:
            assert (a.layer, a.path, a.kind, a.intermediate_size) == (b.layer, b.path, b.kind, b.intermediate_size)
            assert a.module is b.module
            for p, q in zip(a.projections, b.projections, strict=True):
                assert p.tensor is q.tensor and p.bias is q.bias
                assert (p.role, p.offset, p.stride, p.transposed) == (q.role, q.offset, q.stride, q.transposed)
                assert p.wrapper is None
                if a.kind != "experts" and not FAMILIES[name].parameters or a.kind == "experts":
                    assert q.wrapper is not None and peel(q.wrapper) is q.module


@pytest.mark.parametrize("name", [n for n in ROUTED if FAMILIES[n].dense_layers or FAMILIES[n].shared])
def test_dense_layers_and_shared_experts_of_a_mixture(name):
    family, ffns = FAMILIES[name], find_ffns(build_family(name))
    for ffn in ffns:
        dense = ffn.layer in family.dense_layers
        assert ffn.kind == ("gated" if dense else "experts")
        assert (ffn.shared.path if ffn.shared else None) == (
            family.shared.replace(".2.", f".{ffn.layer}.") if family.shared and not dense else None
        )


def test_shared_expert_rows_produce_exactly_their_entries():
    model = build_family("qwen2_moe")
    shared = find_ffn(model, FAMILIES["qwen2_moe"].shared)
    before = intermediate(model, shared)
    zero_rows(shared, [0, 11])
    check_silenced(before, intermediate(model, shared), [0, 11], biased=False)


class ExpertList(nn.Module):
    """Routed experts as modules of their own, as models with their own code have them."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, 3, bias=False)
        self.experts = nn.ModuleList(copy.deepcopy(mlp) for _ in range(3))

    def forward(self, x):
        chosen = int(self.gate(x)[0, 0].argmax())
        return self.experts[chosen](x)


def test_a_list_of_expert_modules_is_a_mixture():
    model = build_family("mistral")
    for layer in model.model.layers:
        layer.mlp = ExpertList(layer.mlp)
    ffn = find_ffns(model)[1]
    assert (ffn.kind, ffn.num_experts, ffn.path) == ("experts", 3, "model.layers.1.mlp.experts")
    part = bos_states(model, 1).intermediates[1][0]
    assert part.ffn.path == f"model.layers.1.mlp.experts.{part.expert}"
    assert find_ffn(model, part.ffn.path).kind == "gated"


class Named(nn.Module):
    """An FFN under names that no table has, with a dropout."""

    def __init__(self, kind: str):
        super().__init__()
        width = {"plain": 40, "halves": 80, "alternating": 80, "gated": 40}[kind]
        self.kind, self.alpha, self.omega = kind, nn.Linear(HIDDEN, width), nn.Linear(40, HIDDEN)
        if kind == "gated":
            self.beta = nn.Linear(HIDDEN, 40)

    def forward(self, x):
        y = self.alpha(x)
        if self.kind == "plain":
            state = y.relu()
        elif self.kind == "halves":
            state = y[..., :40] * nn.functional.silu(y[..., 40:])
        elif self.kind == "alternating":
            state = nn.functional.silu(y[..., ::2]) * y[..., 1::2]
        else:
            state = y * nn.functional.gelu(self.beta(x))
        return self.omega(nn.functional.dropout(state, 0.5, self.training))


@pytest.mark.parametrize(
    ("kind", "found", "stride"),
    [("plain", "plain", 1), ("halves", "fused", 1), ("alternating", "fused", 2), ("gated", "gated", 1)],
)
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "lora"])
def test_ffns_with_unknown_names_are_recognised_by_their_behaviour(kind, found, stride, wrapped):
    model = build_family("mistral")
    for layer in model.model.layers:
        layer.mlp = Named(kind)
    if wrapped:
        model = with_lora("mistral", model)
    model.train()
    ffn = find_ffns(model)[1]
    assert model.training and (ffn.kind, ffn.path, ffn.intermediate_size) == (found, "model.layers.1.mlp", 40)
    assert {projection.stride for projection in ffn.projections} == {stride}
    if found != "plain":
        check_roles_are_apart(ffn)
    if found == "gated":
        assert [projection.module for projection in ffn.projections] == [peel(ffn.module.beta), peel(ffn.module.alpha)]
    for projection in ffn.projections:
        nn.init.zeros_(projection.bias)
    model.eval()
    if not wrapped:
        before = intermediate(model, ffn)
        live = [i for i in range(40) if before[:, i].abs().max() > 1e-6]
        zero_rows(ffn, live[:3])
        check_silenced(before, intermediate(model, ffn), live[:3], biased=False)


class Odd(nn.Module):
    """Features that mix before the down projection: no row makes one entry alone."""

    def __init__(self):
        super().__init__()
        self.widen, self.narrow = nn.Linear(HIDDEN, 40), nn.Linear(40, HIDDEN)

    def forward(self, x):
        return self.narrow(self.widen(x).softmax(-1))


class Mixer(Odd):
    """Shapes of an FFN, but tokens see each other."""

    def forward(self, x):
        return self.narrow(self.widen(x).cumsum(1))


@pytest.mark.parametrize("odd", [Odd, Mixer])
def test_an_unknown_structure_is_refused_with_what_was_found(odd):
    model = build_family("mistral")
    for layer in model.model.layers:
        layer.mlp = odd()
    with pytest.raises(UnsupportedModel) as error:
        find_ffns(model)
    message = str(error.value)
    assert "MistralForCausalLM" in message and "mlp.widen.weight: (40, 32)" in message
    assert "gate_proj/up_proj/down_proj" in message and "fc1/fc2" in message


def test_known_names_with_mismatched_shapes_are_not_an_ffn():
    model = build_family("mistral")
    for layer in model.model.layers:
        layer.mlp.up_proj = nn.Linear(HIDDEN, 7)
    with pytest.raises(UnsupportedModel, match=r"up_proj.weight: \(7, 32\)"):
        find_ffns(model)


def test_two_dense_ffns_in_one_layer_are_refused():
    model = build_family("mistral")
    model.model.layers[0].second = copy.deepcopy(model.model.layers[0].mlp)
    with pytest.raises(UnsupportedModel, match=r"(?s)more than one feed-forward.*\.second \(gated"):
        find_ffns(model)


def test_an_unknown_path_is_refused():
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.0\.mlp"):
        find_ffn(build_family("mistral"), "model.layers.9.mlp")


def test_a_model_without_layers_is_refused():
    with pytest.raises(UnsupportedModel, match="no feed-forward network"):
        find_ffns(nn.Sequential(nn.Linear(2, 2)))


def test_encoder_only_structures_are_unknown():
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    with pytest.raises(UnsupportedModel, match="intermediate.dense.weight"):
        find_ffns(transformers.BertModel(config))


@pytest.mark.parametrize("name", ["llama", "phi3", "glm4"])
def test_the_half_named_gate_is_the_one_under_the_activation(name):
    """The up half enters linearly: with its sign turned the entry turns its sign; with the gate's it does not."""
    model = build_family(name)
    ffn = find_ffns(model)[2]
    for projection in ffn.projections:
        if projection.bias is not None:
            torch.nn.init.zeros_(projection.bias)
    before = intermediate(model, ffn)
    for projection in ffn.projections:
        row = projection.matrix()[projection.features([5])]
        with torch.no_grad():
            projection.matrix()[projection.features([5])] = -row
        turned = torch.allclose(intermediate(model, ffn)[:, 5], -before[:, 5], atol=1e-6)
        with torch.no_grad():
            projection.matrix()[projection.features([5])] = row
        assert turned == (projection.role == "up")

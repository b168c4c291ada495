"""The scan: the layer rule on hand-made states, planted rows found in every kind of FFN, and nothing left behind."""

import json
import math

import pytest
import torch
import transformers
from helpers.zoo_of_families import FAMILIES, HIDDEN, build_family, with_expert_lists, with_lora
from torch import nn

from macdrop.errors import ConfigError, NoMassiveWeights, UnsupportedModel
from macdrop.families import FFN, find_ffn, find_ffns
from macdrop.scan import choose_bos, find_massive_weights, massive_layer, prove
from macdrop.scan.states import bos_states

ROWS = (9, 2, 13)
SIZES = (6.0, 5.0, 4.0)  # pre-activations of the planted rows; GPT-OSS clamps at 7
SPIKE = 3  # the entry of the hidden state that they write to


def find(model, **settings):
    return find_massive_weights(model, source="test", fingerprint="f", **{"bos_token_id": 1, **settings})


# --- the rule for the layer, on hand-made hidden states: entry 0 is the spike, by layer, the embedding first


def layer_of(*spike: float, noise: float = 0.5, other: tuple[float, ...] | None = None, ffn=None) -> int:
    hidden = torch.full((len(spike), 16), noise)
    hidden[:, 0] = torch.tensor(spike)
    if other:
        hidden[:, 1] = torch.tensor(other)
    states = [torch.ones(8) if ffn is None or i in ffn else None for i in range(len(spike) - 1)]
    return massive_layer(hidden, states)[0]


def test_layer_where_the_spike_is_written_and_later_erased():
    assert layer_of(0.1, 0.2, 300, 301, 302, 303, 1.0) == 1  # Llama-3-8B in small
    assert layer_of(0.1, 0.2, 0.3, 5, 900, 910, 900, 2.0) == 3  # Llama-2-13B in small
    assert layer_of(0.1, 250, 250, 250, 0.1) == 0
    assert layer_of(0.1, -0.2, -300, -300, -300, 4.0) == 1  # the sign is of no account


def test_first_written_not_largest():
    assert layer_of(0.1, 200, 350, 360, 2) == 0  # two steps, the first the larger
    assert layer_of(0.1, 0.2, 160, 400, 410, 3) == 1  # two steps, 40 and 60 %
    assert layer_of(0.1, 100, 200, 300, 400, 400, 2) == 0  # steady growth
    assert layer_of(0.1, 60, 400, 400, 2) == 1  # a small step first does not count
    assert layer_of(0.1, 300, 300, 300, 420, 420, 1) == 0  # largest long after it was written


def test_spikes_that_no_ffn_wrote_or_reads_do_not_count():
    # An embedding larger than what is written later, kept and then erased.
    assert layer_of(0.1, 0.1, 90, 90, 90, 1, other=(500, 500, 500, 500, 500, 1)) == 1
    # The last layer writes most: only the head reads it.
    assert layer_of(0.1, 0.2, 100, 100, 100, other=(0.1, 0.1, 0.1, 0.1, 4000)) == 1
    # Written and taken back by the very next layer.
    assert layer_of(0.1, 0.1, 80, 80, 80, 1, other=(0.1, 500, 0.1, 0.1, 0.1, 0.1)) == 1
    # The last layer erases by writing the opposite sign.
    assert layer_of(0.1, 0.2, 100, 100, -100) == 1


def test_layer_without_an_ffn_is_never_chosen():
    assert layer_of(0.1, 300, 500, 500, 1, ffn={1, 3}) == 1
    assert layer_of(0.1, 300, ffn={0}) == 0  # one layer in all


def test_confidence_in_words_and_numbers():
    hidden = torch.full((5, 16), 0.2)
    hidden[2:4, 0] = 400.0
    state = torch.full((32,), 0.5)
    state[3] = 1000.0
    quiet = torch.full((32,), 0.5)
    layer, confidence = massive_layer(hidden, [quiet, state, quiet, quiet])
    assert (layer, confidence.level, confidence.share) == (1, "strong", 1.0)
    assert confidence.top_over_median == pytest.approx(2000) and confidence.spike_over_median == pytest.approx(2000)
    assert "layer 1" in confidence.text and "2000 times the median" in confidence.text
    assert massive_layer(hidden / 10, [quiet, state, quiet, quiet])[1].level == "moderate"  # spike 40, below 100
    hidden[2:4, 0] = 2.0
    assert massive_layer(hidden, [quiet] * 4)[1].level == "weak"
    hidden = torch.full((6, 16), 0.2)
    hidden[2:5, 0] = torch.tensor([100.2, 260.2, 260.2])
    _, confidence = massive_layer(hidden, [quiet] * 5)
    assert confidence.share == pytest.approx(0.625) and "a later layer writes 1.6 times as much" in confidence.text


def test_median_of_zero_falls_back_to_active_entries():
    state = torch.zeros(32)
    state[:5] = torch.tensor([100.0, 1, 1, 1, 1])
    hidden = torch.ones(4, 8)
    assert massive_layer(hidden, [state] * 3)[1].top_over_median == 100


# --- planted rows


def ffn_input(model, ffn: FFN) -> torch.Tensor:
    """The input of the FFN at bos: (d,)."""
    seen = []
    owner = ffn.module if ffn.kind == "experts" else ffn.projections[0].module
    handle = owner.register_forward_pre_hook(lambda _module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(input_ids=torch.tensor([[1]]))
    handle.remove()
    tokens = seen[0].reshape(-1, HIDDEN)
    return tokens[tokens.norm(dim=-1).argmax()]


def plant(model, ffn: FFN) -> None:
    """Make ROWS answer bos with SIZES before the activation, and write the result to entry SPIKE of the stream."""
    x = ffn_input(model, ffn)
    with torch.no_grad():
        for projection in ffn.projections:
            if projection.bias is not None:
                projection.bias.zero_()
            matrix = projection.matrix()
            for row, size in zip(ROWS, SIZES, strict=True):
                matrix[projection.features([row])[0]] = size * x / x.dot(x)
        down = ffn.module.down_proj[ffn.projections[0].expert] if ffn.kind == "experts" else ffn.down.weight
        if down.shape[0] == ffn.intermediate_size:  # stored (in, out)
            down = down.T
        down[:, list(ROWS)] = 0
        down[SPIKE, list(ROWS)] = 40.0


def expected(ffn: FFN) -> torch.Tensor:
    sizes = torch.tensor(SIZES)
    act = (
        next(m for n, m in ffn.module.named_children() if "act" in n or "gelu" in n) if ffn.down else ffn.module.act_fn
    )
    return act(sizes) * sizes if ffn.gated else act(sizes)


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "opt", "gpt_neox", "bloom", "gpt2", "mixtral", "gpt_oss"])
def test_planted_rows_are_found_in_order(name):
    model = build_family(name)
    ffn = bos_states(model, 1).intermediates[1][0].ffn
    plant(model, ffn)
    weights = find(model)
    assert (weights.layer, weights.path, weights.kind) == (1, ffn.path, ffn.kind)
    assert weights.top(3) == ROWS
    assert weights.expert == ffn.projections[0].expert
    assert sorted(weights.indices) == list(range(ffn.intermediate_size))
    assert list(weights.magnitudes) == sorted(weights.magnitudes, reverse=True)
    if name == "gpt_oss":
        size = torch.tensor(SIZES)
        torch.testing.assert_close(
            torch.tensor(weights.magnitudes[:3]), (size + 1) * size * torch.sigmoid(size * 1.702)
        )
    elif name != "opt":  # its activation belongs to the layer
        torch.testing.assert_close(torch.tensor(weights.magnitudes[:3]), expected(ffn), rtol=1e-4, atol=1e-4)
    assert weights.layers[1].intermediate_max == weights.magnitudes[0]
    assert weights.layers[1].hidden_max > 50 * weights.layers[0].hidden_max


@pytest.mark.parametrize("name", ["qwen2_moe", "llama4"])
@pytest.mark.parametrize("shared", [False, True], ids=["routed", "shared"])
def test_routed_and_shared_ffn_of_a_spike_are_told_apart(name, shared):
    model = build_family(name, num_hidden_layers=4, mlp_only_layers=[]) if name == "qwen2_moe" else build_family(name)
    layer = 1 if name == "qwen2_moe" else 0
    parts = bos_states(model, 1).intermediates[layer]
    ffn = parts[1].ffn if shared else parts[0].ffn
    plant(model, ffn)
    weights = find(model)
    assert (weights.layer, weights.path, weights.top(3)) == (layer, ffn.path, ROWS)
    assert weights.expert == (None if shared else parts[0].expert)
    assert weights.kind == ("gated" if shared else "experts")


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "llama4"])
def test_routed_states_equal_what_the_experts_module_computes(name):
    """With the identity as down projection and one expert per token, the output is the weighted state."""
    model = build_family(name, num_experts_per_tok=1, seed=4)
    ffn = find_ffns(model)[2]
    size, seen = ffn.intermediate_size, []
    with torch.no_grad():
        ffn.module.down_proj.zero_()
        ffn.module.down_proj[:, range(size), range(size)] = 1
        if name == "gpt_oss":
            ffn.module.down_proj_bias.zero_()
    handle = ffn.module.register_forward_hook(lambda _module, _args, output: seen.append(output))
    part = bos_states(model, 1).intermediates[2][0]
    handle.remove()
    output = seen[0].view(-1, HIDDEN)[part.expert if name == "llama4" else 0][:size]
    ratio = output.norm() / part.state.norm()
    torch.testing.assert_close(output, part.state * ratio, rtol=1e-4, atol=1e-5)
    assert name == "llama4" and ratio == pytest.approx(1, rel=1e-4) or 0 < ratio <= 1.0001
    assert part.ffn.projections[0].expert == part.expert


def test_expert_with_the_largest_routing_weight_is_chosen():
    model = build_family("mixtral", num_experts_per_tok=3)
    seen = {}
    ffn = find_ffns(model)[1]
    handle = ffn.module.register_forward_pre_hook(lambda _module, args: seen.update(index=args[1], weight=args[2]))
    part = bos_states(model, 1).intermediates[1][0]
    handle.remove()
    assert part.expert == int(seen["index"][0, seen["weight"][0].argmax()])


@pytest.mark.parametrize("everywhere", [False, True], ids=["chosen", "everywhere"])
@pytest.mark.parametrize("seed", range(3))
def test_a_list_of_experts_is_scanned_as_the_same_experts_fused(seed, everywhere):
    """Also where experts run that bos is not routed to, and where zeroing rows makes another state the largest."""
    fused = build_family("mixtral", seed=seed)
    plant(fused, bos_states(fused, 1).intermediates[1][0].ffn)
    first, expected = bos_states(fused, 1).intermediates[1][0], find(fused)
    model = with_expert_lists(fused, everywhere=everywhere)
    parts = bos_states(model, 1).intermediates[1]
    assert len(parts) == (4 if everywhere else 2)
    assert parts[0].expert == first.expert and parts[0].weight > parts[1].weight > 0
    assert sum(part.weight for part in parts) == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(parts[0].state, first.state, rtol=1e-4, atol=1e-5)
    weights = find(model)
    assert weights.path == f"{expected.path}.{expected.expert}"
    assert (weights.layer, weights.expert, weights.top(3)) == (expected.layer, expected.expert, ROWS)
    torch.testing.assert_close(weights.magnitudes, expected.magnitudes, rtol=1e-4, atol=1e-5)
    ids = torch.randint(3, 64, (5, 9), generator=torch.Generator().manual_seed(0))
    proof = prove(model, ids, weights, k=2)
    fused = build_family("mixtral", seed=seed)
    plant(fused, bos_states(fused, 1).intermediates[1][0].ffn)
    fused_proof = prove(fused, ids, expected, k=2)
    for name in ("untouched", "zeroed", "retained", "random"):
        assert getattr(proof, name) == pytest.approx(getattr(fused_proof, name), rel=1e-4)


def test_the_called_expert_that_writes_the_spike_is_found_whatever_its_routing_weight():
    model = with_expert_lists(build_family("mixtral"))
    second = bos_states(model, 1).intermediates[1][1]
    plant(model, second.ffn)
    weights = find(model)
    assert (weights.layer, weights.path, weights.expert, weights.top(3)) == (1, second.ffn.path, second.expert, ROWS)


def test_every_list_of_experts_can_be_scanned():
    for seed in range(8):
        for everywhere in (False, True):
            for top in (1, 2, 3):
                model = build_family("mixtral", seed=seed, num_experts_per_tok=top)
                find(with_expert_lists(model, everywhere=everywhere))


def test_bfloat16_finds_the_same_rows():
    model = build_family("llama")
    plant(model, find_ffns(model)[1])
    exact = find(model)
    rough = find(model.to(torch.bfloat16))
    assert (rough.layer, rough.top(3)) == (exact.layer, exact.top(3))
    assert rough.magnitudes[0] == pytest.approx(exact.magnitudes[0], rel=0.02)


@pytest.mark.gpu
def test_on_a_gpu_in_bfloat16():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for name in ("llama", "mixtral", "gpt_oss", "gpt2"):
        model = build_family(name)
        plant(model, bos_states(model, 1).intermediates[1][0].ffn)
        weights = find(model.to("cuda", torch.bfloat16))
        assert (weights.layer, weights.top(3)) == (1, ROWS)


def test_scan_leaves_the_model_unchanged():
    model = with_lora("llama", build_family("llama")).train()
    model.base_model.model.model.layers[0].eval()  # modes may differ by module
    modes = [module.training for module in model.modules()]
    loss = model(input_ids=torch.tensor([[1, 4, 5]]), labels=torch.tensor([[1, 4, 5]])).loss
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert find(model) == find(model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(p.grad, gradients[n]) for n, p in model.named_parameters() if n in gradients)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks


def test_bare_and_wrapped_models_give_the_same_finding():
    model = build_family("llama")
    bare = find(model)
    from peft import LoraConfig, get_peft_model

    assert find(get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))) == bare  # B starts at zero


def test_wrong_weight_layout_is_detected(monkeypatch):
    """The scan zeroes the rows it found and checks that their entries vanish."""
    import macdrop.structure

    monkeypatch.setattr(macdrop.structure, "_interleaved", lambda *_: True)
    model = build_family("phi3")
    with pytest.raises(UnsupportedModel, match="do not make the intermediate state"):
        find(model)


def test_a_silent_ffn_has_no_massive_weights():
    model = build_family("llama")
    for ffn in find_ffns(model):
        for projection in ffn.projections:
            nn.init.zeros_(projection.tensor)
            nn.init.zeros_(projection.bias)
    with pytest.raises(NoMassiveWeights, match="zero at bos"):
        find(model)


def test_non_finite_states_are_refused():
    model = build_family("llama")
    nn.init.constant_(model.model.layers[0].mlp.down_proj.weight, math.inf)
    with pytest.raises(NoMassiveWeights, match="layers.0.mlp.down_proj.weight holds inf or NaN in 768 of its 768"):
        find(model)


def test_layers_that_run_twice_are_refused():
    model = build_family("llama")
    layers = model.model.layers
    forward = layers[0].forward
    layers[0].forward = lambda x, **kwargs: layers[1](forward(x, **kwargs), **kwargs)
    with pytest.raises(UnsupportedModel, match="3 decoder layers 4 times"):
        find(model)


# --- which token stands for bos


class Words:
    """A tokenizer with only the attributes that the rule reads."""

    def __init__(self, bos=None, eos=None, words=()):
        self.bos_token_id, self.eos_token_id, self.words = bos, eos, words

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.words)}


def config(**values):
    return transformers.LlamaConfig(**{"vocab_size": 10, "bos_token_id": None, "eos_token_id": None, **values})


@pytest.mark.parametrize(
    ("tokenizer", "settings", "given", "token", "rule"),
    [
        (Words(bos=1, eos=2), {"bos_token_id": 5}, 7, 7, "given"),
        (Words(bos=1, eos=2, words=["<|endoftext|>"]), {"bos_token_id": 5}, None, 1, "tokenizer"),
        (Words(eos=2, words=["a", "b", "c", "<|endoftext|>"]), {"bos_token_id": 5}, None, 3, "separator"),
        (Words(eos=2), {"bos_token_id": 5}, None, 5, "config"),
        (Words(eos=2), {"eos_token_id": 6}, None, 2, "eos"),
        (None, {"bos_token_id": 5}, None, 5, "config"),
        (None, {"eos_token_id": [6, 7]}, None, 6, "eos"),
    ],
)
def test_bos_rule(tokenizer, settings, given, token, rule):
    assert choose_bos(tokenizer, config(**settings), given) == (token, rule)


@pytest.mark.parametrize("given", [10, -1, 1.0, True])
def test_bos_outside_the_vocabulary_is_refused(given):
    with pytest.raises(ConfigError, match="vocabulary of 10"):
        choose_bos(None, config(), given)


def test_missing_bos_is_refused():
    with pytest.raises(ConfigError, match="bos_token_id=N"):
        choose_bos(Words(), config())


def test_the_rule_is_recorded():
    model = build_family("llama")
    assert find(model).bos_rule == "given"
    weights = find(model, bos_token_id=None)
    assert (weights.bos_token_id, weights.bos_rule) == (1, "config")


def test_every_family_can_be_scanned():
    for name in FAMILIES:
        weights = find(build_family(name))
        assert json.dumps(weights.to_dict())
        assert find_ffn(build_family(name), weights.path, weights.expert).intermediate_size == len(weights.indices)

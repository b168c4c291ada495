"""MacDrop leaves no trace when detached, refuses what it cannot mask, and never does nothing silently."""

import logging
import subprocess
import sys

import pytest
import torch
from helpers import tiny
from helpers.hook_cases import adapted, traces
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaMLP

from macdrop.config import MacDropConfig
from macdrop.errors import ConfigError, NoMassiveWeights, TrainingInvariantError, UnsupportedModel
from macdrop.hooks import MacDrop
from tune.training.quiet import quiet_libraries

K = len(tiny.ROWS)


def macdrop(model, family="llama", changes=None, **config) -> MacDrop:
    return MacDrop(model, tiny.massive_weights(family, **(changes or {})), MacDropConfig(**{"k": K, **config}))


@pytest.mark.parametrize(
    ("family", "matrices"), [("llama", 2), ("phi3", 2), ("opt", 1), ("gpt2", 1), ("mixtral", 2), ("gpt_oss", 2)]
)
def test_attach_returns_the_number_of_rows_and_detach_restores_the_model(family, matrices):
    settings = {"targets": ["q_proj", "k_proj"]} if family in tiny.EXPERTS else {"use_dora": True}
    model = tiny.lora(tiny.build(family), **settings)
    before = traces(model)
    drop = macdrop(model, family)
    for _ in range(2):  # usable again after detach
        assert drop.attach() == K * matrices
        assert drop.attached and traces(model) != before
        with drop.micro_step(0.5, 0):
            model(**tiny.batch(0)).loss.backward()
        drop.detach()
        assert not drop.attached and traces(model) == before
    drop.detach()  # harmless


def test_detach_restores_dora_functions_of_every_adapter():
    from peft import LoraConfig

    model = tiny.lora(tiny.build(), use_dora=True)
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", use_dora=True))
    wrapper = model.get_base_model().model.layers[1].mlp.up_proj
    layers = list(wrapper.lora_magnitude_vector.values())
    assert len(layers) == 2
    own = [(layer.get_weight_norm, layer.forward) for layer in layers]
    drop = macdrop(model)
    drop.attach()
    assert all(layer.get_weight_norm != norm for layer, (norm, _) in zip(layers, own, strict=True))
    drop.detach()
    assert [(layer.get_weight_norm, layer.forward) for layer in layers] == own


def test_a_disabled_config_attaches_nothing():
    model = tiny.lora(tiny.build())
    drop = macdrop(model, k=0)
    assert drop.attach() == 0
    assert traces(model) == traces(tiny.lora(tiny.build()))
    with drop.micro_step(0.5, 0):
        assert not drop.active


def test_active_only_between_begin_and_end_with_p_above_zero():
    model = tiny.lora(tiny.build())
    drop = macdrop(model)
    drop.attach()
    assert not drop.active
    drop.begin(0.0, 0)
    assert not drop.active
    drop.end()
    drop.begin(0.5, 1)
    assert drop.active
    model(**tiny.batch(0))
    drop.end()
    assert not drop.active
    assert drop.last_dropped == drop.entries_dropped > 0
    assert drop.entries_masked == 2 * K * tiny.HIDDEN


def test_calls_out_of_order_are_refused():
    model = tiny.lora(tiny.build())
    drop = macdrop(model)
    with pytest.raises(RuntimeError, match="not attached"):
        drop.begin(0.5, 0)
    with pytest.raises(RuntimeError, match="without begin"):
        drop.end()
    drop.attach()
    with pytest.raises(RuntimeError, match="attached already"):
        drop.attach()
    drop.begin(0.5, 0)
    with pytest.raises(RuntimeError, match="has not ended"):
        drop.begin(0.5, 1)
    drop.cancel()
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="0 to 1"):
            drop.begin(p, 1)
    assert not drop.active


@pytest.mark.parametrize(
    ("changes", "config", "error", "message"),
    [
        ({}, {"k": tiny.FFN + 1}, ConfigError, "(?s)49.*48"),
        ({"path": "model.layers.1.ffn"}, {}, UnsupportedModel, "model.layers.1.ffn"),
        ({"intermediate_size": 96}, {}, NoMassiveWeights, "(?s)96 features.*48 of 32"),
        ({"hidden_size": 64}, {}, NoMassiveWeights, "another model"),
        ({"indices": (5, 5, *range(46))}, {}, NoMassiveWeights, "no 5 different rows"),
        ({"indices": (5, 48, *range(46))}, {}, NoMassiveWeights, "no 5 different rows"),
    ],
)
def test_mismatched_scan_is_refused_without_a_trace(changes, config, error, message):
    model = tiny.lora(tiny.build())
    before = traces(model)
    with pytest.raises(error, match=message):
        macdrop(model, changes=changes, **config).attach()
    assert traces(model) == before


@pytest.mark.parametrize("expert", [None, 4])
def test_unknown_expert_is_refused(expert):
    with pytest.raises(NoMassiveWeights, match="which has 4 experts"):
        macdrop(tiny.build("mixtral"), "mixtral", changes={"expert": expert}).attach()


def test_all_rows_may_be_masked():
    model = tiny.lora(tiny.build())
    assert macdrop(model, k=tiny.FFN).attach() == 2 * tiny.FFN


@pytest.mark.parametrize("said", [False, True], ids=["in a library", "in a command that said it"])
def test_dora_on_sparse_rows_is_warned_of(caplog, said):
    """Once: by the row that has the fewest entries, and only where DoRA divides by its norm."""
    caplog.set_level(logging.WARNING, logger="macdrop.hooks")
    if said:
        quiet_libraries()
    for dora, kept in ((False, 4), (True, None), (True, 4)):
        caplog.clear()
        model = adapted(use_dora=dora)
        row = model.base_model.model.model.layers[1].mlp.up_proj.base_layer.weight
        with torch.no_grad():
            if kept:
                row[tiny.ROWS[0], kept:] = 0
        drop = macdrop(model, p0=0.8)
        drop.attach()
        assert ("4 non-zero entries loses them all in 41.0%" in caplog.text) == (dora and kept is not None and not said)


def test_trainable_rows_are_refused():
    model = tiny.build()
    model.model.layers[1].mlp.gate_proj.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match="(?s)trainable.*freeze"):
        macdrop(model).attach()


def test_a_merged_adapter_is_refused():
    model = tiny.lora(tiny.build())
    model.merge_adapter()
    with pytest.raises(ConfigError, match="unmerge"):
        macdrop(model).attach()


def test_weights_that_cannot_be_dequantised_are_refused():
    model = tiny.build()
    linear = model.model.layers[1].mlp.up_proj
    linear.weight = nn.Parameter((linear.weight * 100).to(torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match="(?s)Linear.weight.*int8.*cannot dequantise"):
        macdrop(model).attach()
    assert traces(model) == traces(tiny.build())


def test_adapter_added_after_attach_is_detected():
    from peft import LoraConfig

    model = tiny.lora(tiny.build(), use_dora=True)
    drop = macdrop(model)
    drop.attach()
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", use_dora=True))
    with pytest.raises(RuntimeError, match="added or removed after attach"):
        drop.begin(0.5, 0)
    assert not drop.active


def test_kernel_that_bypasses_the_layers_is_detected():
    model = tiny.build().train()
    mlp = model.model.layers[1].mlp
    drop = macdrop(model)
    drop.attach()
    mlp.forward = lambda x: mlp.down_proj(F.silu(F.linear(x, mlp.gate_proj.weight)) * F.linear(x, mlp.up_proj.weight))
    with pytest.raises(TrainingInvariantError, match="(?s)dropped nothing.*fused kernel"), drop.micro_step(0.5, 0):
        model(**tiny.batch(0)).loss.backward()
    assert not drop.active
    with drop.micro_step(0.0, 1):  # p = 0 drops nothing, as it should
        model(**tiny.batch(0)).loss.backward()


def test_an_error_in_the_step_comes_through_and_the_experts_are_restored():
    model = tiny.build("mixtral").train()
    stored = model.model.layers[1].mlp.experts.gate_up_proj
    before = stored.detach().clone()
    drop = macdrop(model, "mixtral")
    drop.attach()
    with pytest.raises(ZeroDivisionError), drop.micro_step(0.5, 0):
        assert not torch.equal(stored, before)
        raise ZeroDivisionError
    assert torch.equal(stored, before)
    drop.begin(0.5, 1)
    assert not torch.equal(stored, before)
    changed = {tuple(entry[:2]) for entry in (stored != before).nonzero().tolist()}
    assert changed <= {(2, row + half) for row in tiny.ROWS for half in (0, tiny.FFN)}  # expert 2, gate and up
    drop.detach()
    assert torch.equal(stored, before)


def test_late_backward_pass_through_restored_experts_is_an_error():
    """The weights of the forward pass are gone after end(); autograd must raise rather than use others."""
    model = tiny.lora(tiny.build("mixtral"), targets=["q_proj", "v_proj"])
    drop = macdrop(model, "mixtral")
    drop.attach()
    with drop.micro_step(0.5, 0):
        loss = model(**tiny.batch(0)).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_evaluating_masked_experts_is_refused():
    model = tiny.build("gpt_oss").train()
    drop = macdrop(model, "gpt_oss")
    drop.attach()
    with pytest.raises(TrainingInvariantError, match="eval mode"), drop.micro_step(0.5, 0):
        model.eval()(**tiny.batch(0))


def test_experts_that_are_modules_are_masked_by_output():
    class Experts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.router = nn.Linear(tiny.HIDDEN, 3, bias=False)
            self.experts = nn.ModuleList(LlamaMLP(config) for _ in range(3))

        def forward(self, x):
            choice = self.router(x).argmax(-1, keepdim=True)
            return sum((choice == i) * expert(x) for i, expert in enumerate(self.experts))

    model = tiny.build().train()
    model.model.layers[1].mlp = Experts(model.config).requires_grad_(False)
    drop = macdrop(model, changes={"path": "model.layers.1.mlp.experts.1", "expert": 1})
    assert drop.attach() == 2 * K
    hooked = [name for name, module in model.named_modules() if module._forward_hooks]
    assert hooked == [f"model.layers.1.mlp.experts.1.{name}_proj" for name in ("gate", "up")]
    with drop.micro_step(0.5, 0):
        model(**tiny.batch(0)).loss.backward()
    assert drop.entries_dropped > 0
    with drop.micro_step(0.5, 1):  # a micro-batch may send no token to this expert
        pass


def test_importing_the_method_loads_nothing_heavy():
    """The callback is left out: transformers loads PEFT itself for its Trainer."""
    code = (
        "import sys, macdrop\n"
        "assert 'torch' not in sys.modules\n"
        "from macdrop import MacDrop, MacDropConfig, attacked, find_ffns, find_massive_weights\n"
        "loaded = {'ray', 'deepspeed', 'peft', 'lm_eval'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)

"""Optimizers on plain tensors: against slow references in fp64 and their libraries, and what each keeps."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.zoo_of_families import build_family
from torch import nn

from macdrop.errors import ConfigError
from tune.config.run_spec import TrainSpec
from tune.training.lora import add_adapter
from tune.training.optimizers import libraries
from tune.training.optimizers.adapter_tensors import AdapterTensor, Base, Factor, adapter_tensors
from tune.training.optimizers.initial_weights import check_init, initial_weights
from tune.training.optimizers.method import SCALE, Method, is_faster, relative_state, state_bytes
from tune.training.optimizers.methods import METHODS, method_of
from tune.training.optimizers.slim_adam import check_rules

STEADY = {"lr_scheduler_type": "constant"}
SHAPES = {"A": (4, 48), "B": (40, 4), "large": (64, 80)}


def spec(optimizer: str = "adamw", **settings) -> TrainSpec:
    if optimizer == "slimadam":
        settings = {"slimadam_rules": {"A": "fan_in", "B": "fan_out"}, **settings}
    return TrainSpec(model_name_or_path="m", **{"zero_stage": 0, "optimizer": optimizer, **STEADY, **settings})


def tensors() -> dict[str, AdapterTensor]:
    found = {name: AdapterTensor("q_proj", Factor.B if name == "B" else Factor.A, s) for name, s in SHAPES.items()}
    return {**found, "magnitude": AdapterTensor("q_proj", Factor.MAGNITUDE, (40,))}


def draws(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(each.shape, generator=generator) for name, each in tensors().items()}


def live(method: Method) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    """Parameters, and an optimizer whose state is made as in an engine."""
    parameters = {name: nn.Parameter(draw) for name, draw in draws(0).items()}
    groups = method.groups(parameters, tensors())
    optimizer = method.build(groups) or torch.optim.AdamW(groups)
    names = {id(parameter): name for name, parameter in parameters.items()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = method.fresh(group, parameter, tensors()[names[id(parameter)]])
            optimizer.state[parameter] = state
    method.begin(optimizer.param_groups, lambda step: 0.01, 0)
    return parameters, optimizer


def update(parameters, optimizer, step: int, rate: float = 0.01) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group[SCALE]
    for name, gradient in draws(step).items():
        parameters[name].grad = gradient.clone()
    optimizer.step()


@pytest.mark.parametrize("optimizer", METHODS)
def test_an_optimizer_keeps_what_its_layout_says(optimizer):
    method = method_of(spec(optimizer))
    parameters, torch_optimizer = live(method)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for step in (1, 2):
        update(parameters, torch_optimizer, step)
    for name, parameter in parameters.items():
        state = torch_optimizer.state[parameter]
        layout = method.layout(tensors()[name])
        for part, kept in layout.items():
            assert tuple(state[part].shape) == kept.shape and state[part].dtype == kept.dtype, (name, part)
        beside = {key for key, value in state.items() if torch.is_tensor(value) and key not in layout}
        assert beside <= {"step", "qmap1", "qmap2"}, "all that steps change is in the layout"
        assert not torch.equal(parameter, before[name])


@pytest.mark.parametrize("optimizer", METHODS)
def test_state_that_is_put_back_continues_to_the_bit(optimizer):
    method = method_of(spec(optimizer, weight_decay=0.1))
    whole, first = live(method)
    resumed, second = live(method)
    for step in range(1, 5):
        update(whole, first, step)
        if step == 2:
            for name, parameter in resumed.items():
                parameter.data.copy_(whole[name])
                for part in method.layout(tensors()[name]):
                    second.state[parameter][part].copy_(first.state[whole[name]][part])
                state = second.state[parameter]
                if "step" in state:
                    state["step"] = torch.tensor(2.0) if torch.is_tensor(state["step"]) else 2
            method.begin(second.param_groups, lambda step: 0.01, 2)
    for step in (3, 4):
        update(resumed, second, step)
    assert all(torch.equal(resumed[name], parameter) for name, parameter in whole.items())


def test_lion_is_the_sign_of_interpolated_gradients():
    chosen = spec("lion", weight_decay=0.1, adam_beta2=0.99)
    parameters, optimizer = live(method_of(chosen))
    slow = {name: draw.double() for name, draw in draws(0).items()}
    momentum = {name: torch.zeros_like(draw) for name, draw in slow.items()}
    for step in range(1, 6):
        update(parameters, optimizer, step)
        for name, gradient in draws(step).items():
            sign = torch.sign(0.9 * momentum[name] + 0.1 * gradient.double())
            slow[name] = slow[name] * (1 - 0.01 * 0.1) - 0.01 * sign
            momentum[name] = 0.99 * momentum[name] + 0.01 * gradient.double()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.double(), slow[name], rtol=1e-5, atol=1e-6)


def test_eight_bits_are_near_adamw_and_take_a_quarter():
    results = {}
    for optimizer in ("adamw", "adamw_8bit"):
        parameters, torch_optimizer = live(method_of(spec(optimizer)))
        for step in range(1, 9):
            update(parameters, torch_optimizer, step)
        results[optimizer] = parameters
    moved = results["adamw"]["large"].detach() - draws(0)["large"]
    apart = (results["adamw"]["large"] - results["adamw_8bit"]["large"]).detach()
    assert 0 < float(apart.norm()) < 0.1 * float(moved.norm())
    torch.testing.assert_close(results["adamw"]["A"], results["adamw_8bit"]["A"], rtol=1e-5, atol=1e-6)
    assert relative_state(method_of(spec("adamw_8bit"))) == pytest.approx(0.508, abs=0.001)
    assert relative_state(method_of(spec())) == 2


OVER = {"none": (), "fan_in": (1,), "fan_out": (0,), "both": (0, 1)}


@pytest.mark.parametrize("a, b", [("fan_in", "fan_out"), ("fan_out", "none"), ("both", "fan_in")])
def test_slimadam_is_adamw_with_means_of_squared_gradients(a, b):
    chosen = spec("slimadam", weight_decay=0.1, adam_beta2=0.95, slimadam_rules={"q_proj/A": a, "B": b, "A": "none"})
    parameters, optimizer = live(method_of(chosen))
    slow = {name: draw.double() for name, draw in draws(0).items()}
    first, second = ({name: torch.zeros_like(draw) for name, draw in slow.items()} for _ in range(2))
    over = {"A": OVER[a], "large": OVER[a], "B": OVER[b], "magnitude": ()}
    for step in range(1, 6):
        update(parameters, optimizer, step)
        for name, gradient in draws(step).items():
            square = gradient.double() ** 2
            square = square.mean(over[name], keepdim=True).expand_as(square) if over[name] else square
            first[name] = 0.9 * first[name] + 0.1 * gradient.double()
            second[name] = 0.95 * second[name] + 0.05 * square
            change = (first[name] / (1 - 0.9**step)) / ((second[name] / (1 - 0.95**step)).sqrt() + 1e-8)
            slow[name] = slow[name] * (1 - 0.01 * 0.1) - 0.01 * change
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter.double(), slow[name], rtol=1e-5, atol=1e-6)
        kept = optimizer.state[parameter]["exp_avg_sq"].shape
        assert kept == torch.Size(1 if i in over[name] else size for i, size in enumerate(parameter.shape))


def test_slimadam_without_rules_is_adamw_to_the_bit():
    results = []
    for chosen in (spec(weight_decay=0.1), spec("slimadam", slimadam_rules={}, weight_decay=0.1)):
        parameters, optimizer = live(method_of(chosen))
        for step in range(1, 9):
            update(parameters, optimizer, step)
        results.append(parameters)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_rules_are_for_tensors_that_the_adapter_has():
    check_rules(tensors(), {"q_proj/A": "both", "magnitude": "fan_out"})
    with pytest.raises(ConfigError, match="'q_prj/A', and the adapter has no such tensors.*Did you mean 'q_proj/A'"):
        check_rules(tensors(), {"q_prj/A": "both"})


def test_slimadam_saves_nearly_all_second_moments():
    entries = sum(math.prod(each.shape) for each in tensors().values())
    slim = state_bytes(method_of(spec("slimadam")), tensors())
    assert slim == 4 * entries + 4 * (4 + 4 + 64 + 40)


def test_muon_makes_matrices_orthogonal_and_leaves_vectors_to_adamw():
    parameters, optimizer = live(method_of(spec("muon", use_dora=True)))
    adamw, other = live(method_of(spec("adamw")))
    update(parameters, optimizer, 1)
    update(adamw, other, 1)
    assert torch.equal(parameters["magnitude"], adamw["magnitude"])
    for name in SHAPES:
        steps = (draws(0)[name] - parameters[name]).detach().double()
        singular = torch.linalg.svdvals(steps / (0.01 * 0.2 * math.sqrt(max(SHAPES[name]))))
        assert 0.5 < float(singular.min()) and float(singular.max()) < 1.3, name


def test_schedule_free_is_its_library_and_its_average_the_mode_eval():
    chosen = spec("schedule_free_adamw", loraplus_lr_ratio=4, weight_decay=0.1)
    method = method_of(chosen)
    rates = [0.0, 0.005, 0.01, 0.01, 0.01]
    parameters, optimizer = live(method)
    method.begin(optimizer.param_groups, lambda step: rates[step - 1], 0)
    for step in range(1, 6):
        update(parameters, optimizer, step, rates[step - 1])
    scalars = [{key: group[key] for key in ("k", "lr_max", "weight_sum")} for group in optimizer.param_groups]
    method.begin(optimizer.param_groups, lambda step: rates[step - 1], 5)
    assert [{key: group[key] for key in ("k", "lr_max", "weight_sum")} for group in optimizer.param_groups] == scalars
    kept = {"z": {name: optimizer.state[parameter]["z"] for name, parameter in parameters.items()}}
    masters = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    result = method.result(masters, kept, optimizer.param_groups[0])
    assert method.masters(result) is masters
    averages = result.weights
    optimizer.eval()
    for name, parameter in parameters.items():
        torch.testing.assert_close(averages[name], parameter.detach(), rtol=1e-6, atol=1e-6)


def test_schedule_free_s_average_is_that_of_the_paper():
    """In fp64: x is the mean of the steps' own points z, weighted by the squared learning rate."""
    parameters, optimizer = live(method_of(spec("schedule_free_adamw")))
    x = z = y = draws(0)["A"].double()
    second = torch.zeros_like(z)
    for step in range(1, 6):
        update(parameters, optimizer, step)
        gradient = draws(step)["A"].double()
        second = 0.999 * second + 0.001 * gradient**2
        z = z - 0.01 * gradient / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        x = x + (z - x) / step
        y = 0.1 * z + 0.9 * x
    torch.testing.assert_close(parameters["A"].double(), y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
def test_lora_plus_has_the_groups_of_peft(dora):
    from peft.optimizers import create_loraplus_optimizer

    settings = {"use_dora": dora, "lora_rank": 2, "lora_target": ["q_proj", "down_proj", "embed_tokens"]}
    model = add_adapter(build_family("llama"), spec(loraplus_lr_ratio=4, **settings))
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=4)
    faster = {id(p) for group in theirs.param_groups if group["lr"] == 4 for p in group["params"]}
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = adapter_tensors(model)
    assert {name for name, p in named.items() if id(p) in faster} == {n for n, each in found.items() if is_faster(each)}
    method = method_of(spec(loraplus_lr_ratio=4, **settings))
    groups = method.groups(named, found)
    method.begin(groups, lambda step: 0.0, 0)
    assert {frozenset(map(id, group["params"])): group[SCALE] for group in groups}[frozenset(faster)] == 4
    assert sum(len(group["params"]) for group in groups) == len(named)
    assert len(method_of(spec(loraplus_lr_ratio=1)).groups(named, found)) == 1


def test_tensors_are_known_by_the_layers_that_hold_them():
    model = add_adapter(build_family("mixtral"), spec(lora_rank=2))
    found = {each.kind: each for each in adapter_tensors(model).values()}
    assert found["gate_up_proj/A"].base == Base.EXPERTS and not found["gate_up_proj/A"].is_matrix
    assert found["q_proj/B"] == AdapterTensor("q_proj", Factor.B, (32, 2))
    model = add_adapter(build_family("llama"), spec(lora_rank=2, use_dora=True, lora_target=["q_proj", "embed_tokens"]))
    found = {each.kind: each for each in adapter_tensors(model).values()}
    assert found["embed_tokens/B"].base == Base.EMBEDDING and not is_faster(found["embed_tokens/B"])
    assert found["q_proj/magnitude"].shape == (32,) and is_faster(found["q_proj/magnitude"])


def test_state_is_counted_over_the_adapter():
    found = tensors()
    entries = sum(math.prod(each.shape) for each in found.values())
    assert state_bytes(method_of(spec()), found) == 8 * entries
    assert state_bytes(method_of(spec("lion")), found) == 4 * entries
    assert state_bytes(method_of(spec("muon", use_dora=True)), found) == 4 * (entries + 40)


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal"])
def test_initial_weights_are_drawn_as_by_peft(init):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], init_lora_weights=init)
    model = get_peft_model(build_family("llama"), config)
    found = adapter_tensors(model)
    drawn = [initial_weights(found, {}, seed=seed, rank=8, init=init) for seed in (1, 1, 2)]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ours = drawn[0][name]
            assert ours.shape == parameter.shape and bool(ours.any()) == bool(parameter.any()), name
            assert float(ours.std()) == pytest.approx(float(parameter.std()), rel=0.5, abs=1e-6), name
            assert torch.equal(ours, drawn[1][name])
            assert not ours.any() or not torch.equal(ours, drawn[2][name])
    for name in found:
        if "lora_A" in name:
            product = drawn[0][name.replace("lora_A", "lora_B")] @ drawn[0][name]
            assert float(product.abs().max()) < 1e-6, "step 0 is the base model"


def test_only_linear_layers_start_orthogonal():
    found = adapter_tensors(add_adapter(build_family("llama"), spec(lora_target=["q_proj", "embed_tokens"])))
    check_init(found, "gaussian")
    with pytest.raises(ConfigError, match="embed_tokens \\(embedding\\)"):
        check_init(found, "orthogonal")


def test_a_missing_library_is_named_with_the_extra_that_brings_it(monkeypatch):
    def gone(library):
        raise ImportError(f"No module named {library!r}")

    monkeypatch.setattr(libraries.importlib, "import_module", gone)
    for optimizer, library in libraries.LIBRARIES.items():
        with pytest.raises(ConfigError, match=f"pip install 'macdrop\\[{libraries.EXTRAS[library]}\\]'"):
            libraries.check_library(optimizer)
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ConfigError, match=r"needs torch 2\.9"):
        libraries.check_library("muon")
    libraries.check_library("adamw")

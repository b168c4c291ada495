"""Every optimizer in a live engine: one that is reused gives the bits of a fresh run, and so does a resumed one."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.small import SMALL
from safetensors.torch import load_file

from tune.config.run_spec import TrainSpec

pytestmark = [pytest.mark.zero, pytest.mark.usefixtures("own_cache")]

STEPS, CUT = 4, 2
SETTINGS = {
    **SMALL,
    "max_steps": STEPS,
    "save_steps": CUT,
    "lr_scheduler_type": "constant_with_warmup",
    "macdrop": {"p0": 0.0},
}
CASES = {
    "adamw": {"loraplus_lr_ratio": 4, "zero_stage": 2, "bf16": True},
    "adamw_8bit": {"zero_stage": 0, "bf16": True, "lora_rank": 64},
    "lion": {"zero_stage": 2},
    "muon": {"zero_stage": 0, "bf16": True, "use_dora": True},
    "slimadam": {"zero_stage": 0, "bf16": True, "use_dora": True, "slimadam_rules": {"A": "fan_in", "B": "fan_out"}},
    "schedule_free_adamw": {"zero_stage": 1, "eval_steps": 1, "loraplus_lr_ratio": 4, "bf16": True},
}


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("optimizer", CASES)
def test_a_reused_engine_and_a_resumed_run_give_the_same_bits(optimizer, tmp_path):
    from tune.data import dataset as data
    from tune.storage.places import cache_dir
    from tune.training.engine import Engine
    from tune.training.finetune import finetune
    from tune.training.process_group import prepare_process

    prepare_process(1)
    first = TrainSpec(**{**SETTINGS, "optimizer": optimizer, **CASES[optimizer]})
    others = {"learning_rate": 1e-3, "adam_beta1": 0.8} if optimizer != "muon" else {"weight_decay": 0.1}
    other = first.model_copy(update={"seed": 3, **others})
    engine = Engine(first)
    prepared = data.load(data.prepare(first, engine.tokenizer, cache_dir() / "data"))

    def run(spec: TrainSpec, name: str, stop: int | None = None):
        def observe(metrics: dict) -> str:
            return "leave" if stop is not None and metrics["step"] >= stop else "go_on"

        return finetune(engine, spec, prepared, tmp_path / name, observe=observe)

    whole = run(first, "whole")
    assert run(first, "cut", stop=CUT - 1).status == "left"
    run(other, "other")
    resumed = run(first, "cut")
    assert resumed.resumed_from == CUT and resumed.eval_loss == whole.eval_loss
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "whole") != adapter(tmp_path / "other")
    assert whole.unmoved == [] and whole.optimizer_bytes > 0


def test_keys_that_differ_alone_give_other_bytes(tmp_path):
    from tune.training.single import train_here

    changes = [
        {},
        {"optimizer": "lion"},
        {"optimizer": "slimadam", "slimadam_rules": {"A": "fan_in"}},
        {"optimizer": "slimadam", "slimadam_rules": {"A": "fan_out"}},
        {"optimizer": "muon"},
        {"loraplus_lr_ratio": 2.0},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
    ]
    for number, change in enumerate(changes):
        spec = TrainSpec(**{**SETTINGS, "zero_stage": 0, "max_steps": 2, "warmup_ratio": 0.0, **change})
        train_here(spec, tmp_path / str(number), observe=None, threads=1)
    assert len({adapter(tmp_path / str(number)) for number in range(len(changes))}) == len(changes)


@pytest.mark.parametrize("bf16", [False, True])
def test_slimadam_without_rules_writes_the_bytes_of_adamw(tmp_path, bf16):
    from tune.training.single import train_here

    for name, change in {"adamw": {}, "slimadam": {"slimadam_rules": {}}}.items():
        spec = TrainSpec(**{**SETTINGS, "zero_stage": 0, "bf16": bf16, "optimizer": name, **change})
        train_here(spec, tmp_path / name, observe=None, threads=1)
    assert adapter(tmp_path / "adamw") == adapter(tmp_path / "slimadam")


def test_schedule_free_writes_and_validates_its_average(tmp_path):
    """The written adapter is x; a checkpoint has y and z as well, from which x follows."""
    from tune.training.checkpoint import AdapterState
    from tune.training.single import train_here

    spec = TrainSpec(**{**SETTINGS, "optimizer": "schedule_free_adamw", "zero_stage": 0, "val_size": 8})
    leave = lambda metrics: "leave" if metrics["step"] >= CUT else "go_on"  # noqa: E731
    train_here(spec, tmp_path, observe=leave, threads=1)
    (folder,) = (tmp_path / "checkpoints").glob("step-*3")
    state = AdapterState.load(folder)
    named = load_file(folder / "adapter_model.safetensors")
    for name, x in state.weights.items():
        y, z = state.optimizer["y"][name], state.optimizer["z"][name]
        assert ((0.9 * x + 0.1 * z) - y).abs().max() < 1e-6
    assert len(named) == len(state.weights)

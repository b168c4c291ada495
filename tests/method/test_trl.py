"""MacDropCallback in TRL's own SFTTrainer: its loss, its evaluation, its logs, on a built-in model."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from macdrop import (
    MacDropCallback,
    MacDropConfig,
    attacked,
    find_massive_weights,
    load_model,
    load_tokenizer,
)
from macdrop.errors import TrainingInvariantError
from tune.zoo.catalog import resolve

trl = pytest.importorskip("trl")
MODEL = "zoo:planted-llama"
STEPS, K = 12, 3


@pytest.fixture(scope="module")
def data():
    from datasets import Dataset

    with open(resolve("zoo:train"), encoding="utf-8") as file:
        rows = [json.loads(line) for line in file][:40]
    return Dataset.from_list([{"prompt": r["instruction"], "completion": f" {r['output']}"} for r in rows])


def sft(folder, data, callback=None, rate=2e-3):
    """A trainer that has trained: LoRA on all linear layers, an evaluation every six steps."""
    from peft import LoraConfig

    source = resolve(MODEL)
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=rate,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=6,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        max_length=64,
        seed=0,
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    trainer = trl.SFTTrainer(
        model=load_model(source),
        args=arguments,
        train_dataset=data.select(range(32)),
        eval_dataset=data.select(range(32, 40)),
        processing_class=load_tokenizer(source),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
        callbacks=[callback] if callback else None,
    )
    trainer.train()
    return trainer


def logged(trainer, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


@pytest.fixture(scope="module")
def plain(tmp_path_factory, data):
    return sft(tmp_path_factory.mktemp("plain"), data)


def test_masks_drop_entries_and_p_decays(tmp_path, data, plain):
    callback = MacDropCallback(None, MacDropConfig(k=K, p0=0.9, schedule="step"))
    trainer = sft(tmp_path, data, callback)
    p = logged(trainer, "macdrop/p")
    assert len(p) == STEPS and p == sorted(p, reverse=True) and p[0] > 0.8 and p[-1] < 0.1
    dropped = logged(trainer, "macdrop/entries_dropped")
    rows = 2 * K * trainer.model.config.hidden_size  # of W_gate and W_up, drawn once a step
    assert dropped == sorted(dropped)
    assert dropped[-1] == pytest.approx(sum(p) * rows, rel=0.1)
    assert logged(trainer, "loss")[0] > logged(plain, "loss")[0] + 0.1, "the first step was taken without massive rows"
    base = load_model(resolve(MODEL)).state_dict()
    trained = {
        name.replace("base_model.model.", "").replace("base_layer.", ""): value
        for name, value in trainer.model.state_dict().items()
    }
    assert all(trained[name].equal(value) for name, value in base.items()), "the base is as it was"


def test_p0_of_zero_is_training_without_the_callback(tmp_path, data, plain):
    trainer = sft(tmp_path, data, MacDropCallback(None, MacDropConfig(k=K, p0=0.0)))
    assert logged(trainer, "loss") == logged(plain, "loss")
    assert logged(trainer, "eval_loss") == logged(plain, "eval_loss")


def test_loss_goes_through_the_masked_layer_and_evaluation_does_not(tmp_path, data):
    """p = 1 throughout is the zeroing attack: TRL's own loss (computed in chunks) must be the attacked one."""
    import torch
    from torch.nn.functional import cross_entropy

    source = resolve(MODEL)
    base, tokenizer = load_model(source), load_tokenizer(source)
    weights = find_massive_weights(base, tokenizer, source=MODEL, fingerprint="")
    batches = []

    class Spy(MacDropCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            model.register_forward_pre_hook(lambda _, a, kw: batches.append(dict(kw)), with_kwargs=True)
            super().on_train_begin(args, state, control, model=model, **kwargs)

    trainer = sft(tmp_path, data, Spy(weights, MacDropConfig(k=K, p0=1.0, schedule="constant")), rate=0.0)

    def mean(batch) -> float:
        with torch.no_grad():
            logits = base(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
        return float(cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100))

    with attacked(base, weights, "zeroing", K):
        assert logged(trainer, "loss")[0] == pytest.approx(mean(batches[0]), rel=1e-3)
    whole = mean(batches[0])
    assert logged(trainer, "loss")[0] > whole + 0.1
    # With a learning rate of 0 the adapter is still nothing, so evaluation without masks is the base's own loss.
    evaluated = [batch for batch in batches if "labels" in batch][6:7]
    assert logged(trainer, "eval_loss")[0] == pytest.approx(mean(evaluated[0]), rel=1e-3)


def test_kernel_that_bypasses_the_layer_is_an_error_not_a_plain_run(tmp_path, data):
    """Fused LoRA kernels call no linear layer, so no hook runs and MacDrop would be disabled silently."""

    class Fused(MacDropCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            super().on_train_begin(args, state, control, model=model, **kwargs)
            for layer in model.base_model.model.model.layers:
                layer.mlp.forward = lambda x: x * 0.0

    with pytest.raises(TrainingInvariantError):
        sft(tmp_path, data, Fused(None, MacDropConfig(k=K, p0=0.9)))


def test_the_documented_axolotl_plugin_hands_out_a_callback_that_trains(tmp_path, data, monkeypatch):
    """Its lines run against the interface of Axolotl's BasePlugin, the callback in a real trainer."""
    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {"add_callbacks_pre_trainer": lambda self, cfg, model: []})
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    text = (Path(__file__).parents[2] / "tune/docs/integrations.md").read_text(encoding="utf-8")
    (code,) = [part for part in text.split("```python\n") if part.startswith("from axolotl")]
    names: dict = {}
    exec(code.partition("```")[0], names)
    (callback,) = names["MacDropPlugin"]().add_callbacks_pre_trainer(types.SimpleNamespace(seed=7), model=None)
    assert callback.config.seed == 7
    assert logged(sft(tmp_path, data, callback), "macdrop/entries_dropped")[-1] > 0

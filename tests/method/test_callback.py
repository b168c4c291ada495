"""MacDropCallback in real runs of `transformers.Trainer`."""

import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny
from transformers import Trainer, TrainingArguments

from macdrop.callback import MacDropCallback
from macdrop.config import MacDropConfig
from macdrop.errors import ConfigError, NoMassiveWeights, TrainingInvariantError
from macdrop.hooks import MacDrop

K, ACCUMULATION, EPOCHS, LR = len(tiny.ROWS), 2, 2, 0.1
ITEMS = 10  # batches of 2: optimizer steps of 2, 2 and 1 micro-batches in each epoch
STEPS = 3 * EPOCHS


class Recorder(Trainer):
    """A Trainer that remembers its micro-batches."""

    def training_step(self, model, inputs, *args, **kwargs):
        self.__dict__.setdefault("seen", []).append({name: value.clone() for name, value in inputs.items()})
        return super().training_step(model, inputs, *args, **kwargs)


def items(count: int = ITEMS) -> list[dict[str, torch.Tensor]]:
    return [{name: value[0] for name, value in tiny.batch(i, rows=1).items()} for i in range(count)]


def trainer_of(callback, folder, **settings) -> Recorder:
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        seed=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=ACCUMULATION,
        num_train_epochs=EPOCHS,
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        optim="sgd",  # Adam would blow up rounding errors of tiny gradients
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        **{"save_strategy": "no", **settings},
    )
    return Recorder(
        model=tiny.lora(tiny.build()),
        args=arguments,
        train_dataset=items(),
        eval_dataset=items(4),
        callbacks=[callback] if callback else [],
    )


def by_hand(batches, config) -> tuple[torch.nn.Module, MacDrop]:
    """The same training with MacDrop in a loop of our own."""
    model = tiny.lora(tiny.build())
    drop = MacDrop(model, tiny.massive_weights(), config)
    drop.attach()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    batches = iter(batches)
    for step in range(STEPS):
        size = 1 if step % 3 == 2 else ACCUMULATION
        for sub in range(size):
            p = config.probability(step + 1, STEPS, step // 3 + 1, EPOCHS)
            with drop.micro_step(p, step * ACCUMULATION + sub):
                (model(**next(batches)).loss / size).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, drop


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("schedule", "scope"),
    [("step", "massive"), ("epoch_before", "massive"), ("constant", "massive"), ("step", "activations")],
)
def test_a_trainer_run_equals_a_loop_with_macdrop(tmp_path, schedule, scope):
    config = MacDropConfig(k=K, p0=0.8, schedule=schedule, seed=5, scope=scope)
    callback = MacDropCallback(tiny.massive_weights(), config)
    trainer = trainer_of(callback, tmp_path, eval_strategy="steps", eval_steps=2)
    before = weights_of(trainer.model)
    trainer.train()
    after = weights_of(trainer.model)
    expected, drop = by_hand(trainer.seen, config)
    assert len(trainer.seen) == 5 * EPOCHS

    for name, value in weights_of(expected).items():
        if "lora_" in name:
            assert torch.allclose(after[name], value, rtol=1e-4, atol=1e-6), name
            assert not torch.equal(after[name], before[name])
        else:
            assert torch.equal(after[name], before[name]), name
    assert callback.drop.entries_dropped == drop.entries_dropped > 0
    assert callback.drop.entries_masked == drop.entries_masked
    assert not callback.drop.attached

    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["macdrop/p"] for entry in logs] == [
        config.probability(t, STEPS, (t - 1) // 3 + 1, EPOCHS) for t in range(1, STEPS + 1)
    ]
    assert logs[-1]["macdrop/entries_dropped"] == drop.entries_dropped
    assert len([entry for entry in trainer.state.log_history if "eval_loss" in entry]) == 3


def test_the_dropped_fraction_is_p(tmp_path):
    callback = MacDropCallback(tiny.massive_weights(), MacDropConfig(k=K, p0=0.6, schedule="constant"))
    trainer_of(callback, tmp_path).train()
    drawn = 5 * EPOCHS * K * tiny.HIDDEN
    assert callback.drop.entries_masked == 2 * drawn
    fraction = callback.drop.entries_dropped / callback.drop.entries_masked
    assert abs(fraction - 0.6) < 5 * (0.6 * 0.4 / drawn) ** 0.5


def test_masks_change_the_result_and_a_disabled_config_does_not(tmp_path):
    adapters = {}
    for name, config in {"none": None, "off": MacDropConfig(k=0), "on": MacDropConfig()}.items():
        trainer = trainer_of(config and MacDropCallback(tiny.massive_weights(), config), tmp_path)
        trainer.train()
        adapters[name] = weights_of(trainer.model)
    assert all(torch.equal(adapters["none"][name], adapters["off"][name]) for name in adapters["none"])
    assert any(not torch.equal(adapters["none"][name], adapters["on"][name]) for name in adapters["none"])


def test_resumed_run_is_bit_identical_to_an_uninterrupted_one(tmp_path):
    config = MacDropConfig(k=K, seed=5)
    settings = {"save_strategy": "steps", "save_steps": 2}
    whole = trainer_of(MacDropCallback(tiny.massive_weights(), config), tmp_path, **settings)
    whole.train()
    resumed = trainer_of(MacDropCallback(tiny.massive_weights(), config), tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(resumed.seen) == 5 * EPOCHS - 2 * ACCUMULATION
    expected, found = weights_of(whole.model), weights_of(resumed.model)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_callback_scans_or_reads_a_saved_scan(tmp_path):
    from macdrop.scan import find_massive_weights

    scanned = find_massive_weights(tiny.build(), tiny.tokenizer(), source="tiny", fingerprint="")
    path = scanned.save(tmp_path / "weights.json")
    callbacks = [MacDropCallback(None, MacDropConfig()), MacDropCallback(str(path), MacDropConfig())]
    for callback in callbacks:
        trainer = trainer_of(callback, tmp_path)
        trainer.processing_class = trainer.callback_handler.processing_class = tiny.tokenizer()
        trainer.train()
        assert callback.weights.path == scanned.path
        assert callback.weights.indices == scanned.indices  # the adapter, which is not zero here, took no part
    assert callbacks[0].drop.entries_dropped == callbacks[1].drop.entries_dropped > 0


def test_stopping_between_two_micro_batches_leaves_no_mask(tmp_path):
    callback = MacDropCallback(tiny.massive_weights(), MacDropConfig())
    trainer = trainer_of(callback, tmp_path, eval_strategy="epoch")

    class Stop(MacDropCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            super().on_substep_end(args, state, control, **kwargs)
            control.should_epoch_stop = True

    callback.__class__ = Stop
    trainer.train()
    assert not callback.drop.active


def test_second_training_after_a_crash_attaches_again(tmp_path):
    callback = MacDropCallback(tiny.massive_weights(), MacDropConfig())
    trainer = trainer_of(callback, tmp_path)
    loss, trainer.compute_loss = trainer.compute_loss, lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    broken = callback.drop
    assert broken.active
    trainer.compute_loss = loss
    trainer.train()
    assert not broken.attached and not broken.active
    assert callback.drop.entries_dropped > 0


def test_evaluating_under_a_mask_is_refused(tmp_path):
    callback = MacDropCallback(tiny.massive_weights(), MacDropConfig())
    trainer = trainer_of(callback, tmp_path)
    trainer.evaluate()  # nothing attached yet
    callback.drop = MacDrop(trainer.model, callback.weights, callback.config)
    callback.drop.attach()
    trainer.evaluate()
    callback.drop.begin(0.5, 0)
    with pytest.raises(TrainingInvariantError, match="mask is in force"):
        trainer.evaluate()
    callback.drop.detach()


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="MacDropConfig"):
        MacDropCallback(None, {"k": 5})
    with pytest.raises(NoMassiveWeights, match="nowhere.json"):
        MacDropCallback(tmp_path / "nowhere.json", MacDropConfig())
    callback = MacDropCallback(tiny.massive_weights(), MacDropConfig(schedule="epoch_after"))
    state = SimpleNamespace(num_train_epochs=sys.maxsize)
    with pytest.raises(ConfigError, match="(?s)epoch_after.*streamed"):
        callback.on_train_begin(None, state, None, model=tiny.lora(tiny.build()))

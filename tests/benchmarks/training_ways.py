"""Ways to train the same examples, each to be made in a process of its own: ours, transformers.Trainer, TRL.

All take LoRA (or DoRA) of rank 16 on all linear layers, AdamW, and optimizer steps of `Setting.batch` examples that are
tokenised once; step n has the same examples in all of them, but where TRL packs its rows itself. A way's `run` trains
some steps and returns what they took.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gemm
import numpy as np
from random_llama import stand_in
from worker import Clock

if TYPE_CHECKING:
    from tune.config.run_spec import TrainSpec
    from tune.data.dataset import Examples

RANK, K, P, LEARNING_RATE = 16, 5, 0.8, 1e-4


@dataclass(frozen=True)
class Setting:
    """What is trained.

    `data`: a folder of `tune.data.dataset.prepare`; `dtype`: fp32, bf16; `device`: cpu, cuda; `attention`: an
    implementation of transformers for all ways, None for the default.
    """

    model: str
    dataset: str
    data: str
    dtype: str
    device: str
    batch: int
    cutoff: int
    threads: int
    attention: str | None = None


@dataclass(frozen=True)
class Ran:
    """What some optimizer steps took: seconds, examples, tokens without padding; `loss` is that of the first step."""

    wall: float
    cpu: float
    examples: int
    tokens: int
    loss: float


def specification(setting: Setting, *, dora: bool = False, macdrop: bool = False, packing: str = "auto") -> TrainSpec:
    """Return our spec of a fine-tuning; all keys that are not named here are at their defaults."""
    from tune.config.messages import build
    from tune.config.run_spec import TrainSpec

    keys = {
        "model_name_or_path": setting.model,
        "dataset": setting.dataset,
        "template": "alpaca",
        "cutoff_len": setting.cutoff,
        "val_size": 0,
        "per_device_train_batch_size": setting.batch,
        "max_steps": 10_000,
        "learning_rate": LEARNING_RATE,
        "lora_rank": RANK,
        "lora_alpha": RANK,
        "bf16": setting.dtype == "bf16",
        "attn_implementation": setting.attention,
        "use_dora": dora,
        "packing": packing,
        "macdrop": {"k": K, "p0": P if macdrop else 0.0},
    }
    return build(TrainSpec, keys).canonical()


def examples(setting: Setting) -> Examples:
    from tune.data import dataset

    return dataset.load(setting.data).train


def picked(setting: Setting, number: int, first: int, steps: int) -> np.ndarray:
    """Return which of `number` examples the steps `first` (from 1) and following take, (steps, batch)."""
    from tune.data.batching import epoch_order

    places = np.arange((first - 1) * setting.batch, (first - 1 + steps) * setting.batch)
    orders = {int(epoch): epoch_order(number, 0, int(epoch)) for epoch in np.unique(places // number)}
    return np.array([orders[int(at // number)][at % number] for at in places]).reshape(steps, setting.batch)


# ---------------------------------------------------------------------------------------------------------------- ours


class Ours:
    """Engine and Training as `macdrop train` runs them: one process, its default ZeRO stage."""

    def __init__(self, setting: Setting, ways: Mapping[str, Mapping[str, Any]]) -> None:
        """ways: name -> arguments of `specification`; those that can share an engine do."""
        from tune.training.process_group import prepare_process
        from tune.training.quiet import quiet_libraries

        quiet_libraries()
        prepare_process(setting.threads)
        self._setting = setting
        self._engines: dict[Any, Any] = {}
        self._trainings = {name: self._training(specification(setting, **options)) for name, options in ways.items()}

    def _training(self, spec: TrainSpec) -> Any:
        from tune.config.sections import Arm
        from tune.data import dataset
        from tune.training.engine import Engine
        from tune.training.step import Training

        weights = _massive_weights(spec) if spec.arm != Arm.PLAIN else None
        key = spec.engine_key()
        if key not in self._engines:
            self._engines[key] = Engine(spec)
        return Training(self._engines[key], spec, dataset.load(self._setting.data), weights)

    def run(self, way: str, first: int, steps: int) -> Ran:
        """Train from a fresh adapter, in the layout that its `packing` asks for; only the steps are timed."""
        training, clock, losses = self._trainings[way], Clock(), []
        training.engine.load_state(training.engine.initial_state(0))
        training.choose_layout()
        training.set_optimizer()
        with _attached(training.drop):
            clock.start()
            for step in range(first, first + steps):
                losses.append(training.step(step).metrics["loss"])
            clock.stop()
        return Ran(clock.wall, clock.cpu, *self._size(training, first, steps), losses[0])

    def _size(self, training: Any, first: int, steps: int) -> tuple[int, int]:
        rows = training.data.train
        taken = picked(self._setting, len(rows), first, steps).ravel()
        return len(taken), int(rows.lengths[taken].sum())

    def products(self, way: str, first: int, steps: int) -> gemm.Rate:
        """Time the matrix products that the steps need at least, alone; see `gemm`."""
        training = self._trainings[way]
        rows = training.data.train
        taken = picked(self._setting, len(rows), first, steps)
        module = training.engine.engine.module
        if not hasattr(self, "_shapes"):
            self._shapes = gemm.shapes(module, rows[int(taken[0, 0])][0])
        tokens, answers = int(rows.lengths[taken].sum()), int(rows.label_counts[taken].sum())
        return gemm.rate(self._shapes, tokens, answers, steps, next(module.parameters()))


def _massive_weights(spec: TrainSpec) -> Any:
    """Return the model's massive weights; rows of its second layer where it has none, as random models have."""
    from macdrop.errors import NoMassiveWeights
    from macdrop.load import check_model
    from tune.training.massive_weights import scanned
    from tune.zoo.catalog import resolve

    try:
        return scanned(spec)
    except NoMassiveWeights:
        return stand_in(check_model(resolve(spec.model_name_or_path)), spec.model_name_or_path)


@contextmanager
def _attached(drop: Any) -> Iterator[None]:
    if drop is None:
        yield
        return
    drop.attach()
    try:
        yield
    finally:
        drop.detach()


# -------------------------------------------------------------------------------------------------------- Hugging Face


class Transformers:
    """transformers.Trainer and PEFT at their defaults: batches padded to their longest example, logits everywhere.

    In bf16 the base is loaded in it and `bf16=True` is set; PEFT then keeps the adapter in fp32.
    """

    def __init__(self, setting: Setting, dora: bool = False) -> None:
        from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

        model, tokenizer = _open(setting)
        self._setting, self._rows = setting, examples(setting)
        self._trainer = _recording(Trainer)(
            model=_adapted(model, dora),
            args=TrainingArguments(**_arguments(setting)),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            train_dataset=_dataset(self._rows, [0]),
        )
        self._timed = _timed(self._trainer)

    def run(self, first: int, steps: int) -> Ran:
        """Train on; setting up the Trainer's loop for these steps is not timed."""
        taken = picked(self._setting, len(self._rows), first, steps).ravel()
        self._trainer.train_dataset = _dataset(self._rows, taken)
        return self._timed(len(taken), int(self._rows.lengths[taken].sum()))


class Trl:
    """TRL's SFTTrainer, whose batches are one row each: padding-free, or packed by it as well (`packing`).

    Defaults but for gradient checkpointing, which the other ways do not use either.
    """

    def __init__(self, setting: Setting, packing: bool) -> None:
        from trl import SFTConfig, SFTTrainer

        model, tokenizer = _open(setting)
        self._setting, self._rows, self._packing = setting, examples(setting), packing
        every = picked(setting, len(self._rows), 1, len(self._rows) // setting.batch).ravel()
        self._trainer = _recording(SFTTrainer)(
            model=model,
            args=SFTConfig(
                **_arguments(setting),
                packing=packing,
                padding_free=True,
                max_length=setting.cutoff if packing else None,
                gradient_checkpointing=False,
                dataset_kwargs={"skip_prepare_dataset": not packing},
            ),
            processing_class=tokenizer,
            train_dataset=_dataset(self._rows, every if packing else every[: setting.batch]),
            peft_config=_lora(False),
        )
        self._packed = self._trainer.train_dataset
        self._timed = _timed(self._trainer)

    def run(self, first: int, steps: int) -> Ran:
        """Train on; with packing its own rows, `Setting.batch` of them a step."""
        if self._packing:
            at = np.arange((first - 1) * self._setting.batch, (first - 1 + steps) * self._setting.batch)
            rows = self._packed.select(at % len(self._packed))
            self._trainer.train_dataset = rows
            lengths = [length for row in rows["seq_lengths"] for length in row]
            return self._timed(len(lengths), sum(lengths))
        taken = picked(self._setting, len(self._rows), first, steps).ravel()
        self._trainer.train_dataset = _dataset(self._rows, taken)
        return self._timed(len(taken), int(self._rows.lengths[taken].sum()))

    def ran(self) -> str:
        """Say what ran, and whether the examples of a row see each other: do its logits change with the first?"""
        import torch

        model, trainer = self._trainer.model, self._trainer
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(min(2, len(trainer.train_dataset)))])
        ids, second = batch["input_ids"], int((batch["position_ids"][0] == 0).nonzero()[1])
        other = ids.clone()
        other[:, :second] = (other[:, :second] + 1) % model.config.get_text_config().vocab_size
        rest = {key: value for key, value in batch.items() if key not in ("input_ids", "labels")}
        place = next(model.parameters()).device
        rest = {key: value.to(place) if hasattr(value, "to") else value for key, value in rest.items()}
        model.eval()
        with torch.no_grad():
            pair = [
                model(input_ids=each.to(place), use_cache=False, **rest).logits[0, second:] for each in (ids, other)
            ]
        model.train()
        far = float((pair[0] - pair[1]).abs().max())
        sight = f"SEE EACH OTHER (logits differ by {far:.2g})" if far > 1e-5 else "do not see each other"
        rows = "packing=True (bfd)" if self._packing else "padding_free=True"
        return f"TRL {_version('trl')}: {rows}, attention {model.config._attn_implementation}; examples {sight}"


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def _open(setting: Setting) -> tuple[Any, Any]:
    """Load base and tokenizer as a user of transformers does, with a pad token."""
    import torch
    from datasets import disable_progress_bars
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tune.training.quiet import quiet_libraries
    from tune.zoo.catalog import resolve

    quiet_libraries()
    disable_progress_bars()
    torch.set_num_threads(setting.threads)
    source = str(resolve(setting.model))
    dtype = torch.bfloat16 if setting.dtype == "bf16" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation=setting.attention)
    return model, tokenizer


def _lora(dora: bool) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", use_dora=dora, task_type="CAUSAL_LM")


def _adapted(model: Any, dora: bool) -> Any:
    from peft import get_peft_model

    return get_peft_model(model, _lora(dora))


def _arguments(setting: Setting) -> dict[str, Any]:
    """Return the arguments of a Trainer: its defaults, without logging and saving, the examples in the given order."""
    return {
        "output_dir": tempfile.gettempdir(),
        "per_device_train_batch_size": setting.batch,
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "bf16": setting.dtype == "bf16",
        "use_cpu": setting.device == "cpu",
        "train_sampling_strategy": "sequential",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _dataset(rows: Examples, taken: Any) -> Any:
    from datasets import Dataset

    pairs = [rows[int(index)] for index in taken]
    return Dataset.from_list([{"input_ids": ids.tolist(), "labels": labels.tolist()} for ids, labels in pairs])


def _recording(kind: type) -> type:
    """Return a Trainer that keeps the loss of each step."""

    class Recording(kind):  # type: ignore[misc,valid-type]
        losses: list[Any] = []

        def training_step(self, *arguments: Any, **options: Any) -> Any:
            loss = super().training_step(*arguments, **options)
            self.losses = [*self.losses, loss.detach()]
            return loss

    return Recording


def _timed(trainer: Any) -> Any:
    """Return a function that trains one epoch and times it from the loop's start to the end of its last step."""
    from transformers import PrinterCallback, TrainerCallback

    clock = Clock()

    class Timed(TrainerCallback):
        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step == state.max_steps:
                clock.stop()

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Timed())

    def train(examples: int, tokens: int) -> Ran:
        trainer.losses = []
        trainer.train()
        return Ran(clock.wall, clock.cpu, examples, tokens, float(trainer.losses[0]))

    return train

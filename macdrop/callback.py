"""MacDrop for `transformers.Trainer` and what is built on it (TRL, LLaMA-Factory, Axolotl): one line.

``Trainer(..., callbacks=[MacDropCallback(weights, MacDropConfig())])``
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from macdrop.config import MacDropConfig
from macdrop.errors import ConfigError, TrainingInvariantError
from macdrop.hooks import MacDrop
from macdrop.scan import find_massive_weights
from macdrop.weights import MassiveWeights


class MacDropCallback(TrainerCallback):
    """Draws a fresh mask for every micro-batch that the Trainer trains on; evaluation runs without masks.

    weights: what `find_massive_weights` found for the base model, or the path of its JSON file. None scans when
        training begins, with the adapter switched off and the Trainer's ``processing_class`` as the tokenizer.
    config: k, p0, schedule and seed.

    p follows the Trainer's state: optimizer step t from 1 of ``state.max_steps``, epoch e from 1. The masks depend on
    the seed and the micro-batch's place in training alone, so that a resumed run draws those of an uninterrupted one.
    Each log gains ``macdrop/p`` and ``macdrop/entries_dropped`` (entries over both matrices, since training began in
    this process). Reporting integrations that the Trainer calls earlier see these only when this callback is first:
    ``trainer.callback_handler.callbacks.insert(0, callback)``.
    """

    def __init__(self, weights: MassiveWeights | str | os.PathLike | None, config: MacDropConfig) -> None:
        if not isinstance(config, MacDropConfig):
            raise ConfigError(f"config is {config!r}; give a MacDropConfig, for instance MacDropConfig(k=5, p0=0.8).")
        if weights is not None and not isinstance(weights, MassiveWeights):
            weights = MassiveWeights.load(weights)
        self.weights: MassiveWeights | None = weights
        self.config = config
        self.drop: MacDrop | None = None
        self.p = 0.0
        self._substep = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None, "the Trainer hands over its model"
        if self.drop is not None:
            self.drop.detach()  # an earlier training ended by an exception
        if self.config.schedule.startswith("epoch") and state.num_train_epochs >= sys.maxsize:
            raise ConfigError(
                f"The schedule {self.config.schedule!r} needs a number of epochs, and a streamed data set has none.\n"
                "Use the schedule 'step', 'exp' or 'constant'."
            )
        if self.weights is None and self.config.enabled:
            self.weights = _scan(model, kwargs.get("processing_class", kwargs.get("tokenizer")))
        self.drop = MacDrop(model, self.weights, self.config)
        self.drop.attach()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        epochs = max(1, int(state.num_train_epochs))
        epoch = min(int(state.epoch or 0) + 1, epochs)
        self.p = self.config.probability(state.global_step + 1, state.max_steps, epoch, epochs)
        self._substep = 0
        self._training.take_counts()  # nobody reads them here, and there would be more with every step
        self._begin(args, state)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._training.end()
        self._substep += 1
        self._begin(args, state)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._training.end()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._training.cancel()  # training was stopped between two micro-batches

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._assert_inactive()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._assert_inactive()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.drop is None or logs is None or "loss" not in logs:
            return
        added = {"macdrop/p": self.p, "macdrop/entries_dropped": self.drop.entries_dropped}
        logs.update(added)
        if state.log_history:
            state.log_history[-1].update(added)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.drop is not None:
            self.drop.detach()

    @property
    def _training(self) -> MacDrop:
        assert self.drop is not None, "the Trainer did not call on_train_begin"
        return self.drop

    def _begin(self, args: TrainingArguments, state: TrainerState) -> None:
        place = state.global_step * args.gradient_accumulation_steps + self._substep
        self._training.begin(self.p, place)

    def _assert_inactive(self) -> None:
        if self.drop is not None and self.drop.active:
            raise TrainingInvariantError("the model is evaluated while MacDrop's mask is in force")


def _scan(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> MassiveWeights:
    """The massive weights of the base model, seen without its adapter."""
    base_alone = getattr(model, "disable_adapter", contextlib.nullcontext)
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    with base_alone():
        return find_massive_weights(model, tokenizer, source=name, fingerprint="")

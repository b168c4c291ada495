"""DeepSpeed engine around one base model and one adapter shape, reused for one fine-tuning after another.

Every fine-tuning starts by loading an `AdapterState` into the live engine: the working copy, the fp32 masters, the
optimizer's state and step counters. A new fine-tuning loads a step-0 state drawn from its seed, a resumed one that of
its checkpoint. There is no other path, so a reused engine gives the same bits as a fresh one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from macdrop.errors import ConfigError, MacDropError, TrainingInvariantError
from tune.config.run_spec import TrainSpec
from tune.config.train.adapter_keys import InitLoraWeights
from tune.config.train.optimizer_rules import AUTO
from tune.data.dataset import Examples
from tune.forward.answer_loss import AnswerLoss
from tune.forward.fused_linear import fuse_linears
from tune.forward.packed_attention import PackedAttention
from tune.forward.packing_check import check_packing
from tune.training.checkpoint import ADAPTER as ADAPTER_FILE
from tune.training.checkpoint import AdapterState, write_tensors
from tune.training.collectives import all_do
from tune.training.deepspeed_config import deepspeed_config
from tune.training.dora_norms import DoraNorms
from tune.training.loading import open_base
from tune.training.lora import ADAPTER, add_adapter, is_drawn, write_config
from tune.training.optimizers.adamw import AdamW
from tune.training.optimizers.adapter_tensors import adapter_tensors
from tune.training.optimizers.initial_weights import check_init, initial_weights
from tune.training.optimizers.live_state import LiveState
from tune.training.optimizers.method import state_bytes
from tune.training.optimizers.methods import method_of
from tune.training.optimizers.slim_adam import check_rules
from tune.training.quiet import no_output


class Engine:
    """One base model with one PEFT adapter under DeepSpeed; see the module's docstring.

    Raises:
        ConfigError: the model cannot be loaded or has no layer named in `lora_target`.
    """

    def __init__(self, spec: TrainSpec) -> None:
        import deepspeed

        assert spec.slimadam_rules != AUTO, "rules are measured before an engine is built for them"
        self.key = spec.engine_key()
        self.spec = spec
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        with _partitioned(spec):
            base, self.tokenizer = open_base(spec)
            base.config.use_cache = False
            if spec.gradient_checkpointing:
                base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                base.enable_input_require_grads()
            self.model = add_adapter(base, spec)
        adapter = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.shapes = {name: tuple(p.shape) for name, p in adapter.items()}
        # DoRA's magnitudes start as the norms of the base weights: known only here, before ZeRO-3 partitions them.
        self._magnitudes = {
            name: p.detach().float().clone() for name, p in adapter.items() if "lora_magnitude_vector" in name
        }
        _check_magnitudes(self._magnitudes)
        numels = [p.numel() for p in adapter.values()]
        config = deepspeed_config(spec, adapter_numel=sum(numels), largest_tensor=max(numels))
        #: What each trained parameter is.
        self.tensors = adapter_tensors(self.model)
        check_rules(self.tensors, spec.slimadam_rules)
        method = method_of(spec)
        groups = method.groups(adapter, self.tensors)
        with no_output():
            self.engine, *_ = deepspeed.initialize(
                model=self.model, model_parameters=groups, optimizer=method.build(groups), config=config
            )
        # Stage 0 has no ZeRO optimizer to ask; for the others DeepSpeed must really have taken the stage.
        assert self.engine.zero_optimization_stage() == spec.zero_stage, "DeepSpeed did not take the ZeRO stage"
        self._adapter = {name: p for name, p in self.engine.module.named_parameters() if p.requires_grad}
        assert set(self._adapter) == set(self.shapes), "DeepSpeed changed the set of trainable parameters"
        fuse_linears(self.engine.module)
        #: The weight norms of DoRA, for the micro-steps of one optimizer step.
        self.norms = DoraNorms(self.engine.module)
        #: What training changes in the live engine.
        self.live = LiveState(self.engine, spec, method, self._adapter, self.tensors)
        self.optimizer_bytes = state_bytes(method, self.tensors)
        self.adamw_bytes = state_bytes(AdamW(spec), self.tensors)
        self.loss = AnswerLoss(self.engine)
        self._base_digest = self.base_digest()
        self._packed: dict[int, tuple[PackedAttention | None, str | None]] = {}

    # --- packed rows ---

    def packed_attention(self, examples: Examples) -> tuple[PackedAttention | None, str | None]:
        """Return what runs packed rows of examples, or None and why the model cannot; a collective.

        The model is checked with the weights it has now, once for each length of the longest example.
        """
        longest = int(examples.lengths.max())
        if longest not in self._packed:
            self._packed[longest] = self._check_packing(examples[0][0], longest)
        return self._packed[longest]

    def _check_packing(self, tokens: np.ndarray, longest: int) -> tuple[PackedAttention | None, str | None]:
        try:
            return all_do(lambda: check_packing(self.engine, self.engine.device, tokens, longest)), None
        except MacDropError as error:
            return None, str(error)

    # --- state ---

    def initial_state(self, seed: int, init: InitLoraWeights = True) -> AdapterState:
        """The step-0 state of a seed: the factors as PEFT draws them, magnitudes of the base, a fresh optimizer.

        Raises:
            ConfigError: PEFT does not have the initialisation for one of the layers.
        """
        check_init(self.tensors, init)
        weights = self._start(seed, init)
        return AdapterState(weights, self.live.initial(weights), step=0, meta={"seed": seed})

    def _start(self, seed: int, init: InitLoraWeights) -> dict[str, torch.Tensor]:
        return initial_weights(self.tensors, self._magnitudes, seed=seed, rank=self.spec.lora_rank, init=init)

    def load_state(self, state: AdapterState) -> None:
        """Make the live engine continue from `state`, on every rank.

        Raises:
            ConfigError: the state belongs to another adapter shape.
        """
        found = {name: tuple(tensor.shape) for name, tensor in state.weights.items()}
        if found != self.shapes:
            differing = sorted(set(found.items()) ^ set(self.shapes.items()))[:4]
            raise ConfigError(
                f"The checkpoint belongs to another adapter shape; these differ: {differing}. "
                "Use the rank, targets and DoRA setting it was trained with."
            )
        self.live.write(state)
        self.engine.micro_steps = 0
        self.engine.global_steps = state.step
        self.engine.global_samples = state.step * self.engine.train_batch_size()
        self.engine.skipped_steps = 0

    def read_state(self, step: int, meta: dict[str, Any]) -> AdapterState:
        """Gather the whole state; a collective, to be called on every rank."""
        return self.live.read(step, meta)

    def write_checkpoint(self, state: AdapterState, folder: Path) -> None:
        """Write a checkpoint, itself a loadable adapter, into an existing folder; rank 0 only."""
        state.save(folder, self._names(state))
        write_config(self.model.peft_config[ADAPTER], folder)

    def write_adapter(self, state: AdapterState, folder: Path) -> None:
        """Write `adapter_model.safetensors` and `adapter_config.json` as PEFT does, in the working precision."""
        dtype = torch.bfloat16 if self.spec.bf16 else torch.float32
        names = self._names(state)
        tensors = {names[name]: tensor.to(dtype) for name, tensor in state.weights.items()}
        write_tensors(tensors, folder / ADAPTER_FILE)
        write_config(self.model.peft_config[ADAPTER], folder)

    def _names(self, state: AdapterState) -> dict[str, str]:
        """Map parameter names to names in an adapter file, by PEFT's own translation."""
        from peft import get_peft_model_state_dict

        translated = get_peft_model_state_dict(
            self.model, state_dict=dict(state.weights), adapter_name=ADAPTER, save_embedding_layers=False
        )
        by_tensor = {id(tensor): name for name, tensor in translated.items()}
        return {name: by_tensor[id(tensor)] for name, tensor in state.weights.items()}

    # --- invariants ---

    def base_digest(self) -> tuple[int, ...]:
        """Return a sum of bit patterns per frozen parameter (this rank's part): equal unless a weight changed."""
        integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        sums = []
        for parameter in self.engine.module.parameters():
            if parameter.requires_grad:
                continue
            data = getattr(parameter, "ds_tensor", parameter).detach().contiguous()
            sums.append(int(data.view(integers[data.element_size()]).sum(dtype=torch.int64)))
        return tuple(sums)

    def check_base(self) -> None:
        """Assert that the base is untouched; a collective.

        Raises:
            TrainingInvariantError: it is not, on any rank.
        """

        def compare() -> None:
            if self.base_digest() != self._base_digest:
                raise TrainingInvariantError("The frozen base weights changed during the fine-tuning.")

        all_do(compare)

    def check_moved(self, state: AdapterState, seed: int, updates: int, init: InitLoraWeights = True) -> list[str]:
        """Return the names of the adapter's tensors that training left as they were at step 0 of `seed`.

        A drawn factor counts from the second update on: its first gradient comes after the other one has moved.

        updates: the optimizer steps so far with a learning rate above 0.

        Raises:
            TrainingInvariantError: none has moved.
        """
        begun = self._start(seed, init)
        expected = [name for name in state.weights if updates > 1 or not is_drawn(name)]
        still = [name for name in expected if not self._moved(state, name, begun[name])]
        if still == expected:
            raise TrainingInvariantError(
                f"The adapter did not learn anything: none of its {len(still)} tensors moved "
                f"({still[0]} first). Is learning_rate 0 in every step, or no layer of lora_target used by the model?"
            )
        names = self._names(state)
        return [names[name] for name in still]

    def _moved(self, state: AdapterState, name: str, begun: torch.Tensor) -> bool:
        """Return whether a tensor has had a gradient, which weight decay has not, and is another than it was."""
        points = self.live.method.points
        parts = (tensors[name] for part, tensors in state.optimizer.items() if part not in points and name in tensors)
        had_gradient = any(bool(kept.any()) for kept in parts if kept.is_floating_point())
        return had_gradient and not torch.equal(state.weights[name], begun)


def _check_magnitudes(magnitudes: dict[str, torch.Tensor]) -> None:
    """Refuse DoRA on weights with a row (of an embedding: a column) of zeros, whose direction is 0 / 0."""
    for name, magnitude in magnitudes.items():
        zeros = int((magnitude == 0).sum())
        if zeros:
            layer = name.removeprefix("base_model.model.").partition(".lora_")[0]
            raise ConfigError(
                f"DoRA cannot be trained on {layer}: {zeros} of its {magnitude.numel()} weight vectors are zero and "
                "have no direction. Leave the layer out of lora_target, or set use_dora to false."
            )


@contextmanager
def _partitioned(spec: TrainSpec) -> Iterator[None]:
    """Partition the model while it loads under ZeRO-3, so that no rank ever holds all of it.

    PEFT must know of it too when it computes DoRA's magnitudes from the base weights.
    """
    if spec.zero_stage != 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    # transformers uses this object's config as long as it lives; bucket sizes do not matter for loading.
    alive = HfDeepSpeedConfig(deepspeed_config(spec, adapter_numel=1, largest_tensor=0))
    with no_output():
        yield
    del alive

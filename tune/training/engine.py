"""DeepSpeed engine around one base model and one adapter shape, reused for one fine-tuning after another.

Every fine-tuning starts by loading an `AdapterState` into the live engine: the working copy, the fp32 masters, Adam's
moments and step counters. A new fine-tuning loads a step-0 state drawn from its seed, a resumed one that of its
checkpoint. There is no other path, so a reused engine gives the same bits as a fresh one.
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
from tune.data.dataset import Examples
from tune.forward.answer_loss import AnswerLoss
from tune.forward.fused_linear import fuse_linears
from tune.forward.packed_attention import PackedAttention
from tune.forward.packing_check import check_packing
from tune.training.checkpoint import ADAPTER as ADAPTER_FILE
from tune.training.checkpoint import MOMENTS, AdapterState, write_tensors
from tune.training.collectives import all_do
from tune.training.deepspeed_config import deepspeed_config
from tune.training.dora_norms import DoraNorms
from tune.training.loading import open_base
from tune.training.lora import ADAPTER, add_adapter, is_drawn, start, write_config
from tune.training.quiet import no_output


class Engine:
    """One base model with one PEFT adapter under DeepSpeed; see the module's docstring.

    Raises:
        ConfigError: the model cannot be loaded or has no layer named in `lora_target`.
    """

    def __init__(self, spec: TrainSpec) -> None:
        import deepspeed

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
        with no_output():
            self.engine, *_ = deepspeed.initialize(
                model=self.model, model_parameters=list(adapter.values()), config=config
            )
        # Stage 0 has no ZeRO optimizer to ask; for the others DeepSpeed must really have taken the stage.
        assert self.engine.zero_optimization_stage() == spec.zero_stage, "DeepSpeed did not take the ZeRO stage"
        self._adapter = {name: p for name, p in self.engine.module.named_parameters() if p.requires_grad}
        assert set(self._adapter) == set(self.shapes), "DeepSpeed changed the set of trainable parameters"
        fuse_linears(self.engine.module)
        #: The weight norms of DoRA, for the micro-steps of one optimizer step.
        self.norms = DoraNorms(self.engine.module)
        self._create_moments()
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

    def initial_state(self, seed: int) -> AdapterState:
        """The step-0 state of a seed: the factors as PEFT draws them, magnitudes of the base, zero moments.

        Every tensor has a generator of its own, keyed by seed and name, so the draw depends on nothing else.
        """
        weights = self._start(seed)
        zeros = {moment: {name: torch.zeros(shape) for name, shape in self.shapes.items()} for moment in MOMENTS}
        return AdapterState(weights, zeros["exp_avg"], zeros["exp_avg_sq"], step=0, meta={"seed": seed})

    def _start(self, seed: int) -> dict[str, torch.Tensor]:
        weights: dict[str, torch.Tensor] = {}
        for number, (name, shape) in enumerate(sorted(self.shapes.items())):
            if name in self._magnitudes:
                weights[name] = self._magnitudes[name].cpu().clone()
            else:
                weights[name] = start(name, shape, torch.Generator().manual_seed(seed * 1_000_003 + number))
        return weights

    def load_state(self, state: AdapterState) -> None:
        """Make the live engine continue from `state`, on every rank.

        Raises:
            ConfigError: the state belongs to another adapter shape.
        """
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        found = {name: tuple(tensor.shape) for name, tensor in state.weights.items()}
        if found != self.shapes:
            differing = sorted(set(found.items()) ^ set(self.shapes.items()))[:4]
            raise ConfigError(
                f"The checkpoint belongs to another adapter shape; these differ: {differing}. "
                "Use the rank, targets and DoRA setting it was trained with."
            )
        self.engine.zero_grad()
        self.engine.optimizer.zero_grad()
        names = list(self._adapter)
        parameters = [self._adapter[name] for name in names]
        stage = self.spec.zero_stage
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0, enabled=stage == 3), torch.no_grad():
            for name, parameter in zip(names, parameters, strict=True):
                parameter.data.copy_(state.weights[name])
        if stage == 0:
            self._load_unpartitioned(state)
        else:
            for name, parameter in self._adapter.items():
                safe_set_full_fp32_param(parameter, state.weights[name].to(parameter.device))
                for moment in MOMENTS:
                    value = getattr(state, moment)[name].to(parameter.device)
                    safe_set_full_optimizer_state(parameter, value, moment)
        for entry in self._inner_optimizer().state.values():
            entry["step"] = torch.full_like(entry["step"], float(state.step))
        self.engine.micro_steps = 0
        self.engine.global_steps = state.step
        self.engine.global_samples = state.step * self.engine.train_batch_size()
        self.engine.skipped_steps = 0

    def read_state(self, step: int, meta: dict[str, Any]) -> AdapterState:
        """Gather the whole state; a collective, to be called on every rank."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        state = AdapterState({}, {}, {}, step, meta)
        masters = self._unpartitioned_masters() if self.spec.zero_stage == 0 else {}
        for name, parameter in self._adapter.items():
            if masters:
                master = masters[name]
                state.weights[name] = _cpu32(master)
                for moment in MOMENTS:
                    getattr(state, moment)[name] = _cpu32(self._inner_optimizer().state[master][moment])
            else:
                state.weights[name] = _cpu32(safe_get_full_fp32_param(parameter))
                for moment in MOMENTS:
                    getattr(state, moment)[name] = _cpu32(safe_get_full_optimizer_state(parameter, moment))
        return state

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

    def check_moved(self, state: AdapterState, seed: int, updates: int) -> list[str]:
        """Return the names of the adapter's tensors that training left as they were at step 0 of `seed`.

        A drawn factor counts from the second update on: its first gradient comes after the other one has moved.

        updates: the optimizer steps so far with a learning rate above 0.

        Raises:
            TrainingInvariantError: none has moved.
        """
        begun = self._start(seed)
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
        had_gradient = any(bool(getattr(state, moment)[name].any()) for moment in MOMENTS)
        return had_gradient and not torch.equal(state.weights[name], begun)

    # --- details ---

    def _inner_optimizer(self) -> Any:
        """Return torch's AdamW inside DeepSpeed's wrapper (stage 0 in fp32 has none)."""
        return getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)

    def _masters(self) -> list[torch.Tensor]:
        """List the fp32 tensors that AdamW updates: flat partitions under ZeRO, else one per parameter."""
        optimizer = self.engine.optimizer
        if self.spec.zero_stage == 3:
            return list(optimizer.fp32_partitioned_groups_flat)
        if self.spec.zero_stage in (1, 2):
            return list(optimizer.single_partition_of_fp32_groups)
        return list(self._unpartitioned_masters().values())

    def _unpartitioned_masters(self) -> dict[str, torch.Tensor]:
        """Stage 0: parameter name -> fp32 master; in fp32 the parameter itself."""
        if not self.spec.bf16:
            return dict(self._adapter)
        optimizer = self.engine.optimizer
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        by_working_copy = {id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}
        return {name: by_working_copy[id(parameter)] for name, parameter in self._adapter.items()}

    def _load_unpartitioned(self, state: AdapterState) -> None:
        for name, master in self._unpartitioned_masters().items():
            master.data.copy_(state.weights[name])
            for moment in MOMENTS:
                self._inner_optimizer().state[master][moment].copy_(getattr(state, moment)[name])

    def _create_moments(self) -> None:
        """Create AdamW's state now: it would be made in the first step, but loading a state needs it earlier."""
        inner = self._inner_optimizer()
        for master in self._masters():
            inner.state[master] = {
                "step": torch.tensor(0.0, dtype=torch.float32),
                "exp_avg": torch.zeros_like(master.data),
                "exp_avg_sq": torch.zeros_like(master.data),
            }
        if self.spec.zero_stage in (1, 2):
            self.engine.optimizer._lazy_init_hp_params_optimizer_state()


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


def _cpu32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float().cpu().clone().contiguous()

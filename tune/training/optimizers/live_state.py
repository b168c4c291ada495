"""Masters and optimizer state inside a DeepSpeed engine, read and written as whole tensors under every ZeRO stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from tune.config.run_spec import TrainSpec
from tune.training.checkpoint import AdapterState
from tune.training.optimizers.adapter_tensors import AdapterTensor, Factor
from tune.training.optimizers.method import Method


class LiveState:
    """Working copies, fp32 masters and optimizer state of an engine: all that training changes.

    engine: DeepSpeed's. adapter: the trained parameters by name, and `tensors` what they are.
    """

    def __init__(
        self,
        engine: Any,
        spec: TrainSpec,
        method: Method,
        adapter: Mapping[str, torch.nn.Parameter],
        tensors: Mapping[str, AdapterTensor],
    ) -> None:
        self.engine, self.method, self.adapter, self.tensors = engine, method, dict(adapter), tensors
        self.stage, self.bf16 = spec.zero_stage, spec.bf16
        self._create()

    # --- whole tensors ---

    def initial(self, weights: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        """Return the optimizer state, part -> name -> tensor, before the first step from these weights."""
        state: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in self.tensors.items():
            for part, kept in self.method.initial(tensor, weights[name]).items():
                state.setdefault(part, {})[name] = kept
        return state

    def write(self, state: AdapterState) -> None:
        """Make the engine continue from `state`, on every rank."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self.engine.zero_grad()
        self.engine.optimizer.zero_grad()
        weights = self.method.masters(state)
        self._set_working_copies(weights)
        masters = self._unpartitioned_masters() if self.stage == 0 else {}
        for name, parameter in self.adapter.items():
            parts = self.method.layout(self.tensors[name])
            if masters:
                masters[name].data.copy_(weights[name])
                for part in parts:
                    self.inner.state[masters[name]][part].copy_(state.optimizer[part][name])
            else:
                safe_set_full_fp32_param(parameter, weights[name].to(parameter.device))
                for part in parts:
                    value = state.optimizer[part][name].to(parameter.device)
                    safe_set_full_optimizer_state(parameter, value, part)
        for entry in self.inner.state.values():
            if "step" in entry:
                old = entry["step"]
                entry["step"] = torch.full_like(old, float(state.step)) if torch.is_tensor(old) else state.step

    def read(self, step: int, meta: dict[str, Any]) -> AdapterState:
        """Gather the whole state; a collective."""
        return replace(self.method.result(*self._gather(), self.inner.param_groups[0]), step=step, meta=meta)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Evaluate the adapter that would be saved; a collective.

        Where that is an average of steps, the working copies hold it meanwhile, and then what they held before, to the
        bit.
        """
        if not self.method.points:
            yield
            return
        state = self.read(0, {})
        self._set_working_copies(state.weights)
        try:
            yield
        finally:
            self._set_working_copies(self.method.masters(state))

    # --- details ---

    @property
    def inner(self) -> Any:
        """torch's optimizer inside DeepSpeed's wrapper (stage 0 in fp32 has none)."""
        return getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)

    def _gather(self) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
        """Return masters by name, and optimizer state by part and name, on the CPU."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        weights: dict[str, torch.Tensor] = {}
        state: dict[str, dict[str, torch.Tensor]] = {}
        masters = self._unpartitioned_masters() if self.stage == 0 else {}
        for name, parameter in self.adapter.items():
            weights[name] = _to_cpu(masters[name] if masters else safe_get_full_fp32_param(parameter)).float()
            for part in self.method.layout(self.tensors[name]):
                found = (
                    self.inner.state[masters[name]][part] if masters else safe_get_full_optimizer_state(parameter, part)
                )
                state.setdefault(part, {})[name] = _to_cpu(found)
        return weights, state

    def _set_working_copies(self, weights: Mapping[str, torch.Tensor]) -> None:
        import deepspeed

        parameters = list(self.adapter.values())
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0, enabled=self.stage == 3), torch.no_grad():
            for name, parameter in self.adapter.items():
                parameter.data.copy_(weights[name])

    def _unpartitioned_masters(self) -> dict[str, torch.Tensor]:
        """Stage 0: parameter name -> fp32 master; in fp32 the parameter itself."""
        if not self.bf16:
            return dict(self.adapter)
        optimizer = self.engine.optimizer
        pairs = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        by_working_copy = {id(low): high for lows, highs in pairs for low, high in zip(lows, highs, strict=True)}
        return {name: by_working_copy[id(parameter)] for name, parameter in self.adapter.items()}

    def _create(self) -> None:
        """Create the optimizer's state: it would be made in the first step, but loading a state needs it earlier."""
        inner, groups = self.inner, self.inner.param_groups
        if self.stage == 0:
            of = {id(master): self.tensors[name] for name, master in self._unpartitioned_masters().items()}
            for group in groups:
                for master in group["params"]:
                    inner.state[master] = self.method.fresh(group, master, of[id(master)])
            return
        optimizer = self.engine.optimizer
        flat = optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups
        for master in flat:
            part = AdapterTensor("", Factor.A, tuple(master.shape))
            inner.state[master] = self.method.fresh({}, master, part)
        if self.stage in (1, 2):
            optimizer._lazy_init_hp_params_optimizer_state()


def _to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().clone().contiguous()

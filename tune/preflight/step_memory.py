"""Estimate of the memory that a packed micro-batch takes in training, from the shapes of a model alone.

The adapter's model runs forward once on torch's meta device, where tensors have shapes and no values, and every tensor
that autograd keeps for the backward pass is counted. Nothing is known of the model's family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from tune.config.run_spec import RaySpec, TrainSpec
from tune.preflight.adapter import model_outline
from tune.preflight.base_memory import base_bytes, dequantised_bytes
from tune.storage.capacity import memory
from tune.training.lora import add_adapter
from tune.training.optimizers.adapter_tensors import adapter_tensors
from tune.training.optimizers.method import state_bytes
from tune.training.optimizers.methods import method_of

#: Numbers of tokens that are counted; what more tokens take is proportional.
COUNTED = (64, 192)
#: Peak over kept bytes: glibc's heap is left with holes between blocks of megabytes, CUDA's allocator hardly is.
#: On SmolLM2-135M and Gemma-3-270M (one thread, LoRA on all linear layers, packed rows of 512 to 3072 tokens) each
#: token took 1.2 to 2.2 times the kept bytes in fp32 and 1.7 times in bf16.
HOLES_CPU, HOLES_GPU = 1.6, 1.1
#: With gradient checkpointing the heap still grew by this share of what would be kept without it.
RECOMPUTED_CPU = 0.8
#: Bytes of a worker's libraries, and of one chunk of logits with what their loss takes.
LIBRARIES, HEAD = 600 * 2**20, 256 * 2**20
#: Bytes per trained parameter of its fp32 master.
MASTER = 4
_NAME = "macdrop_shapes_only"


@dataclass(frozen=True)
class StepMemory:
    """Peak memory of one worker: `fixed` bytes, and bytes for each token of its largest micro-batch.

    kept: what autograd keeps of a token: counted, so that less will not do.
    per_token: with what the allocator loses. Measured peaks on CPUs were 0.7 to 1.2 times `of`.
    """

    fixed: int
    kept: int
    per_token: int

    def least(self, tokens: int) -> int:
        """Return the bytes that a micro-batch of so many tokens takes without any loss."""
        return self.fixed + tokens * self.kept

    def of(self, tokens: int) -> int:
        """Return the bytes that a micro-batch of so many tokens is estimated to take."""
        return self.fixed + tokens * self.per_token

    def tokens(self, room: int) -> int:
        """Return the tokens of the largest micro-batch that fits into so many bytes; 0 or less where none does."""
        return (room - self.fixed) // self.per_token


def step_memory(spec: TrainSpec, *, gpu: bool) -> StepMemory | None:
    """Estimate the peak memory of a worker; None where a model cannot be run without values (kernels of its own)."""
    size = 2 if spec.bf16 else 4
    base: Any = model_outline(spec)
    base.to(torch.bfloat16 if spec.bf16 else torch.float32)
    weights = base_bytes(base, spec) + dequantised_bytes(base, spec)
    for module in base.modules():
        if isinstance(module, PreTrainedModel):
            module.config._attn_implementation = _NAME
    base.config.use_cache = False
    model = add_adapter(base, spec).train()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    state = state_bytes(method_of(spec), adapter_tensors(model))
    try:
        few, many = (_kept(model, base.base_model, tokens) for tokens in COUNTED)
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return None
    kept = max(1, (many - few) // (COUNTED[1] - COUNTED[0]))
    constant = few - kept * COUNTED[0]  # such as DoRA's norms
    per_token = int(kept * (HOLES_GPU if gpu else HOLES_CPU))
    layers = sum(isinstance(module, GradientCheckpointingLayer) for module in model.modules())
    if spec.gradient_checkpointing and layers:
        # Each layer keeps its input, and one layer at a time what it computes.
        whole, kept = kept, layers * base.config.get_text_config().hidden_size * size + kept // layers
        per_token = int(kept * HOLES_GPU if gpu else max(kept, whole * RECOMPUTED_CPU))
        constant //= layers
    fixed = weights + constant + trained * (2 * size + MASTER) + state + HEAD + (0 if gpu else LIBRARIES)
    return StepMemory(fixed, kept, per_token)


@dataclass(frozen=True)
class Room:
    """Memory of one worker: bytes at most, of a GPU or of the host."""

    size: int
    gpu: bool


def worker_room(ray: RaySpec) -> Room | None:
    """Return the memory of each worker of a run on this machine; None for a cluster, whose nodes may differ.

    On CPUs that is an equal part of the memory that this process may use, free or not; on GPUs the worker's share.
    """
    if ray.address is not None:
        return None
    share = 1.0 if ray.gpus_per_worker is None else ray.gpus_per_worker
    if torch.cuda.is_available() and share > 0:
        return Room(int(torch.cuda.get_device_properties(0).total_memory * min(1.0, share)), gpu=True)
    return Room(memory()[1] // (ray.lanes * ray.num_workers), gpu=False)


def _kept(model: torch.nn.Module, decoder: torch.nn.Module, tokens: int) -> int:
    """Return the bytes of distinct tensors, other than parameters, that the decoder's forward pass keeps."""
    parameters = {_storage(p) for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            kept[storage._cdata] = storage  # alive, so that its address stays its own
        return tensor

    ids = torch.zeros((1, tokens), dtype=torch.long, device="meta")
    mask = torch.ones((1, 1, tokens, tokens), dtype=torch.bool, device="meta")  # one that is taken as it is
    with torch.autograd.graph.saved_tensors_hooks(keep, _unread):
        decoder(input_ids=ids, attention_mask=mask)
    return sum(storage.nbytes() for storage in kept.values())


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _unread(tensor: Any) -> Any:
    raise AssertionError("there is no backward pass")


class _ShapesOnly(torch.autograd.Function):
    """Attention that keeps what a fused kernel keeps: queries, keys, values and its output."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, output)
        return output


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    apply: Callable[..., torch.Tensor] = _ShapesOnly.apply
    return apply(query, key, value).transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, _attend)

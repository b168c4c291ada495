"""The one place that knows how a parameter is stored: whole, partitioned by DeepSpeed ZeRO-3, or quantised."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from macdrop.errors import ConfigError
from macdrop.quantised import dequantised, is_quantised, read_codes, write_codes, zero_rows
from macdrop.structure import Projection

_PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Return whether DeepSpeed ZeRO-3 owns the parameter, so that its values are spread over the ranks."""
    return hasattr(parameter, "ds_id")


@contextmanager
def gathered(parameters: Iterable[torch.Tensor], *, write: bool = False) -> Iterator[None]:
    """Make ZeRO-3 partitioned parameters whole inside the block; nothing happens for the others.

    A collective operation: every rank must enter it. With `write`, what rank 0 wrote reaches all ranks at the end.
    """
    partitioned = [p for p in parameters if is_partitioned(p)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0 if write else None):
        yield


def read_rows(projection: Projection, indices: Sequence[int]) -> torch.Tensor:
    """A copy of the rows of `projection` that make the intermediate entries `indices`: (k, d), on the weight's device.

    Collective under ZeRO-3. Raises `ConfigError` where the rows cannot be read: an unknown quantisation, or a
    parameter sharded by something else than DeepSpeed.
    """
    parameter = projection.tensor
    name = f"{type(projection.module).__name__}.{projection.parameter}"
    if hasattr(parameter, "device_mesh"):
        raise ConfigError(
            f"{name} is sharded as a DTensor (FSDP2 or tensor parallel), whose rows macdrop cannot read.\n"
            "Use DeepSpeed ZeRO (any stage), DDP, or one device."
        )
    with gathered([parameter]), torch.no_grad():
        matrix = projection.matrix(_dequantised(projection, name))
        if matrix.dim() != 2:
            raise ConfigError(
                f"{name} has the shape {tuple(parameter.shape)}, but a matrix is needed: the parameter seems to be\n"
                "flattened (FSDP). Use DeepSpeed ZeRO (any stage), DDP, or one device."
            )
        return matrix[projection.features(indices)].detach().clone()


@torch.no_grad()
def write_rows(projection: Projection, indices: Sequence[int], rows: torch.Tensor) -> None:
    """Write `rows` (k, d) over the rows that make the intermediate entries `indices`; not for partitioned parameters.

    The parameter's version counter moves, so that autograd refuses a backward pass through other weights than the
    forward pass saw.
    """
    assert not is_partitioned(projection.tensor), "writing to one rank's copy would be lost"
    projection.matrix()[projection.features(indices)] = rows


def is_writable(parameter: torch.Tensor) -> bool:
    """Return whether rows of a parameter can be set to zero in place: whole, and plain or quantised by bitsandbytes."""
    return not is_partitioned(parameter) and (parameter.dtype in _PLAIN or is_quantised(parameter))


@contextmanager
def zeroed_rows(projection: Projection, indices: Sequence[int]) -> Iterator[None]:
    """Set rows to zero inside the block, and bring them back bit for bit; of quantised weights by their codes.

    For parameters that are `is_writable`. Raises `ConfigError` where quantised rows cannot be edited.
    """
    if is_quantised(projection.tensor):
        features = projection.features(indices)
        codes = read_codes(projection.module, features)
        try:
            zero_rows(projection.module, features)
            yield
        finally:
            write_codes(projection.module, features, codes)
        return
    rows = read_rows(projection, indices)
    try:
        write_rows(projection, indices, torch.zeros((), dtype=rows.dtype, device=rows.device))
        yield
    finally:
        write_rows(projection, indices, rows)


def _dequantised(projection: Projection, name: str) -> torch.Tensor:
    parameter = projection.tensor
    if is_quantised(parameter):
        return dequantised(projection.module)
    if parameter.dtype in _PLAIN:
        return parameter
    weight = None
    if projection.parameter == "weight":
        try:
            from peft.utils.integrations import dequantize_module_weight

            weight = dequantize_module_weight(projection.module)
        except (ImportError, TypeError):
            pass
    if weight is None or weight.dtype not in _PLAIN:
        raise ConfigError(
            f"{name} is stored as {type(parameter).__name__} of {parameter.dtype}, which macdrop cannot dequantise.\n"
            "Load the base model in float32, bfloat16 or float16, or quantise it by bitsandbytes."
        )
    return weight


def not_finite(model: nn.Module, source: str) -> str:
    """A sentence on why the states of a model are not finite: the first weight that holds inf or NaN, or the precision.

    For models whose weights are whole; what is partitioned or quantised is passed over.
    """
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and weight.numel() and not bool((finite := torch.isfinite(weight)).all()):
            count = int((~finite).sum())
            return (
                f"{source}: the weight {name} holds inf or NaN in {count} of its {weight.numel()} entries. The "
                "checkpoint is damaged.\nCopy or download the model again, or train it with a lower learning rate."
            )
    used = next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), torch.float32)
    remedy = {
        torch.float16: "Load the model in float32 or bfloat16.",
        torch.bfloat16: "Load the model in float32. If that does not help, check that its config.json is its own.",
    }.get(used, "Check that its config.json is its own: scales and norms are read from there.")
    return (
        f"{source}: all weights are finite, and yet its states overflow {str(used).removeprefix('torch.')}.\n{remedy}"
    )

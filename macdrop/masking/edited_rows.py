"""Masks on the stored rows of fused experts, which are edited in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from macdrop.errors import ConfigError, TrainingInvariantError
from macdrop.gather import is_partitioned, read_rows, write_rows
from macdrop.masking.layout import Layout
from macdrop.structure import Projection


class EditedRows:
    """Masks k rows of one expert in a 3-D parameter: edits them when opened, restores them bit by bit when closed.

    The experts' kernels read the parameter itself, so there is no output of one matrix to replace.
    """

    one_mask_at_a_time = True

    def __init__(self, projections: Sequence[Projection], indices: Sequence[int], on_use: Callable[[], None]) -> None:
        self.module = projections[0].module
        self.matrices = len(projections)
        self.rows = len(indices) * self.matrices
        self._projections, self._indices, self._on_use = projections, list(indices), on_use
        self._saved: list[tuple[Projection, torch.Tensor]] = []
        self._refuse_partitioned()
        for projection in projections:
            read_rows(projection, self._indices)  # raises where they cannot be read
        self._handle = self.module.register_forward_pre_hook(self._check)

    @property
    def used(self) -> bool:
        return True  # edited rows are seen by any kernel

    def open(self, keeps: Mapping[int, torch.Tensor], layout: Layout) -> None:
        """Mask by the one of `keeps`, a boolean (k, d), from now on; the same for gate and up. Nothing in eval mode."""
        (keep,) = keeps.values()
        if not self.module.training:
            return
        self._refuse_partitioned()
        for projection in self._projections:
            rows = read_rows(projection, self._indices)
            self._saved.append((projection, rows))
            write_rows(projection, self._indices, rows * keep.to(rows.device, rows.dtype))
        self._on_use()

    def close(self) -> None:
        while self._saved:
            projection, rows = self._saved.pop()
            write_rows(projection, self._indices, rows)

    def remove(self) -> None:
        self.close()
        self._handle.remove()

    def _refuse_partitioned(self) -> None:
        for projection in self._projections:
            if is_partitioned(projection.tensor):
                raise ConfigError(
                    f"{type(self.module).__name__}.{projection.parameter} is partitioned by DeepSpeed ZeRO-3, and\n"
                    "MacDrop must edit rows of fused experts in place, which that does not allow.\n"
                    "Use ZeRO stage 0, 1 or 2 for this model."
                )

    def _check(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._saved and not module.training:
            raise TrainingInvariantError("the experts ran in eval mode with masked massive rows: call end() first")

"""One rank's error is every rank's: what a process group does so that none is left waiting in a collective.

An error on one rank only would leave the others in the next collective until it times out. Here all ranks raise the
same, so that a lane can tell it and go on with its next order.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

from macdrop.errors import MacDropError

T = TypeVar("T")


def rank0_does(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 alone and return its value, or raise its error, on every rank.

    A collective that no rank leaves before rank 0 is done. The value is plain data: it is pickled.
    """
    import torch.distributed as dist

    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        told = list(_tried(action))
    dist.broadcast_object_list(told, src=0)
    value, error = told
    if error is not None:
        raise error
    return value


def all_do(action: Callable[[], T]) -> T:
    """Run `action` on every rank and return each rank's own value; an error on any of them is raised on all."""
    import torch.distributed as dist

    value, error = _tried(action)
    errors: list[BaseException | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    first = next((error for error in errors if error is not None), None)
    if first is not None:
        raise first
    return value


def _tried(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """(value, None) or (None, an error that can be pickled)."""
    try:
        return action(), None
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return None, MacDropError(f"{type(error).__name__}: {error}")
        return None, error

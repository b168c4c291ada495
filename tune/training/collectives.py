"""Collectives that share errors: one rank's error is raised on every rank.

An error on one rank alone would leave the others waiting in the next collective until it times out. Here all ranks
raise the same error, so a lane can report it and take its next task.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

from macdrop.errors import MacDropError

T = TypeVar("T")


def rank0_does(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 alone and return its value, or raise its error, on every rank.

    A collective: no rank leaves it before rank 0 is done. The value is pickled, so it must be plain data.
    """
    shared: list[Any] = [None, None]
    if dist.get_rank() == 0:
        shared = list(_attempt(action))
    dist.broadcast_object_list(shared, src=0)
    value, error = shared
    if error is not None:
        raise error
    return value


def all_do(action: Callable[[], T]) -> T:
    """Run `action` on every rank and return each rank's own value; an error on any rank is raised on all."""
    value, error = _attempt(action)
    errors: list[BaseException | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    first = next((error for error in errors if error is not None), None)
    if first is not None:
        raise first
    return cast(T, value)


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Return (value, None), or (None, an error that can be pickled)."""
    try:
        return action(), None
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            return None, MacDropError(f"{type(error).__name__}: {error}")
        return None, error

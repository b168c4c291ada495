"""The matrix products that an optimizer step of an adapter cannot do without, and how fast they run alone.

Counted are, in floating-point operations of a step with T tokens and A answer tokens (an addition and a multiplication
each), over the frozen linear layers W of `out` x `in`:

    forward                 2 T out in
    backward to the input   2 T out in   unless the input depends on nothing that is trained (the first layer's q, k, v)
    vocabulary head         4 A V H      forward and backward at answer tokens alone

Not counted: the adapter's own products, attention, norms, activations, the optimizer; gradients of frozen weights are
never needed. The rate is that of these very products one after the other, with T / steps rows each, as one step has.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from worker import Clock

#: A shape is timed until that many seconds have passed, at least twice.
LEAST_S = 0.15


@dataclass(frozen=True)
class Shapes:
    """Frozen linear layers by (out, in, whether their input has a gradient), and the head's (V, H)."""

    layers: dict[tuple[int, int, bool], int]
    head: tuple[int, int]


@dataclass(frozen=True)
class Rate:
    """The products of some steps: floating-point operations, seconds that they take alone, the best rate of a shape."""

    flop: float
    wall: float
    cpu: float
    best: float


def shapes(model: Any, ids: Any) -> Shapes:
    """Find the frozen linear layers that one example goes through, and those whose input has a gradient.

    ids: token ids (T,).
    """
    import torch
    from torch import nn

    head = model.get_base_model().get_output_embeddings()
    found: Counter[tuple[int, int, bool]] = Counter()

    def count(module: nn.Linear, inputs: tuple[torch.Tensor, ...]) -> None:
        found[module.out_features, module.in_features, inputs[0].requires_grad] += 1

    handles = [
        module.register_forward_pre_hook(count)
        for module in model.modules()
        if isinstance(module, nn.Linear) and not module.weight.requires_grad and module is not head
    ]
    try:
        model(input_ids=torch.as_tensor(ids)[None].to(head.weight.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return Shapes(dict(found), tuple(head.weight.shape))


def operations(found: Shapes, tokens: int, answers: int) -> float:
    """Return the floating-point operations counted for `tokens` tokens of which `answers` carry a loss."""
    layers = sum((4 if back else 2) * n * rows * columns for (rows, columns, back), n in found.layers.items())
    return float(tokens * layers + 4 * answers * found.head[0] * found.head[1])


def rate(found: Shapes, tokens: int, answers: int, steps: int, like: Any) -> Rate:
    """Time the products of `steps` steps: each shape alone, times how often it occurs.

    like: a tensor of the dtype and on the device to measure.
    """
    layers = [(shape[:2], shape[2], number, tokens) for shape, number in found.layers.items()]
    wall = cpu = best = 0.0
    for (out, into), back, number, rows in [*layers, (found.head, True, 1, answers)]:
        height = max(rows // steps, 1)
        for seconds, cpu_seconds in _products(out, into, height, like)[: 1 + back]:
            wall += steps * number * seconds
            cpu += steps * number * cpu_seconds
            best = max(best, 2.0 * height * out * into / seconds)
    return Rate(operations(found, tokens, answers), wall, cpu, best)


def _products(out: int, into: int, height: int, like: Any) -> list[tuple[float, float]]:
    """Return wall and CPU seconds of x W^T and of y W; x: (height, into), y: (height, out), W: (out, into)."""
    import torch

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, dtype=like.dtype, device=like.device)

    weight, x, y = draw(out, into), draw(height, into), draw(height, out)
    return [_time(lambda: x @ weight.T), _time(lambda: y @ weight)]


def _time(run: Callable[[], Any]) -> tuple[float, float]:
    """Return the mean wall and CPU seconds of a run, the first one left out."""
    clock, began, number = Clock(), time.perf_counter(), 0
    run()
    clock.start()
    while number < 2 or time.perf_counter() - began < LEAST_S:
        run()
        number += 1
    clock.stop()
    return clock.wall / number, clock.cpu / number

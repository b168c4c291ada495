"""The actor between Tune's trials and the lanes: an `OrderBook` behind Ray calls."""

from __future__ import annotations

from typing import Any

import ray
from ray.actor import ActorHandle

from tune.orders import OrderBook


def start_dispatcher(book: OrderBook | None = None) -> ActorHandle:
    """Start the actor on the head node; it takes no CPU and lives as long as its handle."""
    return _Dispatcher.options(resources={HEAD: 0.001}).remote(book or OrderBook())


#: Ray's own resource of the head node (1.0 in all): small shares of it keep light actors there and cost no CPU.
HEAD = "node:__internal_head__"


@ray.remote(num_cpus=0, max_concurrency=1)
class _Dispatcher:
    def __init__(self, book: OrderBook) -> None:
        self.book = book

    def call(self, method: str, *arguments: Any) -> Any:
        """Run one method of the book; calls come one at a time, so the book needs no lock."""
        return getattr(self.book, method)(*arguments)


def call(dispatcher: ActorHandle, method: str, *arguments: Any) -> Any:
    """Call the book and wait for its answer."""
    return ray.get(dispatcher.call.remote(method, *arguments))

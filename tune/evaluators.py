"""A pool of evaluation actors: base model and tasks stay resident, adapters are swapped in and out."""

from __future__ import annotations

import time
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from macdrop.errors import MacDropError
from tune.benchmarks.spec import PLAIN, EvalSpec, Job
from tune.spec import TrainSpec

#: A benchmark under which this many actors died is given up.
MAX_ATTEMPTS = 3


@dataclass(frozen=True)
class Opening:
    """What an actor needs to make a model resident; `weights` is where its massive weights are (to be) kept.

    `blocks` are the benchmarks of each split (`tune.benchmarks.spec.SPLITS`), all of them resident side by side.
    With `scan` the actor finds them and proves them with k rows; else it reads them, if they are there.
    """

    spec: TrainSpec
    blocks: dict[str, EvalSpec]
    weights: str
    scan: bool
    k: int
    threads: int


@dataclass
class Item:
    """One benchmark of one adapter (None: the base model). `tag` comes back with the result."""

    tag: dict[str, Any]
    job: Job
    adapter: str | None
    answers: str
    attempts: int = 0

    @property
    def group(self) -> tuple[str | None, Job]:
        """Equal for the plain score and the attacks of one benchmark of one adapter, which share most of the work."""
        return self.adapter, replace(self.job, attack=PLAIN, attack_on=None)


@dataclass
class Result:
    """Rows, or why there are none."""

    item: Item
    rows: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    seconds: float = 0.0
    calls_saved: int = 0  # of layers, by what was shared with other attacks


@ray.remote(max_restarts=0)
class _Evaluator:
    """One resident model. A new model takes the place of the last one in the same process."""

    def __init__(self) -> None:
        self.adapter: str | None = None
        self.model: Any = None
        self.slot: Any = None
        self.scorers: dict[str, Any] = {}
        self.prefix: Any = None
        self.in_place = ExitStack()

    def open(self, opening: Opening) -> str | None:
        """Load model, tokenizer and tasks, find the massive weights; returns their file, None without."""
        import torch

        from macdrop import MassiveWeights, load_model, load_tokenizer
        from tune.benchmarks import AdapterSlot, Scorer
        from tune.benchmarks.prefix import PrefixCache
        from tune.files import atomic_write_json
        from tune.process import device
        from tune.weights import massive_weights, proof
        from tune.zoo import resolve

        self.in_place.close()
        self.model = self.slot = None
        self.scorers = {}
        self.prefix = PrefixCache()
        torch.set_num_threads(opening.threads)
        spec = opening.spec
        source = resolve(spec.model_name_or_path)
        loading = {"revision": spec.model_revision, "trust_remote_code": spec.trust_remote_code}
        tokenizer = load_tokenizer(source, **loading)
        model = load_model(
            source,
            dtype="bfloat16" if spec.bf16 else "float32",
            attn_implementation=spec.attn_implementation,
            **loading,
        ).to(device())
        weights = None
        if opening.scan:
            weights = massive_weights(spec, model, tokenizer)
            weights.save(opening.weights)
            proved = proof(model, tokenizer, weights, k=opening.k, source=spec.model_name_or_path)
            atomic_write_json(Path(opening.weights).with_name("proof.json"), proved.to_dict())
        elif Path(opening.weights).is_file():
            weights = MassiveWeights.load(opening.weights)
        self.slot = AdapterSlot(model)
        self.model, self.adapter = model, None
        for split, block in opening.blocks.items():
            self.scorers[split] = Scorer(model, tokenizer, block, weights)
            self.scorers[split].prepare()
        return opening.weights if weights else None

    def score(self, item: Item) -> tuple[list[dict[str, Any]], float, int]:
        """Rows of one benchmark, the seconds it took, and the calls of layers that sharing saved."""
        started = time.monotonic()
        if item.adapter != self.adapter:
            self.in_place.close()
            self.prefix.clear()
            self.adapter = None
            self.model = self.in_place.enter_context(self.slot.adapter(item.adapter))
            self.adapter = item.adapter
        saved = self.prefix.calls_saved
        scorer = self.scorers[item.job.split]
        rows = scorer.score(item.job, model=self.model, answers_path=item.answers, prefix=self.prefix)
        return rows, time.monotonic() - started, self.prefix.calls_saved - saved


class Pool:
    """Gives items to idle actors, replaces actors that die.

    An actor goes on with the benchmark it has just scored, under its other attacks; else with one that no other actor
    is at, of the adapter it has; else with whatever is waiting, so that none is idle.
    """

    def __init__(self, size: int, *, cpus: float, gpus: float) -> None:
        self._make = _Evaluator.options(num_cpus=cpus, num_gpus=gpus).remote
        self._idle: list[ActorHandle] = [self._make() for _ in range(size)]
        self._last: dict[ActorHandle, Item] = {}
        self._waiting: deque[Item] = deque()
        self._running: dict[ray.ObjectRef, tuple[ActorHandle, Item]] = {}
        self._opening: Opening | None = None

    def open(self, opening: Opening) -> str | None:
        """Make a model resident in every actor; returns the file of its massive weights, None if it has none.

        Raises:
            MacDropError: the model cannot be loaded, scanned or scored.
        """
        assert not self._running, "a pool is opened for a model when nothing is being scored"
        self._opening = opening
        first, *others = self._idle
        self._last = {}
        try:
            weights = ray.get(first.open.remote(opening))
            self._opening = replace(opening, scan=False)
            ray.get([actor.open.remote(self._opening) for actor in others])
        except RayTaskError as error:
            raise cause_of(error) from None
        return weights

    def submit(self, item: Item) -> None:
        self._waiting.append(item)

    @property
    def busy(self) -> int:
        """Items waiting or being scored."""
        return len(self._waiting) + len(self._running)

    def step(self) -> list[Result]:
        """Collect what is ready and hand out what is waiting, without waiting."""
        ready: list[ray.ObjectRef] = []
        if self._running:
            ready, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        # Collected first, so that an actor that is done goes on at once.
        results = [result for ref in ready if (result := self._collect(ref))]
        while self._idle and self._waiting:
            actor = self._idle.pop()
            item = self._next(actor)
            self._waiting.remove(item)
            self._last[actor] = item
            item.attempts += 1
            self._running[actor.score.remote(item)] = (actor, item)
        return results

    def close(self) -> None:
        """End all actors; safe to call twice."""
        for actor in [*self._idle, *(actor for actor, _ in self._running.values())]:
            ray.kill(actor)
        self._idle, self._running = [], {}

    def _next(self, actor: ActorHandle) -> Item:
        last = self._last.get(actor)
        taken = {item.group for _, item in self._running.values()}

        def cost(item: Item) -> tuple[bool, bool, bool]:
            return last is None or item.group != last.group, item.group in taken, not self._holds(actor, item.adapter)

        return min(self._waiting, key=cost)

    def _holds(self, actor: ActorHandle, adapter: str | None) -> bool:
        """A fresh actor holds the base model, and no adapter."""
        return adapter == (self._last[actor].adapter if actor in self._last else None)

    def _collect(self, ref: ray.ObjectRef) -> Result | None:
        actor, item = self._running.pop(ref)
        try:
            rows, seconds, saved = ray.get(ref)
        except RayActorError as error:
            self._replace(actor)
            if item.attempts < MAX_ATTEMPTS:
                self._waiting.appendleft(item)
                return None
            return Result(item, error=f"the evaluation actor died {item.attempts} times: {error}")
        except RayTaskError as error:
            self._idle.append(actor)
            # What the actor holds is unknown after an error half-way.
            self._last.pop(actor, None)
            return Result(item, error=str(cause_of(error)))
        self._idle.append(actor)
        return Result(item, rows, seconds=seconds, calls_saved=saved)

    def _replace(self, dead: ActorHandle) -> None:
        self._last.pop(dead, None)
        actor = self._make()
        # Calls to an actor run in order, so it may be handed out at once.
        actor.open.remote(self._opening)
        self._idle.append(actor)


def cause_of(error: RayTaskError) -> MacDropError:
    """Our own error as it was raised in the actor; any other with its type's name."""
    cause = error.cause
    return cause if isinstance(cause, MacDropError) else MacDropError(f"{type(cause).__name__}: {cause}")

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
from tune.benchmarks.spec import EvalSpec, Job
from tune.spec import TrainSpec

#: A benchmark under which this many actors died is given up.
MAX_ATTEMPTS = 3


@dataclass(frozen=True)
class Opening:
    """What an actor needs to make a model resident; `weights` is where its massive weights are (to be) kept.

    With `scan` the actor finds them and proves them with k rows; else it reads them, if they are there.
    """

    spec: TrainSpec
    eval: EvalSpec
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


@dataclass
class Result:
    """Rows, or why there are none."""

    item: Item
    rows: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    seconds: float = 0.0


@ray.remote(max_restarts=0)
class _Evaluator:
    """One resident model. A new model takes the place of the last one in the same process."""

    def __init__(self) -> None:
        self.adapter: str | None = None
        self.model: Any = None
        self.slot: Any = None
        self.scorer: Any = None
        self.in_place = ExitStack()

    def open(self, opening: Opening) -> str | None:
        """Load model, tokenizer and tasks, find the massive weights; returns their file, None without."""
        import torch

        from macdrop import MassiveWeights, load_model, load_tokenizer
        from tune.benchmarks import AdapterSlot, Scorer
        from tune.files import atomic_write_json
        from tune.process import device
        from tune.weights import massive_weights, proof
        from tune.zoo import resolve

        self.in_place.close()
        self.model = self.slot = self.scorer = None
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
        self.scorer = Scorer(model, tokenizer, opening.eval, weights)
        self.scorer.prepare()
        return opening.weights if weights else None

    def score(self, item: Item) -> tuple[list[dict[str, Any]], float]:
        """Rows of one benchmark, and the seconds it took."""
        started = time.monotonic()
        if item.adapter != self.adapter:
            self.in_place.close()
            self.adapter = None
            self.model = self.in_place.enter_context(self.slot.adapter(item.adapter))
            self.adapter = item.adapter
        rows = self.scorer.score(item.job, model=self.model, answers_path=item.answers)
        return rows, time.monotonic() - started


class Pool:
    """Gives items to idle actors, first those whose adapter an actor already has; replaces actors that die."""

    def __init__(self, size: int, *, cpus: float, gpus: float) -> None:
        self._make = _Evaluator.options(num_cpus=cpus, num_gpus=gpus).remote
        self._idle: list[ActorHandle] = [self._make() for _ in range(size)]
        self._holds: dict[ActorHandle, str | None] = {}
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
        self._holds = {}
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
        """Hand out what is waiting and collect what is ready, without waiting."""
        while self._idle and self._waiting:
            actor = self._idle.pop()
            held = self._holds.get(actor)
            item = next((item for item in self._waiting if item.adapter == held), self._waiting[0])
            self._waiting.remove(item)
            self._holds[actor] = item.adapter
            item.attempts += 1
            self._running[actor.score.remote(item)] = (actor, item)
        if not self._running:
            return []
        ready, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        return [result for ref in ready if (result := self._collect(ref))]

    def close(self) -> None:
        """End all actors; safe to call twice."""
        for actor in [*self._idle, *(actor for actor, _ in self._running.values())]:
            ray.kill(actor)
        self._idle, self._running = [], {}

    def _collect(self, ref: ray.ObjectRef) -> Result | None:
        actor, item = self._running.pop(ref)
        try:
            rows, seconds = ray.get(ref)
        except RayActorError as error:
            self._replace(actor)
            if item.attempts < MAX_ATTEMPTS:
                self._waiting.appendleft(item)
                return None
            return Result(item, error=f"the evaluation actor died {item.attempts} times: {error}")
        except RayTaskError as error:
            self._idle.append(actor)
            # What the actor holds is unknown after an error half-way.
            self._holds[actor] = "?"
            return Result(item, error=str(cause_of(error)))
        self._idle.append(actor)
        return Result(item, rows, seconds=seconds)

    def _replace(self, dead: ActorHandle) -> None:
        self._holds.pop(dead, None)
        actor = self._make()
        # Calls to an actor run in order, so it may be handed out at once.
        actor.open.remote(self._opening)
        self._idle.append(actor)


def cause_of(error: RayTaskError) -> MacDropError:
    """Our own error as it was raised in the actor; any other with its type's name."""
    cause = error.cause
    return cause if isinstance(cause, MacDropError) else MacDropError(f"{type(cause).__name__}: {cause}")

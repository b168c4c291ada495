"""A pool of evaluation actors: base model and tasks stay resident, adapters are swapped in and out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ray.actor import ActorHandle

from tune.config.eval_spec import PLAIN, EvalJob, EvalSpec
from tune.config.run_spec import TrainSpec
from tune.distributed.actors.actor_pool import ActorPool, Done, PoolActor
from tune.scheduling.queue import MAX_ATTEMPTS
from tune.training.watchdog import STACKS, passes_watched, why_it_died


@dataclass(frozen=True)
class Opening:
    """What an actor needs to make a model resident; `weights` is where its massive weights are (to be) kept.

    `blocks` are the benchmarks of each split (`tune.config.eval_spec.SPLITS`), all of them resident side by side.
    With `scan` the actor finds them and proves them with k rows; else it reads them, if they are there. An actor that
    begins no forward pass for `step_timeout_s` seconds in the middle of a benchmark ends itself.
    """

    spec: TrainSpec
    blocks: dict[str, EvalSpec]
    weights: str
    scan: bool
    k: int
    threads: int
    step_timeout_s: float = 1800.0


@dataclass
class EvalTask:
    """One benchmark of one adapter (None: the base model). `tag` comes back with the result.

    `answers` is the file for what was measured item by item, `within` a folder above it that is there.
    """

    tag: dict[str, Any]
    job: EvalJob
    adapter: str | None
    answers: str
    within: str | None = None
    attempts: int = 0

    @property
    def group(self) -> tuple[str | None, EvalJob]:
        """Equal for the plain score and the attacks of one benchmark of one adapter, which share most of the work."""
        return self.adapter, replace(self.job, attack=PLAIN, attack_on=None)

    @property
    def stacks(self) -> Path:
        """Where an actor that hangs leaves what it was at: in the trial's folder, or the model's."""
        answers = Path(self.answers)
        return answers.parent.parent / STACKS / f"score-{answers.stem}.txt"


@dataclass
class Result:
    """Rows, or why there are none."""

    item: EvalTask
    rows: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    seconds: float = 0.0
    calls_saved: int = 0  # of layers, by what was shared with other attacks


class Evaluator(PoolActor):
    """One resident model. A new model takes the place of the last one in the same process."""

    def __init__(self) -> None:
        self.adapter: str | None = None
        self.model: Any = None
        self.slot: Any = None
        self.scorers: dict[str, Any] = {}
        self.prefix: Any = None
        self.in_place = ExitStack()
        self.step_timeout_s = 0.0

    def prepare(self, opening: Opening) -> str | None:
        """Load model, tokenizer and tasks, find the massive weights; returns their file, None without."""
        import torch

        from macdrop import MassiveWeights, load_model, load_tokenizer
        from tune.evaluation.adapters import AdapterSlot
        from tune.evaluation.prefix_cache import PrefixCache
        from tune.evaluation.scorer import Scorer
        from tune.storage.atomic import atomic_write_json
        from tune.training.massive_weights import massive_weights, proof
        from tune.training.process_group import device
        from tune.zoo.catalog import resolve

        self.in_place.close()
        self.model = self.slot = None
        self.scorers = {}
        self.prefix = PrefixCache()
        torch.set_num_threads(opening.threads)
        self.step_timeout_s = opening.step_timeout_s
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
        self.slot = AdapterSlot(model, sealed=True)
        self.model, self.adapter = model, None
        for split, block in opening.blocks.items():
            self.scorers[split] = Scorer(model, tokenizer, block, weights)
            self.scorers[split].prepare()
        return opening.weights if weights else None

    def score(self, item: EvalTask) -> tuple[list[dict[str, Any]], float, int]:
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
        with passes_watched(self.slot.base, item.stacks, self.step_timeout_s):  # an adapter calls the base as well
            rows = scorer.score(
                item.job, model=self.model, answers_path=item.answers, prefix=self.prefix, within=item.within
            )
        return rows, time.monotonic() - started, self.prefix.calls_saved - saved


class EvaluatorPool:
    """Gives items to idle actors; an item whose actor died is given out again.

    An actor goes on with the benchmark it has just scored, under its other attacks; else with one that no other actor
    is at, of the adapter it has; else with whatever is waiting, so that none is idle.
    """

    def __init__(self, size: int, *, cpus: float, gpus: float, kind: type[PoolActor] = Evaluator) -> None:
        self._pool = ActorPool(kind, size, cpus=cpus, gpus=gpus)
        self._last: dict[ActorHandle, EvalTask] = {}
        self._waiting: deque[EvalTask] = deque()
        self._step_timeout_s = 0.0

    def open(self, opening: Opening) -> str | None:
        """Make a model resident in every actor; returns the file of its massive weights, None if it has none.

        Raises:
            MacDropError: the model cannot be loaded, scanned or scored, or actors die of it.
        """
        self._last = {}
        self._step_timeout_s = opening.step_timeout_s
        return self._pool.open(opening, lambda opening: replace(opening, scan=False))

    def submit(self, item: EvalTask) -> None:
        self._waiting.append(item)

    def drain(self, nodes: Collection[str]) -> None:
        """Nodes (Ray's ids) that will be gone soon: their actors finish what they are at, and are made elsewhere."""
        self._pool.drain(nodes)

    def rest(self) -> int:
        """Give up what idle actors hold until something is to be scored; returns how many there were."""
        return self._pool.rest()

    @property
    def busy(self) -> int:
        """Items waiting or being scored."""
        return len(self._waiting) + self.at_work

    @property
    def at_work(self) -> int:
        """Items being scored."""
        return len(self._pool.work)

    def step(self) -> list[Result]:
        """Collect what is ready and hand out what is waiting, without waiting.

        Raises:
            MacDropError: no actor is left, and new ones do not come up.
        """
        # Collected first, so that an actor that is done goes on at once.
        results = [result for done in self._pool.ready() if (result := self._result(done))]
        if self._waiting:
            self._pool.wake()
        while self._pool.idle and self._waiting:
            actor = self._pool.idle[-1]
            item = self._next(actor)
            self._waiting.remove(item)
            self._last[actor] = item
            item.attempts += 1
            self._pool.give(actor, "score", item)
        return results

    def close(self) -> None:
        """End all actors; safe to call twice."""
        self._pool.close()

    def _next(self, actor: ActorHandle) -> EvalTask:
        last = self._last.get(actor)
        taken = {item.group for item in self._pool.work}

        def cost(item: EvalTask) -> tuple[bool, bool, bool]:
            return last is None or item.group != last.group, item.group in taken, not self._holds(actor, item.adapter)

        return min(self._waiting, key=cost)

    def _holds(self, actor: ActorHandle, adapter: str | None) -> bool:
        """A fresh actor holds the base model, and no adapter."""
        return adapter == (self._last[actor].adapter if actor in self._last else None)

    def _result(self, done: Done) -> Result | None:
        """None where the item is scored again, because its actor died."""
        item: EvalTask = done.work
        if done.died:
            self._last.pop(done.actor, None)
            item.attempts -= done.excused
            if item.attempts < MAX_ATTEMPTS:
                self._waiting.appendleft(item)
                return None
            why = why_it_died(item.stacks, self._step_timeout_s, done.died)
            return Result(item, error=f"the evaluation actor died {item.attempts} times: {why}")
        if done.error:
            # What the actor holds is unknown after an error half-way.
            self._last.pop(done.actor, None)
            return Result(item, error=str(done.error))
        rows, seconds, saved = done.value
        return Result(item, rows, seconds=seconds, calls_saved=saved)

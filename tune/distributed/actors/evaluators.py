"""A pool of evaluation actors: base model and benchmarks stay resident, adapters are swapped in and out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from ray.actor import ActorHandle

from macdrop import MassiveWeights
from tune.config.eval_spec import EvalSpec
from tune.config.run_spec import TrainSpec
from tune.distributed.actors.actor_pool import ActorPool, Done, PoolActor
from tune.distributed.actors.eval_task import EvalTask, Result
from tune.evaluation.adapters import AdapterSlot
from tune.evaluation.own.travel import OwnFiles, at_home
from tune.evaluation.prefix_cache import PrefixCache
from tune.evaluation.scorer import Scorer
from tune.scheduling.tasks import MAX_ATTEMPTS
from tune.storage.atomic import atomic_write_json
from tune.storage.places import cache_dir
from tune.storage.records import SNR_FILE
from tune.training.loading import open_base
from tune.training.massive_weights import proof, recorded_weights
from tune.training.process_group import device, prepare_process
from tune.training.single import recorded_snr
from tune.training.watchdog import passes_watched, why_it_died

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Opening:
    """All that an actor needs to make a model resident; `weights` is the file of its massive weights.

    `blocks` are the benchmarks of each split (`tune.config.eval_spec.SPLITS`), all of them resident side by side.
    `own` are the files behind the own measures of each split, which need not be on the actor's machine.
    With `scan` the actor finds the massive weights and proves them with k rows; otherwise it reads the file if it
    exists. `unruled` are fine-tunings for which SlimAdam's rules are measured first, into snr.json beside that file,
    with the batches of `workers` workers. An actor that begins no forward pass for `step_timeout_s` seconds within a
    benchmark exits.
    """

    spec: TrainSpec
    blocks: dict[str, EvalSpec]
    weights: str
    scan: bool
    k: int
    threads: int
    step_timeout_s: float = 1800.0
    own: dict[str, OwnFiles | None] = field(default_factory=dict)
    unruled: tuple[TrainSpec, ...] = ()
    workers: int = 1


class Evaluator(PoolActor):
    """One resident model. A new model replaces the previous one in the same process."""

    def __init__(self) -> None:
        self.model: PreTrainedModel | PeftModel | None = None
        self.slot: AdapterSlot | None = None
        self.adapter: str | None = None
        self.scorers: dict[str, Scorer] = {}
        self.prefix = PrefixCache()
        self.in_place = ExitStack()
        self.step_timeout_s = 0.0

    def prepare(self, opening: Opening) -> str | None:
        """Load model, tokenizer and benchmarks, find the massive weights; return their file, None without."""
        self.in_place.close()
        self.model = self.slot = None  # Two models at once may not fit.
        self.scorers = {}
        self.prefix = PrefixCache()
        torch.set_num_threads(opening.threads)
        self.step_timeout_s = opening.step_timeout_s
        if opening.unruled:
            _measure_snr(opening)
        spec = opening.spec
        model, tokenizer = open_base(spec)
        model = model.to(device())  # type: ignore[arg-type]  # the wrapper in transformers loses `self`
        weights = None
        if opening.scan:
            weights = recorded_weights(spec, model, tokenizer, Path(opening.weights))
            proved = proof(model, tokenizer, weights, k=opening.k, source=spec.model_name_or_path)
            atomic_write_json(Path(opening.weights).with_name("proof.json"), proved.to_dict())
        elif Path(opening.weights).is_file():
            weights = MassiveWeights.load(opening.weights)
        self.slot = AdapterSlot(model, sealed=True)
        self.model, self.adapter = model, None
        for split, block in opening.blocks.items():
            here = at_home(block, opening.own.get(split))
            self.scorers[split] = Scorer(model, tokenizer, here, weights)
            self.scorers[split].prepare()
        return opening.weights if weights else None

    def score(self, task: EvalTask) -> Result:
        """Return the result of one benchmark: its rows, and what scoring them took."""
        assert self.slot is not None, "an actor is opened before it scores"
        started = time.monotonic()
        if task.adapter != self.adapter:
            self.in_place.close()
            self.prefix.clear()
            self.adapter = None
            self.model = self.in_place.enter_context(self.slot.adapter(task.adapter))
            self.adapter = task.adapter
        saved = self.prefix.calls_saved
        scorer = self.scorers[task.job.split]
        with passes_watched(self.slot.base, task.stacks, self.step_timeout_s):  # an adapter calls the base as well
            rows = scorer.score(
                task.job,
                model=self.model,
                answers_path=task.answers,
                prefix=self.prefix,
                within=task.within,
                adapter=task.adapter,
            )
        seconds, shared = time.monotonic() - started, self.prefix.calls_saved - saved
        return Result(task, rows, seconds=seconds, calls_saved=shared, notes=list(scorer.notes))


def _measure_snr(opening: Opening) -> None:
    """Write snr.json unless it is there, and then check it; before the model is resident, as it is loaded for it."""
    prepare_process(opening.threads)
    file = Path(opening.weights).with_name(SNR_FILE)
    record = recorded_snr(opening.unruled, file, cache_dir() / "data", workers=opening.workers)
    if not file.is_file():
        atomic_write_json(file, record.model_dump(mode="json"))


class EvaluatorPool:
    """Hands tasks to idle evaluators; a task whose actor died is retried.

    Scheduling order per actor: the same benchmark under another attack; then an unclaimed benchmark of the loaded
    adapter; then any.
    """

    def __init__(self, size: int, *, cpus: float, gpus: float, kind: type[PoolActor] = Evaluator) -> None:
        self._pool = ActorPool(kind, size, cpus=cpus, gpus=gpus)
        self._last: dict[ActorHandle, EvalTask] = {}
        self._waiting: deque[EvalTask] = deque()
        self._step_timeout_s = 0.0

    def open(self, opening: Opening) -> str | None:
        """Make a model resident in every actor; return the file of its massive weights, None if it has none.

        Raises:
            MacDropError: the model cannot be loaded, scanned or scored, or actors die of it.
        """
        self._last = {}
        self._step_timeout_s = opening.step_timeout_s
        return self._pool.open(opening, lambda opening: replace(opening, scan=False, unruled=()))

    def submit(self, task: EvalTask) -> None:
        """Queue a task."""
        self._waiting.append(task)

    def drain(self, nodes: Collection[str]) -> None:
        """Replace actors on nodes (Ray's ids) that will be taken away; busy ones finish their benchmark first."""
        self._pool.drain(nodes)

    def release(self) -> int:
        """Release idle actors until something is to be scored; return how many there were."""
        return self._pool.release()

    @property
    def busy(self) -> int:
        """Tasks waiting or being scored."""
        return len(self._waiting) + self.at_work

    @property
    def at_work(self) -> int:
        """Tasks being scored."""
        return len(self._pool.work)

    def at(self) -> dict[str, str | None]:
        """Return the actors that are up, by name, each with the trial (or the study's base) that it scores, if any."""
        return {name: work and work.tag["name"] for name, work in self._pool.at().items()}

    def step(self) -> list[Result]:
        """Collect finished tasks and hand out waiting ones, without blocking.

        Raises:
            MacDropError: no actor is left, and replacements fail to start.
        """
        # Collected first, so that an actor that is done gets its next task at once.
        results = [result for done in self._pool.ready() if (result := self._result(done))]
        if self._waiting:
            self._pool.restart()
        while self._pool.idle and self._waiting:
            actor = self._pool.idle[-1]
            task = self._next(actor)
            self._waiting.remove(task)
            self._last[actor] = task
            task.attempts += 1
            self._pool.give(actor, "score", task)
        return results

    def close(self) -> None:
        """End all actors; safe to call twice."""
        self._pool.close()

    def _next(self, actor: ActorHandle) -> EvalTask:
        last = self._last.get(actor)
        claimed = {task.group for task in self._pool.work}

        def cost(task: EvalTask) -> tuple[bool, bool, bool]:
            return last is None or task.group != last.group, task.group in claimed, not self._holds(actor, task.adapter)

        return min(self._waiting, key=cost)

    def _holds(self, actor: ActorHandle, adapter: str | None) -> bool:
        """A fresh actor holds the base model, and no adapter."""
        return adapter == (self._last[actor].adapter if actor in self._last else None)

    def _result(self, done: Done) -> Result | None:
        """Return the result, or None if the task is retried because its actor died."""
        task: EvalTask = done.work
        if done.died:
            self._last.pop(done.actor, None)
            task.attempts -= done.excused
            if task.attempts < MAX_ATTEMPTS:
                self._waiting.appendleft(task)
                return None
            why = why_it_died(task.stacks, self._step_timeout_s, done.died)
            return Result(task, error=f"the evaluation actor died {task.attempts} times: {why}")
        if done.error:
            # After an error the state of the actor's adapter is unknown.
            self._last.pop(done.actor, None)
            return Result(task, error=str(done.error))
        return replace(done.value, task=task)

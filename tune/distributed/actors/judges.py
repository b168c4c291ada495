"""A local judge in Ray actors: resident in each of them, batches handed to whoever is idle, the dead replaced."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from macdrop.errors import MacDropError
from tune.config.judge_spec import JudgeSpec
from tune.config.run_spec import RunSpec
from tune.distributed.actors.actor_pool import ActorPool, PoolActor
from tune.evaluation.judge.answers import answers_of
from tune.evaluation.judge.prompt import Judgement, Question
from tune.evaluation.judge.session import Judge, judge_at_end, make_judge
from tune.scheduling.queue import MAX_ATTEMPTS
from tune.storage.run_folder import RunFolder
from tune.training.watchdog import STACKS, passes_watched, why_it_died


@dataclass(frozen=True)
class JudgeOpening:
    """What an actor needs to make a judge resident. One that begins no forward pass for `step_timeout_s` seconds in the
    middle of a batch ends itself."""

    spec: JudgeSpec
    threads: int
    step_timeout_s: float


class JudgeActor(PoolActor):
    """One resident judge."""

    def prepare(self, opening: JudgeOpening) -> None:
        import torch

        from tune.evaluation.judge.local import LocalJudge

        torch.set_num_threads(opening.threads)
        self.step_timeout_s = opening.step_timeout_s
        self.local = LocalJudge(opening.spec)

    def judge(self, batch: _Batch) -> list[Judgement]:
        with passes_watched(self.local.model, batch.stacks, self.step_timeout_s):
            return list(self.local.judge(batch.asked))


@dataclass
class _Batch:
    """Questions that are judged together, where an actor that hangs leaves its stacks, and how many were given them."""

    asked: list[Question]
    stacks: Path
    attempts: int = 0


class ActorJudge:
    """`size` actors with the same judge; those that hang leave their stacks in the folder `stacks`.

    Raises:
        MacDropError: the judge cannot be loaded, or actors die of it.
    """

    def __init__(
        self,
        opening: JudgeOpening,
        *,
        size: int,
        cpus: float,
        gpus: float,
        stacks: Path,
        kind: type[PoolActor] = JudgeActor,
    ) -> None:
        self._opening, self._stacks = opening, stacks
        self._pool = ActorPool(kind, size, cpus=cpus, gpus=gpus)
        try:
            self._pool.open(opening)
        except MacDropError:
            self.close()
            raise

    def judge(self, asked: Sequence[Question]) -> Iterator[Judgement]:
        """Judgements, batch by batch. A batch under which actors die again and again is one of errors.

        Raises:
            MacDropError: the judge failed.
        """
        order = sorted(asked, key=lambda question: -len(question.prompt))
        size = self._opening.spec.batch_size
        waiting = deque(
            _Batch(order[at : at + size], self._stacks / f"judge-{at // size + 1}.txt")
            for at in range(0, len(order), size)
        )
        while waiting or self._pool.work:
            while self._pool.idle and waiting:
                batch = waiting.popleft()
                batch.attempts += 1
                self._pool.give(self._pool.idle[-1], "judge", batch)
            for done in self._pool.ready(timeout=None):
                batch = done.work
                if done.error:
                    raise done.error
                if not done.died:
                    yield from done.value
                elif batch.attempts < MAX_ATTEMPTS:
                    waiting.appendleft(batch)
                else:
                    why = why_it_died(batch.stacks, self._opening.step_timeout_s, done.died)
                    told = f"the judge's actor died {batch.attempts} times: {why}"
                    yield from (Judgement(question, error=told) for question in batch.asked)

    def close(self) -> None:
        self._pool.close()


def judge_sweep(
    spec: RunSpec,
    run_folder: RunFolder,
    *,
    gpus: float,
    note: Callable[[str], None],
    show: Callable[[int, int], None],
) -> int:
    """Judge at the end of a sweep what is not judged yet; returns the failures.

    gpus: of each actor, as an evaluation actor has them; these are gone by now.
    """

    def make(judge: JudgeSpec) -> Judge:
        if judge.base_url:
            return make_judge(judge)
        actors = spec.ray
        return ActorJudge(
            JudgeOpening(judge, actors.threads_per_worker, actors.step_timeout_s),
            size=actors.evaluators,
            cpus=actors.cpus_per_evaluator,
            gpus=gpus,
            stacks=run_folder.run_dir / STACKS,
        )

    try:
        files = answers_of(run_folder)
    except ValueError as error:
        note(f"nothing was judged: {error}")
        return 1
    return judge_at_end(
        files,
        spec.eval.judge,
        make=make,
        add_scores=run_folder.add_scores,
        note=note,
        show=show,
    )

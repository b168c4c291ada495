"""A local judge in a pool of Ray actors: resident in each of them, fed batch by batch, replaced when an actor dies."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from macdrop.errors import MacDropError
from tune.config.judge_spec import JudgeSpec
from tune.config.run_spec import RaySpec
from tune.distributed.actors.actor_pool import ActorPool, PoolActor
from tune.evaluation.judge.answers import answers_of_run
from tune.evaluation.judge.local import LocalJudge
from tune.evaluation.judge.prompt import Judgement, Question
from tune.evaluation.judge.session import Judge, judge_at_end, make_judge
from tune.scheduling.tasks import MAX_ATTEMPTS
from tune.storage.run_folder import RunFolder
from tune.training.watchdog import STACKS, passes_watched, why_it_died


@dataclass(frozen=True)
class JudgeOpening:
    """All that an actor needs to make a judge resident.

    An actor that begins no forward pass for `step_timeout_s` seconds within a batch exits.
    """

    spec: JudgeSpec
    threads: int
    step_timeout_s: float


class JudgeActor(PoolActor):
    """One resident judge."""

    def prepare(self, opening: JudgeOpening) -> None:
        torch.set_num_threads(opening.threads)
        self.step_timeout_s = opening.step_timeout_s
        self.local = LocalJudge(opening.spec)

    def judge(self, batch: _Batch) -> list[Judgement]:
        """Judge the questions of a batch."""
        assert self.local.model is not None, "only a closed judge has no model"
        with passes_watched(self.local.model, batch.stacks, self.step_timeout_s):
            return list(self.local.judge(batch.asked))


@dataclass
class _Batch:
    """Questions that are judged together; `stacks` is the file for the stacks of an actor that hangs."""

    asked: list[Question]
    stacks: Path
    attempts: int = 0


class ActorJudge:
    """`size` actors with the same judge; actors that hang leave their stacks in the folder `stacks`.

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
        """Yield judgements, batch by batch; a batch under which actors keep dying yields errors.

        Raises:
            MacDropError: the judge failed.
        """
        longest_first = sorted(asked, key=lambda question: -len(question.prompt))
        size = self._opening.spec.batch_size
        waiting = deque(
            _Batch(longest_first[at : at + size], self._stacks / f"judge-{at // size + 1}.txt")
            for at in range(0, len(asked), size)
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
                    error = f"the judge's actor died {batch.attempts} times: {why}"
                    yield from (Judgement(question, error=error) for question in batch.asked)

    def close(self) -> None:
        """End the actors; safe to call twice."""
        self._pool.close()


def judge_sweep(
    judge: JudgeSpec,
    run_folder: RunFolder,
    *,
    actors: RaySpec,
    gpus: float,
    note: Callable[[str], None],
    show: Callable[[int, int], None],
) -> int:
    """Judge at the end of a sweep what has not been judged yet; return the number of failures.

    gpus: those of an evaluation actor, which have been freed by now.
    """

    def make(judge: JudgeSpec) -> Judge:
        if judge.base_url:
            return make_judge(judge)
        return ActorJudge(
            JudgeOpening(judge, actors.threads_per_worker, actors.step_timeout_s),
            size=actors.evaluators,
            cpus=actors.cpus_per_evaluator,
            gpus=gpus,
            stacks=run_folder.run_dir / STACKS,
        )

    try:
        files = answers_of_run(run_folder)
    except ValueError as error:
        note(f"nothing was judged: {error}")
        return 1
    return judge_at_end(
        files,
        judge,
        make=make,
        add_scores=run_folder.add_scores,
        note=note,
        show=show,
    )

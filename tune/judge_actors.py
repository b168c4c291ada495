"""A local judge in Ray actors: resident in each of them, batches handed to whoever is idle, the dead replaced."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from macdrop.errors import MacDropError
from tune.assess import Judge, judge_at_end, make_judge
from tune.benchmarks.judge import Judgement, Question
from tune.benchmarks.judge_spec import JudgeSpec
from tune.crew import MAX_ATTEMPTS, Crew, Member
from tune.journal import Journal
from tune.judging import answers_of
from tune.progress import Progress
from tune.spec import RunSpec


class _JudgeActor(Member):
    """One resident judge."""

    def prepare(self, argument: tuple[JudgeSpec, int]) -> None:
        import torch

        from tune.benchmarks.judge_local import LocalJudge

        spec, threads = argument
        torch.set_num_threads(threads)
        self.local = LocalJudge(spec)

    def judge(self, batch: _Batch) -> list[Judgement]:
        return list(self.local.judge(batch.asked))


@dataclass
class _Batch:
    """Questions that are judged together, and how many actors were given them."""

    asked: list[Question]
    attempts: int = 0


class ActorJudge:
    """`size` actors with the same judge.

    Raises:
        MacDropError: the judge cannot be loaded, or actors die of it.
    """

    def __init__(
        self,
        spec: JudgeSpec,
        *,
        size: int,
        cpus: float,
        gpus: float,
        threads: int,
        kind: type[Member] = _JudgeActor,
    ) -> None:
        self._batch_size = spec.batch_size
        self._crew = Crew(kind, size, cpus=cpus, gpus=gpus)
        try:
            self._crew.open((spec, threads))
        except MacDropError:
            self.close()
            raise

    def judge(self, asked: Sequence[Question]) -> Iterator[Judgement]:
        """Judgements, batch by batch. A batch under which actors die again and again is one of errors.

        Raises:
            MacDropError: the judge failed.
        """
        order = sorted(asked, key=lambda question: -len(question.prompt))
        waiting = deque(_Batch(order[at : at + self._batch_size]) for at in range(0, len(order), self._batch_size))
        while waiting or self._crew.work:
            while self._crew.idle and waiting:
                batch = waiting.popleft()
                batch.attempts += 1
                self._crew.give(self._crew.idle[-1], "judge", batch)
            for done in self._crew.ready(timeout=None):
                batch = done.work
                if done.error:
                    raise done.error
                if not done.died:
                    yield from done.value
                elif batch.attempts < MAX_ATTEMPTS:
                    waiting.appendleft(batch)
                else:
                    told = f"the judge's actor died {batch.attempts} times: {done.died}"
                    yield from (Judgement(question, error=told) for question in batch.asked)

    def close(self) -> None:
        self._crew.close()


def judge_sweep(spec: RunSpec, journal: Journal, progress: Progress, *, gpus: float) -> int:
    """Judge at the end of a sweep what is not judged yet; returns the failures.

    gpus: of each actor, as an evaluation actor has them; these are gone by now.
    """

    def make(judge: JudgeSpec) -> Judge:
        if judge.base_url:
            return make_judge(judge)
        actors = spec.ray
        return ActorJudge(
            judge,
            size=actors.evaluators,
            cpus=actors.cpus_per_evaluator,
            gpus=gpus,
            threads=actors.threads_per_worker,
        )

    try:
        files = answers_of(journal)
    except ValueError as error:
        progress.note(f"nothing was judged: {error}")
        return 1
    return judge_at_end(
        files,
        spec.eval.judge,
        make=make,
        add_scores=journal.add_scores,
        note=progress.note,
        show=progress.judged,
    )

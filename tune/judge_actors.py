"""A local judge in Ray actors: resident in each of them, batches handed to whoever is idle, the dead replaced."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from tune.assess import Judge, judge_at_end, make_judge
from tune.benchmarks.judge import Judgement, Question
from tune.benchmarks.judge_spec import JudgeSpec
from tune.evaluators import MAX_ATTEMPTS, cause_of
from tune.journal import Journal
from tune.judging import answers_of
from tune.progress import Progress
from tune.spec import RunSpec


@ray.remote(max_restarts=0)
class _JudgeActor:
    """One resident judge."""

    def open(self, spec: JudgeSpec, threads: int) -> None:
        import torch

        from tune.benchmarks.judge_local import LocalJudge

        torch.set_num_threads(threads)
        self.local = LocalJudge(spec)

    def judge(self, asked: Sequence[Question]) -> list[Judgement]:
        return list(self.local.judge(asked))


class ActorJudge:
    """`size` actors with the same judge.

    Raises:
        MacDropError: the judge cannot be loaded.
    """

    def __init__(self, spec: JudgeSpec, *, size: int, cpus: float, gpus: float, threads: int) -> None:
        self._spec, self._threads = spec, threads
        self._new = _JudgeActor.options(num_cpus=cpus, num_gpus=gpus).remote
        self._actors: list[ActorHandle] = []
        try:
            ray.get([self._open() for _ in range(size)])
        except RayTaskError as error:
            self.close()
            raise cause_of(error) from None

    def _open(self) -> ray.ObjectRef:
        actor = self._new()
        self._actors.append(actor)
        return actor.open.remote(self._spec, self._threads)

    def judge(self, asked: Sequence[Question]) -> Iterator[Judgement]:
        """Judgements, batch by batch. A batch under which actors die again and again is one of errors.

        Raises:
            MacDropError: the judge failed.
        """
        order = sorted(asked, key=lambda question: -len(question.prompt))
        size = self._spec.batch_size
        waiting = deque((order[at : at + size], 1) for at in range(0, len(order), size))
        idle = list(self._actors)
        running: dict[ray.ObjectRef, tuple[ActorHandle, list[Question], int]] = {}
        while waiting or running:
            while idle and waiting:
                actor, (batch, attempt) = idle.pop(), waiting.popleft()
                running[actor.judge.remote(batch)] = (actor, batch, attempt)
            ready, _ = ray.wait(list(running), num_returns=1)
            for ref in ready:
                actor, batch, attempt = running.pop(ref)
                try:
                    judged = ray.get(ref)
                except RayTaskError as error:
                    raise cause_of(error) from None
                except RayActorError as error:
                    self._actors.remove(actor)
                    self._open()
                    idle.append(self._actors[-1])
                    if attempt < MAX_ATTEMPTS:
                        waiting.appendleft((batch, attempt + 1))
                        continue
                    told = f"the judge's actor died {attempt} times: {str(error).splitlines()[0]}"
                    judged = [Judgement(question, error=told) for question in batch]
                else:
                    idle.append(actor)
                yield from judged

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []


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



"""Evaluation and judge actors that die at work or during start-up: only in-flight work is repeated."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from macdrop.errors import MacDropError
from tune.config.eval_spec import EvalJob, EvalSpec, jobs
from tune.config.judge_spec import JudgeSpec
from tune.config.messages import build
from tune.config.run_spec import RunSpec
from tune.distributed.actors.actor_pool import ActorPool, PoolActor
from tune.distributed.actors.eval_task import EvalTask, Result
from tune.distributed.actors.evaluators import Evaluator, EvaluatorPool, Opening
from tune.distributed.actors.judges import ActorJudge, JudgeOpening
from tune.evaluation.judge.prompt import Judgement, Question
from tune.scheduling.tasks import MAX_ATTEMPTS

pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.timeout(240)]


class Fragile(PoolActor):
    """A stand-in for a real actor: logs its work and dies by SIGKILL as often as `plan.json` says."""

    def _do(self, name: str) -> None:
        with open(self.folder / "log", "a") as file:
            file.write(f"{name} {os.getpid()}\n")
        done = Counter(line.split()[0] for line in (self.folder / "log").read_text().splitlines())
        plan = json.loads((self.folder / "plan.json").read_text())
        if done[name] <= plan["deaths"].get(name, 0):
            os.kill(os.getpid(), signal.SIGKILL)
        if name in plan["errors"]:
            raise MacDropError(f"{name} cannot be done")

    def prepare(self, opening) -> str:
        self.folder = Path(opening.weights if isinstance(opening, Opening) else opening.spec.model)
        self._do("open")
        return str(self.folder)

    def score(self, item):
        self._do(item.tag["name"])
        return Result(item, [{"value": 1.0}])

    def judge(self, batch):
        for question in batch.asked:
            self._do(question.item)
        return [Judgement(question, score=5) for question in batch.asked]


@pytest.fixture(scope="module", autouse=True)
def _fragile_travels(local_ray):
    """Ray's workers cannot import this file."""
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def tell(folder: Path, errors=(), **deaths: int) -> None:
    (folder / "log").write_text("")
    (folder / "plan.json").write_text(json.dumps({"deaths": deaths, "errors": list(errors)}))


def log(folder: Path) -> list[str]:
    return [line.split()[0] for line in (folder / "log").read_text().splitlines()]


def opening(folder: Path) -> Opening:
    return Opening(None, {}, str(folder), scan=True, k=1, threads=1)


def finish(pool: EvaluatorPool) -> dict[str, str | None]:
    """Name -> error of every result; each comes once."""
    results = []
    deadline = time.monotonic() + 120
    while pool.busy and time.monotonic() < deadline:
        results += pool.step()
        time.sleep(0.02)
    assert len({result.task.tag["name"] for result in results}) == len(results)
    return {result.task.tag["name"]: result.error for result in results}


def open_all(pool: EvaluatorPool, folder: Path) -> str:
    """Open the pool and wait for those actors, too, that it does not wait for."""
    answer = pool.open(opening(folder))
    deadline = time.monotonic() + 60
    while pool._pool._coming and time.monotonic() < deadline:
        pool.step()
        time.sleep(0.02)
    return answer


@pytest.fixture
def pool():
    made = EvaluatorPool(2, cpus=0, gpus=0, kind=Fragile)
    yield made
    made.close()


def submit(pool: EvaluatorPool, names: str) -> None:
    for name in names:
        pool.submit(EvalTask({"name": name}, EvalJob("perplexity", name), None, ""))


def test_only_the_in_flight_benchmark_is_retried_and_a_failing_one_is_dropped(pool, tmp_path):
    tell(tmp_path, b=1, e=MAX_ATTEMPTS)
    assert open_all(pool, tmp_path) == str(tmp_path)
    submit(pool, "abcdefgh")
    found = finish(pool)
    assert {name for name, error in found.items() if error} == {"e"}
    assert f"the evaluation actor died {MAX_ATTEMPTS} times" in found["e"]
    done = Counter(log(tmp_path))
    assert done.pop("open") <= 2 + 1 + MAX_ATTEMPTS, "each death costs one actor"
    assert done == {name: {"b": 2, "e": MAX_ATTEMPTS}.get(name, 1) for name in "abcdefgh"}


def test_actors_killed_while_they_open_a_model_are_replaced(pool, tmp_path):
    tell(tmp_path, open=2)
    open_all(pool, tmp_path)
    submit(pool, "ab")
    assert finish(pool) == {"a": None, "b": None}
    tell(tmp_path, open=100)
    with pytest.raises(MacDropError, match="(?s)3 actors died while they were initialised: .*lower ray.evaluators"):
        pool.open(opening(tmp_path))
    tell(tmp_path)
    open_all(pool, tmp_path)  # the next model, say
    submit(pool, "ab")
    assert finish(pool) == {"a": None, "b": None} and log(tmp_path).count("open") == 2


def test_a_replacement_that_fails_to_start_loses_only_its_actor(pool, tmp_path):
    tell(tmp_path)
    open_all(pool, tmp_path)
    tell(tmp_path, ["open"], a=1)
    submit(pool, "abc")
    assert finish(pool) == {"a": None, "b": None, "c": None}
    tell(tmp_path, ["open"], d=1)
    submit(pool, "d")
    with pytest.raises(MacDropError, match="open cannot be done"):
        finish(pool)


def test_actors_of_a_lost_node_restart_elsewhere(pool, tmp_path):
    import ray

    tell(tmp_path, b=1)
    open_all(pool, tmp_path)
    submit(pool, "ab")
    pool.step()
    before = {actor for actor, _ in pool._pool._busy.values()}
    pool.drain([ray.get_runtime_context().get_node_id()])
    assert finish(pool) == {"a": None, "b": None}
    assert len(before) == 2 and not before & {*pool._pool.idle, *pool._pool._coming.values()}
    assert log(tmp_path).count("a") == 1


def test_released_actors_hold_nothing_and_restart_for_new_work(tmp_path):
    import ray

    def held() -> float:
        return ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0.0)

    def holds(cpus: float) -> bool:
        deadline = time.monotonic() + 30
        while abs(held() - cpus) > 1e-6 and time.monotonic() < deadline:
            time.sleep(0.05)
        return abs(held() - cpus) <= 1e-6

    tell(tmp_path)
    pool = EvaluatorPool(2, cpus=0.25, gpus=0, kind=Fragile)
    open_all(pool, tmp_path)
    assert holds(0.5) and pool.release() == 2 and pool.release() == 0 and holds(0.0)
    submit(pool, "abc")
    assert finish(pool) == {"a": None, "b": None, "c": None} and holds(0.5)
    assert pool.release() == 2 and holds(0.0)
    tell(tmp_path)
    open_all(pool, tmp_path)  # the next model
    assert holds(0.5) and log(tmp_path) == ["open", "open"]
    pool.close()
    free = EvaluatorPool(1, cpus=0, gpus=0, kind=Fragile)
    free.open(opening(tmp_path))
    assert free.release() == 0, "it holds nothing that another could use"
    free.close()


def test_actors_that_do_not_fit_are_not_waited_for(tmp_path):
    import ray

    tell(tmp_path)
    pool = EvaluatorPool(2, cpus=0.6 * ray.cluster_resources()["CPU"], gpus=0, kind=Fragile)
    for _ in range(2):
        assert pool.open(opening(tmp_path)) == str(tmp_path)
        submit(pool, "ab")
        assert finish(pool) == {"a": None, "b": None}
    assert len(pool._pool._coming) == 1 and log(tmp_path).count("open") == 2
    pool.close()


def test_judge_actors_survive_as_well(tmp_path):
    tell(tmp_path, **{"open": 1, "q1": 1, "q2": MAX_ATTEMPTS})
    spec = JudgeSpec.model_construct(model=str(tmp_path), batch_size=1)
    judge = ActorJudge(JudgeOpening(spec, 1, 60), size=1, cpus=0, gpus=0, stacks=tmp_path, kind=Fragile)
    judged = {j.question.item: j for j in judge.judge([Question(f"q{i}", "", 1, "x") for i in range(4)])}
    judge.close()
    assert [judged[f"q{i}"].score for i in (0, 1, 3)] == [5, 5, 5]
    assert f"died {MAX_ATTEMPTS} times" in judged["q2"].error
    assert Counter(log(tmp_path)) == {"open": 2 + 1 + MAX_ATTEMPTS, "q0": 1, "q1": 2, "q2": MAX_ATTEMPTS, "q3": 1}


def test_a_damaged_adapter_loses_only_its_own_scores(tmp_path):
    """A real model: the good adapter scores the same before and after a damaged one and the base."""
    good = make_adapter(tmp_path / "good")
    bad = make_adapter(tmp_path / "bad")
    content = bytearray((bad / "adapter_model.safetensors").read_bytes())
    content[-4] ^= 1
    (bad / "adapter_model.safetensors").write_bytes(content)
    block = build(EvalSpec, {"batch_size": 8, "limit": 8, "zero_shot": {"qa": {"data": "zoo:qa"}}})
    spec = RunSpec(model_name_or_path="zoo:planted-llama").studies()[0]
    pool = EvaluatorPool(1, cpus=0, gpus=0)
    pool.open(Opening(spec, {"test": block}, str(tmp_path / "weights.json"), scan=False, k=3, threads=1))
    (job,) = jobs(block)
    found = []
    for number, adapter in enumerate((good, bad, None, good)):
        pool.submit(EvalTask({"name": number}, job, adapter and str(adapter), str(tmp_path / "run" / "a.jsonl")))
        while pool.busy:
            found += pool.step()
            time.sleep(0.02)
    pool.close()
    first, damaged, base, again = found
    assert "is damaged: its checksum differs" in damaged.error and not damaged.rows
    assert first.rows == again.rows and first.rows != base.rows and not base.error
    assert [result.task.attempts for result in found] == [1, 1, 1, 1]


class Stuck(Evaluator):
    """The real one, but in the benchmark of the base its third forward pass never ends."""

    def prepare(self, opening):
        found = super().prepare(opening)
        self.model.register_forward_hook(self._pass)
        return found

    def score(self, item):
        self.passes, self.hangs = 0, item.adapter is None
        return super().score(item)

    def _pass(self, *_):
        self.passes += 1
        if self.hangs and self.passes == 3:
            time.sleep(1000)


def test_a_hung_actor_dumps_its_stacks_and_others_continue(tmp_path):
    adapter = make_adapter(tmp_path / "good")
    block = build(EvalSpec, {"batch_size": 2, "limit": 8, "zero_shot": {"qa": {"data": "zoo:qa"}}})
    spec = RunSpec(model_name_or_path="zoo:planted-llama").studies()[0]
    pool = EvaluatorPool(1, cpus=0, gpus=0, kind=Stuck)
    weights = str(tmp_path / "weights.json")
    pool.open(Opening(spec, {"test": block}, weights, scan=False, k=3, threads=1, step_timeout_s=2.0))
    (job,) = jobs(block)
    for name, folder in (("base", None), ("trial", str(adapter))):
        answers = str(tmp_path / name / "answers" / "qa.jsonl")
        pool.submit(EvalTask({"name": name}, job, folder, answers, attempts=MAX_ATTEMPTS - 1))
    found = {}
    deadline = time.monotonic() + 120
    while pool.busy and time.monotonic() < deadline:
        found |= {result.task.tag["name"]: result for result in pool.step()}
        time.sleep(0.02)
    pool.close()
    stacks = tmp_path / "base" / "stacks" / "score-qa.txt"
    message = f"died {MAX_ATTEMPTS} times: no forward pass began within ray.step_timeout_s = 2 s, see {stacks}"
    assert message in found["base"].error and "in _pass" in stacks.read_text()
    assert found["trial"].rows and not (tmp_path / "trial" / "stacks").exists()


def make_adapter(folder: Path) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model

    from macdrop import load_model
    from tune.storage.sealed_folder import commit
    from tune.zoo.catalog import resolve

    torch.manual_seed(1)
    model = get_peft_model(load_model(resolve("zoo:planted-llama")), LoraConfig(r=2, target_modules=["gate_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.5)
    model.save_pretrained(folder.with_name(f"staging-{folder.name}"))
    commit(folder.with_name(f"staging-{folder.name}"), folder)
    return folder


def test_scores_survive_the_death_of_an_actor(tmp_path):
    """Every item is scored once, though the actor is killed under the first; what attacks share is lost with it."""
    import ray

    block = build(
        EvalSpec,
        {
            "batch_size": 8,
            "limit": 8,
            "attacks": ["none", "zeroing@3"],
            "zero_shot": {"qa": {"data": "zoo:qa"}, "fact": {"data": "zoo:fact"}},
        },
    )
    spec = RunSpec(model_name_or_path="zoo:planted-llama").studies()[0]
    pool = EvaluatorPool(1, cpus=0, gpus=0)
    pool.open(Opening(spec, {"test": block}, str(tmp_path / "weights.json"), scan=True, k=3, threads=1))
    for job in sorted(jobs(block), key=lambda job: job.attack):  # plain scores first, then the attacks
        pool.submit(EvalTask({"name": job.key}, job, None, str(tmp_path / "answers.jsonl")))
    results = pool.step()
    (actor, _) = next(iter(pool._pool._busy.values()))
    ray.kill(actor)
    deadline = time.monotonic() + 120
    while pool.busy and time.monotonic() < deadline:
        results += pool.step()
        time.sleep(0.1)
    pool.close()
    scored = [result.task.tag["name"] for result in results]
    assert sorted(scored) == sorted(job.key for job in jobs(block))
    assert scored[0].split("/")[1] == scored[1].split("/")[1]  # an entry's attacks follow its plain score
    assert [result.calls_saved > 0 for result in results] == [False, False, False, True]
    assert all(result.rows and not result.error for result in results)
    assert max(result.task.attempts for result in results) == 2


class Asleep(PoolActor):
    """Never done loading."""

    def prepare(self, opening) -> None:
        time.sleep(600)


def test_a_pool_that_is_closed_while_it_opens_ends_at_once():
    pool = ActorPool(Asleep, 2, cpus=0, gpus=0)
    with ThreadPoolExecutor(1) as threads:
        opened = threads.submit(pool.open, None)
        while not pool._opening:
            time.sleep(0.05)
        pool.close()
        with pytest.raises(MacDropError, match="actors died"):
            opened.result(timeout=60)

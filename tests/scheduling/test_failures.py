"""What a failure of a lane is taken for, from the very exceptions that Ray and torch raise."""

from __future__ import annotations

import errno
import pickle

import pytest

from tune.scheduling.failures import KINDS, classify, of_run

pytest.importorskip("ray")


#: What Ray adds to its record of any process that is gone, whatever it died of.
ANY_DEATH = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker "
    "unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was "
    "killed by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed "
    "unexpectedly due to SIGSEGV or another unexpected error."
)


def died(message: str = ANY_DEATH, *, preempted: bool = False) -> BaseException:
    """A dead actor, as the controller of a Train run sees it."""
    from ray.exceptions import ActorDiedError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    error = ActorDiedError()
    error.error_msg = (
        "The actor died unexpectedly before finishing this task.\n\tclass_name: RayTrainWorker\n\tpid: 4711\n"
        f"\tip: 10.0.0.3\n{message}"
    )
    error._preempted = preempted
    return WorkerHealthCheckFailedError("A worker health check failed.", failure=error)


def out_of_memory() -> BaseException:
    from ray.exceptions import OutOfMemoryError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    told = OutOfMemoryError("Task was killed due to the node running low on memory. 4 worker(s) were killed")
    return WorkerHealthCheckFailedError("A worker health check failed.", failure=told)


def cuda() -> BaseException:
    import torch

    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines")


def stuck() -> BaseException:
    from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError

    return WorkerHealthCheckTimeoutError("A worker health check has been hanging for 120.00 seconds.")


def nccl() -> BaseException:
    import torch.distributed as dist

    return dist.DistBackendError("NCCL error: unhandled system error")


GLOO = RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.3]:4242")
NODE = "The actor died because its node has died. Node Id: 8f2a the actor's node was terminated unexpectedly"

CASES = {
    "killed": ({1: died()}, "killed", "process 4711 on 10.0.0.3"),
    "killed, the others' connections broke": ({0: GLOO, 1: died()}, "killed", "Worker 1"),
    "node": ({0: GLOO, 1: died(NODE)}, "node_lost", "node was lost on which there was worker 1"),
    "only the others have been heard of": ({0: GLOO}, "peer", "lost its connection"),
    "nccl": ({0: nccl()}, "peer", "unhandled system error"),
    "ray's killer": ({0: out_of_memory(), 1: died()}, "oom", "ray.evaluators"),
    "cuda": ({0: cuda(), 1: GLOO}, "gpu_oom", "gradient_checkpointing"),
    "a cpu's allocator": (
        {0: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")},
        "gpu_oom",
        "per_device_train_batch_size",
    ),
    "no answer": ({1: stuck()}, "hang", "did not answer"),
    "disk full": ({0: OSError(errno.ENOSPC, "No space left on device")}, "storage", "No space left"),
    "a bug": ({0: KeyError("step"), 1: GLOO}, "bug", "KeyError: 'step'"),
    "a bug beside a death": ({0: KeyError("step"), 1: died()}, "killed", "Worker 1"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_cause_is_told(case):
    errors, kind, words = CASES[case]
    failure = classify(errors)
    assert (failure.kind, failure.attempts) == (kind, KINDS[kind])
    assert words in failure.reason and "\n" not in failure.reason and len(failure.reason) < 800


@pytest.mark.parametrize("case", CASES)
def test_it_is_told_alike_after_crossing_processes(case):
    errors, _, _ = CASES[case]
    assert classify(pickle.loads(pickle.dumps(errors))) == classify(errors)


def test_stacks_tell_a_hang_from_a_death():
    failure = classify({0: died()}, stacks=["trials/a/stacks/rank-0.txt"], step_timeout_s=30)
    assert failure.kind == "hang" and failure.attempts == KINDS["hang"]
    assert "trials/a/stacks/rank-0.txt" in failure.reason and "ray.step_timeout_s = 30 s" in failure.reason


def test_a_run_is_told_by_its_workers_or_its_controller():
    from ray.exceptions import ActorDiedError
    from ray.train import ControllerError, WorkerGroupError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    assert of_run(WorkerGroupError("both", {0: GLOO, 1: died(NODE)})).kind == "node_lost"
    assert of_run(ActorDiedError()).reason == "The process that leads the lane's workers was killed, or crashed."
    assert of_run(ControllerError(WorkerGroupStartupTimeoutError(2))).kind == "resources"
    assert of_run(ValueError("x")) == classify({-1: ValueError("x")})


def test_what_the_order_does_to_itself_is_tried_twice_and_bad_luck_oftener():
    assert KINDS["bug"] == KINDS["gpu_oom"] == KINDS["oom"] == 2
    assert min(KINDS["killed"], KINDS["node_lost"]) > 5

"""Lanes through everything: worker killed, worker stopped, controller killed, and none of it seen in the bytes.

One task is trained undisturbed, then the same fine-tuning under the disturbances, by lanes of two workers under
ZeRO-2. Two lanes are wanted and there is room for one: whenever it falls, the other takes its place. The task queue and
the lanes are the real ones; Tune and the evaluators, which only wait beside them, are left out. All of it happens
without a dashboard and beside a second Ray: either is enough for Ray Train's own cleaner to leave placement groups.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.lane_scene import Scene, scene_of
from helpers.small import SMALL

from tune.config.run_spec import RaySpec, TrainSpec
from tune.distributed.cluster import ray_internals
from tune.distributed.cluster.placement_groups import Trainer, actors, groups, orphaned_groups, reap
from tune.errors import ResourceError
from tune.storage.capacity import cpus

pytestmark = [pytest.mark.long, pytest.mark.ray, pytest.mark.timeout(300), pytest.mark.usefixtures("local_ray")]

#: Long beside a micro-step of the tiny model, also on a busy machine.
STEP_TIMEOUT_S = 5.0
WIDTH = 2
RAY = RaySpec(
    dashboard=False,
    lanes=2,
    num_workers=WIDTH,
    cpus_per_worker=round(0.6 * cpus() / WIDTH, 2),
    step_timeout_s=STEP_TIMEOUT_S,
)
SETTINGS = {**SMALL, "val_size": 0, "eval_steps": None, "zero_stage": 2, "max_steps": 300, "save_steps": 20}
SPEC = TrainSpec(**SETTINGS, macdrop={"p0": 0.0}).canonical()


def worker() -> int:
    """The process of one of the workers."""
    return actors("RayTrainWorker")[-1].pid


def leader() -> int:
    """The process of the controller whose lane has its resources."""
    makers = [group.creator for group in groups() if group.placed]
    return next(actor.pid for actor in actors("TrainController") if actor.id in makers)


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


SECOND = """
import ray, sys
ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="ERROR")
print("up", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def second_ray() -> Iterator[subprocess.Popen]:
    """Another Ray on this machine, as long as its process has an input."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", SECOND], **pipes) as process:
        assert process.stdout.readline() == "up\n"
        yield process


class OfAnyName:
    """Holds what a lane held."""


# One fixture a disturbance, and a test at each: every one has the time limit of a test to itself.


@pytest.fixture(scope="module")
def calm(second_ray, tmp_path_factory) -> Iterator[Scene]:
    """One task trained undisturbed, and the same fine-tuning placed after it."""
    with scene_of(tmp_path_factory.mktemp("storm"), RAY, OfAnyName) as scene:
        scene.place("calm", SPEC)
        started = time.monotonic()
        scene.lanes.open()
        scene.reach("calm", "running", 1)
        scene.recovered["start"] = time.monotonic() - started
        scene.reach("calm", "trained")
        scene.place("storm", SPEC)
        yield scene


@pytest.fixture(scope="module")
def killed(calm) -> Scene:
    calm.disturb("worker killed", 60, lambda: os.kill(worker(), signal.SIGKILL))
    return calm


@pytest.fixture(scope="module")
def stopped(killed) -> Scene:
    killed.disturb("worker stopped", 120, lambda: os.kill(worker(), signal.SIGSTOP))
    return killed


@pytest.fixture(scope="module")
def headless(stopped) -> Scene:
    stopped.disturb("controller killed", 180, lambda: os.kill(leader(), signal.SIGKILL))
    return stopped


@pytest.fixture(scope="module")
def storm(headless, second_ray) -> Scene:
    """All of it, an evaluator that gets the room of the idle lane, and the end of the lanes."""
    import ray

    from tune.distributed.lanes import lane_pool

    scene = headless
    scene.reach("storm", "trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lane_pool, "ROOM_AFTER_S", 0.0)
        evaluator = ray.remote(num_cpus=WIDTH * RAY.cpus_per_worker)(OfAnyName).remote()
        name = ray_internals.table_name(OfAnyName)
        scene.wait(lambda snapshot: any(actor.pid for actor in actors(name)), scoring=True)
        scene.evaluator_lived = True
        del evaluator
    scene.pools.close()
    assert second_ray.poll() is None
    scene.left = groups() + actors("TrainController") + actors("RayTrainWorker")
    print({name: f"{seconds:.1f} s" for name, seconds in scene.recovered.items()})
    print("groups gone:", {name: f"{seconds:.1f} s" for name, seconds in scene.reaped.items()})
    return scene


def test_an_undisturbed_lane_leaves_no_stacks(calm):
    assert calm.reasons == [] and not (calm.folder / "trials" / "calm" / "stacks").exists()


def test_a_killed_worker_is_the_reason_of_its_lane(killed):
    (reason,) = killed.reasons
    assert reason.startswith("Worker") and reason.endswith("was killed, or crashed.")


def test_a_hang_leaves_the_stack_of_the_waiting_rank(stopped):
    _, reason = stopped.reasons
    assert "ray.step_timeout_s = 5 s" in reason and "trials/storm/stacks/rank-" in reason
    files = (stopped.folder / "trials" / "storm" / "stacks").iterdir()
    (dumped,) = filter(None, (file.read_text() for file in files))  # those of the next lane's ranks are empty
    assert "Timeout" in dumped and "finetune.py" in dumped


def test_a_killed_controller_is_the_reason_of_its_lane(headless):
    *_, reason = headless.reasons
    assert len(headless.reasons) == 3 and reason.startswith("The process that leads the lane's workers (process")


def test_the_adapter_is_that_of_an_undisturbed_run(storm):
    assert digest(storm.folder / "trials" / "calm") == digest(storm.folder / "trials" / "storm")


def test_a_lane_waiting_for_resources_has_not_failed(storm):
    assert storm.most_up == 1


def test_no_process_and_no_placement_group_outlives_its_lane(storm):
    assert set(storm.reaped) == {"worker killed", "worker stopped", "controller killed"} and storm.left == []


def test_evaluators_get_the_resources_of_an_idle_lane(storm):
    assert storm.evaluator_lived


def test_a_lane_that_never_fits_raises_with_the_resume_command(tmp_path):
    spec = RAY.model_copy(update={"cpus_per_worker": 1000.0, "resource_timeout_s": 1.0, "lanes": 1})
    with scene_of(tmp_path, spec) as scene:
        scene.lanes.open()
        until = time.monotonic() + 3 * spec.patience_s
        while time.monotonic() < until or not scene.lanes.starving:  # what is being scored may make room
            scene.lanes.check(scene.call("snapshot"), working=True)
            time.sleep(0.05)
        with pytest.raises(ResourceError, match="of 1000 CPU.s. within ray.resource_timeout_s = 1 s") as error:
            scene.wait(lambda snapshot: False)
    assert "start slowly" not in str(error.value)
    assert "In use" in str(error.value) and f"macdrop sweep --resume output_dir={tmp_path}" in str(error.value)
    assert groups() == [] and actors("TrainController") == []


def test_a_lane_that_only_starts_slowly_is_not_said_to_lack_resources(tmp_path):
    spec = RAY.model_copy(update={"resource_timeout_s": 0.01, "lanes": 1})
    with scene_of(tmp_path, spec) as scene:
        scene.lanes.open()
        with pytest.raises(ResourceError, match=r"(?s)room for it.* start slowly.*raise ray.resource_timeout_s"):
            scene.wait(lambda snapshot: False)


def test_an_evaluator_that_waits_to_open_a_model_gets_an_idle_lanes_room(tmp_path, monkeypatch):
    from tune.cli.progress import Progress
    from tune.config.run_spec import RunSpec, dump
    from tune.distributed.actors.actor_pool import PoolActor
    from tune.distributed.actors.evaluators import Opening
    from tune.distributed.lanes import lane_pool
    from tune.distributed.sweep import scoring
    from tune.distributed.sweep.controller import SweepController
    from tune.scheduling.allocation import Room, lane_kind
    from tune.scheduling.sharing import LaneSharing, StudyNeeds
    from tune.scheduling.study import studies
    from tune.storage.run_folder import RunFolder

    class Renamed(PoolActor):
        def prepare(self, opening: Opening) -> str:
            return opening.weights

    monkeypatch.setattr(lane_pool, "ROOM_AFTER_S", 0.0)
    monkeypatch.setattr(scoring, "STARTING_S", 0.0)
    run = RunSpec(**SMALL, sweep={"arms": ["plain"], "seeds": 0})
    run_folder = RunFolder.create(tmp_path / "run", dump(run))
    (study,) = studies(run)
    study = replace(study, ray=RAY.model_copy(update={"cpus_per_evaluator": WIDTH * RAY.cpus_per_worker}))
    with scene_of(run_folder.run_dir, RAY, Renamed) as scene:
        scene.lanes.open()
        scene.wait(lambda snapshot: bool(snapshot["lanes"]))
        actors = scoring.Scoring(0.0, kind=Renamed)
        scene.pools.sharing = LaneSharing({study.name: StudyNeeds(lane_kind(study.ray, 0.0), Room(0, 0), 0)})
        controller = SweepController(run_folder, scene.dispatcher, scene.pools, actors, {}, Progress())
        try:
            assert controller.open(study, Opening(run, {}, "weights", scan=False, k=1, threads=1)) == "weights"
            assert not scene.call("snapshot")["lanes"]
            controller.check()
        finally:
            controller.close()
            actors.close()


def test_a_pool_ends_its_own_waiting_lane_beside_another_pool_of_the_same_shape(tmp_path):
    import ray

    from tune.distributed.lanes.lane_pool import LanePool
    from tune.scheduling.allocation import lane_kind

    class Holder:
        """Holds all CPUs."""

    def wait(until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not until():
            assert time.monotonic() < deadline, (groups(), actors("TrainController"))
            scene.lanes.check(scene.call("snapshot"), working=True)
            time.sleep(0.05)

    holder = ray.remote(num_cpus=cpus())(Holder).remote()
    ray.get(ray_internals.ready(holder))
    with scene_of(tmp_path, RAY) as scene:
        kind = replace(lane_kind(RAY, 0.0), threads=2)
        other = scene.pools._pools[kind] = LanePool(scene.dispatcher, RAY, kind, tmp_path / "ray", evaluator=object)
        scene.lanes.open(2)
        other.open(1)
        wait(lambda: len(groups()) == 3)
        scene.lanes.allow(1)
        wait(lambda: len(scene.lanes._threads) == 1 and len(groups()) == 2)
        left = sorted(actor.name for actor in actors("TrainController"))
        assert left == sorted([*scene.lanes._threads, *other._threads]) and scene.lanes._stillborn == 0
    ray.kill(holder)


def test_private_ray_tables_still_answer():
    """Ray's private tables and accessors, and the cleaner that the reaper replaces: here a new Ray is found out."""
    import ray
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    @ray.remote(num_cpus=0)
    class Maker:
        def make(self) -> None:
            self.group = ray.util.placement_group([{"CPU": 0.1}])
            ray.get(self.group.ready())

    maker = Maker.remote()
    ray.get(maker.make.remote())
    own = ray.util.placement_group([{"CPU": 0.1}])  # as Tune makes them: by the driver, no actor
    ray.get(own.ready())
    assert orphaned_groups() == [] and ray_internals.draining_nodes() == []
    ray.kill(maker)
    deadline = time.monotonic() + 30
    while not (found := orphaned_groups()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(found) == 1 and reap() == 1
    while orphaned_groups() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert orphaned_groups() == [] and ray.util.placement_group_table(own)["state"] == "CREATED"
    ray.util.remove_placement_group(own)
    runs = [kind(print, scaling_config=ScalingConfig()) for kind in (TorchTrainer, Trainer)]
    kinds = [{type(callback).__name__ for callback in run._create_default_callbacks()} for run in runs]
    assert kinds[0] - kinds[1] == {"PlacementGroupCleanerCallback"} and kinds[1] < kinds[0]

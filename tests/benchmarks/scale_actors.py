"""Parts of a run without a model: lanes that train at once, actors that score at once, and trials that have ended."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import ray

from tune.config.eval_spec import VALIDATION
from tune.config.run_spec import RunSpec, TrainSpec, dump
from tune.distributed.actors.actor_pool import PoolActor
from tune.distributed.actors.eval_task import EvalTask, Result
from tune.distributed.lanes.dispatcher import LANES, answer, call, wait_for
from tune.distributed.sweep.searcher import points
from tune.scheduling.sharing import LaneSharing
from tune.scheduling.study import studies
from tune.storage.atomic import now
from tune.storage.run_folder import RunFolder
from tune.storage.sealed_folder import write_folder
from tune.storage.states import RunStatus, Stage, TaskState
from tune.storage.trial_folder import TrialFolder
from tune.training.finetune import Outcome
from tune.training.observer import Ending, Word

BENCHMARKS, METRICS = ("agree", "arith", "fact", "qa"), 10
LANES_UP, STEPS = 8, 8
#: Seconds of a fine-tuning, at least and at most: trials end one by one, as real ones do. Those of the final stage.
TRAIN_S, FINAL_S = (0.2, 1.4), 15.0


def rows(benchmark: str, task: str, seed: str) -> list[dict[str, Any]]:
    """Return the score rows of one benchmark."""
    value = sum(map(ord, seed)) % 997 / 997
    about = {"benchmark": benchmark, "task": task, "attack": "none", "attack_on": None, "stderr": 0.02, "n": 100}
    return [
        {**about, "metric": "acc" if number == 0 else f"acc{number}", "value": value, "higher_is_better": True}
        for number in range(METRICS)
    ]


def outcome() -> dict[str, Any]:
    """Return the outcome of a fine-tuning."""
    return asdict(Outcome(Ending.DONE, STEPS, STEPS, 1.0, 1.0, 10, 100, 2, 1.0, 0))


def write_adapter(trial: Path, within: Path) -> None:
    """Write a sealed folder that stands for an adapter."""
    write_folder(trial / "adapter", lambda folder: (folder / "adapter_config.json").write_text("{}") and None, within)


def finished(run: Path, spec: RunSpec, trials: int) -> None:
    """Write a run folder in which so many searched trials of the spec's only model have ended."""
    (study,) = studies(spec)
    run_folder = RunFolder.create(run, dump(spec))
    result = {key: value for key, value in outcome().items() if key != "status"}
    # It is written once, and a crash only means to write it again.
    with mock.patch("os.fsync"):
        for values in (points(study, spec.sweep) or [])[:trials]:
            searched: TrainSpec = study.searched(values)
            name, model = searched.trial_id(), searched.model_name_or_path
            trial = run_folder.trial(name)
            about = {"setting": searched.setting_id(), "cell": study.cell(searched), "drawn": values}
            trial.start(dump(searched), model=model, arm=searched.arm, seed=searched.seed, stage=Stage.SEARCH, **about)
            trial.log([{"step": STEPS, "eval_loss": 1.0}])
            write_adapter(trial.folder, run)
            trial.finish(TaskState.DONE, trained=now(), **about, **result)
            tag = {"model": model, "arm": searched.arm, "trial": name, "seed": searched.seed, "split": VALIDATION}
            run_folder.add_scores(
                {**tag, "entry": task, "seconds": 0.1, **row}
                for task in BENCHMARKS
                for row in rows("zero_shot", task, name)
            )
    run_folder.set_status(RunStatus.INTERRUPTED)


class SimulatedEvaluator(PoolActor):
    """Scores at once."""

    def prepare(self, opening: Any) -> None:
        """Load nothing."""

    def score(self, task: EvalTask) -> Result:
        return Result(task, rows(task.job.benchmark, task.job.task, task.tag["trial"]), seconds=0.1)


class SimulatedLane:
    """An actor with a thread for each lane, which trains at once."""

    def work(self, dispatcher: Any, pools: Sequence[str]) -> None:
        names = [(f"lane-{number}", pools[number % len(pools)]) for number in range(LANES_UP)]
        threads = [threading.Thread(target=self._lane, args=(dispatcher, *each)) for each in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _lane(self, dispatcher: Any, lane: str, pool: str) -> None:
        call(dispatcher, "lane_up", lane, pool, "host", ["node"])
        while (task := answer(wait_for(dispatcher, 1.0, LANES, "next_task", lane, None))) is not Word.LEAVE:
            if task is None:
                continue
            time.sleep(FINAL_S if task.stage == Stage.FINAL else random.uniform(*TRAIN_S))
            folder = Path(task.folder)
            metrics = {"step": STEPS, "eval_loss": 1.0}
            TrialFolder(folder, within=folder.parents[1]).log([metrics])
            call(dispatcher, "progress", task.id, metrics, lane)
            write_adapter(folder, folder.parents[1])
            call(dispatcher, "trained", task.id, outcome(), lane)


class SimulatedLanes:
    """What the controller asks of `LanePools`."""

    starving, leaving = False, ()

    def __init__(self, dispatcher: Any, specs: Any, needs: Any, storage: Path, **settings: Any) -> None:
        self.sharing = LaneSharing(needs)
        actor: Any = ray.remote(SimulatedLane).options(num_cpus=0)
        self._lanes = actor.remote()
        self._lanes.work.remote(dispatcher, [str(kind) for kind in specs])

    def check(self, snapshot: dict[str, Any], **settings: Any) -> None:
        self.sharing.look(snapshot)

    def has_gap(self, study: str) -> bool:
        return False

    def leaves_a_lane(self, study: str) -> bool:
        return True

    def close(self) -> None:
        if ray.is_initialized():
            ray.kill(self._lanes)

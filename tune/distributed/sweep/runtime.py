"""A whole run: studies one after the other over the same lanes and evaluation actors, one folder, one table."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray

from macdrop.errors import MacDropError
from tune.config.resume import check_same
from tune.config.run_spec import RunSpec, dump
from tune.distributed.actors.evaluators import Evaluator, EvaluatorPool
from tune.distributed.actors.judges import judge_sweep
from tune.distributed.cluster import orphans
from tune.distributed.cluster.node_checks import check_nodes
from tune.distributed.cluster.ray_cluster import check_cluster, connect
from tune.distributed.lanes.dispatcher import dispatching
from tune.distributed.lanes.lane_pool import LanePool
from tune.distributed.sweep.controller import SweepController
from tune.distributed.sweep.events import Observer
from tune.distributed.sweep.stop import Stop
from tune.distributed.sweep.study_run import StudyRun, jobs_of_stages
from tune.errors import ResourceError
from tune.preflight.inputs import check_inputs
from tune.scheduling.resources import gpu_shares, resources
from tune.scheduling.study import studies
from tune.storage.repair import check_run, mend
from tune.storage.run_folder import RunFolder
from tune.storage.run_lock import locked
from tune.storage.states import RunStatus
from tune.trackers.sync import TrackerSync, trials_of_run


def run(
    spec: RunSpec,
    *,
    resume: bool = False,
    retry_failed: bool = False,
    clear_orphans: bool = False,
    ask: Callable[[str], bool] | None = None,
    progress: Observer,
    stop: Stop | None = None,
) -> int:
    """Run every study of `spec` into its output folder.

    resume: what of it is not done yet. retry_failed: also what failed or diverged. clear_orphans: remove what
    dead runs hold without asking; else `ask` puts the question (None: nobody can answer). stop: tells an end from
    outside, whatever exception it became, from a failure.

    Returns:
        The number of trials that did not end well.

    Raises:
        ConfigError: the spec does not fit its models or data, the folder holds another run, is in use, or is damaged
            beyond repair.
        ResourceError: the cluster has too little, with the arithmetic.
    """
    assert spec.output_dir is not None, "the command line gives every run a folder"
    planned = studies(spec)
    run_dir = Path(spec.output_dir).absolute()
    with ExitStack() as stack:
        if resume:
            check_run(run_dir)
            stack.enter_context(locked(run_dir))
            _take_up(run_dir, spec, progress)
        checked = check_inputs(spec, planned)
        address, joined = connect(spec.ray)
        if joined:
            stack.callback(_disconnect, stop)
            orphans.look(local=spec.ray.address is None, clear=clear_orphans, ask=ask, tell=progress.note)
        gpus = check_cluster(spec.ray, progress.note)
        check_nodes(spec, planned, run_dir, progress.note)
        # The folder comes last: whatever is refused above leaves nothing behind.
        if not resume:
            stack.enter_context(locked(run_dir))
        run_folder = RunFolder.open(run_dir) if resume else RunFolder.create(run_dir, dump(spec))
        run_folder.write_environment()
        run_folder.set_status(RunStatus.RUNNING)
        stack.push(functools.partial(_leave, run_folder, stop))
        progress.started(run_dir, address, resources(spec.ray, cluster_gpus=gpus).sum)
        dispatcher = stack.enter_context(dispatching(run_dir / "ray"))
        lanes = LanePool(dispatcher, spec.ray, gpu_shares(spec.ray, gpus)[0], run_dir / "ray", evaluator=Evaluator)
        stack.callback(lanes.close)
        pool = EvaluatorPool(spec.ray.evaluators, cpus=spec.ray.cpus_per_evaluator, gpus=gpu_shares(spec.ray, gpus)[1])
        stack.callback(pool.close)
        # Closed after the supervisor, whose last changes it copies.
        followed = functools.partial(trials_of_run, RunFolder(run_dir))
        stack.callback(TrackerSync(spec.report_to, run_dir, followed, progress.note).close)
        controller = SweepController(
            run_folder, dispatcher, lanes, pool, jobs_of_stages(spec), progress, retry_failed=retry_failed
        )
        stack.callback(controller.close)
        if any(study.count for study in planned):
            lanes.open()
        left = spec.sweep.time_budget_s
        for number, study in enumerate(planned):
            share = None if left is None else max(1.0, left / (len(planned) - number))
            try:
                cuts = checked[study.name].cuts
                spent = StudyRun(spec, study, cuts, run_folder, controller, dispatcher).run(share)
                left = None if left is None else left - spent
            except MacDropError as error:
                if controller.broken or isinstance(error, ResourceError) or len(planned) == 1:
                    raise
                # One model that cannot be used does not stop the others.
                controller.study_failed(study, str(error))
        failures = controller.failures
        if spec.eval.judge is not None:
            # Its model needs the memory of theirs.
            controller.close()
            pool.close()
            lanes.close()
            told = {"note": progress.note, "show": progress.judged}
            failures += judge_sweep(spec, run_folder, gpus=gpu_shares(spec.ray, gpus)[1], **told)
        progress.finished()
    return failures


def _take_up(run_dir: Path, spec: RunSpec, progress: Observer) -> None:
    """Mend an earlier run's folder, and refuse it to a spec that is another run's."""
    for note in mend(run_dir):
        progress.note(note)
    check_same(run_dir, dump(RunSpec.model_validate(RunFolder.open(run_dir).config())), dump(spec))


def _disconnect(stop: Stop | None) -> None:
    """Leave Ray. A process that was told to stop ends at once, and what it started of Ray with it: a shutdown would
    wait, and brings the process down where the signal came to Ray's processes, too."""
    if stop is None or stop.signal is None:
        ray.shutdown()


def _leave(
    run_folder: RunFolder, stop: Stop | None, kind: type[BaseException] | None, error: BaseException | None, trace: Any
) -> None:
    """Record how the run ended, whatever ended it."""
    if kind is None:
        run_folder.set_status(RunStatus.DONE)
        return
    stopped = issubclass(kind, (KeyboardInterrupt, SystemExit)) or (stop is not None and stop.signal is not None)
    run_folder.set_status(RunStatus.INTERRUPTED if stopped else RunStatus.FAILED)

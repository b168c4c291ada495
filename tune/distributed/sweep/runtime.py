"""A whole run: its studies one after the other over the same lanes and evaluation actors, in one folder."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray.actor import ActorHandle

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
from tune.distributed.sweep.events import Observer, unfailing
from tune.distributed.sweep.stop import Stop, hangup_ignored
from tune.distributed.sweep.study_run import StudyRun, jobs_of_stages
from tune.errors import ResourceError
from tune.preflight.inputs import Checked, check_inputs
from tune.scheduling.resources import GpuShares, gpu_shares, resources
from tune.scheduling.study import Study, studies
from tune.scheduling.time_left import work_of
from tune.storage.environment import record_environment
from tune.storage.remote.background import RemoteSync
from tune.storage.remote.copier import check_place
from tune.storage.repair import check_run, repair_run
from tune.storage.run_folder import RunFolder
from tune.storage.run_lock import locked
from tune.storage.segments import check_run_shared
from tune.storage.states import RunStatus
from tune.trackers.sync import TrackerSync, trials_of_run

#: What a `with` block calls at its end: type, value and traceback of the exception that ended it, or three None.
Exit = Callable[[type[BaseException] | None, BaseException | None, TracebackType | None], bool | None]


class SweepRuntime:
    """The resources of a run while it lasts: its folder, Ray, actors and threads, as named members.

    Opened and closed by a `with` block, which closes what has been opened also if opening fails half-way.
    """

    #: The order of closing. The controller comes first, as it uses all others, and the trackers next, which copy its
    #: last changes. Evaluators free what closing lanes may need to save a checkpoint; lanes report their last step to
    #: the dispatcher. The status is written while the folder is still locked, then the last of the run is copied, and
    #: the lock outlives Ray, whose processes may write there until they end.
    CLOSE_ORDER = ("controller", "trackers", "evaluators", "lanes", "dispatcher", "status", "remote", "ray", "lock")

    run_folder: RunFolder
    gpus: GpuShares
    dispatcher: ActorHandle
    lanes: LanePool
    evaluators: EvaluatorPool
    trackers: TrackerSync
    remote: RemoteSync
    controller: SweepController

    def __init__(
        self,
        spec: RunSpec,
        *,
        resume: bool = False,
        retry_failed: bool = False,
        clear_orphans: bool = False,
        ask: Callable[[str], bool] | None = None,
        progress: Observer,
        stop: Stop | None = None,
    ) -> None:
        assert spec.output_dir is not None, "the command line gives every run a folder"
        self.spec, self.progress = spec, unfailing(progress)
        self.planned: list[Study] = studies(spec)
        self.checked: dict[str, Checked] = {}
        self._run_dir = Path(spec.output_dir).absolute()
        self._resume, self._retry_failed = resume, retry_failed
        self._clear_orphans, self._ask, self._stop = clear_orphans, ask, stop
        self._exits: dict[str, Exit] = {}

    def __enter__(self) -> SweepRuntime:
        try:
            self.open()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A stack closes all of it even if some of it raises, with the exception handed from one to the next.
        stack = ExitStack()
        for member in reversed(self.CLOSE_ORDER):
            if member in self._exits:
                stack.push(self._exits.pop(member))
        stack.__exit__(kind, error, trace)

    def open(self) -> None:
        """Open the run; whatever is refused leaves nothing behind.

        Raises:
            ConfigError: the spec does not fit its models or data, or the folder cannot be used.
            ResourceError: the cluster has too little.
        """
        begun = None
        if self._resume:
            check_run(self._run_dir)
            self._enter("lock", locked(self._run_dir))
            begun = _repair(self._run_dir, self.spec, self.progress)
        self.checked = check_inputs(self.spec, self.planned, begun)
        if self.spec.sync_to is not None:
            lost = check_place(self.spec.sync_to, self._run_dir, resume=self._resume)
            if lost is not None:
                self.progress.note(f"sync_to {self.spec.sync_to} cannot be reached ({lost}); the run resumes.")
        address, cluster_gpus = self._connect()
        # The folder comes last, after everything that may refuse the run.
        if not self._resume:
            self._enter("lock", locked(self._run_dir))
        self._open_folder()
        self.progress.started(self._run_dir, address, resources(self.spec.ray, cluster_gpus=cluster_gpus).sum)
        steps = {name: checked.steps for name, checked in self.checked.items()}
        self.progress.planned(work_of(self.spec, self.planned, steps))
        for name, checked in self.checked.items():
            for sentence in (*checked.data, *checked.notes):
                self.progress.found(name, sentence)
        self._start()

    def run_studies(self) -> int:
        """Run every study; return the number of trials, benchmarks and studies that did not end well."""
        if any(study.count for study in self.planned):
            self.lanes.open()
        left = self.spec.sweep.time_budget_s
        for number, study in enumerate(self.planned):
            share = None if left is None else max(1.0, left / (len(self.planned) - number))
            try:
                cuts = self.checked[study.name].cuts
                study_run = StudyRun(self.spec, study, cuts, self.run_folder, self.controller, self.dispatcher)
                spent = study_run.run(share)
                left = None if left is None else left - spent
            except MacDropError as error:
                if self.controller.broken or isinstance(error, ResourceError) or len(self.planned) == 1:
                    raise
                # One model that cannot be used does not stop the others.
                self.controller.study_failed(study, str(error))
        return self.controller.failures

    def judge(self) -> int:
        """Judge the generated answers, after the last study; return the number of failures."""
        if self.spec.eval.judge is None:
            return 0
        # The judge needs the memory of the models.
        self.controller.close()
        self.evaluators.close()
        self.lanes.close()
        return judge_sweep(
            self.spec.eval.judge,
            self.run_folder,
            actors=self.spec.ray,
            gpus=self.gpus.per_evaluator,
            note=self.progress.note,
            show=self.progress.judged,
        )

    # --- opening ---

    def _connect(self) -> tuple[str, float]:
        """Join or start Ray and check the cluster; return the dashboard's address and the cluster's GPUs."""
        spec, note = self.spec, self.progress.note
        with hangup_ignored():
            address, joined = connect(spec.ray, note)
        if joined:
            self._at_close("ray", functools.partial(_disconnect, self._stop))
            orphans.look(local=spec.ray.address is None, clear=self._clear_orphans, ask=self._ask, tell=note)
        cluster_gpus = check_cluster(spec.ray, note)
        self.gpus = gpu_shares(spec.ray, cluster_gpus)
        check_nodes(spec, self.planned, self._run_dir, note)
        return address, cluster_gpus

    def _open_folder(self) -> None:
        run_dir = self._run_dir
        self.run_folder = RunFolder.open(run_dir) if self._resume else RunFolder.create(run_dir, dump(self.spec))
        if apart := record_environment(run_dir, resumed=self._resume):
            self.progress.note(f"resumed in another environment: {'; '.join(apart)}")
        self._exits["status"] = functools.partial(_record_end, self.run_folder, self._stop, _Finished(self.run_folder))
        self.run_folder.set_status(RunStatus.RUNNING)

    def _start(self) -> None:
        """Start the dispatcher, the pools, the trackers, the copy and the control loop."""
        spec, ray_dir = self.spec, self._run_dir / "ray"
        self.dispatcher = self._enter("dispatcher", dispatching(ray_dir))
        self.lanes = LanePool(self.dispatcher, spec.ray, self.gpus.per_worker, ray_dir, evaluator=Evaluator)
        self._at_close("lanes", self.lanes.close)
        self.evaluators = EvaluatorPool(
            spec.ray.evaluators, cpus=spec.ray.cpus_per_evaluator, gpus=self.gpus.per_evaluator
        )
        self._at_close("evaluators", self.evaluators.close)
        # A run folder of its own: the trackers read it from another thread.
        followed = functools.partial(trials_of_run, RunFolder(self._run_dir))
        self.trackers = TrackerSync(spec.report_to, self._run_dir, followed, self.progress.note)
        self._at_close("trackers", self.trackers.close)
        self.remote = RemoteSync(spec.sync_to, self._run_dir, self.progress.note)
        self._at_close("remote", self.remote.close)
        self.controller = SweepController(
            self.run_folder,
            self.dispatcher,
            self.lanes,
            self.evaluators,
            jobs_of_stages(spec),
            self.progress,
            retry_failed=self._retry_failed,
        )
        self._at_close("controller", self.controller.close)

    def _at_close(self, member: str, close: Callable[[], Any]) -> None:
        def leave(*_: object) -> None:
            close()

        self._exits[member] = leave

    def _enter(self, member: str, manager: AbstractContextManager[Any]) -> Any:
        entered = manager.__enter__()
        self._exits[member] = manager.__exit__
        return entered


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

    resume: only what is not done yet. retry_failed: also what failed or diverged. clear_orphans: remove resources held
    by dead runs without asking; otherwise `ask` puts the question (None: nobody can answer). stop: distinguishes a stop
    signal, whatever exception it became, from a failure.

    Returns:
        The number of trials that did not end well.

    Raises:
        ConfigError: the spec does not fit its models or data, the folder holds another run, is in use, or is damaged
            beyond repair.
        ResourceError: the cluster has too little, with the arithmetic.
    """
    with SweepRuntime(
        spec,
        resume=resume,
        retry_failed=retry_failed,
        clear_orphans=clear_orphans,
        ask=ask,
        progress=progress,
        stop=stop,
    ) as runtime:
        failures = runtime.run_studies()
        failures += runtime.judge()
        runtime.progress.finished()
    return failures


def _repair(run_dir: Path, spec: RunSpec, progress: Observer) -> int:
    """Repair an earlier run's folder, refuse it to the spec of another run; return the workers that it began with."""
    for note in repair_run(run_dir):
        progress.note(note)
    started = RunSpec.model_validate(RunFolder.open(run_dir).config())
    check_same(run_dir, dump(started), dump(spec))
    begun, workers = started.ray.num_workers, spec.ray.num_workers
    check_run_shared(started, workers)
    if workers != begun:
        progress.note(
            f"ray.num_workers is {workers} and was {begun} when the run began: batches and masks stay the same, and "
            "bits may differ from here on (the report says for which trials, and from which step)"
        )
    return begun


def _disconnect(stop: Stop | None) -> None:
    """Leave Ray. On a stop signal, exit without it: Ray's child processes exit with us.

    A shutdown would wait, and would crash this process where Ray's processes have received the signal, too.
    """
    if stop is None or stop.signal is None:
        ray.shutdown()


class _Finished:
    """The end of a finished run that is resumed, which stays its end if nothing is left to do."""

    def __init__(self, run_folder: RunFolder) -> None:
        run = run_folder.run()
        self._time = run.get("finished") if run.get("status") == RunStatus.DONE else None
        self._work = self._done(run_folder) if self._time else None

    def unless_changed(self, run_folder: RunFolder) -> str | None:
        """Return the time of the earlier end; None if there was none, or trials or scores have come since."""
        return self._time if self._time and self._work == self._done(run_folder) else None

    @staticmethod
    def _done(run_folder: RunFolder) -> tuple:
        trials = [(record.trial, record.status, record.finished) for record in run_folder.trials()]
        return trials, run_folder.score_rows()


def _record_end(
    run_folder: RunFolder,
    stop: Stop | None,
    before: _Finished,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
) -> None:
    """Record how the run ended, whatever ended it."""
    if kind is None:
        run_folder.set_status(RunStatus.DONE, finished=before.unless_changed(run_folder))
        return
    stopped = issubclass(kind, (KeyboardInterrupt, SystemExit)) or (stop is not None and stop.signal is not None)
    run_folder.set_status(RunStatus.INTERRUPTED if stopped else RunStatus.FAILED)

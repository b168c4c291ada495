"""A whole run: its studies side by side over shared lanes and evaluation actors, in one folder."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray.actor import ActorHandle

from tune.config.run_spec import RunSpec, dump
from tune.distributed.actors.evaluators import Evaluator
from tune.distributed.actors.judges import judge_sweep
from tune.distributed.cluster import orphans
from tune.distributed.cluster.node_checks import check_nodes
from tune.distributed.cluster.ray_cluster import check_models, connect
from tune.distributed.lanes.dispatcher import dispatching
from tune.distributed.lanes.lane_pools import LanePools
from tune.distributed.sweep.controller import SweepController
from tune.distributed.sweep.earlier_run import check_earlier_run
from tune.distributed.sweep.events import Observer, unfailing
from tune.distributed.sweep.run_end import Finished, record_end
from tune.distributed.sweep.scoring import Scoring
from tune.distributed.sweep.stop import Stop, hangup_ignored
from tune.distributed.sweep.studies import StudyThreads
from tune.distributed.sweep.study_run import StudyRun, jobs_of_stages
from tune.errors import ResourceError
from tune.preflight.inputs import Checked, check_inputs
from tune.scheduling.allocation import LaneKind, evaluator_room, lane_kind
from tune.scheduling.resources import gpu_shares, needs_of
from tune.scheduling.sharing import StudyNeeds
from tune.scheduling.study import Study, studies
from tune.scheduling.time_left import work_of
from tune.storage.environment import record_environment
from tune.storage.remote.background import RemoteSync
from tune.storage.remote.copier import check_place
from tune.storage.repair import check_run, repair_contents, repair_spec
from tune.storage.run_folder import RunFolder
from tune.storage.run_lock import locked
from tune.storage.states import RunStatus
from tune.trackers.sync import TrackerSync, trials_of_run

#: What a `with` block calls at its end: type, value and traceback of the exception that ended it, or three None.
Exit = Callable[[type[BaseException] | None, BaseException | None, TracebackType | None], bool | None]


class SweepRuntime:
    """The resources of a run while it lasts: its folder, Ray, actors and threads, as named members.

    Opened and closed by a `with` block, which closes what has been opened also if opening fails half-way.
    """

    #: The order of closing. The controller comes first, as it uses all others, then the evaluators, which free what
    #: closing lanes may need to save a checkpoint, the studies' threads, which end without these two, and the trackers,
    #: which copy the controller's last changes. Lanes report their last step to the dispatcher. The status is written
    #: while the folder is still locked, then the last of the run is copied, and the lock outlives Ray, whose processes
    #: may write there until they end.
    CLOSE_ORDER = (
        *("controller", "scoring", "studies", "trackers", "lanes", "dispatcher", "status", "remote", "ray", "lock"),
    )

    run_folder: RunFolder
    cluster_gpus: float
    dispatcher: ActorHandle
    lanes: LanePools
    scoring: Scoring
    studies: StudyThreads
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
        skip_unplaceable: bool = False,
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
        self._skip_unplaceable = skip_unplaceable
        #: Studies that are left out, and why.
        self._unplaceable: dict[str, str] = {}
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
        begun: dict[str, int] = {}
        if self._resume:
            check_run(self._run_dir)
            self._enter("lock", locked(self._run_dir))
            notes = repair_spec(self._run_dir)
            begun, changed = check_earlier_run(self._run_dir, self.spec)
            for note in (*notes, *changed):
                self.progress.note(note)
        self.checked = check_inputs(self.spec, self.planned, begun)
        if self.spec.sync_to is not None:
            lost = check_place(self.spec.sync_to, self._run_dir, resume=self._resume)
            if lost is not None:
                self.progress.note(f"sync_to {self.spec.sync_to} cannot be reached ({lost}); the run resumes.")
        address = self._connect_and_repair() if self._resume else self._connect()
        # The folder comes last, after everything that may refuse the run.
        if not self._resume:
            self._enter("lock", locked(self._run_dir))
        self._open_folder()
        self.progress.started(self._run_dir, address, needs_of(self.spec.rays(), cluster_gpus=self.cluster_gpus))
        steps = {name: checked.steps for name, checked in self.checked.items()}
        self.progress.planned(work_of(self.spec, self.planned, steps))
        for name, checked in self.checked.items():
            for sentence in (*checked.data, *checked.notes):
                self.progress.found(name, sentence)
        self._start()

    def run_studies(self) -> int:
        """Run every study; return the number of trials, benchmarks and studies that did not end well."""
        most = self.spec.sweep.max_concurrent_models
        self.studies = StudyThreads(
            self.planned,
            self._run_study,
            self.controller,
            self.lanes,
            None if most == "auto" else most,
            self.spec.sweep.time_budget_s,
        )
        self._at_close("studies", self.studies.close)
        self.studies.run_all()
        return self.controller.failures

    def _run_study(self, study: Study, time_budget_s: float | None) -> float:
        cuts = self.checked[study.name].cuts
        return StudyRun(self.spec, study, cuts, self.run_folder, self.controller, self.dispatcher).run(time_budget_s)

    def judge(self) -> int:
        """Judge the generated answers, after the last study; return the number of failures."""
        if self.spec.eval.judge is None:
            return 0
        # The judge needs the memory of the models.
        self.controller.close()
        self.scoring.close()
        self.lanes.close()
        return judge_sweep(
            self.spec.eval.judge,
            self.run_folder,
            actors=self.spec.ray,
            gpus=gpu_shares(self.spec.ray, self.cluster_gpus).per_evaluator,
            note=self.progress.note,
            show=self.progress.judged,
        )

    # --- opening ---

    def _connect_and_repair(self) -> str:
        """Connect, and meanwhile repair what an earlier run left; return the dashboard's address."""
        with ThreadPoolExecutor(1) as aside:
            repairing = aside.submit(repair_contents, self._run_dir)
            address = self._connect()
            for note in repairing.result():
                self.progress.note(note)
        return address

    def _connect(self) -> str:
        """Join or start Ray and check the cluster; return the dashboard's address."""
        spec, note = self.spec, self.progress.note
        with hangup_ignored():
            address, joined = connect(spec.ray, note)
        if joined:
            self._at_close("ray", functools.partial(_disconnect, self._stop))
            orphans.look(local=spec.ray.address is None, clear=self._clear_orphans, ask=self._ask, tell=note)
        rays = {study.name: study.ray for study in self.planned}
        self.cluster_gpus, self._unplaceable = check_models(rays, note, skip=self._skip_unplaceable)
        self.planned = [study for study in self.planned if study.name not in self._unplaceable]
        check_nodes(spec, self.planned, self._run_dir, note)
        return address

    def _open_folder(self) -> None:
        run_dir = self._run_dir
        self.run_folder = RunFolder.open(run_dir) if self._resume else RunFolder.create(run_dir, dump(self.spec))
        if apart := record_environment(run_dir, resumed=self._resume):
            self.progress.note(f"resumed in another environment: {'; '.join(apart)}")
        self._exits["status"] = functools.partial(record_end, self.run_folder, self._stop, Finished(self.run_folder))
        self.run_folder.set_status(RunStatus.RUNNING)

    def _start(self) -> None:
        """Start the dispatcher, the pools, the trackers, the copy and the control loop."""
        spec, ray_dir = self.spec, self._run_dir / "ray"
        self.dispatcher = self._enter("dispatcher", dispatching(ray_dir))
        kinds = {study.name: lane_kind(study.ray, self.cluster_gpus) for study in self.planned}
        needs = {study.name: self._needs(study, kinds[study.name]) for study in self.planned}
        specs = {kinds[study.name]: study.ray for study in self.planned}
        self.lanes = LanePools(self.dispatcher, specs, needs, ray_dir, evaluator=Evaluator, record=self._record_times)
        self._at_close("lanes", self.lanes.close)
        self.scoring = Scoring(self.cluster_gpus, record=self._record_times)
        self._at_close("scoring", self.scoring.close)
        # A run folder of its own: the trackers read it from another thread.
        followed = trials_of_run(RunFolder(self._run_dir))
        self.trackers = TrackerSync(spec.report_to, self._run_dir, followed, self.progress.note)
        self._at_close("trackers", self.trackers.close)
        self.remote = RemoteSync(spec.sync_to, self._run_dir, self.progress.note)
        self._at_close("remote", self.remote.close)
        self.controller = SweepController(
            self.run_folder,
            self.dispatcher,
            self.lanes,
            self.scoring,
            jobs_of_stages(spec),
            self.progress,
            retry_failed=self._retry_failed,
        )
        self._at_close("controller", self.controller.close)
        for name, reason in self._unplaceable.items():
            self.controller.study_failed(name, f"left out: {reason}")

    def _record_times(self, rows: list[dict[str, Any]]) -> None:
        """Record times of lanes or actors; without room for them the timeline has a gap, and the run goes on."""
        with suppress(ResourceError):
            self.run_folder.add_times(rows)

    def _needs(self, study: Study, kind: LaneKind) -> StudyNeeds:
        first = study.searched_count if study.search else study.final_count
        if study.search and study.samples:
            first = min(first, self.spec.sweep.max_concurrent_trials + len(study.plain))
        return StudyNeeds(kind, evaluator_room(study.ray, self.cluster_gpus), first)

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
    skip_unplaceable: bool = False,
    ask: Callable[[str], bool] | None = None,
    progress: Observer,
    stop: Stop | None = None,
) -> int:
    """Run every study of `spec` into its output folder.

    resume: only what is not done yet. retry_failed: also what failed or diverged. clear_orphans: remove resources held
    by dead runs without asking; otherwise `ask` puts the question (None: nobody can answer). skip_unplaceable: leave
    out models that the cluster cannot hold. stop: distinguishes a stop signal, whatever exception it became, from a
    failure.

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
        skip_unplaceable=skip_unplaceable,
        ask=ask,
        progress=progress,
        stop=stop,
    ) as runtime:
        failures = runtime.run_studies()
        failures += runtime.judge()
        runtime.progress.finished()
    return failures


def _disconnect(stop: Stop | None) -> None:
    """Leave Ray. On a stop signal, exit without it: Ray's child processes exit with us.

    A shutdown would wait, and would crash this process where Ray's processes have received the signal, too.
    """
    if stop is None or stop.signal is None:
        ray.shutdown()

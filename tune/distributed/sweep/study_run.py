"""One study of a run, stage by stage: search by validation, selection, comparison on fresh seeds."""

from __future__ import annotations

import functools
import json
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import ray.tune
from ray.actor import ActorHandle
from ray.tune import FailureConfig, Result, RunConfig, Stopper, TuneConfig, Tuner, register_trainable

from tune.config.eval_spec import NO_ATTACK, TEST, VALIDATION, EvalJob, jobs
from tune.config.run_spec import MacDropSpec, RunSpec, TrainSpec
from tune.config.sections import Arm
from tune.distributed.actors.evaluators import Opening
from tune.distributed.cluster.ray_internals import HEAD
from tune.distributed.lanes.dispatcher import call
from tune.distributed.sweep.controller import SweepController
from tune.distributed.sweep.earlier_run import Resumed
from tune.distributed.sweep.schedulers import scheduler
from tune.distributed.sweep.searcher import optuna_searcher, param_space, points
from tune.distributed.sweep.searcher import values as point_of
from tune.distributed.sweep.trial import RESTARTS, CancelStopped, TrialContext, run_trial
from tune.evaluation.own.travel import own_files
from tune.scheduling import history as past
from tune.scheduling import selection as finalists
from tune.scheduling.early_stopping import Cuts
from tune.scheduling.selection import Candidate
from tune.scheduling.sharing import Phase
from tune.scheduling.study import Study
from tune.storage import search_state
from tune.storage.atomic import atomic_write_json
from tune.storage.places import cache_dir
from tune.storage.records import TrialRecord
from tune.storage.run_folder import RunFolder
from tune.storage.search_state import SearchTime
from tune.storage.states import Stage, TaskState
from tune.training.optimizers.snr_record import read_snr

#: Tune's registry of functions by their names is not made for threads, and studies run at the same time.
_REGISTERING = threading.Lock()
#: The follower of tasks that no Tune trial queued: baselines of the search, and the whole final stage.
BASELINE = "baseline"


def jobs_of_stages(spec: RunSpec) -> dict[str, list[EvalJob]]:
    """Return what the trials of each stage are scored on; no test benchmark takes part in the search."""
    return {Stage.SEARCH: jobs(spec.validation, VALIDATION), Stage.FINAL: jobs(spec.eval)}


@dataclass
class StudyRun:
    """One model's study on the lanes and evaluators of a run; `cuts` are ASHA's rules, None without it."""

    spec: RunSpec
    study: Study
    cuts: Cuts | None
    run_folder: RunFolder
    controller: SweepController
    dispatcher: ActorHandle
    #: Trials of an earlier run of the same folder that will not be retrained -> the states of their tasks.
    standing: dict[str, TaskState] = field(default_factory=dict)
    #: Points of the search space -> the names of their fine-tunings.
    _names: dict[str, str] = field(default_factory=dict)

    def run(self, time_budget_s: float | None) -> float:
        """Run what is not done yet of the study; return the seconds spent searching.

        time_budget_s: for the search, including earlier runs of the same folder. The selection and the final stage
        follow, however the search ended.
        """
        context = self._begin()
        if self.standing:  # how much is to be queued is not known
            self.controller.lanes.sharing.turn(self.study.name, Phase.RUNNING)
        searched = SearchTime(self.run_folder.search_time_file(self.study.name), self.run_folder.run_dir)
        if self.study.count:
            file = self.run_folder.finalists_file(self.study.name)
            chosen = self.run_folder.finding(file)
            if chosen is None:
                if self.study.search:
                    left = None if time_budget_s is None else max(1.0, time_budget_s - searched.seconds)
                    with searched, self.controller.timing(searched):
                        self._search(context, left)
                chosen = self._select()
                atomic_write_json(file, chosen)
            specs = finalists.final_specs(chosen)
            self.controller.stage(self.study, Stage.FINAL, len(specs))
            self._place(context, specs, Stage.FINAL)
        self.controller.wait(self.study, last=True)
        return searched.seconds

    def _begin(self) -> TrialContext:
        """Open the study, and enter the trials of an earlier run: these are read while the evaluators start."""
        given_up = threading.Event()
        with ThreadPoolExecutor(1) as aside:
            reading = aside.submit(self._read, given_up)
            try:
                context = self._open()
            except BaseException:
                given_up.set()
                raise
        resumed = reading.result()
        self.controller.resume_scoring(resumed.unscored)
        self.standing = resumed.states
        return context

    def _read(self, given_up: threading.Event) -> Resumed:
        resumed = self.controller.resume(self.study, given_up)
        if not self.study.unruled:  # rules that are yet to be measured change the names
            for values in points(self.study, self.spec.sweep) or ():
                if given_up.is_set():
                    break
                self._name(values)
        return resumed

    def _open(self) -> TrialContext:
        """Make the model resident in the evaluators, score the base, find the massive weights, measure rules."""
        wanted = jobs_of_stages(self.spec)
        blocks = {TEST: self.spec.eval}
        if self.study.search and wanted[Stage.SEARCH]:
            blocks[VALIDATION] = self.spec.validation
        attacked = any(job.attack != NO_ATTACK for block in blocks.values() for job in jobs(block))
        opening = Opening(
            self.study.spec,
            blocks,
            str(self.run_folder.massive_weights_file(self.study.name)),
            scan=attacked or self.study.drops,
            k=self.study.spec.macdrop.k or MacDropSpec().k,
            threads=self.study.ray.threads_per_worker,
            step_timeout_s=self.study.ray.step_timeout_s,
            own={split: own_files(block) for split, block in blocks.items()},
            unruled=self.study.unruled,
            workers=self.run_folder.workers_at_start(self.study.spec.model_name_or_path),
        )
        weights = self.controller.open(self.study, opening)
        if opening.unruled:
            self.study = self.study.with_measured(read_snr(self.run_folder.snr_file(self.study.name)).rules())
        return TrialContext(
            dispatcher=self.dispatcher,
            study=self.study,
            run_dir=str(self.run_folder.run_dir),
            data=str(cache_dir() / "data"),
            weights=weights,
            pool=self.controller.lanes.sharing.pool_of(self.study.name),
            workers_at_start=self.run_folder.workers_at_start(self.study.spec.model_name_or_path),
        )

    def _place(self, context: TrialContext, specs: list[TrainSpec] | tuple[TrainSpec, ...], stage: Stage) -> None:
        for spec in specs:
            call(self.dispatcher, "place", context.task(spec, stage), BASELINE)

    def _search(self, context: TrialContext, time_budget_s: float | None) -> None:
        """Train and score the baselines and the searched trials, then the plain twins of the best."""
        self.controller.stage(self.study, Stage.SEARCH, self.study.searched_count)
        self._place(context, self.study.plain, Stage.SEARCH)
        if self.study.samples:
            results = self._tune(context, time_budget_s)
            # If the run is being closed, lanes save checkpoints of tasks that were not cancelled.
            self.controller.check(self.study)
            self._count_lost(results)
            # On timeout Tune stops trials without calling back.
            call(self.dispatcher, "abandon", self.study.name, BASELINE)
        self.controller.wait(self.study)
        twins = finalists.twins(self.study, self._candidates(), self.spec.sweep.metric)
        if twins:
            self._place(context, twins, Stage.SEARCH)
            self.controller.wait(self.study)

    def _select(self) -> dict[str, Any]:
        """Return the content of the finalists file."""
        if not self.study.search:
            return finalists.planned(self.study, self.spec.sweep.metric)
        content, notes = finalists.select(self.study, self._candidates(), self.spec.sweep.metric)
        for note in notes:
            self.controller.note(f"{self.study.name}: {note}")
        return content

    def _candidates(self) -> list[Candidate]:
        """Return the trials of the search, from the run folder."""
        return [self._candidate(record) for record in self._searched()]

    def _candidate(self, record: TrialRecord) -> Candidate:
        scores = self.controller.validation_scores(record.trial)
        return finalists.candidate(record, scores, self.spec.sweep.metric)

    def _searched(self) -> list[TrialRecord]:
        """Return the records of the search's trials, including those that the final stage has taken over."""
        spec = self.study.spec
        found = self.run_folder.trials(spec.model_name_or_path)
        return [record for record in found if record.seed == spec.seed and record.arm in (Arm.PLAIN, Arm.MACDROP)]

    def _tune(self, context: TrialContext, time_budget_s: float | None) -> Sequence[Result]:
        """Run the rest of the search; trials that ended in an earlier run are known to it, but not run again."""
        sweep, draws = self.spec.sweep, self.run_folder.draws_file(self.study.name)
        listed = points(self.study, sweep)
        searcher, reports = None, {}
        if listed is None or self.cuts:
            records = {record.trial: record for record in self._searched()}
            drawn = search_state.draws(draws, records.values()) if listed is None else listed
            reports = self._reports(drawn, records)
        if listed is None:
            known = [self._past(values, records, reports) for values in drawn]
            samples = sweep.num_samples - sum(each.state != past.OPEN for each in known)
            searcher = optuna_searcher(sweep, known, functools.partial(search_state.remember, draws))
        else:
            states = ((values, self.standing.get(self._name(values))) for values in listed)
            listed = [values for values, state in states if state in (None, TaskState.TRAINED)]
            samples = min(1, len(listed))
        if samples < 1:
            return ()
        trainable = functools.partial(run_trial, context=context)
        # On the head, without a CPU, which the lanes need: a trial only waits.
        trainable = ray.tune.with_resources(trainable, {"CPU": 0, HEAD: 0.001})
        name = f"trial-{self.study.name}"
        with _REGISTERING:
            register_trainable(name, trainable)
        results = Tuner(
            name,
            param_space=param_space(self.study, listed),
            # Searcher and scheduler know their own metrics: Tune accepts no more than one for both.
            tune_config=TuneConfig(
                search_alg=searcher,
                scheduler=scheduler(self.study, sweep, self.cuts, reports),
                num_samples=samples,
                max_concurrent_trials=sweep.max_concurrent_trials,
                time_budget_s=time_budget_s,
                reuse_actors=True,
            ),
            run_config=RunConfig(
                name=f"tune-{self.study.name}-{int(time.time())}",
                storage_path=str(self.run_folder.run_dir / "ray"),
                callbacks=[CancelStopped(context)],
                failure_config=FailureConfig(max_failures=RESTARTS),
                stop=StopOnError(self.controller, self.study),
                verbose=0,
            ),
        ).fit()
        return [results[number] for number in range(len(results))]

    def _count_lost(self, results: Sequence[Result]) -> None:
        """Report trials that Tune gave up: their tasks are cancelled, which is no failure to the queue."""
        for result in results:
            if result.error is not None:
                last = (str(result.error).strip() or type(result.error).__name__).splitlines()[-1]
                self.controller.trial_lost(self._name(point_of(result.config or {})), last)

    def _name(self, values: dict[str, Any]) -> str:
        """Return the name of the fine-tuning with searched values; a third of a millisecond, so each is found once."""
        point = json.dumps(values, sort_keys=True, default=str)
        if point not in self._names:
            self._names[point] = self.study.searched(values).trial_id()
        return self._names[point]

    def _reports(
        self, drawn: list[dict[str, Any]], records: dict[str, TrialRecord]
    ) -> dict[str, list[tuple[int, float]]]:
        """Return the reports of searched trials that will not be retrained; others repeat theirs when they resume."""
        names = dict.fromkeys(self._name(values) for values in drawn)
        return {
            name: past.judged(records[name], self.run_folder.trial(name).metrics())
            for name in names
            if name in self.standing and name in records
        }

    def _past(self, values: dict[str, Any], records: dict[str, TrialRecord], reports: dict[str, Any]) -> past.PastTrial:
        name = self._name(values)
        if name not in records:
            return past.PastTrial(values, past.OPEN)
        objectives = self._candidate(records[name]).values
        return past.past(values, self.standing.get(name), records[name], objectives, reports.get(name, ()))


class StopOnError(Stopper):
    """Stops Tune's trials of a study when it cannot go on: the control loop has ended, or its actors are gone."""

    def __init__(self, controller: SweepController | None, study: Study | None) -> None:
        self._controller, self._study = controller, study

    def __reduce__(self) -> tuple:
        # Tune pickles its settings into the run folder; a thread cannot be pickled, and nobody uses the copy.
        return StopOnError, (None, None)

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if self._controller is None:
            return False
        try:
            self._controller.check(self._study)
        except Exception:  # raised again by whoever waits for the study
            return True
        return False

"""The driver's control loop: queue changes to the run folder, adapters to the evaluators, scores to the queue."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.actor import ActorHandle
from ray.tune import Stopper

from tune.config.eval_spec import VALIDATION, EvalJob
from tune.config.recorded import asked_for
from tune.config.run_spec import TrainSpec, dump
from tune.distributed.actors.eval_task import EvalTask, Result
from tune.distributed.actors.evaluators import EvaluatorPool, Opening
from tune.distributed.lanes.dispatcher import call
from tune.distributed.lanes.lane_pool import LanePool
from tune.distributed.sweep.events import Observer
from tune.evaluation.score_names import named_scores
from tune.scheduling.history import resume_state
from tune.scheduling.queue import QueuedTask, TrainTask
from tune.scheduling.study import Study
from tune.storage.atomic import now
from tune.storage.run_folder import BASE, RunFolder
from tune.storage.search_state import SearchTime
from tune.storage.states import Stage, TaskState
from tune.training.finetune import Outcome, slow_paths, unmoved_text
from tune.training.proving.layer_proofs import copy_layers

#: Short compared with a benchmark of a tiny model: an actor that is done waits for the next tick.
TICK_S = 0.1
#: An actor that has not started after this long is waiting for resources.
STARTING_S = 60.0


class SweepController:
    """A thread next to Tune; the only writer of trial.json and scores.jsonl, so a killed trial loses nothing."""

    def __init__(
        self,
        run_folder: RunFolder,
        dispatcher: ActorHandle,
        lanes: LanePool,
        evaluators: EvaluatorPool,
        jobs: dict[str, list[EvalJob]],
        progress: Observer,
        *,
        retry_failed: bool = False,
    ) -> None:
        """Start the loop.

        jobs: what the trials of each stage are scored on; the base model is scored on all of it. retry_failed: retrain
        trials that failed or diverged in an earlier run of the same folder.
        """
        self._retry_failed = retry_failed
        self._run_folder, self._dispatcher = run_folder, dispatcher
        self._lanes, self._evaluators = lanes, evaluators
        self._jobs, self._progress = jobs, progress
        self._lock = threading.Lock()
        self._pending: dict[str, dict[str, Any]] = {}
        self._seen = 0
        self._searched: SearchTime | None = None
        self._error: BaseException | None = None
        self._waits = False
        self._opening: float | None = None
        self._failed: set[str] = set()
        #: Models, with a note that is shown once for each.
        self._noted: set[tuple[str, str]] = set()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="controller", daemon=True)
        self._thread.start()

    # --- driver ---

    def open(self, study: Study, opening: Opening) -> str | None:
        """Make the study's model resident in the evaluators and score the base; return its massive weights' file."""
        with self._lock:
            self._progress.study(study)
            self._opening = time.monotonic()
        try:
            # Without the lock, so that the loop runs: an actor may be waiting for what an idle lane holds.
            weights = self._evaluators.open(opening)
        finally:
            self._opening = None
        if weights is not None and opening.scan:
            # Here: a proof of every layer is kept in the cache of the machine that it was made on.
            copy_layers(opening.spec, Path(weights))
        with self._lock:
            if study.base:
                tag = {"model": study.spec.model_name_or_path, "arm": BASE, "trial": BASE, "seed": None}
                jobs = self._jobs[Stage.FINAL] + (self._jobs[Stage.SEARCH] if study.search else [])
                self._score(f"{study.name}:{BASE}", tag, None, jobs)
        return weights

    def resume_finished(self, study: Study) -> dict[str, TaskState]:
        """Enter the trials that an earlier run of this folder has finished into the queue.

        Trials that are trained but not fully scored will get their missing scores.

        Returns:
            The states of the entered tasks, by trial.
        """
        entered = {}
        for record in self._run_folder.trials():
            if record.model != study.spec.model_name_or_path:
                continue
            trial = self._run_folder.trial(record.trial)
            state = resume_state(
                record,
                adapter=trial.adapter_dir.is_dir(),
                scored=not self._missing(record.model, record.trial, self._jobs[record.stage]),
                retry_failed=self._retry_failed,
            )
            if state is None:
                continue
            entered[record.trial] = state
            if state in (TaskState.FAILED, TaskState.DIVERGED):
                self._failed.add(record.trial)
            spec = TrainSpec.model_validate(record.config)
            task = TrainTask(
                id=record.trial,
                study=study.name,
                spec=dump(spec),
                folder=str(trial.folder),
                data="",
                weights=None,
                engine_key=spec.engine_key(),
                width=0,
                stage=record.stage,
                cell=record.cell or {},
                drawn=record.drawn,
            )
            outcome = record.model_dump(include=set(Outcome.__dataclass_fields__) - {"status"}, exclude_unset=True)
            scores = self.validation_scores(record.trial)
            call(self._dispatcher, "record", task, state, outcome, scores, record.reason)
        return entered

    def wait(self, study: Study) -> None:
        """Wait until every task and every score of the study is settled.

        Raises:
            the error that ended the loop.
        """
        while True:
            self.check()
            with self._lock:
                tasks = call(self._dispatcher, "snapshot")["tasks"]
                settled = all(row["state"].is_final for row in tasks if row["study"] == study.name)
                if settled and not self._pending and not self._evaluators.busy and not self._take_changes():
                    return
            time.sleep(TICK_S)

    def check(self) -> None:
        """Raise the error that ended the loop, if one did."""
        if self._error is not None:
            raise self._error

    def stage(self, study: Study, stage: str, trials: int) -> None:
        """Announce a stage of at most `trials` trials."""
        with self._lock:
            self._progress.stage(study, stage, trials)

    @contextmanager
    def timing(self, searched: SearchTime) -> Iterator[None]:
        """Keep the time spent searching up to date within the `with` block."""
        self._searched = searched
        try:
            yield
        finally:
            self._searched = None

    def note(self, text: str) -> None:
        """Show the user a message."""
        with self._lock:
            self._progress.note(text)

    def validation_scores(self, trial: str) -> dict[str, float]:
        """Return a trial's search scores as `sweep.metric` names them: benchmark/task/metric[@attack]."""
        rows = [row for row in self._run_folder.trial_scores(trial) if row["split"] == VALIDATION]
        return named_scores(rows, asked_for(self._run_folder.config()))

    def study_failed(self, study: Study, reason: str) -> None:
        """Record that a model cannot be used at all."""
        self._failed.add(study.name)
        self._progress.note(f"{study.name}: {reason}")

    @property
    def broken(self) -> bool:
        """True once the loop has ended with an error."""
        return self._error is not None

    @property
    def failures(self) -> int:
        """The number of trials, benchmarks and studies that did not end well."""
        return len(self._failed)

    def stopper(self) -> Stopper:
        """Return what stops Tune when the loop has ended with an error."""
        return _StopOnError(self)

    def close(self) -> None:
        """End the loop; safe to call twice."""
        self._end.set()
        self._thread.join(timeout=10)

    # --- loop ---

    def _loop(self) -> None:
        try:
            while not self._end.wait(TICK_S):
                with self._lock:
                    self._tick()
        except BaseException as error:
            self._error = error

    def _tick(self) -> None:
        if (searched := self._searched) is not None:
            searched.keep()
        self._take_changes()
        opening = self._opening
        if opening is None:
            for result in self._evaluators.step():
                self._scored(result)
        snapshot = call(self._dispatcher, "snapshot")
        scoring = bool(self._evaluators.busy) or (opening is not None and time.monotonic() > opening + STARTING_S)
        self._lanes.check(snapshot, scoring=scoring, working=bool(self._evaluators.at_work))
        if opening is None:
            self._evaluators.drain(self._lanes.leaving)
        if self._lanes.starving and not self._waits:
            self._progress.note("no lane has its workers; waiting for resources")
        self._waits = self._lanes.starving
        if self._waits and opening is None and not scoring and (released := self._evaluators.release()):
            self._progress.note(f"{released} idle evaluation actor(s) released to make room for a lane")
        self._progress.show(snapshot, self._evaluators.busy)

    def _take_changes(self) -> bool:
        """Process the queue's changes since the last call; return whether there were any."""
        self._seen, changes = call(self._dispatcher, "changes", self._seen)
        for entry in changes:
            self._changed(entry)
        return bool(changes)

    def _changed(self, entry: QueuedTask) -> None:
        task = entry.task
        trial = self._run_folder.trial(task.id)
        model, seed = task.spec["model_name_or_path"], task.spec["seed"]
        spec = TrainSpec.model_validate(task.spec)
        arm = spec.arm
        about: dict[str, Any] = {
            "stage": task.stage,
            "setting": spec.setting_id(),
            "cell": task.cell,
            "drawn": task.drawn,
        }
        record = trial.record()
        if entry.state == TaskState.QUEUED:
            return
        if entry.state == TaskState.RUNNING or record is None:  # a short one may have ended between two polls
            trial.start(task.spec, model=model, arm=arm, seed=seed, **about)
        if entry.state == TaskState.TRAINED:
            # Otherwise it comes from an earlier run, or was placed for another stage.
            if record is None or record.trained is None:
                trial.note(trained=now(), **{k: v for k, v in entry.outcome.items() if k != "status"})
                if unmoved := entry.outcome.get("unmoved"):
                    self._progress.note(f"{task.id}: {unmoved_text(unmoved)}")
                self._note_once(model, slow_paths(entry.outcome))
            tag = {"model": model, "arm": arm, "trial": task.id, "seed": seed}
            self._score(task.id, tag, str(trial.adapter_dir), self._jobs[task.stage])
        elif entry.state.is_final:
            if entry.state in (TaskState.FAILED, TaskState.DIVERGED):
                self._failed.add(task.id)
            outcome = {key: value for key, value in entry.outcome.items() if key != "status"}
            if entry.judged is not None:
                outcome["judged"] = entry.judged
            if entry.state == TaskState.FAILED:
                outcome["kind"] = entry.kind
            trial.finish(entry.state, entry.reason, **about, **outcome)
            self._progress.ended(entry)

    def _note_once(self, model: str, notes: Iterable[str]) -> None:
        for note in (note for note in notes if (model, note) not in self._noted):
            self._noted.add((model, note))
            self._progress.note(f"{model}: {note}")

    # --- scores ---

    def _score(self, name: str, tag: dict[str, Any], adapter: str | None, jobs: list[EvalJob]) -> None:
        """Submit the benchmarks of an adapter, or of the base, that have no score yet."""
        missing = self._missing(tag["model"], tag["trial"], jobs)
        self._pending[name] = {"left": len(missing), "errors": []}
        for job in missing:
            file = self._run_folder.answers_file(tag["model"], tag["trial"], job)
            self._evaluators.submit(
                EvalTask({**tag, "name": name}, job, adapter, str(file), str(self._run_folder.run_dir))
            )
        if not missing:
            self._settle(name)

    def _missing(self, model: str, trial: str, jobs: list[EvalJob]) -> list[EvalJob]:
        """Return the benchmarks among `jobs` without a score in the run folder."""
        known = {
            EvalJob(row["benchmark"], row["entry"], row["attack"], row["attack_on"], row["split"])
            for row in self._run_folder.trial_scores(trial)
            if row["model"] == model
        }
        return [job for job in jobs if job not in known]

    def _scored(self, result: Result) -> None:
        tag = dict(result.task.tag)
        name = tag.pop("name")
        if result.error:
            self._pending[name]["errors"].append(f"{result.task.job.key}: {result.error}")
            self._failed.add(f"{name} {result.task.job.key}")
        else:
            # lm-eval may name a task differently from the entry of the eval: block that asked for it.
            job = result.task.job
            extra = {"entry": job.task, "split": job.split, "seconds": round(result.seconds, 3)}
            self._run_folder.add_scores([{**tag, **row, **extra} for row in result.rows])
            self._note_once(tag["model"], result.notes)
        self._progress.scored(name, result)
        self._pending[name]["left"] -= 1
        if not self._pending[name]["left"]:
            self._settle(name)

    def _settle(self, name: str) -> None:
        errors = self._pending.pop(name)["errors"]
        if name.endswith(f":{BASE}"):
            return
        call(self._dispatcher, "scored", name, self.validation_scores(name), "; ".join(errors) or None)


class _StopOnError(Stopper):
    """Stops all of Tune's trials when the controller has failed."""

    def __init__(self, controller: SweepController | None) -> None:
        self._controller = controller

    def __reduce__(self) -> tuple:
        # Tune pickles its settings into the run folder; a thread cannot be pickled, and nobody uses the copy.
        return _StopOnError, (None,)

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._controller is not None and self._controller.broken

"""The driver's control loop: queue changes to the run folder, adapters to the evaluators, scores to the queue."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ray.actor import ActorHandle

from tune.config.eval_spec import VALIDATION, EvalJob
from tune.config.recorded import asked_for
from tune.config.run_spec import TrainSpec
from tune.distributed.actors.eval_task import EvalTask, Result
from tune.distributed.actors.evaluators import Opening
from tune.distributed.lanes.dispatcher import Watch, answer, call
from tune.distributed.lanes.lane_pools import LanePools
from tune.distributed.sweep.earlier_run import RecordedTask, Resumed, missing_jobs, recorded_tasks
from tune.distributed.sweep.events import Observer
from tune.distributed.sweep.scoring import Scoring
from tune.evaluation.score_names import named_scores
from tune.scheduling.queue_log import Changes
from tune.scheduling.sharing import Phase
from tune.scheduling.study import Study
from tune.scheduling.tasks import QueuedTask
from tune.storage.atomic import atomic_write_json, now
from tune.storage.run_folder import BASE, RunFolder
from tune.storage.search_state import SearchTime
from tune.storage.states import Stage, TaskState
from tune.training.finetune import slow_paths, unmoved_text
from tune.training.proving.layer_proofs import copy_layers

#: Short compared with a benchmark of a tiny model: an actor that is done waits for the next tick.
TICK_S = 0.1
#: Tasks of an earlier run that enter the queue in one call.
BATCH = 500


class SweepController:
    """A thread next to Tune; the only writer of trial.json and scores.jsonl, so a killed trial loses nothing."""

    def __init__(
        self,
        run_folder: RunFolder,
        dispatcher: ActorHandle,
        lanes: LanePools,
        scoring: Scoring,
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
        self.lanes, self._scoring = lanes, scoring
        self._jobs, self._progress = jobs, progress
        self._asked = asked_for(run_folder.config())
        self._lock = threading.RLock()
        self._pending: dict[str, dict[str, Any]] = {}
        self._changes = Watch(dispatcher)
        self._snapshot: dict[str, Any] = {"lanes": {}, "queued": {}, "open": {}}
        #: Rows of tasks that have changed since the display was last updated.
        self._rows: list[dict[str, Any]] = []
        self._searched: list[SearchTime] = []
        self._error: BaseException | None = None
        self._waits = False
        self._failed: set[str] = set()
        self._given_up: set[str] = set()
        #: Trials that have begun -> their arm and setting.
        self._settings: dict[str, tuple[str, str]] = {}
        #: Models, with a note that is shown once for each.
        self._noted: set[tuple[str, str]] = set()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="controller", daemon=True)
        self._thread.start()

    # --- driver ---

    def open(self, study: Study, opening: Opening) -> str | None:
        """Make the study's model resident in the evaluators and score the base; return its massive weights' file."""
        self.check(study)
        self._run_folder.failure_file(study.name).unlink(missing_ok=True)
        with self._lock:
            self._progress.study(study)
        weights = self._scoring.open(study.name, opening, study.ray)
        if weights is not None and opening.scan:
            # Here: a proof of every layer is kept in the cache of the machine that it was made on.
            copy_layers(opening.spec, Path(weights))
        with self._lock:
            if study.base:
                tag = {"model": study.spec.model_name_or_path, "arm": BASE, "trial": BASE, "seed": None}
                jobs = self._jobs[Stage.FINAL] + (self._jobs[Stage.SEARCH] if study.search else [])
                self._score(study.name, f"{study.name}:{BASE}", tag, None, jobs)
        return weights

    def ended(self, study: Study, *, well: bool, more: bool) -> None:
        """Note that a study has ended, well or not; with `more` to come its evaluators go to another one."""
        with self._lock:
            if not well:
                # Its trials under way stay so in the run folder: a resumed run ends them.
                self._given_up.add(study.name)
                call(self._dispatcher, "abandon", study.name, "")
            self._pending = {name: each for name, each in self._pending.items() if each["study"] != study.name}
            self._scoring.hand_on(study.name, keep=more and study.name not in self._scoring.broken)
            self.lanes.sharing.turn(study.name, Phase.ENDED)
            self._progress.study_ended(study)

    def resume(self, study: Study, given_up: threading.Event) -> Resumed:
        """Read which trials of a study an earlier run of this folder has trained, and enter them into the queue.

        Those that lack scores wait for `resume_scoring`, which needs the evaluators. given_up: set to end the reading.
        Raises as `check`.
        """
        found = Resumed()
        model, retry = study.spec.model_name_or_path, self._retry_failed
        together: list[RecordedTask] = []
        for task in recorded_tasks(self._run_folder, model, study.name, self._jobs, self._named, retry_failed=retry):
            self.check(study)
            if given_up.is_set():
                break
            found.states[task.task.id] = task.state
            if task.state in (TaskState.FAILED, TaskState.DIVERGED):
                with self._lock:
                    self._failed.add(task.task.id)
            (found.unscored if task.state == TaskState.TRAINED else together).append(task)
            if len(together) == BATCH:
                self._record(together)
                together = []
        self._record(together)
        return found

    def resume_scoring(self, unscored: Sequence[RecordedTask]) -> None:
        """Enter trained tasks; their missing benchmarks follow."""
        self._record(unscored)

    def _record(self, tasks: Sequence[RecordedTask]) -> None:
        answer(self._dispatcher.record_all.remote([each.arguments for each in tasks]))

    def wait(self, study: Study, *, last: bool = False) -> None:
        """Wait until all tasks and scores of the study are settled, and raise as `check`; last: it queues no others."""
        self.check(study)
        with self._changing():
            self._take_changes(self._changes.fetch())  # with what the study has placed
            self.lanes.sharing.look(self._snapshot)
            if last:
                self.lanes.sharing.turn(study.name, Phase.LAST)
        while True:
            self.check(study)
            with self._lock:
                unfinished = self._snapshot["open"].get(study.name, 0)
                if not unfinished and all(pending["study"] != study.name for pending in self._pending.values()):
                    return
            time.sleep(TICK_S)

    def check(self, study: Study | None = None) -> None:
        """Raise the error that ended the loop, `Closed` if the run is being closed, or what ends this study."""
        if self._error is not None:
            raise self._error
        if self._end.is_set():
            raise Closed
        if study is not None and study.name in self._scoring.broken:
            raise self._scoring.broken[study.name]

    def stage(self, study: Study, stage: str, trials: int) -> None:
        """Announce a stage of at most `trials` trials."""
        with self._lock:
            self._progress.stage(study, stage, trials)

    @contextmanager
    def timing(self, searched: SearchTime) -> Iterator[None]:
        """Keep the time spent searching up to date within the `with` block."""
        self._searched.append(searched)
        try:
            yield
        finally:
            self._searched.remove(searched)

    def note(self, text: str) -> None:
        """Show the user a message."""
        with self._lock:
            self._progress.note(text)

    def validation_scores(self, trial: str) -> dict[str, float]:
        """Return a trial's search scores as `sweep.metric` names them: benchmark/task/metric[@attack]."""
        return self._named(self._run_folder.trial_scores(trial))

    def _named(self, rows: Iterable[dict[str, Any]]) -> dict[str, float]:
        return named_scores([row for row in rows if row["split"] == VALIDATION], self._asked)

    def study_failed(self, name: str, reason: str) -> None:
        """Record that a model is given up, and why."""
        file = self._run_folder.failure_file(name)
        atomic_write_json(file, {"reason": reason, "time": now()}, within=self._run_folder.run_dir)
        with self._lock:
            self._failed.add(name)
            self._progress.note(f"{name}: {reason}")

    def trial_lost(self, trial: str, reason: str) -> None:
        """Record that Tune gave up a trial of a search, and why; a task that failed is recorded by itself."""
        with self._lock:
            self._failed.add(trial)
            self._progress.note(f"{trial}: its search process failed too often: {reason}")

    @property
    def broken(self) -> bool:
        """True once the loop has ended, with an error or as the run is being closed."""
        return self._error is not None or self._end.is_set()

    @property
    def failures(self) -> int:
        """The number of trials, benchmarks and studies that did not end well."""
        return len(self._failed)

    def close(self) -> None:
        """End the loop; safe to call twice."""
        self._end.set()
        self._thread.join(timeout=10)

    # --- loop ---

    def _loop(self) -> None:
        with suppress(BaseException):  # kept
            while self._error is None and not self._end.wait(TICK_S):
                with self._changing():
                    self._tick()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the lock; an error ends the loop, and so the run: changes of the queue are given once only."""
        with self._lock:
            try:
                yield
            except BaseException as error:
                self._error = error
                raise

    def _tick(self) -> None:
        for searched in list(self._searched):
            searched.keep()
        self._take_changes(self._changes.news())
        for result in self._scoring.step():
            self._scored(result)
        scoring = self._scoring.wanting
        self.lanes.check(self._snapshot, scoring=scoring, working=bool(self._scoring.at_work))
        self._scoring.drain(self.lanes.leaving)
        if self.lanes.starving and not self._waits:
            self._progress.note("no lane could start its workers yet; waiting for resources")
        self._waits = self.lanes.starving
        if self._waits and not self._scoring.opening and (released := self._scoring.release()):
            self._progress.note(f"{released} idle evaluation actor(s) released to make room for a lane")
        rows, self._rows = self._rows, []
        self._progress.show({**self._snapshot, "tasks": rows}, self._scoring.left())

    def _take_changes(self, changes: Changes | None) -> None:
        """Process the queue's changes since the last call, if there are any."""
        if changes is not None:
            self._snapshot = changes.snapshot
            self._rows += changes.snapshot["tasks"]
            for entry in changes.changed:
                self._changed(entry)

    def _changed(self, entry: QueuedTask) -> None:
        task = entry.task
        if entry.state == TaskState.QUEUED or task.study in self._given_up:
            return
        trial = self._run_folder.trial(task.id)
        model, seed = task.spec["model_name_or_path"], task.spec["seed"]
        if task.id not in self._settings:
            spec = TrainSpec.model_validate(task.spec)
            self._settings[task.id] = spec.arm, spec.setting_id()
        arm, setting = self._settings[task.id]
        about: dict[str, Any] = {"stage": task.stage, "setting": setting, "cell": task.cell, "drawn": task.drawn}
        record = trial.record()
        if entry.state == TaskState.RUNNING or record is None:  # a short one may end before its start is seen
            trial.start(task.spec, model=model, arm=arm, seed=seed, **about)
        if entry.state == TaskState.TRAINED:
            # Otherwise it comes from an earlier run, or was placed for another stage.
            if record is None or record.trained is None:
                trial.note(trained=now(), **{k: v for k, v in entry.outcome.items() if k != "status"})
                if unmoved := entry.outcome.get("unmoved"):
                    self._progress.note(f"{task.id}: {unmoved_text(unmoved)}")
                self._note_once(model, slow_paths(entry.outcome))
            tag = {"model": model, "arm": arm, "trial": task.id, "seed": seed}
            self._score(task.study, task.id, tag, str(trial.adapter_dir), self._jobs[task.stage])
        elif entry.state.is_final:
            del self._settings[task.id]
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

    def _score(self, study: str, name: str, tag: dict[str, Any], adapter: str | None, jobs: list[EvalJob]) -> None:
        """Submit the benchmarks of an adapter, or of the base, that have no score yet."""
        missing = missing_jobs(tag["model"], self._run_folder.trial_scores(tag["trial"]), jobs)
        self._pending[name] = {"study": study, "left": len(missing), "errors": []}
        for job in missing:
            file = self._run_folder.answers_file(tag["model"], tag["trial"], job)
            task = EvalTask({**tag, "name": name}, job, adapter, str(file), str(self._run_folder.run_dir))
            self._scoring.submit(study, task)
        if not missing:
            self._settle(name)

    def _scored(self, result: Result) -> None:
        tag = dict(result.task.tag)
        name = tag.pop("name")
        study = self._pending[name]["study"]
        if result.error:
            self._pending[name]["errors"].append(f"{result.task.job.key}: {result.error}")
            self._failed.add(f"{name} {result.task.job.key}")
        else:
            # lm-eval may name a task differently from the entry of the eval: block that asked for it.
            job = result.task.job
            extra = {"entry": job.task, "split": job.split, "seconds": round(result.seconds, 3)}
            self._run_folder.add_scores([{**tag, **row, **extra} for row in result.rows])
            self._note_once(tag["model"], result.notes)
        self._progress.scored(name, result, study)
        self._pending[name]["left"] -= 1
        if not self._pending[name]["left"]:
            self._settle(name)

    def _settle(self, name: str) -> None:
        errors = self._pending.pop(name)["errors"]
        if name.endswith(f":{BASE}"):
            return
        call(self._dispatcher, "scored", name, self.validation_scores(name), "; ".join(errors) or None)


class Closed(Exception):
    """The run is being closed while a study of it goes on."""

"""One study of a run, stage by stage: search by validation, selection, comparison on fresh seeds."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Any

import ray.tune
from ray.actor import ActorHandle
from ray.tune import RunConfig, TuneConfig, Tuner

from tune import finalists
from tune.asha import Cuts
from tune.benchmarks.spec import PLAIN, TEST, VALIDATION, Job, jobs
from tune.dispatch import call
from tune.evaluators import Opening
from tune.files import atomic_write_json
from tune.finalists import Candidate
from tune.journal import FINALS, SEARCH, Journal
from tune.plan import Study
from tune.search import Past, param_space, scheduler, searcher
from tune.spec import MacDropSpec, RunSpec, TrainSpec
from tune.supervisor import Supervisor
from tune.trial import CancelStopped, Desk, run_trial
from tune.weights import cache_dir

#: The follower of orders that no Tune trial placed: baselines of the search, and all of the final stage.
BASELINE = "baseline"


def jobs_of_stages(spec: RunSpec) -> dict[str, list[Job]]:
    """What the trials of each stage are scored on: no test benchmark takes part in the search."""
    return {SEARCH: jobs(spec.validation, VALIDATION), FINALS: jobs(spec.eval)}


@dataclass
class StudyRun:
    """One model's study on lanes and evaluators that are there; `cuts` are what ASHA may do, None without it."""

    spec: RunSpec
    study: Study
    cuts: Cuts | None
    journal: Journal
    supervisor: Supervisor
    dispatcher: ActorHandle

    def run(self, time_budget_s: float | None) -> float:
        """Run what is not done yet of the study; returns the seconds spent searching.

        time_budget_s: for the search. The selection and the final stage follow, however it ended.
        """
        desk = self._open()
        self.supervisor.resume_finished(self.study)
        spent = 0.0
        if self.study.count:
            file = self.journal.finalists_file(self.study.name)
            chosen = self.journal.finding(file)
            if chosen is None:
                started = time.monotonic()
                if self.study.search:
                    self._search(desk, time_budget_s)
                spent = time.monotonic() - started
                chosen = self._select()
                atomic_write_json(file, chosen)
            specs = finalists.final_specs(chosen)
            self.supervisor.stage(self.study, FINALS, len(specs))
            self._place(desk, specs, FINALS)
        self.supervisor.wait(self.study)
        return spent

    def _open(self) -> Desk:
        """Make the model resident in the evaluators, score the base, find the massive weights."""
        wanted = jobs_of_stages(self.spec)
        blocks = {TEST: self.spec.eval}
        if self.study.search and wanted[SEARCH]:
            blocks[VALIDATION] = self.spec.validation
        attacked = any(job.attack != PLAIN for block in blocks.values() for job in jobs(block))
        opening = Opening(
            self.study.spec,
            blocks,
            str(self.journal.massive_weights_file(self.study.name)),
            scan=attacked or self.study.drops,
            k=self.study.spec.macdrop.k or MacDropSpec().k,
            threads=self.spec.ray.threads_per_worker,
        )
        return Desk(
            dispatcher=self.dispatcher,
            study=self.study,
            run_dir=str(self.journal.run_dir),
            data=str(cache_dir() / "data"),
            weights=self.supervisor.open(self.study, opening),
            width=self.spec.ray.num_workers,
        )

    def _place(self, desk: Desk, specs: list[TrainSpec] | tuple[TrainSpec, ...], stage: str) -> None:
        for spec in specs:
            call(self.dispatcher, "place", desk.order(spec, stage), BASELINE)

    def _search(self, desk: Desk, time_budget_s: float | None) -> None:
        """Baselines and searched trials, all of them trained and scored; then the plain twins of what was found."""
        self.supervisor.stage(self.study, SEARCH, self.study.searched_count)
        self._place(desk, self.study.plain, SEARCH)
        if self.study.samples:
            self._tune(desk, time_budget_s)
            # When its time is up, Tune ends trials without telling anybody.
            call(self.dispatcher, "abandon", self.study.name, BASELINE)
        self.supervisor.wait(self.study)
        twins = finalists.twins(self.study, self._candidates(), self.spec.sweep.metric)
        if twins:
            self._place(desk, twins, SEARCH)
            self.supervisor.wait(self.study)

    def _select(self) -> dict[str, Any]:
        """The content of finalists.json."""
        if not self.study.search:
            return finalists.planned(self.study, self.spec.sweep.metric)
        content, notes = finalists.select(self.study, self._candidates(), self.spec.sweep.metric)
        for note in notes:
            self.supervisor.note(f"{self.study.name}: {note}")
        return content

    def _candidates(self) -> list[Candidate]:
        """The trials of the search, as the journal has them."""
        model = self.study.spec.model_name_or_path
        return [
            finalists.candidate(record, self.supervisor.validation_scores(record["trial"]), self.spec.sweep.metric)
            for record in self.journal.trials()
            if (record["model"], record["stage"]) == (model, SEARCH)
        ]

    def _past(self) -> list[Past]:
        """What Optuna drew in an earlier run of this folder; what failed then is tried again."""
        drawn = {record["trial"]: record.get("drawn") for record in self.journal.trials()}
        return [
            Past(
                drawn[found.trial],
                found.values if found.selectable else None,
                ended=found.begun and found.status in ("done", "stopped", "diverged"),
            )
            for found in self._candidates()
            if drawn[found.trial] is not None
        ]

    def _tune(self, desk: Desk, time_budget_s: float | None) -> None:
        sweep = self.spec.sweep
        trainable = functools.partial(run_trial, desk=desk)
        # A share of the head's own resource: a trial only waits, so it must not take a CPU from the lanes.
        trainable = ray.tune.with_resources(trainable, {"CPU": 0, "node:__internal_head__": 0.001})
        grid = self.study.trials is not None
        past = self._past() if sweep.search_alg == "optuna" else []
        samples = 1 if grid else sweep.num_samples - sum(each.ended for each in past)
        if samples < 1:
            return
        Tuner(
            trainable,
            param_space=param_space(self.study),
            # Searcher and scheduler know their metrics: Tune refuses several, and two that differ.
            tune_config=TuneConfig(
                search_alg=searcher(self.study, sweep, past),
                scheduler=scheduler(self.study, sweep, self.cuts),
                num_samples=samples,
                max_concurrent_trials=sweep.max_concurrent_trials,
                time_budget_s=time_budget_s,
                reuse_actors=True,
            ),
            run_config=RunConfig(
                name=f"tune-{self.study.name}-{int(time.time())}",
                storage_path=str(self.journal.run_dir / "ray"),
                callbacks=[CancelStopped(desk)],
                stop=self.supervisor.stopper(),
                verbose=0,
            ),
        ).fit()

"""A whole run: studies one after the other over the same lanes and evaluation actors, one folder, one table."""

from __future__ import annotations

import functools
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray
import ray.tune
from ray.tune import RunConfig, TuneConfig, Tuner

from macdrop.errors import ConfigError, MacDropError, ResourceError
from tune.benchmarks.spec import jobs
from tune.check import check_inputs
from tune.cluster_state import check_cluster, connect
from tune.dispatch import call, start_dispatcher
from tune.evaluators import Opening, Pool
from tune.journal import Journal
from tune.judge_actors import judge_sweep
from tune.lanes import Lanes
from tune.mirror import Mirror, trials_of_run
from tune.plan import Study, gpu_shares, resources, studies
from tune.progress import Progress
from tune.search import param_space, scheduler, searcher
from tune.spec import MacDropSpec, RunSpec, dump
from tune.supervisor import Supervisor
from tune.trial import CancelStopped, Desk, run_trial
from tune.weights import cache_dir

#: The follower of orders that no Tune trial placed: the plain baselines.
BASELINE = "baseline"


def run(spec: RunSpec, *, resume: bool = False, progress: Progress) -> int:
    """Run every study of `spec` into its output folder.

    Returns:
        The number of trials that did not end well.

    Raises:
        ConfigError: the spec does not fit its models or data, or the folder holds another run.
        ResourceError: the cluster has too little, with the arithmetic.
    """
    assert spec.output_dir is not None, "the command line gives every run a folder"
    planned = studies(spec)
    run_dir = Path(spec.output_dir).absolute()
    if resume and _settings(Journal.open(run_dir).config()) != _settings(dump(spec)):
        raise ConfigError(
            f"{run_dir} was started with another spec (its config.yaml). Resume it with that file, or choose "
            "another output_dir."
        )
    steps = check_inputs(spec, planned)
    with ExitStack() as stack:
        address, joined = connect(spec.ray)
        if joined:
            stack.callback(ray.shutdown)
        gpus = check_cluster(spec.ray)
        # The folder comes last: whatever is refused above leaves nothing behind.
        journal = Journal.open(run_dir) if resume else Journal.create(run_dir, dump(spec))
        journal.write_environment()
        journal.set_status("running")
        stack.push(functools.partial(_leave, journal))
        progress.started(run_dir, address, resources(spec.ray, cluster_gpus=gpus).sum)
        dispatcher = start_dispatcher()
        lanes = Lanes(dispatcher, spec.ray, gpu_shares(spec.ray, gpus)[0], run_dir / "ray")
        stack.callback(lanes.close)
        pool = Pool(spec.ray.evaluators, cpus=spec.ray.cpus_per_evaluator, gpus=gpu_shares(spec.ray, gpus)[1])
        stack.callback(pool.close)
        # Closed after the supervisor, whose last changes it copies.
        followed = functools.partial(trials_of_run, Journal(run_dir))
        stack.callback(Mirror(spec.report_to, run_dir, followed, progress.note).close)
        supervisor = Supervisor(journal, dispatcher, lanes, pool, jobs(spec.eval), progress)
        stack.callback(supervisor.close)
        if any(study.count for study in planned):
            lanes.open()
        deadline = time.monotonic() + spec.sweep.time_budget_s if spec.sweep.time_budget_s else None
        for number, study in enumerate(planned):
            share = None if deadline is None else max(1.0, (deadline - time.monotonic()) / (len(planned) - number))
            try:
                _study(spec, study, journal, supervisor, dispatcher, steps[study.name], share)
            except MacDropError as error:
                if supervisor.broken or isinstance(error, ResourceError) or len(planned) == 1:
                    raise
                # One model that cannot be used does not stop the others.
                supervisor.study_failed(study, str(error))
        failures = supervisor.failures
        if spec.eval.judge is not None:
            # Its model needs the memory of theirs.
            supervisor.close()
            pool.close()
            lanes.close()
            failures += judge_sweep(spec, journal, progress, gpus=gpu_shares(spec.ray, gpus)[1])
        progress.finished()
    return failures


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """A dumped spec without the folder, which may be written in several ways, and the trackers, which may change."""
    return {key: value for key, value in config.items() if key not in ("output_dir", "report_to")}


def _leave(journal: Journal, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
    """Record how the run ended, whatever ended it."""
    if kind is None:
        journal.set_status("done")
    else:
        journal.set_status("interrupted" if issubclass(kind, (KeyboardInterrupt, SystemExit)) else "failed")


def _study(
    spec: RunSpec,
    study: Study,
    journal: Journal,
    supervisor: Supervisor,
    dispatcher: Any,
    steps: int,
    time_budget_s: float | None,
) -> None:
    """One model: open it in the evaluators, place the baselines, search, wait until all is scored."""
    attacked = any(job.attack != "none" for job in jobs(spec.eval))
    searched = study.trials is None or any(study.searched(values).arm == "macdrop" for values in study.trials)
    weights_file = str(journal.massive_weights_file(study.name))
    weights = supervisor.open(
        study,
        Opening(
            study.spec,
            spec.eval,
            weights_file,
            scan=attacked or searched,
            k=study.spec.macdrop.k or MacDropSpec().k,
            threads=spec.ray.threads_per_worker,
        ),
    )
    desk = Desk(
        dispatcher=dispatcher,
        study=study,
        run_dir=str(journal.run_dir),
        data=str(cache_dir() / "data"),
        weights=weights,
        width=spec.ray.num_workers,
    )
    supervisor.resume_finished(study)
    for baseline in study.plain:
        call(dispatcher, "place", desk.order(baseline), BASELINE)
    if study.samples:
        _search(spec, study, desk, journal, supervisor, steps, time_budget_s)
        # When its time is up, Tune ends trials without telling anybody.
        call(dispatcher, "abandon", study.name, BASELINE)
    supervisor.wait(study)


def _search(
    spec: RunSpec,
    study: Study,
    desk: Desk,
    journal: Journal,
    supervisor: Supervisor,
    steps: int,
    time_budget_s: float | None,
) -> None:
    sweep = spec.sweep
    trainable = functools.partial(run_trial, desk=desk)
    # A share of the head's own resource: a trial only waits, so it must not take a CPU from the lanes.
    trainable = ray.tune.with_resources(trainable, {"CPU": 0, "node:__internal_head__": 0.001})
    grid = study.trials is not None
    Tuner(
        trainable,
        param_space=param_space(study),
        tune_config=TuneConfig(
            metric=sweep.metric.name,
            mode="min" if sweep.metric.goal == "minimize" else "max",
            search_alg=searcher(study, sweep),
            scheduler=scheduler(sweep, steps),
            num_samples=1 if grid else sweep.num_samples,
            max_concurrent_trials=sweep.max_concurrent_trials,
            time_budget_s=time_budget_s,
            reuse_actors=True,
        ),
        run_config=RunConfig(
            name=f"tune-{study.name}-{int(time.time())}",
            storage_path=str(journal.run_dir / "ray"),
            callbacks=[CancelStopped(desk)],
            stop=supervisor.stopper(),
            verbose=0,
        ),
    ).fit()

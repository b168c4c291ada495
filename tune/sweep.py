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
from tune.cluster_state import check_cluster, connect
from tune.dispatch import call, start_dispatcher
from tune.evaluators import Opening, Pool
from tune.journal import Journal
from tune.lanes import Lanes
from tune.plan import Study, gpu_shares, resources, studies
from tune.progress import Progress
from tune.search import param_space, scheduler, searcher
from tune.spec import RunSpec, dump
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
    planned = studies(spec)
    steps = check_inputs(spec, planned)
    run_dir = Path(spec.output_dir).absolute()
    journal = Journal.open(run_dir) if resume else Journal.create(run_dir, dump(spec))
    if resume and journal.config != dump(spec):
        raise ConfigError(
            f"{run_dir} was started with another spec (its config.yaml). Resume it with that file, or choose "
            "another output_dir."
        )
    with ExitStack() as stack:
        address = connect(spec.ray)
        stack.callback(ray.shutdown)
        gpus = check_cluster(spec.ray)
        journal.write_environment()
        progress.started(run_dir, address, resources(spec.ray, cluster_gpus=gpus).sum)
        dispatcher = start_dispatcher()
        lanes = Lanes(dispatcher, spec.ray, gpu_shares(spec.ray, gpus)[0], run_dir / "ray")
        stack.callback(lanes.close)
        pool = Pool(
            spec.ray.evaluators, cpus=spec.ray.cpus_per_evaluator, gpus=gpu_shares(spec.ray, gpus)[1]
        )
        stack.callback(pool.close)
        supervisor = Supervisor(journal, dispatcher, lanes, pool, jobs(spec.eval), progress)
        stack.callback(supervisor.close)
        if any(study.count for study in planned):
            lanes.open()
        deadline = time.monotonic() + spec.sweep.time_budget_s if spec.sweep.time_budget_s else None
        for number, study in enumerate(planned):
            share = None if deadline is None else max(1.0, (deadline - time.monotonic()) / (len(planned) - number))
            try:
                _study(spec, study, journal, supervisor, dispatcher, steps[study.name], share)
            except (ConfigError, MacDropError) as error:
                if isinstance(error, ResourceError) or len(planned) == 1:
                    raise
                # One model that cannot be used does not stop the others.
                supervisor.study_failed(study, str(error))
        progress.finished()
    return supervisor.failures


def check_inputs(spec: RunSpec, planned: list[Study]) -> dict[str, int]:
    """Read tokenizers, data and benchmark files before anything starts; returns each study's optimizer steps.

    Raises:
        ConfigError: a model or file cannot be used, or the search needs a validation set that is not there.
    """
    from macdrop import load_tokenizer
    from macdrop.load import check_model
    from tune import data
    from tune.batching import total_steps
    from tune.benchmarks import check_files
    from tune.zoo import resolve

    check_files(spec.eval)
    steps: dict[str, int] = {}
    for study in planned:
        train = study.spec
        source = resolve(train.model_name_or_path)
        check_model(source, revision=train.model_revision, trust_remote_code=train.trust_remote_code)
        if not study.count:
            steps[study.name] = 0
            continue
        tokenizer = load_tokenizer(source, revision=train.model_revision, trust_remote_code=train.trust_remote_code)
        prepared = data.load(data.prepare(train, tokenizer, cache_dir() / "data"))
        if prepared.validation is None and (spec.sweep.metric.name == "eval_loss" or spec.sweep.scheduler == "asha"):
            raise ConfigError(
                "val_size is 0, but the search optimises eval_loss. Set val_size (for example 0.05), or "
                "sweep.metric to a score such as {name: zero_shot/arc_easy/acc, goal: maximize}."
            )
        batch = train.per_device_train_batch_size * train.gradient_accumulation_steps * spec.ray.num_workers
        steps[study.name] = total_steps(train, len(prepared.train), batch)
    return steps


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
        Opening(study.spec, spec.eval, weights_file, scan=attacked or searched, threads=spec.ray.threads_per_worker),
    )
    if weights:
        _check_k(study, weights, spec)
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
        param_space=param_space(study, sweep),
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


def _check_k(study: Study, weights_file: str, spec: RunSpec) -> None:
    """k is only known to fit once the model is scanned; refuse it before the first step.

    Raises:
        ConfigError: k is above the size of the FFN.
    """
    from macdrop import MassiveWeights

    weights = MassiveWeights.load(weights_file)
    space = spec.sweep.parameters.get("macdrop.k")
    for k in [study.spec.macdrop.k, *(space.bounds() if space else [])]:
        weights.top(k)

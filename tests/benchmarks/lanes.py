"""Tiny fine-tunings in a lane over the same ones as one Ray Train run each, and what a further trial in a lane costs.

    python tests/benchmarks/lanes.py [--trials 8] [--steps 20] [--workers 2] [--runs 8]

The trials are a plain adapter and MacDrop adapters of several k, p0, schedules and seeds on a built-in model, under
ZeRO-2. In the lane: dispatcher, one lane, its tasks; from the start of the lane to the last adapter on disk. One run
each: what `macdrop train` does with ray.num_workers above one, one `TorchTrainer` after the other, half of them before
the lane and half after it, so that a machine that gets busier or less busy affects both. Both use the same Ray (its
start is not counted), the same tokenised data and the same scan, and must leave the same bytes in
adapter_model.safetensors. Tune's own trial actors, which wait beside the lane, are not part of it. With fewer `--runs`,
the lane's time for the ratio ends with as many trials.

Fixed cost of a trial: from its start to the next one's, without its optimizer steps; validation, state and files count.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from measure import Quartiles, machine, table, verdict

if TYPE_CHECKING:
    from tune.config.run_spec import RaySpec, TrainSpec
    from tune.scheduling.tasks import TrainTask

TARGET, FIXED_TARGET_S = 4.0, 2.0
MODEL = "zoo:planted-llama"
POLL_S = 0.05


@dataclass
class Trained:
    """One fine-tuning: seconds in all and in optimizer steps, and its adapter's digest."""

    seconds: float
    in_steps: float
    digest: str

    @property
    def fixed(self) -> float:
        return self.seconds - self.in_steps


def settings(number: int, steps: int) -> list[TrainSpec]:
    """`number` different fine-tunings that one engine can train, the first of them plain."""
    from tune.config.run_spec import MacDropSpec, TrainSpec

    schedules = ("step", "constant", "epoch_after")
    blocks = [MacDropSpec(k=0, p0=0.0)]
    blocks += [
        MacDropSpec(k=(3, 5)[i % 2], p0=(0.4, 0.8, 1.0)[i % 3], schedule=schedules[i % 3]) for i in range(number - 1)
    ]
    return [
        TrainSpec(
            model_name_or_path=MODEL,
            cutoff_len=64,
            val_size=0.1,
            lora_rank=8,
            learning_rate=2e-3,
            max_steps=steps,
            seed=i,
            macdrop=block,
        ).canonical()
        for i, block in enumerate(blocks)
    ]


class Inputs:
    """What both ways read: the scan and the tokenised data, made once beforehand."""

    def __init__(self, spec: TrainSpec, workers: int) -> None:
        from macdrop import load_tokenizer
        from tune.data import dataset as data
        from tune.storage.places import cache_dir
        from tune.training.massive_weights import scanned
        from tune.zoo.catalog import resolve

        self.cache = cache_dir() / "data"
        self.weights = scanned(spec).save(cache_dir() / "massive_weights.json")
        prepared = data.load(data.prepare(spec, load_tokenizer(resolve(spec.model_name_or_path)), self.cache))
        self.lengths = prepared.train.lengths
        self.workers = workers

    def in_steps(self, spec: TrainSpec, folder: Path) -> float:
        """Seconds in optimizer steps, from the tokens per second that each step has logged."""
        from tune.data.batching import Batches
        from tune.storage.json_lines import read_jsonl

        batches = Batches(
            len(self.lengths),
            seed=spec.seed,
            per_device=spec.per_device_train_batch_size,
            accumulation=spec.gradient_accumulation_steps,
            world=self.workers,
        )
        steps = [row for row in read_jsonl(folder / "metrics.jsonl") if "tokens_per_second" in row]
        assert len(steps) == spec.max_steps, f"{folder} has {len(steps)} steps"
        return sum(self.lengths[batches.step(row["step"])].sum() / row["tokens_per_second"] for row in steps)


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def in_a_lane(
    specs: list[TrainSpec], ray_spec: RaySpec, inputs: Inputs, root: Path
) -> tuple[float, float, list[Trained]]:
    """Train all in one lane; returns seconds in all, seconds until the first began, and the trials in their order."""
    from tune.distributed.cluster.placement_groups import Reaper
    from tune.distributed.lanes.dispatcher import call, dispatching
    from tune.distributed.lanes.lane_pool import LanePool
    from tune.scheduling.allocation import lane_kind

    tasks = [_task(spec, inputs, root, str(lane_kind(ray_spec, 0.0))) for spec in specs]
    started: dict[str, float] = {}
    ended: dict[str, float] = {}
    seen = 0
    with dispatching(root / "ray") as dispatcher, closing(Reaper()):
        for task in tasks:
            call(dispatcher, "place", task, "benchmark")
        began = time.time()
        lanes = LanePool(dispatcher, ray_spec, lane_kind(ray_spec, 0.0), root / "ray", evaluator=object)
        lanes.open()
        try:
            while len(ended) < len(tasks):
                seen, changes = call(dispatcher, "changes", seen)
                for entry in changes:
                    if entry.state in ("failed", "diverged", "stopped"):
                        raise RuntimeError(f"{entry.task.id} {entry.state}: {entry.reason}")
                    if entry.state in ("running", "trained"):
                        started.setdefault(entry.task.id, time.time())
                    if entry.state == "trained":
                        ended[entry.task.id] = time.time()
                lanes.check(call(dispatcher, "snapshot"))
                time.sleep(POLL_S)
        finally:
            lanes.close()
    last = max(ended.values())
    starts = [*(started[task.id] for task in tasks), last]
    assert starts == sorted(starts), "a lane takes tasks in the order of the queue"
    trials = [
        Trained(after - before, inputs.in_steps(spec, Path(task.folder)), digest(Path(task.folder)))
        for spec, task, before, after in zip(specs, tasks, starts, starts[1:], strict=False)
    ]
    return last - began, starts[0] - began, trials


def _task(spec: TrainSpec, inputs: Inputs, root: Path, pool: str) -> TrainTask:
    from tune.config.run_spec import dump
    from tune.scheduling.tasks import TrainTask

    return TrainTask(
        id=spec.trial_id(),
        study="benchmark",
        spec=dump(spec),
        folder=str(root / spec.trial_id()),
        data=str(inputs.cache),
        weights=str(inputs.weights) if spec.arm == "macdrop" else None,
        engine_key=spec.engine_key(),
        pool=pool,
    )


def one_run_each(specs: list[TrainSpec], ray_spec: RaySpec, inputs: Inputs, root: Path) -> list[Trained]:
    """Train each in a Ray Train run of its own, one after the other."""
    from tune.distributed.lanes.train_run import Workers

    trials = []
    for spec in specs:
        _wait_for_cpus(ray_spec)
        folder = root / spec.trial_id()
        began = time.perf_counter()
        with Workers(ray_spec, spec, folder) as workers:
            while not workers.wait(POLL_S):
                pass
            outcome = workers.outcome()
        seconds = time.perf_counter() - began
        assert outcome.status == "done", outcome
        trials.append(Trained(seconds, inputs.in_steps(spec, folder), digest(folder)))
        print(f"  TorchTrainer run of {spec.trial_id()}: {seconds:.1f} s", flush=True)
    return trials


def _wait_for_cpus(ray_spec: RaySpec) -> None:
    """Wait until the workers before have given their CPUs back; not counted."""
    import ray

    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0) < ray_spec.num_workers * ray_spec.cpus_per_worker:
        if time.monotonic() > deadline:
            raise RuntimeError("the workers before still hold their CPUs")
        time.sleep(POLL_S)


def report(total: float, until_first: float, lane: list[Trained], runs: list[Trained]) -> str:
    """The tables; `runs` may be fewer than `lane`, and the lane's time is then taken for as many."""
    later = lane[1:] or lane
    as_many = total - sum(trial.seconds for trial in lane[len(runs) :])
    separate = sum(trial.seconds for trial in runs)
    rows = [
        (
            "in a lane",
            len(lane),
            f"{total:.1f}",
            f"{until_first:.1f}",
            f"{lane[0].fixed:.1f}",
            Quartiles.of([trial.fixed for trial in later]).show(2),
            f"{sum(t.in_steps for t in lane) / len(lane):.2f}",
        ),
        (
            "one TorchTrainer run each",
            len(runs),
            f"{separate:.1f}",
            "-",
            f"{runs[0].fixed:.1f}",
            Quartiles.of([trial.fixed for trial in runs[1:] or runs]).show(2),
            f"{sum(t.in_steps for t in runs) / len(runs):.2f}",
        ),
    ]
    headings = ("", "trials", "seconds", "until first", "fixed, first", "fixed, later ones", "steps of a trial")
    equal = sum(mine.digest == theirs.digest for mine, theirs in zip(lane, runs, strict=False))
    distinct = len({trial.digest for trial in lane})
    fixed = Quartiles.of([trial.fixed for trial in later]).median
    return "\n".join(
        [
            table(headings, rows),
            f"equal adapters: {equal} of {len(runs)} by SHA-256 ({distinct} of the lane's {len(lane)} are distinct)",
            verdict("one run each / in a lane, wall time,", separate / as_many, TARGET, at_least=True),
            verdict("fixed cost of a further trial in the lane", fixed, FIXED_TARGET_S, unit=" s"),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--runs", type=int, help="TorchTrainer runs, by default as many as trials")
    given = parser.parse_args()
    runs = min(given.runs or given.trials, given.trials)
    with tempfile.TemporaryDirectory(prefix="macdrop-lanes-") as temporary:
        root = Path(temporary)
        os.environ["MACDROP_CACHE"] = str(root / "cache")
        import ray

        from tune.config.run_spec import RaySpec
        from tune.distributed.cluster.ray_cluster import connect
        from tune.training.quiet import quiet_libraries

        quiet_libraries()
        print(machine(), flush=True)
        specs = settings(given.trials, given.steps)
        ray_spec = RaySpec(num_workers=given.workers)
        inputs = Inputs(specs[-1], given.workers)
        began = time.perf_counter()
        connect(ray_spec)
        try:
            print(f"Ray started in {time.perf_counter() - began:.1f} s, not counted below")
            separate = one_run_each(specs[: runs // 2], ray_spec, inputs, root / "runs")
            _wait_for_cpus(ray_spec)
            total, until_first, lane = in_a_lane(specs, ray_spec, inputs, root / "lane")
            print(f"  lane: {len(lane)} trials in {total:.1f} s", flush=True)
            separate += one_run_each(specs[runs // 2 : runs], ray_spec, inputs, root / "runs")
        finally:
            ray.shutdown()
        print(f"\n{report(total, until_first, lane, separate)}\n\n{machine()}")


if __name__ == "__main__":
    main()

"""The cost of checkpoints: their size relative to the adapter, and their time relative to a training step.

    python tests/benchmarks/checkpoints.py [--ranks 8 64] [--rounds 30]

A fine-tuning of the built-in model in one process; a step and a checkpoint are made once a round, in random order. A
checkpoint is read out of the engine, written, checksummed and synced to the disk: it holds the adapter and Adam's two
moments in fp32, three times the adapter, and the names of its tensors. Its share is that of a fine-tuning of so many
steps with checkpoints as often as a run file has them by default. A step of this model takes milliseconds, so the
measured share is an upper bound; beside it stands what the same checkpoints are of steps of one second.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import tempfile
from dataclasses import dataclass
from pathlib import Path

from measure import WALL, Timings, Variant, interleave, machine, table, verdict

TARGET = 3.2
#: Of the fine-tuning whose share is printed; with the default save_steps it makes a checkpoint every tenth of them.
STEPS = 600


@dataclass(frozen=True)
class Size:
    """Bytes of one checkpoint's folder, and of its adapter in fp32."""

    checkpoint: int
    adapter: int

    @property
    def ratio(self) -> float:
        return self.checkpoint / self.adapter


class Bench:
    """A fine-tuning that has begun, its next step, and its next checkpoint."""

    def __init__(self, rank: int, bf16: bool, root: Path) -> None:
        from tune.config.run_spec import TrainSpec
        from tune.data import dataset as data
        from tune.training.engine import Engine
        from tune.training.finetune import _Run
        from tune.training.process_group import prepare_process
        from tune.training.step import Training

        prepare_process()
        spec = TrainSpec(
            model_name_or_path="zoo:planted-llama",
            cutoff_len=64,
            max_steps=STEPS,
            lora_rank=rank,
            lora_target=["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"],
            per_device_train_batch_size=8,
            macdrop={"p0": 0.0},
            zero_stage=0,
            bf16=bf16,
        )
        self.engine = Engine(spec)
        prepared = data.load(data.prepare(spec, self.engine.tokenizer, root / "data"))
        self.run = _Run(Training(self.engine, spec, prepared, None), root / "trial", None)
        self.run._tidy()
        self.run._start(None)
        self.run.training.choose_layout()
        self.run.training.set_optimizer()

    def step(self) -> None:
        self.run.step += 1
        self.run.training.step(self.run.step)

    def checkpoint(self) -> None:
        self.run._save()

    def variants(self) -> dict[str, Variant]:
        return {"step": Variant(self.step), "checkpoint": Variant(self.checkpoint)}

    def size(self) -> Size:
        """Of the newest checkpoint."""
        newest = max(self.run.checkpoints.iterdir())
        adapter = 4 * sum(p.numel() for p in self.engine.model.parameters() if p.requires_grad)
        return Size(sum(file.stat().st_size for file in newest.iterdir()), adapter)


def report(name: str, size: Size, timings: Timings) -> str:
    made = len(range(STEPS // 10, STEPS, STEPS // 10))  # at the last step the adapter itself is written
    step, checkpoint = (timings.median(variant) for variant in ("step", "checkpoint"))
    rows = [
        (variant, f"{1000 * timings.median(variant):.1f}", timings.ratio(variant, "step", WALL).show(2))
        for variant in timings.seconds
    ]
    rounds = len(timings.seconds["step"])
    share, slow = (made * checkpoint / (made * checkpoint + STEPS * each) for each in (step, 1.0))
    return "\n".join(
        [
            table((f"{name}, {rounds} rounds", "wall ms", "wall / step"), rows),
            f"share of {STEPS} steps, {made} checkpoints: {share:.2%}; were each step one second: {slow:.3%}",
            f"{size.checkpoint:,} bytes a checkpoint, {size.adapter:,} of them the adapter in fp32",
            verdict(f"{name}: checkpoint / adapter, bytes,", size.ratio, TARGET),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 64])
    parser.add_argument("--rounds", type=int, default=30)
    given = parser.parse_args()
    from tune.training.quiet import quiet_libraries

    quiet_libraries()
    print(machine(), flush=True)
    for rank in given.ranks:
        for bf16 in (False, True):
            with tempfile.TemporaryDirectory() as root:
                bench = Bench(rank, bf16, Path(root))
                timings = interleave(bench.variants(), given.rounds)
                name = f"r = {rank}, {'bf16' if bf16 else 'fp32'}"
                print(report(name, bench.size(), timings), end="\n\n", flush=True)
    print(machine())


if __name__ == "__main__":
    main()

"""Training on real rows: macdrop over transformers.Trainer and PEFT, over TRL, over the rate of its matrix products.

    python tests/benchmarks/training.py MODEL DATASET [--bf16] [--rounds 5] [--rows trainer trl dora share memory]
    python tests/benchmarks/training.py random-llama-1b DATASET --device cuda --dtype bf16

DATASET holds rows of instruction, input and output. All ways train the same tokenised examples (alpaca's template, at
most --cutoff tokens, loss on answers) with LoRA, r = 16, on all linear layers, --batch examples per optimizer step, the
same threads; each in a process of its own. A round runs --steps steps of every way, in a new random order; ratios are
of seconds per example, in pairs from the same round. Before anything is timed, the first loss of ours must be that of
the Trainer: the ways do the same work.

    Trainer            transformers.Trainer and PEFT at their defaults: batches padded to the longest, all logits
    TRL padding-free   SFTTrainer, a batch in one row
    TRL packed         SFTTrainer with packing=True: --batch rows of up to --cutoff tokens, so more examples per step
    macdrop            as `macdrop train` runs it, packing: auto, masks on (k = 5, p0 = 0.8)
    ours plain, padded packing: auto without masks; packing: off with and without
    DoRA               use_dora, in ours and in the Trainer
    products           the matrix products that a step cannot do without, alone; `gemm.py` has the formula

Rows: `trainer`, `trl` and `dora` compare these; `share` is the time of the products over that of a plain packed step,
which is the share of the GEMM rate that the step reaches; `memory` starts fresh processes for ours and the Trainer and
prints the most memory (on the CPU the resident set; on a GPU, of tensors) in --steps steps, in total and above what the
loaded model takes. TRL is optional: without the package its rows are left out.

random-llama-1b is built in a temporary folder from a config, with the tokenizer of --tokenizer.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

from gemm import Rate
from measure import CPU, WALL, Quartiles, Spent, Timings, Variant, interleave, machine, table, verdict
from random_llama import NAME as RANDOM
from random_llama import write
from training_ways import Ours, Ran, Setting, Transformers, Trl, examples, picked
from worker import Worker

ROWS = ("trainer", "trl", "dora", "share", "memory")
#: Ours over the Trainer's, by dtype.
TARGETS = {"fp32": 3.0, "bf16": 2.5}
TRL_TARGET, DORA_TARGET, SHARE_TARGET, MEMORY_TARGET = 1.2, 1.12, 60.0, 0.5
#: The first losses of two ways may differ by this, relatively.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
MACDROP, PLAIN, TRAINER = "macdrop", "ours plain", "Trainer"
PADDED, PADDED_PLAIN, DORA, TRAINER_DORA = "ours padded, masks", "ours padded", "ours DoRA", "Trainer DoRA"
TRL_FREE, TRL_PACKED, PRODUCTS = "TRL padding-free", "TRL packed", "products"
#: Way of ours -> arguments of `training_ways.specification`.
OURS = {
    MACDROP: {"macdrop": True},
    PLAIN: {},
    PADDED: {"macdrop": True, "packing": "off"},
    PADDED_PLAIN: {"packing": "off"},
    DORA: {"dora": True},
}
#: Row -> ways of ours that it shows beside plain training; each is an engine that takes memory all the time.
WAYS = {"trainer": (MACDROP, PADDED, PADDED_PLAIN), "trl": (MACDROP,), "dora": (DORA,), "share": ()}
Run = Callable[[int, int], Ran]


class Bench:
    """The processes of the ways that some rows need, and what they have run."""

    def __init__(self, setting: Setting, rows: Sequence[str], steps: int, stack: ExitStack) -> None:
        self.setting, self.steps = setting, steps
        shown = {PLAIN, *(name for row in rows for name in WAYS.get(row, ()))}
        names = [name for name in OURS if name in shown]
        ours = self._worker(stack, Ours, setting, {name: OURS[name] for name in names})
        others = {TRAINER: self._worker(stack, Transformers, setting)} if {"trainer", "dora"} & {*rows} else {}
        if "dora" in rows:
            others[TRAINER_DORA] = self._worker(stack, Transformers, setting, True)
        trls = {TRL_FREE: False, TRL_PACKED: True} if "trl" in rows else {}
        trls = {name: self._worker(stack, Trl, setting, packing) for name, packing in trls.items()}
        self.runs: dict[str, Run] = {name: _call(ours, "run", name) for name in names}
        self.runs |= {name: _call(worker, "run") for name, worker in (others | trls).items()}
        self.products = _call(ours, "products", PLAIN) if "share" in rows else None
        self.losses: dict[str, float] = {}
        self.rates: list[Rate] = []
        self.per_example: dict[str, float] = {}
        self.tokens: dict[str, list[float]] = {name: [] for name in self.runs}
        self.notes = [worker.call("ran") for worker in trls.values()]

    def _worker(self, stack: ExitStack, kind: type, setting: Setting, *arguments: object) -> Worker:
        return stack.enter_context(closing(Worker(kind, setting, *arguments, environment=environment(setting))))

    def variants(self) -> dict[str, Variant]:
        """One variant for each way; its runs take the steps of one round after the other, alike in all ways."""
        made = {name: Variant(self._rounds(name, run)) for name, run in self.runs.items()}
        return made | ({PRODUCTS: Variant(self._rates())} if self.products else {})

    def _rounds(self, name: str, run: Run) -> Callable[[], Spent]:
        at = iter(range(1, 1_000_000, self.steps))

        def one() -> Spent:
            ran = run(next(at), self.steps)
            self.losses.setdefault(name, ran.loss)
            self.tokens[name].append(ran.tokens / ran.wall)
            return Spent(ran.wall / ran.examples, ran.cpu / ran.examples)

        return one

    def _rates(self) -> Callable[[], Spent]:
        at = iter(range(1, 1_000_000, self.steps))

        def one() -> Spent:
            assert self.products is not None, "asked for with the row `share` alone"
            self.rates.append(self.products(next(at), self.steps))
            each = self.steps * self.setting.batch
            return Spent(self.rates[-1].wall / each, self.rates[-1].cpu / each)

        return one


def _call(worker: Worker, method: str, *leading: object) -> Callable[[int, int], object]:
    return lambda first, steps: worker.call(method, *leading, first, steps)


def environment(setting: Setting) -> dict[str, str]:
    """Return what a way's process must have in its environment before it imports anything."""
    return {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if setting.device == "cpu" else {}


def check_losses(losses: dict[str, float], dtype: str) -> str:
    """Compare the first losses of the ways that do the same work: all without masks, but for TRL's own batches.

    Raises:
        AssertionError: one is another than that of plain training here.
    """
    same = [name for name in (TRAINER, TRAINER_DORA, PADDED_PLAIN, DORA, TRL_FREE) if name in losses]
    for name in same:
        off = abs(losses[name] / losses[PLAIN] - 1)
        assert off <= TOLERANCE[dtype], f"{name} begins with loss {losses[name]:.6f}, ours with {losses[PLAIN]:.6f}"
    shown = ", ".join(f"{name} {losses[name]:.5f}" for name in (PLAIN, *same))
    return f"first losses agree to {TOLERANCE[dtype]:g}: {shown}"


def report(bench: Bench, timings: Timings) -> str:
    """Return the table of ways, and the rows of the issue that they are for."""
    ways = [name for name in timings.seconds if name != PRODUCTS]
    rows = [
        (
            name,
            f"{1 / timings.median(name, WALL):.3f}",
            f"{1000 * timings.median(name, CPU):.0f}",
            f"{Quartiles.of(bench.tokens[name][-len(timings.seconds[name]) :]).median:.0f}",
            timings.ratio(name, PLAIN, CPU).show(2),
            timings.ratio(name, PLAIN, WALL).show(2),
        )
        for name in ways
    ]
    headings = ("way", "examples/s", "CPU ms/example", "tokens/s", f"CPU / {PLAIN}", f"wall / {PLAIN}")
    number = len(timings.seconds[PLAIN])
    lines = [f"{number} rounds of {bench.steps} steps, {bench.setting.dtype}, {bench.setting.device}"]
    lines += [table(headings, rows), *bench.notes, *_lines(bench, timings)]
    return "\n".join(lines)


def _lines(bench: Bench, timings: Timings) -> list[str]:
    there, target = timings.seconds, TARGETS[bench.setting.dtype]
    lines = []
    if TRAINER in there and MACDROP in there:
        lines += _ratio(timings, "examples/s, macdrop over Trainer", TRAINER, MACDROP, target)
        lines += _ratio(timings, "examples/s, ours plain over Trainer", TRAINER, PLAIN, target)
    trls = [name for name in (TRL_FREE, TRL_PACKED) if name in there]
    if trls:
        fastest = min(trls, key=lambda name: timings.median(name, WALL))
        lines += _ratio(timings, f"examples/s, macdrop over {fastest}", fastest, MACDROP, TRL_TARGET)
        lines += _ratio(timings, f"examples/s, ours plain over {fastest}", fastest, PLAIN, TRL_TARGET)
    if DORA in there:
        lines += _ratio(timings, "DoRA step over LoRA step, ours", DORA, PLAIN, DORA_TARGET, at_least=False)
        there_too = timings.ratio(TRAINER_DORA, TRAINER, WALL).show()
        lines.append(f"the same in the Trainer: {there_too} wall, {timings.ratio(TRAINER_DORA, TRAINER).show()} CPU")
    if PRODUCTS in there:
        lines += _share(bench, timings)
    return lines


def _ratio(timings: Timings, what: str, above: str, below: str, target: float, *, at_least: bool = True) -> list[str]:
    """Return the seconds of one way over those of another, and whether that meets a target."""
    wall, cpu = (timings.ratio(above, below, clock) for clock in (WALL, CPU))
    judged = verdict(what, wall.median, target, at_least=at_least)
    return [f"{judged}: {wall.show(2)} wall, {cpu.show(2)} CPU"]


def _share(bench: Bench, timings: Timings) -> list[str]:
    rates = bench.rates[-len(timings.seconds[PRODUCTS]) :]
    speed = Quartiles.of([rate.flop / rate.wall / 1e9 for rate in rates])
    best = Quartiles.of([rate.best / 1e9 for rate in rates])
    share = {clock: timings.ratio(PRODUCTS, PLAIN, clock) for clock in (WALL, CPU)}
    percent = 100 * share[WALL].median
    judged = verdict("share of the GEMM rate, plain packed step,", percent, SHARE_TARGET, at_least=True, unit=" %")
    return [
        f"GEMM rate with the model's shapes: {speed.show(0)} GFLOP/s (fastest shape {best.show(0)}); "
        f"{rates[0].flop / bench.steps / bench.setting.batch / 1e9:.1f} GFLOP per example",
        f"{judged}: {share[WALL].show(2)} wall, {share[CPU].show(2)} CPU",
    ]


def peak_memory(setting: Setting, steps: int) -> str:
    """Run some steps of ours and of the Trainer in fresh processes, one after the other, and compare their peaks."""
    found = {}
    for name, kind, given in (
        (PLAIN, Ours, ({PLAIN: {}},)),
        (MACDROP, Ours, ({MACDROP: OURS[MACDROP]},)),
        (TRAINER, Transformers, ()),
    ):
        with closing(Worker(kind, setting, *given, environment=environment(setting))) as worker:
            worker.call("reset_peak")
            loaded = worker.call("memory")["now"]
            worker.call("run", *([name] if kind is Ours else []), 1, steps)
            peak = worker.call("memory")["peak"]
        found[name] = (loaded, peak - loaded, peak)
    rows = [(name, *(f"{value / 1e6:.0f}" for value in values)) for name, values in found.items()]
    step, whole = ([found[name][at] / found[TRAINER][at] for name in (MACDROP, PLAIN)] for at in (1, 2))
    return "\n".join(
        [
            table((f"peak memory, {steps} steps, MB", "loaded", "of a step", "in total"), rows),
            f"of a step, over the Trainer's: macdrop {step[0]:.3f}, plain {step[1]:.3f}; in total {whole[0]:.3f}, "
            f"{whole[1]:.3f}",
            verdict("peak memory of a step, macdrop over Trainer", step[0], MEMORY_TARGET),
        ]
    )


def describe(setting: Setting, steps: int) -> str:
    """Say what the first steps' examples are: tokens, answers, and how much of a padded batch is padding."""
    rows = examples(setting)
    lengths = rows.lengths[picked(setting, len(rows), 1, steps)]
    padded = sum(len(batch) * int(batch.max()) for batch in lengths)
    return (
        f"{setting.model}, {len(rows)} examples, {rows.lengths.mean():.0f} tokens each, {rows.label_counts.mean():.0f} "
        f"of them answer; a batch of {setting.batch}, padded, is {lengths.sum() / padded:.0%} tokens"
    )


def prepared(given: argparse.Namespace, root: Path) -> Setting:
    """Tokenise the rows once for all ways."""
    from training_ways import specification

    from macdrop import load_tokenizer
    from tune.data import dataset
    from tune.zoo.catalog import resolve

    model = str(write(root / RANDOM, given.tokenizer)) if given.model == RANDOM else given.model
    keys = ("dataset", "dtype", "device", "batch", "cutoff", "threads", "attention")
    drafted = Setting(model=model, data="", **{key: getattr(given, key) for key in keys})
    folder = dataset.prepare(specification(drafted), load_tokenizer(resolve(model)), root / "data")
    return replace(drafted, data=str(folder))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"a folder, zoo:NAME, or {RANDOM}")
    parser.add_argument("dataset")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--dtype", choices=TARGETS, default="fp32")
    parser.add_argument("--bf16", action="store_const", const="bf16", dest="dtype", help="the same as --dtype bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of a way in a round")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--cutoff", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--attention", help="attention of all ways, as transformers names it: flash_attention_2, ...")
    parser.add_argument("--tokenizer", default="zoo:planted-llama", help=f"tokenizer of {RANDOM}")
    given = parser.parse_args()
    if "trl" in given.rows and importlib.util.find_spec("trl") is None:
        print("TRL is not installed (pip install 'trl>=1.16'): its rows are left out.")
        given.rows.remove("trl")
    return given


def main() -> None:
    given = parse()
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU here. Leave it out, or run this on a machine with one.")
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory(prefix="macdrop-training-") as temporary:
        setting = prepared(given, Path(temporary))
        print(describe(setting, given.steps), flush=True)
        if set(given.rows) != {"memory"}:
            with ExitStack() as stack:
                bench = Bench(setting, given.rows, given.steps, stack)
                timings = interleave(bench.variants(), given.rounds)
                print(f"\n{check_losses(bench.losses, given.dtype)}\n\n{report(bench, timings)}", flush=True)
        if "memory" in given.rows:
            print(f"\n{peak_memory(setting, given.steps)}", flush=True)
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()

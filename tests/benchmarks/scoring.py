"""A zero-shot suite with a resident model, plain and under attacks: lm-eval's own HFLM over ours.

    python tests/benchmarks/scoring.py --model PATH --benchmark arc_easy=FILE --benchmark piqa=FILE ... [--limit 100]
    python tests/benchmarks/scoring.py --model random-llama-1b --device cuda --dtype bf16 --benchmark ...

Two processes, warm in all rounds: one has lm-eval's unmodified HFLM around the model and calls lm-eval's `evaluate`,
the other our Scorer. Both score the same rows with the same prompts, batch size and threads. A round scores the suite
once without attack, and once without and under all of --attacks, in a new random order; ratios are of pairs from the
same round. Loading model, rows and tasks is not timed. What is warm beyond that is printed: ours scores as an
evaluation actor does from its second adapter on. lm-eval knows no attacks: its `evaluate` runs once for each, with the
rows set to zero; ours shares what the attacks leave unchanged.

Scores must be equal in every digit, and the chosen answer of every item too (in bf16 they are only counted). The items
whose log-likelihoods differ most are computed in float64, too, request by request: ours must be near that. A
--benchmark is TASK=FILE, an lm-eval task with local rows, or rows of our own multiple-choice format.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

from measure import CPU, WALL, Spent, Timings, Variant, interleave, machine, table, verdict
from random_llama import NAME as RANDOM
from random_llama import write
from scoring_ways import PLAIN, LmEval, Ours, Scored, Setting
from task_files import Benchmark, write_task
from worker import Worker

TARGET, ATTACKED_TARGET = 3.0, 8.0
WARM = (
    "warm in both: model, tasks, rows. lm-eval builds and tokenises its prompts in every evaluate; ours keeps prompts, "
    "tokens and its proofs that requests and attacks share, and nothing that depends on weights"
)
SUITE = ("zoo:qa", "zoo:fact", "zoo:agree")
ATTACKS = ("zeroing@5", "zeroing@1", "retaining@5")
LM_EVAL, OURS = "lm-eval", "ours"
#: Log-likelihoods in fp32 may be this far from those in float64, which are computed of so many items.
TOLERANCE, REFERENCES = 1e-4, 4


@dataclass
class Bench:
    """The two processes, and what each scored last: way -> `Scored`, with and without attacks."""

    workers: dict[str, Worker]
    attacks: Sequence[str]
    last: dict[tuple[str, bool], Scored] = field(default_factory=dict)

    def variants(self) -> dict[str, Variant]:
        return {
            name(way, under): Variant(self._scoring(way, under))
            for way in self.workers
            for under in ((False, True) if self.attacks else (False,))
        }

    def _scoring(self, way: str, under: bool) -> Callable[[], Spent]:
        def score() -> Spent:
            scored = self.workers[way].call("run", [PLAIN, *(self.attacks if under else ())])
            self.last[way, under] = scored
            return Spent(scored.wall, scored.cpu)

        return score


def name(way: str, under: bool) -> str:
    return f"{way}, attacks" if under else way


@dataclass(frozen=True)
class Agreement:
    """How two ways agree: scores, log-likelihoods and chosen answers that differ, and the largest difference."""

    scores: int
    unequal: int
    items: int
    other_choice: int
    largest: float

    @classmethod
    def of(cls, theirs: Scored, mine: Scored) -> Agreement:
        assert theirs.scores.keys() == mine.scores.keys() and theirs.answers.keys() == mine.answers.keys()
        pairs = [pair for key in theirs.answers for pair in zip(theirs.answers[key], mine.answers[key], strict=True)]
        return cls(
            scores=len(theirs.scores),
            unequal=sum(value != mine.scores[key] for key, value in theirs.scores.items()),
            items=len(pairs),
            other_choice=sum(a.index(max(a)) != b.index(max(b)) for a, b in pairs),
            largest=max(abs(x - y) for a, b in pairs for x, y in zip(a, b, strict=True)),
        )

    def show(self) -> str:
        return (
            f"{self.scores - self.unequal} of {self.scores} scores equal in every digit, the same answer chosen in "
            f"{self.items - self.other_choice} of {self.items} items, log-likelihoods within {self.largest:.2g}"
        )

    def check(self) -> None:
        """Require what fp32 promises.

        Raises:
            AssertionError: a score or a choice differs.
        """
        assert not self.unequal and not self.other_choice, self.show()


def furthest(theirs: Scored, mine: Scored) -> list[tuple[str, str, int]]:
    """Return the items (benchmark, attack, document) in which two ways differ most, the first of them most."""
    found = [
        (max(abs(x - y) for x, y in zip(a, b, strict=True)), (*key, document))
        for key in theirs.answers
        for document, (a, b) in enumerate(zip(theirs.answers[key], mine.answers[key], strict=True))
    ]
    return [item for _, item in sorted(found, reverse=True)[:REFERENCES]]


def distance(scored: Scored, items: Sequence[tuple[str, str, int]], exact: Sequence[Sequence[float]]) -> float:
    """Return the largest distance of a log-likelihood of these items from the exact one."""
    pairs = zip(items, exact, strict=True)
    return max(abs(x - y) for (*key, n), e in pairs for x, y in zip(scored.answers[tuple(key)][n], e, strict=True))


def report(bench: Bench, timings: Timings, dtype: str) -> str:
    mine = bench.last[OURS, bool(bench.attacks)]
    theirs = bench.last[LM_EVAL, bool(bench.attacks)]
    scores = [(*key, f"{value:.4f}", f"{mine.scores[key]:.4f}") for key, value in theirs.scores.items()]
    ways = [(each, f"{timings.median(each, WALL):.2f}", f"{timings.median(each, CPU):.2f}") for each in timings.seconds]
    lines = [
        table(("benchmark", "metric", "attack", LM_EVAL, OURS), scores),
        Agreement.of(theirs, mine).show(),
        "",
        table((f"{len(timings.seconds[OURS])} rounds, {dtype}", "wall s", "CPU s"), ways),
    ]
    for under, target in ((False, TARGET), (True, ATTACKED_TARGET)):
        if name(OURS, under) in timings.seconds:
            pair = name(LM_EVAL, under), name(OURS, under)
            wall, cpu = timings.ratio(*pair, WALL), timings.ratio(*pair, CPU)
            what = f"lm-eval over ours, suite{f' under {len(bench.attacks)} attacks and none' if under else ''},"
            lines.append(f"{verdict(what, wall.median, target, at_least=True)}: {wall.show(2)} wall, {cpu.show(2)} CPU")
    return "\n".join(lines)


def memory(bench: Bench, loaded: dict[str, int]) -> str:
    """Say how much memory each process took at most beyond its loaded model."""
    peaks = {way: worker.call("memory")["peak"] for way, worker in bench.workers.items()}
    words = [f"{way} {(peak - loaded[way]) / 1e6:.0f} (in total {peak / 1e6:.0f})" for way, peak in peaks.items()]
    return f"peak memory beyond the loaded model, MB: {', '.join(words)}"


def checked(bench: Bench) -> str:
    """Require what fp32 promises, and say how far either way is from float64.

    Raises:
        AssertionError: a score or a choice differs, or a log-likelihood of ours is not near that in float64.
    """
    theirs, mine = (bench.last[way, bool(bench.attacks)] for way in (LM_EVAL, OURS))
    Agreement.of(theirs, mine).check()
    items = furthest(theirs, mine)
    exact = bench.workers[OURS].call("reference", items)
    near, far = distance(mine, items, exact), distance(theirs, items, exact)
    words = f"from float64, in the {len(items)} items that differ most: ours within {near:.2g}, lm-eval's {far:.2g}"
    print(words, flush=True)
    assert near <= TOLERANCE, words
    return words


def started(setting: Setting, stack: ExitStack) -> dict[str, Worker]:
    alone = {"CUDA_VISIBLE_DEVICES": ""} if setting.device == "cpu" else {}
    alone["TQDM_DISABLE"] = "1"
    alone["HF_DATASETS_CACHE"] = str(Path(setting.tasks) / "datasets")
    made = {LM_EVAL: LmEval, OURS: Ours}
    return {way: stack.enter_context(closing(Worker(kind, setting, environment=alone))) for way, kind in made.items()}


def prepared(given: argparse.Namespace, root: Path) -> Setting:
    """Write the task files for lm-eval, and the random model if that is the one."""
    suite = tuple(Benchmark.parse(text) for text in given.benchmark or SUITE)
    for benchmark in suite:
        write_task(benchmark, root / "tasks")
    model = str(write(root / RANDOM, given.tokenizer)) if given.model == RANDOM else given.model
    tasks, size = str(root / "tasks"), given.batch_size
    return Setting(model, suite, tasks, given.limit, size, given.dtype, given.device, given.threads)


def measure(setting: Setting, attacks: Sequence[str], rounds: int) -> str:
    """Run the rounds and return the report.

    Raises:
        AssertionError: in fp32, scores or choices differ, or log-likelihoods of ours are not those in float64.
    """
    with ExitStack() as stack:
        bench = Bench(started(setting, stack), attacks)
        loaded = {}
        for way, worker in bench.workers.items():
            worker.call("reset_peak")
            loaded[way] = worker.call("memory")["now"]
        timings = interleave(bench.variants(), rounds)
        text = f"{WARM}\n{report(bench, timings, setting.dtype)}\n{memory(bench, loaded)}"
        print(text, flush=True)
        if setting.dtype == "fp32":
            text = f"{text}\n{checked(bench)}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo:planted-llama", help=f"a folder, zoo:NAME, or {RANDOM}")
    parser.add_argument("--benchmark", action="append", help="DATA or TASK=DATA; may be given several times")
    parser.add_argument("--attacks", nargs="*", default=list(ATTACKS))
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokenizer", default="zoo:planted-llama", help=f"tokenizer of {RANDOM}")
    given = parser.parse_args()
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    if given.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch finds no GPU here. Leave it out, or run this on a machine with one.")
    with tempfile.TemporaryDirectory(prefix="macdrop-scoring-") as temporary:
        setting = prepared(given, Path(temporary))
        print(f"{machine()}\n{setting.model}, limit {given.limit}, batch size {given.batch_size}\n", flush=True)
        measure(setting, given.attacks, given.rounds)
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()

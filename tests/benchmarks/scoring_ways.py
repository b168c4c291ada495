"""Ways to score a suite under attacks with a resident model, each to be made in a process of its own.

Model, tasks and rows are loaded before; each way keeps from run to run what it keeps in its own use.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from random_llama import stand_in
from task_files import METRICS, Benchmark
from worker import Clock

PLAIN = "none"
#: (benchmark, attack) -> for every item the log-likelihood of each choice.
Answers = dict[tuple[str, str], list[list[float]]]


@dataclass(frozen=True)
class Setting:
    """What is scored; `tasks` is a folder with a task file for each benchmark, `limit` None for all rows."""

    model: str
    suite: tuple[Benchmark, ...]
    tasks: str
    limit: int | None
    batch_size: int
    dtype: str
    device: str
    threads: int


@dataclass(frozen=True)
class Scored:
    """What scoring the suite under some attacks took, its scores by (benchmark, metric, attack), and its answers."""

    wall: float
    cpu: float
    scores: dict[tuple[str, str, str], float]
    answers: Answers


class Resident:
    """A model that stays loaded, and the rows that attacks set to zero."""

    def __init__(self, setting: Setting) -> None:
        import torch

        from macdrop.load import open_model
        from tune.training.quiet import quiet_libraries
        from tune.zoo.catalog import resolve

        quiet_libraries()
        torch.set_num_threads(setting.threads)
        self.setting = setting
        dtype = "bfloat16" if setting.dtype == "bf16" else "float32"
        model, self.tokenizer = open_model(resolve(setting.model), dtype=dtype)
        self.model = model.to(setting.device).eval()
        self._weights: Any = None

    def weights(self) -> Any:
        """Return the massive weights; rows of the second layer where a model has none, as random ones have."""
        from macdrop import find_massive_weights
        from macdrop.errors import NoMassiveWeights

        if self._weights is None:
            try:
                self._weights = find_massive_weights(self.model, self.tokenizer, source="", fingerprint="")
            except NoMassiveWeights:
                self._weights = stand_in(self.model.config, "random")
        return self._weights

    @contextmanager
    def _attacked(self, text: str, model: Any) -> Iterator[None]:
        from macdrop import attacked
        from macdrop.attack import Attack

        if text == PLAIN:
            yield
            return
        attack = Attack.parse(text)
        with attacked(model, self.weights(), attack.kind, attack.k):
            yield


class LmEval(Resident):
    """lm-eval's own HFLM around the model, and its `evaluate` once for each attack, whose rows are set to zero."""

    def __init__(self, setting: Setting) -> None:
        from lm_eval.models.huggingface import HFLM

        super().__init__(setting)
        # Both ways take the log-softmax in fp32: in bf16 long answers would be rounded to whole units.
        softmax = {"softmax_dtype": "float32"} if setting.dtype == "bf16" else {}
        self._harness = HFLM(pretrained=self.model, tokenizer=self.tokenizer, batch_size=setting.batch_size, **softmax)

    def run(self, attacks: Iterable[str]) -> Scored:
        """Score the suite under each attack; loading its tasks is not timed."""
        from lm_eval.evaluator import evaluate

        from tune.training.quiet import quiet_while_scoring

        clock, found = Clock(), {}
        with quiet_while_scoring():
            tasks = {attack: self._tasks() for attack in attacks}
            places = {attack: self._attacked(attack, self.model) for attack in tasks}
            clock.start()
            for attack, loaded in tasks.items():
                with places[attack]:
                    found[attack] = evaluate(self._harness, loaded, limit=self.setting.limit)
            clock.stop()
        scores, answers = {}, {}
        for attack, result in found.items():
            for benchmark in self.setting.suite:
                name, results = benchmark.name, result["results"][benchmark.name]
                scores |= {(name, m, attack): results[f"{m},none"] for m in METRICS if f"{m},none" in results}
                items = sorted(result["samples"][name], key=lambda item: item["doc_id"])
                answers[name, attack] = [_likelihoods(item["filtered_resps"]) for item in items]
        return Scored(clock.wall, clock.cpu, scores, answers)

    def _tasks(self) -> Any:
        from lm_eval.tasks import TaskManager

        names = [benchmark.name for benchmark in self.setting.suite]
        return TaskManager(include_defaults=False, include_path=self.setting.tasks).load(names)


class Ours(Resident):
    """Our Scorers with the resident model, one for each list of attacks: as in an evaluation actor, but for Ray."""

    def __init__(self, setting: Setting) -> None:
        from tune.evaluation.prefix_cache import PrefixCache

        super().__init__(setting)
        self._scorers: dict[tuple[str, ...], Any] = {}
        self._prefix = PrefixCache()

    def run(self, attacks: Iterable[str]) -> Scored:
        """Score the suite under each attack as that of a new adapter: nothing is kept that depends on weights."""
        scorer = self._scorer(tuple(attacks))
        self._prefix.clear()
        clock, rows = Clock(), []
        with tempfile.TemporaryDirectory(prefix="macdrop-answers-") as folder:
            clock.start()
            for job in scorer.jobs():
                rows += scorer.score(job, answers_path=Path(folder) / job.file_name, prefix=self._prefix)
            clock.stop()
            answers = {(job.task, job.attack): _kept(Path(folder) / job.file_name) for job in scorer.jobs()}
        scores = {(row["task"], row["metric"], row["attack"]): row["value"] for row in rows}
        return Scored(clock.wall, clock.cpu, scores, answers)

    def reference(self, items: Iterable[tuple[str, str, int]]) -> list[list[float]]:
        """Return the log-likelihoods of items (benchmark, attack, document) in float64, each request alone."""
        import copy

        import torch

        exact = copy.deepcopy(self.model).double()
        found = []
        for benchmark, attack, document in items:
            scorer = next(scorer for attacks, scorer in self._scorers.items() if attack in attacks)
            job = next(job for job in scorer.jobs() if (job.task, job.attack) == (benchmark, attack))
            harness, (task,) = scorer._benchmark(job)._harness, scorer._data(job).loaded["tasks"].values()
            pairs = [harness._encode_pair(*each.args) for each in task.instances if each.doc_id == document]
            with self._attacked(attack, exact), torch.no_grad():
                found.append([_alone(exact, *pair) for pair in pairs])
        return found

    def _scorer(self, attacks: tuple[str, ...]) -> Any:
        """Return the Scorer of these attacks, made and prepared on first use."""
        from tune.config.eval_spec import EvalSpec
        from tune.config.messages import build
        from tune.evaluation.scorer import Scorer

        if attacks not in self._scorers:
            setting = self.setting
            entries = {benchmark.name: benchmark.entry for benchmark in setting.suite}
            sizes = {"batch_size": setting.batch_size, "limit": setting.limit}
            block = {**sizes, "zero_shot": entries, "attacks": list(attacks)}
            weights = None if attacks == (PLAIN,) else self.weights()
            self._scorers[attacks] = Scorer(self.model, self.tokenizer, build(EvalSpec, block), weights)
            self._scorers[attacks].prepare()
        return self._scorers[attacks]


def _alone(model: Any, context: list[int], continuation: list[int]) -> float:
    """Return the log-likelihood of a continuation by a pass of its own."""
    import torch

    ids = torch.tensor([context + continuation[:-1]], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(context) - 1 :].double()
    return float(logits.log_softmax(-1).cpu().gather(1, torch.tensor(continuation)[:, None]).sum())


def _kept(file: Path) -> list[list[float]]:
    """Read the log-likelihoods that a score's file of answers keeps, by document."""
    items: list[Mapping[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
    return [_likelihoods(item["answers"]) for item in sorted(items, key=lambda item: item["doc_id"])]


def _likelihoods(answers: Iterable[Any]) -> list[float]:
    return [float(likelihood) for likelihood, _ in answers]

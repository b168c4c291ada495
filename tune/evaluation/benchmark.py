"""Kinds of benchmarks: what each must do, and the table of those there are.

A new kind is one module with an entry model (a subclass of `BenchmarkEntry`) and a class that follows `Benchmark`, made
known by `register_benchmark`. That module must be imported in every process that reads run files or scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from tune.config.eval_entries import BenchmarkEntry
from tune.config.eval_spec import EvalSpec, add_section
from tune.config.parse import SECTIONS
from tune.config.run_spec import RunSpec
from tune.evaluation.generation import GenerationBenchmark
from tune.evaluation.item_values import Values
from tune.evaluation.own.own_tasks import check_tasks
from tune.evaluation.perplexity import PerplexityBenchmark
from tune.evaluation.zero_shot.lm_eval_tasks import ZeroShotBenchmark

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tune.evaluation.logits import Logits


class Benchmark(Protocol):
    """One kind of benchmark: a section of the `eval:` block. A scorer makes one of each kind it needs and keeps it.

    Importing its module loads neither torch nor lm-eval: reports read items without them.
    """

    def __init__(self, spec: EvalSpec, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None: ...

    @staticmethod
    def check(name: str, entry: Any, spec: EvalSpec) -> None:
        """Open the local files of an entry; raise DataError or ConfigError for what cannot be scored."""

    def load(self, name: str, entry: Any) -> Any:
        """Read the data of an entry; the scorer keeps them for `count` and `score`."""

    def count(self, data: Any, limit: int | None) -> int:
        """Return the number of items that `score` goes through."""

    def score(
        self, data: Any, model: PreTrainedModel | PeftModel, batch_size: int, limit: int | None, logits: Logits
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return score rows, one of them named as the entry is, and what to keep of every item.

        A row has task, version, metric, value, stderr, n, higher_is_better, num_fewshot and settings. `logits` runs the
        model without a KV cache, sharing what attacks leave unchanged.
        """

    @staticmethod
    def items(records: list[dict[str, Any]], row: Mapping[str, Any]) -> Values | None:
        """Return the values of the kept items that the score in `row` came from; None where none were kept."""


BENCHMARKS: dict[str, type[Benchmark]] = {
    "zero_shot": ZeroShotBenchmark,
    "perplexity": PerplexityBenchmark,
    "generation": GenerationBenchmark,
}


def register_benchmark(section: str, entry: type[BenchmarkEntry], benchmark: type[Benchmark]) -> None:
    """Add a kind of benchmark: `eval:` and `validation:` then take a section of entries that it scores."""
    add_section(section, entry)
    BENCHMARKS[section] = benchmark
    RunSpec.model_rebuild(force=True)


def check_files(spec: EvalSpec) -> None:
    """Open every local file of `spec` and look at all its rows; nothing is downloaded.

    Raises:
        DataError: a file is missing or empty, or a row cannot be used (file, line, columns).
        ConfigError: a task that lm-eval does not have, or a key that does not fit the data.
    """
    check_tasks(spec)
    for section in SECTIONS:
        for name, entry in spec.entries(section).items():
            BENCHMARKS[section].check(name, entry, spec)

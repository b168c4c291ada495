"""The kind of benchmark behind the section `zero_shot`: scored by lm-eval itself.

lm-eval takes seconds to import, so the modules around its classes are loaded when the first task is.
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tune.config.eval_entries import ZeroShot
from tune.config.eval_spec import EvalSpec
from tune.evaluation.check import check_zero_shot
from tune.evaluation.item_values import RATIOS, Values, part_of, same_score
from tune.evaluation.own.own_tasks import is_own
from tune.training.quiet import quiet_while_scoring

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tune.evaluation.logits import Logits


def _late(module: str) -> ModuleType:
    """Return a module of this package that loads lm-eval."""
    return importlib.import_module(f"tune.evaluation.zero_shot.{module}")


class ZeroShotBenchmark:
    """Scores entries of `zero_shot` by lm-eval itself."""

    def __init__(self, spec: EvalSpec, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self._spec, self._tokenizer, self._max_length = spec, tokenizer, max_length
        self._tasks = _late("task_loader").Tasks()
        self._harness: Any = None

    @staticmethod
    def check(name: str, entry: ZeroShot, spec: EvalSpec) -> None:
        """Check local rows also as lm-eval reads them, which takes lm-eval itself: its tasks have code of their own."""
        reads_here = check_zero_shot(name, entry, spec)
        if reads_here or is_own(entry.task or name, spec.task_path):
            loader = _late("task_loader")
            with quiet_while_scoring():
                loader.check_functions(name, entry, spec)
                if reads_here:
                    loader.Tasks().load(name, entry, spec)

    def load(self, name: str, entry: ZeroShot) -> Any:
        return self._tasks.load(name, entry, self._spec, self._max_length, self._tokenizer)

    def count(self, data: Any, limit: int | None) -> int:
        sizes = [len(task.eval_docs) for task in data.loaded["tasks"].values()]
        return sum(sizes if limit is None else [min(size, limit) for size in sizes])

    def score(
        self, data: Any, model: PreTrainedModel | PeftModel, batch_size: int, limit: int | None, logits: Logits
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        if self._harness is None:
            tokenizer = copy.deepcopy(self._tokenizer)  # lm-eval sets its pad token and side
            self._harness = _late("harness").Harness(model, tokenizer, self._max_length)
        entry = self._spec.zero_shot[data.name]
        self._harness.use(model, batch_size, entry, logits)
        return _late("task_scoring").score(data, self._harness, limit, entry.metric)

    @staticmethod
    def items(records: list[dict[str, Any]], row: Mapping[str, Any]) -> Values | None:
        """Items of one task, or of all members of a group; None for a metric that is not kept item by item."""
        metric, _, filtered = row["metric"].partition(",")
        mine = [r for r in records if r["filter"] == (filtered or "none") and metric in r["metrics"]]
        names = {r["task"] for r in mine}
        member = part_of(row)
        if member:
            mine = [r for r in mine if r["task"] == member]
        values = {f"{r['task']}/{r['doc_id']} {r['doc_hash'][:8]}": r["metrics"][metric] for r in mine}
        if metric in RATIOS:  # lm-eval keeps pairs (log-likelihood, words)
            return {key: (-float(loss), float(words)) for key, (loss, words) in values.items()} or None
        if not values or not all(isinstance(value, (int, float)) for value in values.values()):
            return None
        if member or len(names) < 2 or same_score(math.fsum(values.values()) / len(values), row["value"]):
            return values
        sizes = {name: sum(r["task"] == name for r in mine) for name in names}
        weights = [len(mine) / (len(names) * sizes[r["task"]]) for r in mine]
        return {key: value * weight for (key, value), weight in zip(values.items(), weights, strict=True)}

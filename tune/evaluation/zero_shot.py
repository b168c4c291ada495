"""Zero-shot and few-shot tasks scored by lm-eval itself; tasks and data stay resident between scorings.

Importing this module loads lm-eval. Local rows replace a task's hub data set; prompts, metrics, filters, versions and
functions stay lm-eval's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import datasets
import lm_eval.api.task
import lm_eval.utils
import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from macdrop.errors import ConfigError, DataError, MacDropError
from tune.config.eval_entries import ZeroShot
from tune.config.eval_spec import EvalSpec
from tune.data.readers import Table, read_rows
from tune.errors import BenchmarkError
from tune.evaluation import catalogue
from tune.evaluation.check import as_on_the_hub, check_zero_shot, effective_shots, task_file, unknown_task
from tune.evaluation.decode import fit_middle
from tune.evaluation.prefix_cache import Logits, plain_logits
from tune.evaluation.zero_shot_rows import ResidentTask, items_of, rows_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Model = PreTrainedModel | PeftModel

FEWSHOT_SEED = 1234  # lm-eval's default
_KEYS_OF_THE_HUB = ("dataset_name", "dataset_kwargs", "tag", "group", "task_list")


class Harness(HFLM):
    """lm-eval's Hugging Face model around a resident one; `use` exchanges the model, as for one with an adapter."""

    def __init__(self, model: Model, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        # A stand-in for the model: lm-eval would tie its weights, which must not happen around an adapter.
        # log-softmax in fp32: in bf16 log-likelihoods of long answers are rounded to whole units.
        super().__init__(
            pretrained=SimpleNamespace(config=model.config, device=model.device),
            tokenizer=tokenizer,
            max_length=max_length,
            softmax_dtype="float32",
        )
        self._positions = max_length
        self._logits: Logits = plain_logits
        self._encoded: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
        self.middle = False
        self.shortened = 0

    def use(self, model: Model, batch_size: int, entry: ZeroShot, logits: Logits = plain_logits) -> None:
        """Score `entry` with `model` from now on, `batch_size` requests at a time; `logits` runs the model."""
        self._logits = logits
        self._model, self._device, self.batch_size_per_gpu = model, model.device, batch_size
        self._max_length = longest(entry, self._positions)
        self.middle, self.shortened = entry.truncation == "middle", 0

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode as lm-eval does, but cut long prompts in the middle where the entry says so.

        Returns:
            token ids and attention mask, (prompts, longest prompt).
        """
        if not (self.middle and left_truncate_len):
            return super().tok_batch_encode(strings, padding_side, left_truncate_len, **options)
        prompts = [self.tok_encode(string) for string in strings]
        self.shortened += sum(len(ids) > left_truncate_len for ids in prompts)
        kept = {"input_ids": [fit_middle(ids, left_truncate_len) for ids in prompts]}
        padded = self.tokenizer.pad(kept, padding=True, padding_side=padding_side, return_tensors="pt")
        return padded["input_ids"], padded["attention_mask"]

    def _model_call(self, inps: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Call the model without a KV cache, which only generation needs."""
        return self._logits(self._model, inps)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode each request once for all scorings: requests do not change from adapter to adapter."""
        key = (context, continuation)
        if key not in self._encoded:
            self._encoded[key] = super()._encode_pair(context, continuation)
        return self._encoded[key]

    def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Score without a progress bar; raise BenchmarkError if the model returns NaN."""
        answers = super().loglikelihood(requests, disable_tqdm=True)
        if any(value != value for value, _ in answers):
            raise BenchmarkError("The model returns NaN, so answers cannot be ranked.")
        return answers

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = True) -> list[float]:
        """Run lm-eval's own without a progress bar."""
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list, disable_tqdm: bool = True) -> list[str]:
        """Run lm-eval's own without a progress bar."""
        return super().generate_until(requests, disable_tqdm=True)


class Tasks:
    """Loads lm-eval tasks; its full index is built only for names that no task file defines (groups and tags)."""

    def __init__(self) -> None:
        self._direct = TaskManager(include_defaults=False)
        self._indexed: TaskManager | None = None

    def load(self, name: str, entry: ZeroShot, spec: EvalSpec, max_length: int) -> ResidentTask:
        """Build the task of one entry with its data; its prompts are built at the first scoring and kept.

        Raises:
            ConfigError: the task or its split is unknown to lm-eval, or `max_length` tokens leave no room.
            DataError: local rows do not fit. BenchmarkError: a download failed.
        """
        check_zero_shot(name, entry, spec)
        if entry.data:
            loaded = self._local(name, entry)
        else:
            loaded = self._from_hub(name, entry)
        for task in loaded["tasks"].values():
            shots = effective_shots(spec.inherited(entry, "num_fewshot"), task.get_config("num_fewshot"))
            task.set_config(key="num_fewshot", value=shots)
            _build_requests_once(task)
            if entry.max_new_tokens and task.get_config("output_type") == "generate_until":
                task.set_config(key="generation_kwargs", value={"max_gen_toks": entry.max_new_tokens}, update=True)
            _check_room(name, entry, task, longest(entry, max_length))
        return ResidentTask(name, entry.task or name, loaded, bool(entry.data), entry.split)

    def _from_hub(self, entry_name: str, entry: ZeroShot) -> dict[str, Any]:
        name = entry.task or entry_name
        file = catalogue.find_task(name)
        target: str | dict[str, Any] = str(file) if file else name
        manager = self._direct
        if file is None:
            if self._indexed is None:
                self._indexed = TaskManager()
            manager = self._indexed
            if name not in manager.all_tasks:
                raise unknown_task(name)
        if entry.split:
            definition = load_yaml(file, resolve_func=True)
            if "class" in definition:
                raise ConfigError(f"eval.zero_shot.{entry_name}: lm-eval's task {name!r} chooses its split in code.")
            target = definition | {"test_split": entry.split, "validation_split": None}
        try:
            return manager.load([target])
        except KeyError as error:
            if entry.split is None or entry.split not in error.args:
                raise
            raise ConfigError(
                f"eval.zero_shot.{entry_name}: the data set of lm-eval's task {name!r} has no split {entry.split!r}; "
                "train, validation and test are usual."
            ) from None
        except Exception as error:  # datasets and huggingface_hub raise a dozen kinds; all mean: no data
            raise BenchmarkError(
                f"Loading the data of lm-eval's task {name!r} failed: {type(error).__name__}: {_first_line(error)}\n"
                f"Without internet, give a local copy in the same schema: zero_shot: {{{name}: {{data: FILE}}}}."
            ) from error

    def _local(self, name: str, entry: ZeroShot) -> dict[str, Any]:
        task = entry.task or name
        table = read_rows(entry.data or [])
        file = task_file(task, entry, table)
        splits = {"test": table} | ({"train": read_rows(entry.fewshot_data)} if entry.fewshot_data else {})
        if file is None:
            config = _choice_config(table, entry.target_delimiter)
        else:
            config = load_yaml(file, resolve_func=True)
            splits = {split: as_on_the_hub(rows, config) for split, rows in splits.items()}
            if "class" in config or config.get("unsafe_code"):
                raise ConfigError(f"lm-eval's task {task!r} loads its data with its own code; leave data: out.")
            config = {key: value for key, value in config.items() if key not in _KEYS_OF_THE_HUB}
        config |= {
            "task": name,
            "dataset_path": "local",
            "custom_dataset": _in_memory(splits),
            "training_split": "train" if entry.fewshot_data else None,
            "validation_split": None,
            "test_split": "test",
            "fewshot_split": "train" if entry.fewshot_data else None,
        }
        if isinstance(config.get("fewshot_config"), Mapping):
            shots = {k: v for k, v in config["fewshot_config"].items() if k != "split"}
            config["fewshot_config"] = shots | ({"split": "train"} if entry.fewshot_data else {})
        try:
            return self._direct.load([config])
        except MacDropError:
            raise
        except Exception as error:  # the task's own code meets rows it was not made for
            raise DataError(
                f"{table.places[0]}: lm-eval's task {task!r} cannot use these rows: {type(error).__name__}: "
                f"{_first_line(error)}\nRows must have the schema of its hub data set."
            ) from error


def longest(entry: ZeroShot, max_length: int) -> int:
    """Return the tokens that prompt and answer of an entry may take together."""
    return min(entry.max_length or max_length, max_length)


def _check_room(name: str, entry: ZeroShot, task: Any, max_length: int) -> None:
    if task.get_config("output_type") != "generate_until":
        if entry.truncation == "middle":
            raise ConfigError(f"eval.zero_shot.{name}: truncation middle is for tasks that generate; leave it out.")
        return
    new = normalize_gen_kwargs(task.get_config("generation_kwargs") or {})["max_gen_toks"]
    if max_length - new < 2:
        raise ConfigError(
            f"eval.zero_shot.{name}: answers of up to {new} tokens leave no room for a prompt in {max_length}. "
            f"Set eval.zero_shot.{name}.max_new_tokens below {max_length - 1}."
        )


def _build_requests_once(task: Any) -> None:
    """Keep the requests of a task: building the prompts takes longer than a tiny model takes to answer them."""
    build = task.build_all_requests
    built: list[Any] = []

    def resident(**settings: Any) -> None:
        if built:
            for instance in built[0]:
                instance.resps, instance.filtered_resps = [], {}
            return
        with _without_bar():
            build(**settings)
        built.append(task.instances)

    task.build_all_requests = resident


@contextmanager
def _without_bar() -> Iterator[None]:
    """Hide the progress bar of lm-eval's request building, which has no switch."""
    shown = lm_eval.api.task.tqdm
    lm_eval.api.task.tqdm = partial(shown, disable=True)
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = shown


_compiled = lru_cache(maxsize=256)(lm_eval.utils.env.from_string)


@contextmanager
def _templates_compiled_once() -> Iterator[None]:
    """Compile each prompt template once, not once per document: that is half of the time of scoring a tiny model."""
    lm_eval.utils.env.from_string = _compiled
    try:
        yield
    finally:
        del lm_eval.utils.env.from_string


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _choice_config(table: Table, delimiter: str | None) -> dict[str, Any]:
    """Return lm-eval's configuration for our own multiple-choice format."""
    if delimiter is None:  # a context that ends in white space, as many templates do, already has its delimiter
        first = table.rows[0]
        delimiter = "" if first["context"][-1:].isspace() or first["choices"][0][0].isspace() else " "
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
    return {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{label}}",
        "target_delimiter": delimiter,
        "metric_list": metrics,
        "metadata": {"version": 1},
    }


def _in_memory(splits: Mapping[str, Table]) -> Callable[..., dict[str, datasets.Dataset]]:
    """Wrap rows as lm-eval's `custom_dataset`: without a disk cache, a lock, or stale rows when the file changes."""

    def build(**_: Any) -> dict[str, datasets.Dataset]:
        found = {}
        for split, table in splits.items():
            try:
                found[split] = datasets.Dataset.from_list(table.rows)
            except Exception as error:  # pyarrow's errors share no base
                raise DataError(
                    f"{table.places[0]} and following: a column changes its type: {_first_line(error)}"
                ) from error
        return found

    return build


def score(task: ResidentTask, harness: Harness, limit: int | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Score a task with the model that `harness` uses.

    Returns:
        rows, and per item its metrics and answers.

    Raises:
        BenchmarkError: lm-eval could not score the task.
    """
    for each in task.loaded["tasks"].values():
        each.set_fewshot_seed(seed=FEWSHOT_SEED)  # or the examples would differ from scoring to scoring
    try:
        with _templates_compiled_once():
            result = evaluate(harness, task.loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    except MacDropError:
        raise
    except Exception as error:
        raise BenchmarkError(f"lm-eval could not score {task.name!r}: {type(error).__name__}: {error}") from error
    rows = [{**row, "max_length": harness.max_length} for row in rows_of(task, result)]
    if harness.middle:
        for row in rows:
            row["settings"] += f" truncation=middle shortened={harness.shortened}"
    return rows, items_of(result["samples"])

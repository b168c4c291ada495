"""Loader of lm-eval's tasks: its own, with data of the Hub or local rows in their place, and the user's own.

Local rows replace a task's data set; prompts, metrics, filters, versions and functions stay lm-eval's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from macdrop.errors import ConfigError, DataError, MacDropError
from tune.config.eval_entries import ZeroShot
from tune.config.eval_spec import EvalSpec
from tune.data.local_rows import Table, read_rows
from tune.errors import BenchmarkError
from tune.evaluation.check import (
    CHOICE_METRICS,
    as_on_the_hub,
    check_metric,
    check_zero_shot,
    delimiter_of,
    effective_shots,
    task_file,
    unknown_task,
)
from tune.evaluation.own import own_tasks
from tune.evaluation.zero_shot.documents import Documents
from tune.evaluation.zero_shot.harness import longest
from tune.evaluation.zero_shot.task_scoring import build_requests_once, templates_compiled_once
from tune.evaluation.zero_shot.zero_shot_rows import ResidentTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KEYS_OF_THE_HUB = ("dataset_name", "dataset_kwargs", "tag", "group", "task_list")


class Tasks:
    """Loads lm-eval tasks; its full index is built only for names that no task file defines (groups and tags)."""

    def __init__(self) -> None:
        self._direct = TaskManager(include_defaults=False)
        self._indexed: dict[str | None, TaskManager] = {}

    def load(
        self,
        name: str,
        entry: ZeroShot,
        spec: EvalSpec,
        max_length: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> ResidentTask:
        """Build the task of one entry with its data, and check every document of it.

        Args:
            max_length: tokens that prompt and answer may take; None leaves their lengths unchecked.
            tokenizer: counts the tokens of the answers.

        Raises:
            ConfigError: the task, its split or its metric is unknown to lm-eval, or `max_length` tokens leave no room.
            DataError: local rows do not fit, or an answer names no choice. BenchmarkError: a download failed.
        """
        check_zero_shot(name, entry, spec)
        places: list[str] = []
        if entry.data:
            loaded, places = self._local(name, entry, spec.task_path)
        else:
            loaded = self._from_hub(name, entry, spec.task_path)
        for task in loaded["tasks"].values():
            shots = effective_shots(spec.inherited(entry, "num_fewshot"), task.get_config("num_fewshot"))
            task.set_config(key="num_fewshot", value=shots)
            build_requests_once(task)
            if entry.max_new_tokens and task.get_config("output_type") == "generate_until":
                task.set_config(key="generation_kwargs", value={"max_gen_toks": entry.max_new_tokens}, update=True)
            with templates_compiled_once():
                documents = Documents(task, places)
                documents.check()
                if max_length is not None and tokenizer is not None:
                    _check_room(name, entry, task, longest(entry, max_length))
                    documents.check_answers(tokenizer, longest(entry, max_length), spec.inherited(entry, "limit"))
        if not any(_names_metrics_later(task) for task in loaded["tasks"].values()):
            check_metric(name, entry.metric, _metrics(loaded["tasks"].values()))
        return ResidentTask(
            name, entry.task or name, loaded, bool(entry.data), entry.split, _own_version(entry.task or name, spec)
        )

    def _manager(self, folder: str | None) -> TaskManager:
        """Return lm-eval's index of all names, those of `folder` among them."""
        if folder not in self._indexed:
            self._indexed[folder] = TaskManager(include_path=folder)
        return self._indexed[folder]

    def _from_hub(self, entry_name: str, entry: ZeroShot, folder: str | None) -> dict[str, Any]:
        """Return what lm-eval makes of a task as it is defined, with the data that its definition names."""
        name = entry.task or entry_name
        file = own_tasks.find_task(name, folder)
        target: str | dict[str, Any] = str(file) if file else name
        manager = self._direct
        if file is None:
            manager = self._manager(folder)
            if name not in manager.all_tasks:
                raise unknown_task(name, folder)
        elif own_tasks.is_own(name, folder):
            target = own_tasks.beside(_definition(file), file)
        if entry.split:
            definition = target if isinstance(target, dict) else load_yaml(file, resolve_func=True)
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
            if own_tasks.is_own(name, folder):
                raise ConfigError(
                    f"eval.zero_shot.{entry_name}: lm-eval cannot load the task {name!r} of task_path: "
                    f"{type(error).__name__}: {_first_line(error)}"
                ) from error
            raise BenchmarkError(
                f"Loading the data of lm-eval's task {name!r} failed: {type(error).__name__}: {_first_line(error)}\n"
                f"Without internet, give a local copy in the same schema: zero_shot: {{{name}: {{data: FILE}}}}."
            ) from error

    def _local(self, name: str, entry: ZeroShot, folder: str | None) -> tuple[dict[str, Any], list[str]]:
        """Return what lm-eval makes of local rows, and the place of each row."""
        task = entry.task or name
        table = read_rows(entry.data or [])
        file = task_file(task, entry, table, folder)
        splits = {"test": table} | ({"train": read_rows(entry.fewshot_data)} if entry.fewshot_data else {})
        if file is None:
            config = _choice_config(delimiter_of(name, entry, table))
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
            return self._direct.load([config]), table.places
        except MacDropError:
            raise
        except Exception as error:  # the task's own code meets rows it was not made for
            raise DataError(
                f"{table.places[0]}: lm-eval's task {task!r} cannot use these rows: {type(error).__name__}: "
                f"{_first_line(error)}\nRows must have the schema of its hub data set."
            ) from error


def _definition(file: Path) -> dict[str, Any]:
    """Read a task of the user's own, with its functions.

    Raises:
        ConfigError: a function cannot be imported, or the file is not valid.
    """
    try:
        return load_yaml(file, resolve_func=True)
    except (Exception, SystemExit) as error:  # the user's code is imported
        raise ConfigError(f"task_path: {file} cannot be read: {type(error).__name__}: {error}") from None


def _own_version(name: str, spec: EvalSpec) -> str:
    """Return the fingerprint of a task of the user's own; empty for lm-eval's, which has its own versions."""
    if spec.task_path is None or not own_tasks.is_own(name, spec.task_path):
        return ""
    return own_tasks.task_version(own_tasks.find_task(name, spec.task_path), spec.task_path)


def check_functions(name: str, entry: ZeroShot, spec: EvalSpec) -> None:
    """Import the functions of a task of the user's own; others are left alone."""
    task = entry.task or name
    if own_tasks.is_own(task, spec.task_path) and (file := own_tasks.find_task(task, spec.task_path)):
        _definition(file)


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


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _metrics(tasks: Iterable[Any]) -> list[str]:
    """Return the names of the metrics that tasks compute."""
    return list(dict.fromkeys(str(metric) for task in tasks for metric in task.aggregation()))


def _names_metrics_later(task: Any) -> bool:
    """Return whether code of a task chooses the names of its metrics while it scores, as pass@k is."""
    return any(callable(each.get("metric")) for each in task.get_config("metric_list") or [])


def _choice_config(delimiter: str) -> dict[str, Any]:
    """Return lm-eval's configuration for our own multiple-choice format.

    Functions, not templates: what a template renders is read again, so that digits become a number.
    """
    metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in CHOICE_METRICS]
    return {
        "output_type": "multiple_choice",
        "doc_to_text": lambda row: row["context"],
        "doc_to_choice": lambda row: row["choices"],
        "doc_to_target": lambda row: row["label"],
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
                columns = dict.fromkeys(column for row in table.rows for column in row)
                found[split] = datasets.Dataset.from_dict({c: [row.get(c) for row in table.rows] for c in columns})
            except Exception as error:  # pyarrow's errors share no base
                raise DataError(
                    f"{table.places[0]} and following: a column changes its type: {_first_line(error)}"
                ) from error
        return found

    return build

"""Checks of benchmark entries against the files they name. Loads neither torch nor lm-eval."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from macdrop.errors import ConfigError, DataError, nearest
from tune.config.eval_entries import Generation, Perplexity, ZeroShot
from tune.config.eval_spec import EvalSpec
from tune.config.syntax.yaml_core import brief
from tune.data.local_rows import Table, read_documents, read_rows
from tune.data.locations import is_local, locate
from tune.data.readers import quoted, rows_inside
from tune.evaluation import catalogue
from tune.evaluation.own import own_tasks

CHOICE_COLUMNS = ("context", "choices", "label")
#: What rows in our own multiple-choice format are scored by.
CHOICE_METRICS = ("acc", "acc_norm")
#: Hub data set of a task -> columns that it names otherwise than the files of the benchmark's authors.
RENAMED = {"Xnhyacinth/LongBench": {"input": "question"}}
#: Folder of lm-eval's tasks -> packages that its metrics import, and our extra that installs them.
PACKAGES = {"longbench": (("jieba", "fuzzywuzzy", "rouge"), "macdrop[longbench]")}


def check_zero_shot(name: str, entry: ZeroShot, spec: EvalSpec) -> Path | None:
    """Check one zero-shot entry: the task must be known, or the rows in our own format, with all their columns.

    Returns:
        the definition of the task that reads local rows; None for rows of our own, and for data of the Hub.
    """
    task = entry.task or name
    if not entry.data:
        file = own_tasks.find_task(task, spec.task_path)
        if file is None and not own_tasks.is_own(task, spec.task_path) and task not in catalogue.known_names():
            raise unknown_task(task, spec.task_path)
        if file is None and entry.split:
            raise ConfigError(
                f"eval.zero_shot.{name}: split is for single tasks, and {task!r} is a group; list its tasks."
            )
        _check_packages(name, file)
        if file is not None and (known := _metrics_of(catalogue.read_definition(file))):
            check_metric(name, entry.metric, known)
        here = own_tasks.is_own(task, spec.task_path) and file is not None and own_tasks.reads_local_data(file)
        return file if here else None
    table = read_rows(entry.data)
    file = task_file(task, entry, table, spec.task_path)
    _check_packages(name, file)
    if file is None:
        check_choices(task, table)
        delimiter_of(name, entry, table)
        check_metric(name, entry.metric, CHOICE_METRICS)
        shots = spec.inherited(entry, "num_fewshot") or 0
    else:
        definition = catalogue.read_definition(file)
        table = as_on_the_hub(table, definition)
        table.require(catalogue.needed_columns(file), f"lm-eval's task {task!r}")
        if entry.target_delimiter is not None:
            raise ConfigError(
                f"eval.zero_shot.{name}: target_delimiter is fixed by lm-eval's task {task!r}; leave it out."
            )
        shots = effective_shots(spec.inherited(entry, "num_fewshot"), definition.get("num_fewshot"))
        if "samples" in (definition.get("fewshot_config") or {}):
            shots = 0
    if shots and not entry.fewshot_data:
        raise ConfigError(
            f"eval.zero_shot.{name}: {shots} few-shot examples are requested, but no rows to draw them from.\n"
            "Give fewshot_data: (never the rows that are scored), or set num_fewshot: 0."
        )
    if entry.fewshot_data:
        examples = read_rows(entry.fewshot_data)
        if file is None:
            check_choices(task, examples)
        else:
            examples = as_on_the_hub(examples, definition)
            examples.require(catalogue.needed_columns(file), f"lm-eval's task {task!r}")
    return file


def check_metric(name: str, metric: str | None, known: Sequence[str]) -> None:
    """Refuse a metric that tables are asked to show and the task does not have.

    Raises:
        ConfigError: with the metrics there are.
    """
    if metric is not None and metric not in known:
        raise ConfigError(
            f"eval.zero_shot.{name}.metric is {metric!r}, which this task does not compute.{nearest(metric, known)} "
            f"Allowed: {', '.join(known)}."
        )


def as_on_the_hub(table: Table, definition: Mapping[str, Any]) -> Table:
    """Rename the columns of the authors' files to those of the task's hub data set."""
    names = RENAMED.get(definition.get("dataset_path") or "", {})
    rows = [{names.get(key, key) if names.get(key) not in row else key: row[key] for key in row} for row in table.rows]
    return Table(rows, table.places)


def _metrics_of(definition: Mapping[str, Any]) -> list[str]:
    """Return the metrics that a task's definition names; none where its code names them, or lm-eval's defaults hold."""
    listed = [each.get("metric") for each in definition.get("metric_list") or []]
    return listed if all(type(metric) is str for metric in listed) else []


def _check_packages(name: str, file: Path | None) -> None:
    packages, extra = PACKAGES.get(file.parent.name if file else "", ((), ""))
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(
            f"eval.zero_shot.{name} needs {', '.join(missing)}, not installed here.\nRun: pip install '{extra}'"
        )


def task_file(task: str, entry: ZeroShot, table: Table, folder: str | None = None) -> Path | None:
    """Return the definition of the task, one of `folder` or lm-eval's; None for rows in our own format.

    An unknown name costs a pass over all of lm-eval's files; rows that are clearly in our own format skip it.
    """
    ours = entry.task is None and set(CHOICE_COLUMNS) <= set(table.rows[0])
    return own_tasks.find_task(task, folder, by_path=ours)


def effective_shots(asked: int | None, default: int | None) -> int:
    """Apply lm-eval's rule: the requested number, but a task that says 0 stays at 0; null is the task's own number."""
    return default or 0 if asked is None or default == 0 else asked


def unknown_task(name: str, folder: str | None = None) -> ConfigError:
    """Return the error for a name that neither `folder` nor lm-eval defines, and that comes without data."""
    where = f"Neither lm-eval nor task_path ({folder}) has a task" if folder else "lm-eval has no task"
    return ConfigError(
        f"{where} {name!r}.{nearest(name, [*own_tasks.names_in(folder), *catalogue.known_names()])}\n"
        f"For your own task give data: a file of rows with {', '.join(CHOICE_COLUMNS)}."
    )


def check_choices(name: str, table: Table) -> None:
    """Check rows in our own multiple-choice format.

    Raises:
        DataError: a column is missing or has another type, or the label is not an index into the choices.
    """
    if not set(CHOICE_COLUMNS) <= set(table.rows[0]):
        hint = nearest(name, catalogue.known_names())
        table.require(
            CHOICE_COLUMNS,
            f"{name!r}, which is not a task of lm-eval, so it must be in our own format.{hint} That format",
        )
    table.require(CHOICE_COLUMNS, "multiple choice")
    for row, place in zip(table.rows, table.places, strict=True):
        choices, label = row["choices"], row["label"]
        if not isinstance(row["context"], str):
            raise _bad(place, "context", "a text", row["context"])
        if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
            raise _bad(place, "choices", "a list of at least two texts", choices)
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label < len(choices):
            raise _bad(place, "label", f"the index of the right choice, 0 to {len(choices) - 1}", label)


def delimiter_of(name: str, entry: ZeroShot, table: Table) -> str:
    """Return the text between context and choice of rows in our own format: a space, or nothing where they have one.

    Raises:
        ConfigError: some of the rows have white space there and some have none.
    """
    if entry.target_delimiter is not None:
        return entry.target_delimiter
    spaced = [{row["context"][-1:].isspace() or choice[0].isspace() for choice in row["choices"]} for row in table.rows]
    odd = next((place for place, found in zip(table.places, spaced, strict=True) if found != spaced[0]), None)
    if odd is not None or len(spaced[0]) > 1:
        raise ConfigError(
            f"eval.zero_shot.{name}: context and choice meet in white space in some places and without it in others "
            f"(compare {odd or 'the choices'} with {table.places[0]}).\nSet eval.zero_shot.{name}.target_delimiter to "
            "what stands between all of them: ' ', or '' for nothing."
        )
    return "" if True in spaced[0] else " "


def _bad(place: str, column: str, wanted: str, value: object) -> DataError:
    return DataError(f"{place}: {column!r} must be {wanted}, not {brief(value)}.")


def check_perplexity(entry: Perplexity) -> None:
    """Check that local text exists; a hub id is left to the scorer."""
    local = [is_local(path) for path in entry.data]
    if all(local):
        read_documents(entry.data, entry.column)
    elif any(local) or len(entry.data) > 1:
        for path in entry.data:
            locate(path)


def read_generation(entry: Generation) -> tuple[str, Table]:
    """Read the rows of a generation entry and name their format.

    Raises:
        DataError: no format fits the columns, or a row cannot be used.
        ConfigError: metrics that need references are requested where there are none.
    """
    table = read_rows(entry.data)
    kind = entry.format or _format_of(table)
    if kind == "spec_bench":
        if entry.metrics and entry.text_metrics:
            raise ConfigError(
                f"{entry.data[0]}: {', '.join(entry.text_metrics)}: these metrics need references, and these questions "
                "have none; leave them out."
            )
        table.require(("question_id", "category", "turns"), "format spec_bench")
        for row, place in zip(table.rows, table.places, strict=True):
            turns = row["turns"]
            if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
                raise _bad(place, "turns", "a list of one or more texts", turns)
            if not isinstance(row["category"], str):
                raise _bad(place, "category", "a text", row["category"])
            _check_id(row, place)
    else:
        _check_references(table, needed=bool(entry.text_metrics))
    return kind, table


def _check_references(table: Table, *, needed: bool) -> None:
    """Check rows with a prompt; their references may be missing where own metrics alone score the answers."""
    question, answer = ("prompt", "reference") if "prompt" in table.rows[0] else ("instruction", "output")
    table.require((question, answer) if needed else (question,), "format reference")
    for row, place in zip(table.rows, table.places, strict=True):
        if not isinstance(row[question], str) or not row[question]:
            raise _bad(place, question, "a text", row[question])
        wanted = row.get(answer, "")
        if not all(isinstance(text, str) for text in (wanted if isinstance(wanted, list) and wanted else [wanted])):
            raise _bad(place, answer, "a text, or a list of texts", wanted)
        if not isinstance(row.get("input") or "", str):
            raise _bad(place, "input", "a text", row["input"])
        _check_id(row, place)


def _check_id(row: Mapping[str, Any], place: str) -> None:
    """Refuse an identity of a question that a file of answers could not hold."""
    given = row.get("question_id", 0)
    if isinstance(given, bool) or not isinstance(given, (str, int)):
        raise _bad(place, "question_id", "a text or a whole number", given)


def _format_of(table: Table) -> str:
    columns = table.rows[0].keys()
    if "turns" in columns:
        return "spec_bench"
    if columns & {"prompt", "reference", "instruction", "output"}:
        return "reference"
    raise DataError(
        f"{table.places[0]}: these columns fit no generation format: {quoted(columns)}.{rows_inside(table.rows[0])}\n"
        "spec_bench has question_id, category, turns; reference has prompt, reference, or instruction, input, output."
    )

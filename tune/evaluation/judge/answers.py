"""Generated answers of a run or an evaluation, for a judge to score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from macdrop.errors import ConfigError
from tune.config.recorded import models_of
from tune.config.run_spec import slug
from tune.evaluation.judge.judgements import Answers
from tune.storage.json_lines import read_jsonl
from tune.storage.records import SCORES_FILE
from tune.storage.run_folder import BASE, RunFolder
from tune.storage.states import Stage, TaskState


def answers_of_run(run_folder: RunFolder) -> list[Answers]:
    """Return the generated answers of a run's base models and final trials, under all attacks.

    Raises:
        ConfigError: there are none; the message says why.
    """
    entries = list(((run_folder.config().get("eval") or {}).get("generation")) or {})
    records = run_folder.trials()
    folders = [
        (run_folder.trial(record.trial).folder, record.model_dump(include={"model", "arm", "trial", "seed"}))
        for record in records
        if record.status == TaskState.DONE and record.stage == Stage.FINAL
    ]
    names = _model_names(run_folder)
    for folder in sorted((run_folder.run_dir / "models").glob("*/")):
        tag = {"model": names.get(folder.name, folder.name), "arm": BASE, "trial": BASE, "seed": None}
        folders.insert(0, (folder, tag))
    found = [
        _with_score_settings(run_folder, Answers.read(file, run_folder.run_dir, tag, entries))
        for folder, tag in folders
        for file in sorted((folder / "answers").glob("generation-*.jsonl"))
    ]
    if found:
        return found
    if not records and not folders:
        raise ConfigError(f"{run_folder.run_dir} has no trials and no scored base model: there is nothing to judge.")
    raise ConfigError(
        f"{run_folder.run_dir} has no generated answers: no generation benchmark has been scored for a base model or a "
        "final trial.\nList one under eval.generation, for example Spec-Bench, and run the sweep (or --resume it)."
    )


def _model_names(run_folder: RunFolder) -> dict[str, str]:
    """Map the slugs of the run's models to their full names."""
    names = [*models_of(run_folder.config()), *(row["model"] for row in run_folder.score_rows())]
    return {slug(name): name for name in names}


def _with_score_settings(run_folder: RunFolder, answers: Answers) -> Answers:
    """Add limit, split and suite from the score row of the same answers."""
    same = {
        "model": answers.tag["model"],
        "trial": answers.tag["trial"],
        "benchmark": "generation",
        "attack": answers.attack,
        "attack_on": answers.attack_on,
    }
    for row in run_folder.score_rows():
        if all(row[key] == value for key, value in same.items()) and answers.entry in (row.get("entry"), row["task"]):
            words = [word for word in (row.get("settings") or "").split() if word.startswith("suite=")]
            more: dict[str, Any] = {key: row[key] for key in ("limit", "split") if key in row}
            answers.tag.update(more | {"words": words})
            break
    return answers


def answers_of_evaluation(folder: Path) -> list[Answers]:
    """Return the generated answers that `macdrop eval --output` wrote.

    Raises:
        ConfigError: there are none.
    """
    scored = read_jsonl(folder / SCORES_FILE)
    tag = {key: scored[0].get(key) for key in ("model", "adapter")} if scored else {}
    entries = [row["task"] for row in scored if row["benchmark"] == "generation"]
    files = sorted((folder / "answers").glob("generation-*.jsonl"))
    if not files:
        raise ConfigError(f"{folder} has no generated answers: list a benchmark under eval.generation.")
    return [Answers.read(file, folder, tag, entries) for file in files]

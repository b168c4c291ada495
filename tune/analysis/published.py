"""The paper's figures (`paper.yaml`), and whether a trial matches the setting in which they were measured."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tune.analysis.display_names import adapter_name
from tune.config.parse import read_yaml
from tune.config.run_spec import slug
from tune.config.sections import Arm
from tune.evaluation.score_names import Cell

FILE = Path(__file__).with_name("paper.yaml")
SUITE = re.compile(r"\bsuite=([\w-]+)@")


@cache
def paper() -> dict[str, Any]:
    """The content of paper.yaml."""
    return read_yaml(FILE)


@dataclass(frozen=True)
class Figure:
    """A published figure that belongs to one of our rows; `source` is its table."""

    value: float
    source: str


def is_one_of(model: str, ids: Iterable[str]) -> bool:
    """Return whether a model, as a spec names it, is one of these hub ids: by the whole id, or a folder of that name.

    `owner/name` is a hub id unless there is a folder of this path: another owner's model is another one.
    """
    hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model) and not Path(model).is_dir()
    wanted = model.lower() if hub_id else slug(model).lower()
    return wanted in (each.lower() if hub_id else slug(each).lower() for each in ids)


def row_name(model: str) -> str | None:
    """The paper's name of a checkpoint, given as a hub id or as a folder of that name; None if it has none."""
    return next((name for name, ids in paper()["checkpoints"].items() if is_one_of(model, ids)), None)


def figure(table: str, model: str, settings: Mapping[str, Any], arm: str) -> Figure | None:
    """The paper's figure of a fine-tuned model; `arm` is plain or macdrop, `settings` have dotted keys."""
    found = paper()["tables"][table]
    adapters = found["rows"].get(row_name(model) or "", {})
    value = adapters.get(adapter_name(settings), {}).get(arm)
    return None if value is None else Figure(value, cited(table))


def base_figures(model: str, attack: str) -> dict[str, float]:
    """Column of the paper's table of attacks -> figure of a base model; `attack` is none, zeroing@5 or retaining@5."""
    found = paper()["tables"]["attacks"]
    kinds = {"none": "none"} | {f"{kind}@{found['k']}": kind for kind in ("zeroing", "retaining")}
    row = found["rows"].get(row_name(model) or "", {}).get(kinds.get(attack, ""), [])
    return dict(zip(found["columns"], row, strict=False))


def cited(table: str) -> str:
    """The source of a table, such as "arXiv 2410.01866v2"."""
    return f"arXiv {paper()['arxiv']}v{paper()['tables'][table]['arxiv_version']}"


def setting_differences(settings: Mapping[str, Any], arm: str, workers: int) -> list[str]:
    """Differences from the paper's fine-tuning, such as "learning_rate 0.002 (paper: 0.0001)"."""
    wanted = dict(paper()["setting"]["plain"])
    if arm == Arm.MACDROP:
        wanted |= {f"macdrop.{key}": value for key, value in paper()["setting"]["macdrop"].items()}
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps")
    batch = workers * settings.get(keys[0], 1) * settings.get(keys[1], 1)
    ours = {**settings, "batch": batch, "dataset": _last(settings.get("dataset"))}
    return [
        f"{key} {_plain(ours.get(key))} (paper: {_plain(value)})"
        for key, value in wanted.items()
        if ours.get(key) != value
    ]


def score_differences(cells: Iterable[Cell], suite: str) -> list[str]:
    """Reasons why scores are not comparable with the paper's: another suite, or only part of the benchmark."""
    found = []
    for cell in cells:
        how = dict(cell.how)
        if how.get("limit") is not None:
            found.append(f"a limit of {how['limit']} items")
        if not any(key == "settings" and suite in SUITE.findall(str(value)) for key, value in cell.how):
            found.append(f"not scored with the suite {suite}")
    return list(dict.fromkeys(found))


def _last(dataset: Any) -> Any:
    """The bare name of a data set: llamafactory/alpaca_gpt4_en, or a local alpaca_gpt4_en.json -> alpaca_gpt4_en."""
    if isinstance(dataset, list) and len(dataset) == 1:
        dataset = dataset[0]
    return slug(dataset).partition(".")[0] if isinstance(dataset, str) else dataset


def _plain(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)

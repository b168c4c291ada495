"""The contents of run.json, trial.json, finalists.json and the rows of scores.jsonl, as validated models.

Keys that a model does not name are kept. Values are never converted, except for states, which become enums.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated, Any, Required, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from typing_extensions import TypedDict

from macdrop.errors import ConfigError
from tune.config.run_spec import TrainSpec
from tune.config.syntax.yaml_core import parse_blocks
from tune.storage.atomic import read_mapping, report_damage
from tune.storage.environment import version
from tune.storage.states import RunStatus, Stage, TaskState

Record = TypeVar("Record", bound=BaseModel)
_STRICT = ConfigDict(extra="allow", strict=True)
Number = int | float
FINALISTS_FILE = "finalists.json"
SNR_FILE = "snr.json"
SCORES_FILE = "scores.jsonl"
TIMES_FILE = "times.jsonl"
TIME_KEYS = ("role", "name", "study", "trial", "begin", "end")
SCORE_KEY = ("model", "trial", "split", "benchmark", "task", "metric", "attack", "attack_on")
"""What makes a score one score: a later line with the same values replaces the earlier one."""
SCORE_COLUMNS = (
    "model",
    "arm",
    "trial",
    "seed",
    "split",
    "benchmark",
    "task",
    "version",
    "metric",
    "attack",
    "attack_on",
    "value",
    "stderr",
    "n",
    "higher_is_better",
    "batch_size",
    "limit",
    "num_fewshot",
)


@lru_cache(maxsize=65536)
def check_name(name: str) -> str:
    """Return a name that is that of a folder, and not a path to elsewhere.

    Raises:
        ConfigError: it is not.
    """
    if not name or name in (".", "..") or Path(name).name != name or "\0" in name:
        raise ConfigError(f"{name!r} is not the name of a trial")
    return name


def _check_inside(path: str) -> str:
    if Path(path).is_absolute() or ".." in Path(path).parts or "\0" in path:
        raise ValueError(f"{path!r} is not a path inside the run folder")
    return path


Name = Annotated[str, AfterValidator(check_name)]
Inside = Annotated[str, AfterValidator(_check_inside)]


class RunRecord(BaseModel):
    """run.json. `spec` is the copy from which config.yaml is repaired."""

    model_config = _STRICT

    name: str
    created: str
    status: Annotated[RunStatus, Field(strict=False)]
    finished: str | None = None
    command: str | None = None
    macdrop: str | None = None
    layout: int | None = None
    spec: Any = None


class TrialRecord(BaseModel):
    """trial.json of a sweep's trial, with its config.yaml as `config`.

    A trial without a stage was written before there were stages, when every trial was compared: it counts as final.
    `setting` is equal for trials that differ only in their seed. `cell` is the searched kind of adapter, within which
    plain and MacDrop are compared. `drawn` are the searched values, None for a trial that no search asked for.
    `trained` is when the adapter was complete. `judged` is the last step that the search saw of a trial it pruned.
    `kind` is the kind of failure (`tune.scheduling.failures`). `segments` say on how many workers it was trained, from
    which step on (`tune.storage.segments`). `config_seal` is that of config.yaml.
    """

    model_config = _STRICT

    trial: Name
    model: str
    arm: str
    seed: int | None
    status: Annotated[TaskState, Field(strict=False)]
    stage: Annotated[Stage, Field(strict=False)] = Stage.FINAL
    setting: str | None = None
    cell: dict[str, Any] | None = None
    drawn: dict[str, Any] | None = None
    reason: str | None = None
    started: str | None = None
    finished: str | None = None
    attempts: Number | None = None
    trained: str | None = None
    judged: Number | None = None
    kind: str | None = None
    step: Number | None = None
    total_steps: Number | None = None
    train_loss: Number | None = None
    eval_loss: Number | None = None
    seconds: Number | None = None
    segments: list[dict[str, Any]] | None = None
    config_seal: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)


class Cell(BaseModel):
    """The settings that a kind of adapter sends to the final stage; MacDrop settings best first."""

    model_config = _STRICT

    cell: dict[str, Any]
    plain: str | None
    macdrop: list[str]
    placebos: dict[str, str]

    @property
    def settings(self) -> list[str]:
        return [*([] if self.plain is None else [self.plain]), *self.macdrop, *self.placebos.values()]


class Finalists(BaseModel):
    """finalists.json; see `tune.scheduling.selection`."""

    model_config = _STRICT

    tried: int
    objectives: list[dict[str, Any]]
    seeds: list[int]
    cells: list[Cell]
    settings: dict[str, Annotated[TrainSpec, Field(strict=False)]]

    @model_validator(mode="after")
    def _settings_have_their_names(self) -> Finalists:
        for name in (name for cell in self.cells for name in cell.settings):
            if name not in self.settings or self.settings[name].setting_id() != name:
                raise ValueError(f"{name} is not the setting of that name")
        return self


class ScoreRow(TypedDict, total=False):
    """A row of scores.jsonl. Readers validate rows and keep the mappings: pandas reads the same file."""

    __pydantic_config__ = ConfigDict(strict=True)  # type: ignore[misc]

    model: Required[str]
    trial: Required[Name]
    benchmark: Required[str]
    task: Required[str]
    metric: Required[str]
    value: Required[Number | None]
    arm: str | None
    split: str
    attack: str | None
    attack_on: str | None
    entry: str | None
    judgements: Inside | None
    settings: str | None
    stderr: Number | None
    n: Number | None
    seed: Number | None
    seconds: Number | None


#: A file has hundreds of thousands of rows: a typed dictionary takes a third of the time of a model.
_is_score = TypeAdapter(ScoreRow).validator.validate_python


def parse(record: type[Record], content: dict[str, Any]) -> Record:
    """Validate the content of a file.

    Raises:
        ValueError: a key is missing or has a value that it cannot have; the message names the first such keys.
    """
    try:
        return record.model_validate(content)
    except ValidationError as error:
        raise ValueError(_explain(error)) from None


def read_record(
    path: Path, record: type[Record], problems: list[str] | None = None, within: Path | None = None
) -> Record | None:
    """Read and validate a .json file.

    Args:
        problems: where a damaged file is noted, once, and None returned, instead of raising.

    Raises:
        ConfigError: the file is damaged; the message has the path.
    """
    content = read_mapping(path, problems, within=within)
    if content is None:
        return None
    try:
        return parse(record, content)
    except ValueError as error:
        report_damage(path, error, problems)
        return None


def read_trial(folder: Path, problems: list[str] | None = None, *, config: bool = True) -> TrialRecord | None:
    """Read a trial's record, with its config.yaml unless without `config`.

    Args:
        problems: where damage is noted, and None returned, instead of raising.

    Raises:
        ConfigError: a file is damaged, or the record is that of another trial.
    """
    record = read_record(folder / "trial.json", TrialRecord, problems)
    if record is None:
        return None
    if record.trial != folder.name:
        report_damage(folder / "trial.json", ValueError(f"it is the record of trial {record.trial!r}"), problems)
        return None
    file = folder / "config.yaml"
    if config and file.exists():
        record.config = read_mapping(file, problems, parse=parse_blocks) or {}
    return record


def config_seal(text: str) -> str:
    """Return a checksum of a config.yaml and of what a fine-tuning is in this version of macdrop.

    A file with the seal that it was written with has not changed, and neither has what its content means.
    """
    return hashlib.sha256(f"{_meaning()}\n{text}".encode()).hexdigest()


@cache
def _meaning() -> str:
    return f"{version('macdrop')} " + json.dumps(TrainSpec.model_json_schema(), sort_keys=True)


def check_score(row: dict[str, Any]) -> None:
    """Raise a ValueError unless `row` is a row of scores.jsonl."""
    try:
        _is_score(row)
    except ValidationError as error:
        raise ValueError(_explain(error)) from None


def _explain(error: ValidationError) -> str:
    found = error.errors(include_url=False)
    missing = [str(each["loc"][-1]) for each in found if each["type"] == "missing"]
    if missing:
        return f"it has no {', '.join(missing)}"
    place = ".".join(str(part) for part in found[0]["loc"])
    return f"{place} cannot be {found[0]['input']!r:.80}" if place else found[0]["msg"]

"""The `eval:` block of a run file, and the list of jobs it stands for. No torch, no lm-eval, no file is opened here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from macdrop.attack import NONE, Attack
from tune.config import suites
from tune.config.judge_spec import JudgeSpec
from tune.config.parse import SECTIONS
from tune.config.strict import Strict, Text

PLAIN = NONE
TEST, VALIDATION = SPLITS = ("test", "validation")
"""What a score is for: `test` benchmarks are reported (block `eval:`), `validation` ones select (`validation:`)."""
TEXT_METRICS = ("exact_match", "chrf", "rouge_l")
INHERITABLE = ("attacks", "limit", "batch_size", "num_fewshot")

PositiveInt = Annotated[int, Field(gt=0)]
Paths = Annotated[
    list[Text], Field(min_length=1), BeforeValidator(lambda value: [value] if isinstance(value, str) else value)
]


def _attacks(value: Any) -> list[str]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)):
        raise ValueError(f"a list of attacks is wanted, like [{PLAIN}, zeroing@3]")
    names = [str(Attack.parse(item)) for item in items]
    if not names:
        raise ValueError(f"no attack is listed; write [{PLAIN}] for scores without attack")
    if len(set(names)) < len(names):
        raise ValueError(f"an attack is listed twice: {', '.join(names)}")
    return names


Attacks = Annotated[list[str], BeforeValidator(_attacks)]


class _Entry(Strict):
    """What every benchmark entry may set for itself; a key left out is inherited from the `eval:` block.

    `suite` is written by `eval.suite`: NAME@VERSION of the suite an entry came from, +KEY for a changed definition.
    """

    suite: Text | None = None
    attacks: Attacks | None = None
    limit: PositiveInt | None = None
    batch_size: PositiveInt | None = None

    @model_serializer(mode="wrap")
    def _inherited_stays_out(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Write what is inherited as left out: read back, a null would count as set."""
        kept = self.model_fields_set
        return {key: value for key, value in dump(self).items() if key in kept or key not in INHERITABLE}


class ZeroShot(_Entry):
    """One lm-eval task, or a local multiple-choice file of rows ``{"context", "choices", "label"}``.

    `task` names the lm-eval task when the entry has another name; `data` are local rows in the schema of the task's hub
    data set; `fewshot_data` are rows to draw examples from; `target_delimiter` is for our own format only.
    `split` is the split of the hub data set to score (null: the task's own; local data are a split themselves).
    `metric` is the one of the task's metrics that tables and means show. `max_length` caps prompt and answer together
    (null: `eval.max_length`); a longer prompt loses tokens on the `left`, or in the `middle` if the task generates.
    """

    task: Text | None = None
    data: Paths | None = None
    split: Text | None = None
    fewshot_data: Paths | None = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    metric: Text | None = None
    max_length: Annotated[int, Field(ge=2)] | None = None
    truncation: Literal["left", "middle"] = "left"
    max_new_tokens: PositiveInt | None = None
    target_delimiter: str | None = None

    @model_validator(mode="after")
    def _fits_the_data(self) -> ZeroShot:
        if self.fewshot_data and not self.data:
            raise ValueError("fewshot_data is for tasks with local data; give data: as well")
        if self.split and self.data:
            raise ValueError("split is for data of the hub; a local file is scored whole, so leave split out")
        return self


class Perplexity(_Entry):
    """Text to measure perplexity on: local files, or a hub data set; `limit` counts windows.

    `window` is in tokens, the bos token included (null: the model's maximum, at most `max_window`); `stride` in tokens
    (null: windows do not overlap). `name`, `split` and `column` are those of a hub data set; `column` of row files as
    well. Of the data the first `documents` are taken (null: all; empty ones count with `keep_empty` only) and joined by
    `join`; of the windows the first `windows` (null: all), without a last one that is not full if `full_windows`.
    `bos`: in front of every window, once in front of the text (where the tokenizer puts it), or none.
    """

    data: Paths
    name: Text | None = None
    split: Text = "test"
    column: Text = "text"
    documents: PositiveInt | None = None
    keep_empty: bool = False
    join: str = "\n\n"
    bos: Literal["window", "text", "none"] = "window"
    window: Annotated[int, Field(ge=2)] | None = None
    max_window: Annotated[int, Field(ge=2)] = 2048
    stride: PositiveInt | None = None
    windows: PositiveInt | None = None
    full_windows: bool = False

    @model_validator(mode="after")
    def _stride_fits(self) -> Perplexity:
        if self.window and self.stride and self.stride > self.window - 1:
            raise ValueError(
                f"stride {self.stride} skips tokens: a window of {self.window} holds at most {self.window - 1} tokens "
                "after its first; use a smaller stride, or null for windows that do not overlap"
            )
        return self


def _per_category(value: Any) -> Any:
    match = re.fullmatch(r"(\d+) per category", value.strip()) if isinstance(value, str) else None
    return int(match[1]) if match else value


class Generation(_Entry):
    """Greedy answers to prompts. `format` is found from the columns when it is left out.

    spec_bench: rows ``{"question_id", "category", "turns"}``; `limit` counts questions per category (``2``, or written
    out as ``2 per category``).
    reference: rows ``{"prompt", "reference"}`` or ``{"instruction", "input", "output"}``, scored by `metrics`.
    Answers, and references with them, end before the first text of `stop`.
    `template` (auto: the tokenizer's chat template, else the alpaca prompt; rows with `prompt` are taken as they are).
    """

    data: Paths
    format: Literal["spec_bench", "reference"] | None = None
    template: Literal["auto", "chat", "alpaca", "plain"] = "auto"
    max_new_tokens: PositiveInt = 64
    metrics: list[Literal["exact_match", "chrf", "rouge_l"]] | None = Field(default=None, min_length=1)
    stop: Annotated[list[Text], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)] = []
    limit: Annotated[PositiveInt | None, BeforeValidator(_per_category)] = None

    @model_validator(mode="after")
    def _metrics_need_references(self) -> Generation:
        if self.metrics and self.format == "spec_bench":
            raise ValueError("metrics need references, and format spec_bench has none; leave metrics out")
        return self


QueuedTask = ZeroShot | Perplexity | Generation


def _named(value: Any) -> Any:
    """Accept a name, a list of names, or a mapping; a bare string as a value is the data."""
    if value is None:
        return {}
    items = [value] if isinstance(value, str) else value
    if isinstance(items, Mapping):
        return {name: {} if v is None else {"data": v} if isinstance(v, str) else v for name, v in items.items()}
    if not isinstance(items, (list, tuple)):
        raise ValueError("a mapping of names to settings is wanted, or a list of names")
    named: dict[str, Any] = {}
    for item in items:
        if not isinstance(item, (str, Mapping)):
            raise ValueError(f"{item!r:.60} is no name; in a list write names, or name: settings")
        for name, entry in (_named(item) if isinstance(item, Mapping) else {item: {}}).items():
            if name in named:
                raise ValueError(f"{name!r} is listed twice; give the second one another name")
            named[name] = entry
    return named


class EvalSpec(Strict):
    """The `eval:` block: three sections of named benchmarks, and the settings they share.

    `batch_size` is fixed and kept in every row. `limit`: items of each task (null: all). `num_fewshot` null: the task's
    own number. `max_length` null: the model's. `add_bos_token` null: as the tokenizer does. `attack_on`: base rows with
    the adapter in place, rows of the merged weights, or both. `judge` gives the answers of `generation` a score.
    `suite` (a name or a list) and `local` (the folder of the suites' files) are replaced by what they stand for when a
    block is read, and never written (`tune.config.suites.expand`).
    """

    suite: None = Field(None, exclude=True)
    local: None = Field(None, exclude=True)
    batch_size: PositiveInt = 16
    limit: PositiveInt | None = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = 0
    max_length: Annotated[int, Field(ge=2)] | None = None
    add_bos_token: bool | None = None
    attacks: Attacks = [PLAIN]
    attack_on: Literal["base", "merged", "both"] = "base"
    zero_shot: Annotated[dict[Text, ZeroShot], BeforeValidator(_named)] = {}
    perplexity: Annotated[dict[Text, Perplexity], BeforeValidator(_named)] = {}
    generation: Annotated[dict[Text, Generation], BeforeValidator(_named)] = {}
    judge: JudgeSpec | None = None

    @model_validator(mode="before")
    @classmethod
    def _expanded(cls, value: Any) -> Any:
        return suites.expand(value) if isinstance(value, Mapping) else value

    @field_validator("batch_size", mode="before")
    @classmethod
    def _fixed(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(f"batch_size must be a whole number, not {value!r}: scores move with it, so it is fixed")
        return value

    def entry(self, job: EvalJob) -> QueuedTask:
        """The benchmark entry that `job` scores."""
        return getattr(self, job.benchmark)[job.task]

    def inherited(self, entry: QueuedTask, key: str) -> Any:
        """`key` of the entry where it is set there (null counts as set), else of the block."""
        return getattr(entry if key in entry.model_fields_set else self, key)


@dataclass(frozen=True)
class EvalJob:
    """One benchmark entry under one attack: the unit that is scored, scheduled and cached.

    `split` says which block of the run file asks for it, one of `SPLITS`.
    """

    benchmark: str
    task: str
    attack: str = PLAIN
    attack_on: str | None = None
    split: str = TEST

    @property
    def key(self) -> str:
        """A short readable name, unique within a run; that of a validation job begins with its split."""
        split = "" if self.split == TEST else self.split
        return "/".join(part for part in (split, self.benchmark, self.task, self.attack, self.attack_on) if part)


def jobs(spec: EvalSpec, split: str = TEST) -> list[EvalJob]:
    """List what `spec` asks for, in file order: for each entry the plain score and then its attacks."""
    places = ["base", "merged"] if spec.attack_on == "both" else [spec.attack_on]
    found = []
    for section in SECTIONS:
        for name, entry in getattr(spec, section).items():
            for attack in entry.attacks or spec.attacks:
                places_of = [None] if attack == PLAIN else places
                found += [EvalJob(section, name, attack, place, split) for place in places_of]
    return found

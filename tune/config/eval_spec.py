"""The `eval:` block of a run file, and the jobs it stands for. Loads no torch and no lm-eval, and opens no file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic.fields import FieldInfo

from tune.config import suites
from tune.config.endpoints.server_spec import GenerationServer
from tune.config.eval_entries import (
    ENTRIES,
    NO_ATTACK,
    Attacks,
    BenchmarkEntry,
    Generation,
    Perplexity,
    PositiveInt,
    ZeroShot,
    benchmark_name,
)
from tune.config.judge_spec import JudgeSpec
from tune.config.parse import SECTIONS
from tune.config.sections import Location, Strict, Text

TEST, VALIDATION = SPLITS = ("test", "validation")
"""What a score is for: `test` benchmarks (block `eval:`) are reported, `validation` benchmarks select settings."""


def _named(value: Any) -> Any:
    """Accept a name, a list of names, or a mapping; a bare string as a value is the data."""
    if value is None:
        return {}
    items = [value] if isinstance(value, str) else value
    if isinstance(items, Mapping):
        for name in filter(lambda name: isinstance(name, str), items):
            benchmark_name(name)
        return {name: {} if v is None else {"data": v} if isinstance(v, str) else v for name, v in items.items()}
    if not isinstance(items, (list, tuple)):
        raise ValueError("a mapping of names to settings is wanted, or a list of names")
    named: dict[str, Any] = {}
    for item in items:
        if not isinstance(item, (str, Mapping)):
            raise ValueError(f"{item!r:.60} is not a name; in a list write names, or name: settings")
        for name, entry in (_named(item) if isinstance(item, Mapping) else {item: {}}).items():
            if name in named:
                raise ValueError(f"{name!r} is listed twice; give the second one another name")
            named[name] = entry
    return named


class EvalSpec(Strict):
    """The `eval:` block: a section of named benchmarks per kind, and the settings they share.

    `suite` and `local` are replaced by what they stand for when a block is read, and never written
    (`tune.config.suites.expand`).
    """

    suite: None = Field(
        default=None,
        exclude=True,
        description=(
            "Shipped suites to include, a name or a list (see `macdrop suites`). Your own keys override theirs; an "
            "entry set to `off` is left out."
        ),
    )
    local: None = Field(
        default=None,
        exclude=True,
        description="Folder with the suites' data files, laid out as `macdrop suites NAME` lists them.",
    )
    batch_size: PositiveInt = Field(
        default=16,
        description="Evaluation batch size. It is fixed and stored with every score, because scores depend on it.",
    )
    limit: PositiveInt | None = Field(
        default=None, description="Maximum number of examples per benchmark; `null` is all."
    )
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(
        default=0, description="Number of few-shot examples in the prompt; `null` uses the task's own."
    )
    max_length: Annotated[int, Field(ge=2)] | None = Field(
        default=None,
        description="Maximum number of tokens of prompt and answer together; `null` is the model's maximum.",
    )
    add_bos_token: bool | None = Field(default=None, description="Prepend the bos token; `null` follows the tokenizer.")
    attacks: Attacks = Field(
        default=[NO_ATTACK],
        description="Attacks to score under: `none`, `zeroing@K`, `retaining@K` and `random@K` (random rows).",
    )
    attack_on: Literal["base", "merged", "both"] = Field(
        default="base",
        description="Which weights are attacked: `base` rows with the adapter in place, `merged` weights, or `both`.",
    )
    zero_shot: Annotated[dict[Text, ZeroShot], BeforeValidator(_named)] = Field(
        default={}, description="lm-eval tasks: a list of names, or a mapping of names to the keys below."
    )
    perplexity: Annotated[dict[Text, Perplexity], BeforeValidator(_named)] = Field(
        default={}, description="Perplexity texts: a mapping of names to the keys below."
    )
    generation: Annotated[dict[Text, Generation], BeforeValidator(_named)] = Field(
        default={}, description="Generation prompts: a mapping of names to the keys below."
    )
    task_path: Location | None = Field(
        default=None,
        description=(
            "Folder with lm-eval task YAMLs of your own, named in `zero_shot` like any task; it is sent to the "
            "evaluation actors. See [your own tasks](benchmarks.md#your-own-tasks)."
        ),
    )
    code_path: Location | None = Field(
        default=None,
        description=(
            "Folder with the modules of your own metrics (`MODULE:FUNCTION` in `generation.NAME.metrics`); `null` is "
            "the folder of the run file. They and what they import from there are sent to the evaluation actors."
        ),
    )
    code_version: Text | None = Field(
        default=None,
        description=(
            "Fingerprint of the files behind your own metrics and tasks, recorded with a run: files that differ from "
            "it are refused. `null` takes them as they are."
        ),
    )
    generation_server: GenerationServer | None = Field(
        default=None,
        description=(
            "Server that decodes the answers of `generation`; `null` decodes in the evaluation actors. See "
            "[a generation server](benchmarks.md#a-generation-server)."
        ),
    )
    judge: JudgeSpec | None = Field(
        default=None,
        description="Judge of generated answers: a model name, or a mapping of the keys below; `null` is no judge.",
    )

    @model_validator(mode="before")
    @classmethod
    def _expanded(cls, value: Any) -> Any:
        return suites.expand(value) if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _own_files_are_used(self) -> EvalSpec:
        if self.task_path is not None and not self.zero_shot:
            raise ValueError("task_path has tasks for zero_shot, which lists none; name some, or leave task_path out")
        unused = {
            "code_path": self.code_path is not None and not self.own_metrics,
            "code_version": self.code_version is not None and not (self.own_metrics or self.task_path),
        }
        if key := next((key for key, wrong in unused.items() if wrong), None):
            raise ValueError(
                f"{key} is for metrics of your own, and no generation.NAME.metrics has one (MODULE:FUNCTION); "
                "leave it out"
            )
        return self

    @model_validator(mode="after")
    def _server_can_generate(self) -> EvalSpec:
        if self.generation_server is None:
            return self
        if not self.generation:
            raise ValueError("generation_server answers the prompts of generation, which lists none; leave it out")
        for name, entry in self.generation.items():
            if attacked := [attack for attack in entry.attacks or self.attacks if attack != NO_ATTACK]:
                raise ValueError(
                    f"generation_server cannot answer under {attacked[0]}: an attack edits weights, and a server keeps "
                    f"its own. Set generation.{name}.attacks: none, or leave generation_server out"
                )
        return self

    @field_validator("batch_size", mode="before")
    @classmethod
    def _fixed(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(f"batch_size must be a whole number, not {value!r}: scores move with it, so it is fixed")
        return value

    def entries(self, section: str) -> dict[str, BenchmarkEntry]:
        """Return the entries of a section by name; none in a block made before the section was registered."""
        return getattr(self, section, {})

    @property
    def own_metrics(self) -> list[str]:
        """Names of the user's own metrics in the block, MODULE:FUNCTION, each once."""
        return list(dict.fromkeys(name for entry in self.generation.values() for name in entry.own_metrics))

    def entry(self, job: EvalJob) -> BenchmarkEntry:
        """Return the benchmark entry that `job` scores."""
        return self.entries(job.benchmark)[job.task]

    def inherited(self, entry: BenchmarkEntry, key: str) -> Any:
        """Return `key` of the entry where it is set there (null counts as set), else of the block."""
        return getattr(entry if key in entry.model_fields_set else self, key)


@dataclass(frozen=True)
class EvalJob:
    """One benchmark entry under one attack: the unit that is scored, scheduled and cached.

    `split` is the block of the run file that lists it, one of `SPLITS`.
    """

    benchmark: str
    task: str
    attack: str = NO_ATTACK
    attack_on: str | None = None
    split: str = TEST

    @property
    def key(self) -> str:
        """A short readable name, unique within a run; validation jobs begin with their split."""
        split = "" if self.split == TEST else self.split
        return "/".join(part for part in (split, self.benchmark, self.task, self.attack, self.attack_on) if part)

    @property
    def file_name(self) -> str:
        """The name of the file with its answers."""
        return f"{self.key.replace('/', '-')}.jsonl"


def jobs(spec: EvalSpec, split: str = TEST) -> list[EvalJob]:
    """List what `spec` asks for, in file order: for each entry the plain score and then its attacks."""
    places = ["base", "merged"] if spec.attack_on == "both" else [spec.attack_on]
    found = []
    for section in SECTIONS:
        for name, entry in spec.entries(section).items():
            for attack in entry.attacks or spec.attacks:
                places_of = [None] if attack == NO_ATTACK else places
                found += [EvalJob(section, name, attack, place, split) for place in places_of]
    return found


def add_section(section: str, entry: type[BenchmarkEntry]) -> None:
    """Let `eval:` blocks hold a section of another kind of benchmark.

    Models with an `EvalSpec` in them have to be rebuilt afterwards; `tune.evaluation.benchmark.register_benchmark`
    does it.
    """
    entries: Any = dict.__class_getitem__((Text, entry))
    annotation: Any = Annotated[entries, BeforeValidator(_named)]
    named = FieldInfo.from_annotated_attribute(annotation, {})
    named.description = (entry.__doc__ or "").strip().partition("\n")[0] or None
    ENTRIES[section] = entry
    SECTIONS.append(section)
    EvalSpec.model_fields[section] = named
    EvalSpec.model_rebuild(force=True)

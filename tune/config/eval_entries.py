"""The entries of an `eval:` block: one class for each kind of benchmark, with the keys that a user may set."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from macdrop.attack import NONE, Attack
from macdrop.errors import nearest
from tune.config.sections import Location, Strict, Text, UserPath, shown
from tune.config.train.data_keys import ASKING_TEMPLATES, check_template

NO_ATTACK = NONE
#: The name of a mean over benchmarks, among their names.
MEAN = "mean"
#: Bytes of a benchmark's name: a file is named after it, with its section and attack, and a file's name has 255.
NAME_BYTES = 120
TEXT_METRICS = ("exact_match", "chrf", "rouge_l")
#: A metric of the user's own: a module of the block's `code_path`, and a function in it.
OWN_METRIC = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"
#: Keys of the block that an entry may set for itself.
INHERITABLE = ("attacks", "limit", "batch_size", "num_fewshot")

PositiveInt = Annotated[int, Field(gt=0)]


def benchmark_name(name: str) -> str:
    """Return the name of a benchmark as it is.

    Raises:
        ValueError: no file can be named after it, or the name means something else among scores.
    """
    try:
        shown(name)
    except ValueError as error:
        raise ValueError(f"a benchmark cannot have this name: {error}") from None
    wrong = None
    if len(name.encode()) > NAME_BYTES:
        wrong = f"it has {len(name.encode())} bytes, and {NAME_BYTES} are allowed"
    elif found := next((mark for mark in "/\\@" if mark in name), None):
        wrong = f"{found!r} separates the parts of a score's name"
    elif name != name.strip() or name.startswith("."):
        wrong = "it begins or ends with a space, or begins with a dot"
    elif name.split()[:1] == [MEAN]:
        wrong = f"means over benchmarks are called {MEAN!r}"
    if wrong:
        raise ValueError(f"{name!r:.60} cannot name a benchmark: {wrong}. Give it another name.")
    return name


def _one_or_several(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Paths = Annotated[list[Location], Field(min_length=1), BeforeValidator(_one_or_several)]


def _attacks(value: Any) -> list[str]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)):
        raise ValueError(f"a list of attacks is wanted, like [{NO_ATTACK}, zeroing@3]")
    names = [str(Attack.parse(item)) for item in items]
    if not names:
        raise ValueError(f"no attack is listed; write [{NO_ATTACK}] for scores without attack")
    if len(set(names)) < len(names):
        raise ValueError(f"an attack is listed twice: {', '.join(names)}")
    return names


Attacks = Annotated[list[str], BeforeValidator(_attacks)]


class BenchmarkEntry(Strict):
    """Base of every benchmark entry; an inheritable key that is left out is taken from the `eval:` block.

    `suite` is written by `eval.suite`: NAME@VERSION of the suite an entry came from, +KEY for a changed definition.
    """

    suite: Text | None = Field(
        default=None, description="Filled in by `eval.suite`: the suite that this entry came from."
    )
    attacks: Attacks | None = Field(default=None, description="Overrides `attacks` of the block.")
    limit: PositiveInt | None = Field(default=None, description="Overrides `limit` of the block.")
    batch_size: PositiveInt | None = Field(default=None, description="Overrides `batch_size` of the block.")

    @model_serializer(mode="wrap")
    def _inherited_stays_out(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave inherited keys out: read back, a null would count as set."""
        kept = self.model_fields_set
        return {key: value for key, value in dump(self).items() if key in kept or key not in INHERITABLE}


class ZeroShot(BenchmarkEntry):
    """One lm-eval task, or a local multiple-choice file of rows ``{"context", "choices", "label"}``."""

    task: Text | None = Field(default=None, description="Task name in lm-eval, if NAME differs from it.")
    data: Paths | None = Field(
        default=None,
        description=(
            "Local files with rows in the task's own schema; for a custom task, rows `{context, choices, label}`."
        ),
    )
    split: Text | None = Field(
        default=None,
        description="Split of the Hub data set; `null` is the one lm-eval scores. Not allowed with `data`.",
    )
    fewshot_data: Paths | None = Field(
        default=None, description="Local files to draw few-shot examples from; needs `data`."
    )
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(
        default=None, description="Overrides `num_fewshot` of the block."
    )
    metric: Text | None = Field(default=None, description="The task's metric that tables and means show.")
    max_length: Annotated[int, Field(ge=2)] | None = Field(
        default=None, description="Maximum number of tokens of prompt and answer together; `null` uses the block's."
    )
    truncation: Literal["left", "middle"] = Field(
        default="left",
        description="Where longer prompts are cut: on the `left`, or in the `middle` (generative tasks only).",
    )
    max_new_tokens: PositiveInt | None = Field(
        default=None, description="Maximum number of generated tokens (generative tasks only)."
    )
    target_delimiter: str | None = Field(
        default=None, description="Text between context and choice (custom tasks only)."
    )

    @model_validator(mode="after")
    def _fits_the_data(self) -> ZeroShot:
        if self.fewshot_data and not self.data:
            raise ValueError("fewshot_data is for tasks with local data; give data: as well")
        if self.split and self.data:
            raise ValueError("split is for data of the hub; a local file is scored whole, so leave split out")
        return self


class Perplexity(BenchmarkEntry):
    """Text to measure perplexity on: local files, or a Hub data set."""

    limit: PositiveInt | None = Field(default=None, description="Overrides `limit` of the block; counts windows.")
    data: Paths = Field(description="Local text files, local rows with a text column, or a Hub data set.")
    name: Text | None = Field(default=None, description="Configuration name of the Hub data set.")
    split: Text = Field(default="test", description="Split of the Hub data set.")
    column: Text = Field(default="text", description="Column that holds the text.")
    documents: PositiveInt | None = Field(
        default=None, description="Number of documents to use, from the start; `null` uses all."
    )
    keep_empty: bool = Field(default=False, description="Keep empty documents.")
    join: str = Field(default="\n\n", description="Separator between documents.")
    bos: Literal["window", "text", "none"] = Field(
        default="window",
        description="Where bos tokens go: in front of every `window`, once in front of the whole `text`, or `none`.",
    )
    window: Annotated[int, Field(ge=2)] | None = Field(
        default=None,
        description="Window length in tokens, including bos; `null` is the model's maximum, up to `max_window`.",
    )
    max_window: Annotated[int, Field(ge=2)] = Field(
        default=2048, description="Upper limit of the window length if `window` is `null`."
    )
    stride: PositiveInt | None = Field(
        default=None,
        description="Tokens between the starts of overlapping windows; `null` means that windows do not overlap.",
    )
    windows: PositiveInt | None = Field(
        default=None, description="Number of windows to score, from the start; `null` scores all."
    )
    full_windows: bool = Field(default=False, description="Drop a last window that is not full.")

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


def _metric(name: str) -> str:
    if name in TEXT_METRICS or re.fullmatch(OWN_METRIC, name):
        return name
    raise ValueError(
        f"{name!r:.80} is not a metric.{nearest(name, TEXT_METRICS)} Allowed: {', '.join(TEXT_METRICS)}, or a function "
        "of your own as MODULE:FUNCTION, such as my_metrics:score for score(answer, row) in my_metrics.py"
    )


class Generation(BenchmarkEntry):
    """Greedy answers to prompts.

    spec_bench: rows ``{"question_id", "category", "turns"}``; `limit` counts questions per category (``2``, or written
    out as ``2 per category``).
    reference: rows ``{"prompt", "reference"}`` or ``{"instruction", "input", "output"}``, scored by `metrics`.
    Answers are cut before the first text of `stop`, references with them; rows with `prompt` are taken as they are.
    """

    data: Paths = Field(description="Spec-Bench question files, or files with rows `{prompt, reference}`.")
    format: Literal["spec_bench", "reference"] | None = Field(
        default=None, description="`spec_bench` or `reference`; `null` detects it from the columns."
    )
    template: UserPath = Field(
        default="auto",
        description=(
            "Prompt template: `chat`, `alpaca`, `plain`, `auto` (the tokenizer's chat template if there is one, else "
            "alpaca), or a chat template in a file `FILE.jinja`."
        ),
    )
    thinking: bool = Field(
        default=False,
        description=(
            "Ask for a thought before the answer, where the chat template has a thinking mode; thoughts are not scored."
        ),
    )
    max_new_tokens: PositiveInt = Field(default=64, description="Maximum number of greedily decoded tokens per turn.")
    metrics: list[Annotated[str, AfterValidator(_metric)]] | None = Field(
        default=None,
        min_length=1,
        description=(
            "Any of `exact_match`, `chrf`, `rouge_l`, and functions of your own as `MODULE:FUNCTION`; `null` is the "
            "first three if there are references. See [your own metrics](benchmarks.md#your-own-metrics)."
        ),
    )
    stop: Annotated[list[Text], BeforeValidator(_one_or_several)] = Field(
        default=[], description="An answer is cut before the first occurrence of any of these texts."
    )
    limit: Annotated[PositiveInt | None, BeforeValidator(_per_category)] = Field(
        default=None,
        description=(
            "Overrides `limit` of the block; counts prompts, for Spec-Bench questions per category (`N per category`)."
        ),
    )

    @field_validator("template")
    @classmethod
    def _known_template(cls, value: str) -> str:
        return check_template(value, ASKING_TEMPLATES)

    @model_validator(mode="after")
    def _metrics_fit(self) -> Generation:
        if self.text_metrics and self.metrics and self.format == "spec_bench":
            raise ValueError(
                f"{self.text_metrics[0]} needs references, and format spec_bench has none; leave it out of metrics"
            )
        names = [name.partition(":")[2] or name for name in self.metrics or ()]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"metrics has two of the name {twice!r}, as their scores would have; rename a function")
        return self

    @property
    def own_metrics(self) -> list[str]:
        """Names of the user's own metrics, MODULE:FUNCTION."""
        return [name for name in self.metrics or () if ":" in name]

    @property
    def text_metrics(self) -> list[str]:
        """Names of the metrics that compare an answer with references."""
        return list(TEXT_METRICS) if self.metrics is None else [name for name in self.metrics if ":" not in name]


#: The model of each section's entries.
ENTRIES: dict[str, type[BenchmarkEntry]] = {"zero_shot": ZeroShot, "perplexity": Perplexity, "generation": Generation}

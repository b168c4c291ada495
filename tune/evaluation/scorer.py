"""Scorer of one model: one benchmark under one attack at a time; model, tasks and data stay resident between jobs."""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch

from macdrop.attack import Attack, attacked_rows
from macdrop.errors import ConfigError, MacDropError
from macdrop.hooks import MacDrop
from macdrop.masking import attacked
from macdrop.weights import MassiveWeights
from tune.config.eval_spec import NO_ATTACK, EvalJob, EvalSpec, jobs
from tune.config.parse import SECTIONS
from tune.data.locations import is_local
from tune.evaluation.benchmark import BENCHMARKS, Benchmark
from tune.evaluation.generation import GenerationBenchmark
from tune.evaluation.logits import Logits, is_unsplit, plain_logits
from tune.evaluation.merging import merged_weights
from tune.evaluation.own.own_metrics import item_notes
from tune.evaluation.prefix_cache import PrefixCache
from tune.forward.head import UNSPLIT
from tune.storage.atomic import atomic_write_text
from tune.training.quiet import quiet_while_scoring

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

#: The word of a row's settings that counts prompts which did not fit, as benchmarks write it.
_CUT = re.compile(r"\b(prompts_cut_left|shortened)=(\d+)")
#: The word of a row's settings that says that requests were computed one by one.
_APART = "contexts=apart"
_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length", "max_seq_len")


class Row(TypedDict):
    """One score. `value` is None where no item has one; `stderr` is over items; `attack_on` is None without attack.

    `settings` are ``key=value`` words.
    """

    benchmark: str
    task: str
    version: str
    metric: str
    attack: str
    attack_on: str | None
    value: float | None
    stderr: float | None
    n: int
    higher_is_better: bool | None
    batch_size: int
    limit: int | None
    num_fewshot: int | None
    max_length: int
    settings: str


class Scorer:
    """Scores jobs of one evaluation spec with one resident model.

    Args:
        model: a causal language model, bare or with a PEFT adapter; `score` may be given another one of the same base.
        tokenizer: its tokenizer; a copy is used, the caller's is not changed.
        spec: what to score.
        weights: the massive weights of the base, needed for attacks.

    Raises:
        ConfigError: attacks without `weights` or on more rows than the layer has, a max_length beyond the model's, or
            an add_bos_token that the tokenizer cannot follow.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        spec: EvalSpec,
        weights: MassiveWeights | None = None,
    ) -> None:
        self.model, self.spec, self.weights = model, spec, weights
        self.tokenizer, self.max_length = _reading(spec, model.config, tokenizer)
        #: Notes for the user on what `prepare` and `score` met in the data, each once.
        self.notes: list[str] = []
        for job in jobs(spec):
            self._check_attack(job)
        self._benchmarks: dict[str, Benchmark] = {}
        self._resident: dict[tuple[str, str], Any] = {}

    def _check_attack(self, job: EvalJob) -> None:
        if job.attack == NO_ATTACK:
            return
        if self.weights is None:
            raise ConfigError(
                f"Attack {job.attack!r} needs the massive weights of this model: run `macdrop scan` first."
            )
        attack = Attack.parse(job.attack)
        attacked_rows(self.weights, attack.kind, attack.k)

    def jobs(self) -> list[EvalJob]:
        """Return the jobs of the spec, in file order."""
        return jobs(self.spec)

    def prepare(self) -> None:
        """Load the tasks and data of all jobs, so that an error in any of them shows before the first score."""
        for job in self.jobs():
            with quiet_while_scoring() as heard:
                self._data(job)
            self._note(job, heard)
        self._generation_with(None)

    def _generation_with(self, adapter: str | Path | None) -> None:
        """Let a generation server, if there is one, answer with an adapter."""
        found = self._benchmarks.get("generation")
        if isinstance(found, GenerationBenchmark):
            found.connect()
            found.adapter = adapter

    def score(
        self,
        job: EvalJob,
        model: PreTrainedModel | PeftModel | None = None,
        answers_path: str | Path | None = None,
        drop: MacDrop | None = None,
        prefix: PrefixCache | None = None,
        limit: int | None = None,
        within: str | Path | None = None,
        adapter: str | Path | None = None,
    ) -> list[Row]:
        """Score one job.

        Args:
            job: one of `jobs()`.
            model: the model to score, e.g. the base with an adapter in place; by default the one given at construction.
            answers_path: the jsonl file for what was measured item by item (answers, hits, losses), written atomically.
            drop: a `macdrop.MacDrop` attached to the model; it must not mask anything.
            prefix: a cache that the plain score and the attacks of one entry share; the caller keeps it from job to job
                as long as the weights do not change. Scores are bit-identical with it.
            limit: items per task, in place of the entry's own `limit`.
            adapter: the folder of the model's adapter, for a generation server; None for the base.
            within: a folder above `answers_path` whose storage is waited for; see `tune.storage.atomic.lasting`.

        Returns:
            rows, at least one of which has the job's task as its `task`; parts of it (categories of Spec-Bench, members
            of an lm-eval group) are named `task/part`.

        Raises:
            ConfigError, DataError: the entry cannot be scored as written.
            BenchmarkError: scoring failed. MacDropError: masks were on.
        """
        self._check_attack(job)
        model = self.model if model is None else model
        entry = self.spec.entry(job)
        batch_size = self.spec.inherited(entry, "batch_size") or self.spec.batch_size
        limit = limit or self.spec.inherited(entry, "limit")
        with (
            quiet_while_scoring() as heard,
            masks_off(model, drop),
            self._under(job, model),
            self._sharing(job, model, prefix) as logits,
        ):
            benchmark, data = self._benchmark(job), self._data(job)
            self._generation_with(adapter)
            rows, items = benchmark.score(data, model, batch_size, limit, logits)
        if answers_path is not None:
            lines = (
                json.dumps(item | {"attack": job.attack, "attack_on": job.attack_on}, default=str) for item in items
            )
            atomic_write_text(answers_path, "".join(line + "\n" for line in lines), within)
        scored = [self._row(job, row, batch_size, limit) for row in rows]
        assert any(row["task"] == job.task for row in scored), "every job has a row of its own name"
        self._note(job, heard, next(row for row in scored if row["task"] == job.task))
        self._add_notes([*([UNSPLIT] if is_unsplit(model) else []), *item_notes(_where(job), items)])
        return scored

    def _note(self, job: EvalJob, heard: Mapping[str, int], row: Row | None = None) -> None:
        """Note what lm-eval warned of, how many prompts were cut for a score, and contexts that were not shared."""
        name = _where(job)
        found = [f"{name}: lm-eval warns {count} time(s): {said:.300}" for said, count in heard.items()]
        if row is not None and (cut := _CUT.search(row["settings"])) and int(cut[2]):
            share = f"{cut[2]} of {row['n']} prompts ({int(cut[2]) / row['n']:.0%})"
            where = "in the middle" if cut[1] == "shortened" else "on the left"
            found.append(f"{name}: {share} are too long for max_length {row['max_length']} and were cut {where}")
        if row is not None and _APART in row["settings"].split():
            found.append("requests did not share their contexts, as the model computes them differently then: slower")
        self._add_notes(found)

    def _add_notes(self, found: Iterable[str]) -> None:
        self.notes += [note for note in dict.fromkeys(found) if note not in self.notes]

    def items(self, job: EvalJob, limit: int | None = None) -> int:
        """Return the number of documents, windows or questions that `score` goes through."""
        limit = limit or self.spec.inherited(self.spec.entry(job), "limit")
        return self._benchmark(job).count(self._data(job), limit)

    def _benchmark(self, job: EvalJob) -> Benchmark:
        """Return the job's kind of benchmark, created on first use."""
        if job.benchmark not in self._benchmarks:
            made = BENCHMARKS[job.benchmark](self.spec, self.tokenizer, self.max_length)
            self._benchmarks[job.benchmark] = made
        return self._benchmarks[job.benchmark]

    def _data(self, job: EvalJob) -> Any:
        """Return the resident data of the job's entry, loaded on first use."""
        key = (job.benchmark, job.task)
        if key not in self._resident:
            self._resident[key] = self._benchmark(job).load(job.task, self.spec.entry(job))
        return self._resident[key]

    @contextlib.contextmanager
    def _sharing(
        self, job: EvalJob, model: PreTrainedModel | PeftModel, prefix: PrefixCache | None
    ) -> Iterator[Logits]:
        """Yield the function that computes logits, sharing outputs with the entry's other attacks where possible."""
        benchmark = (job.split, job.benchmark, job.task)
        on_base = [other for other in self.jobs() if other.attack_on != "merged"]
        several = sum((other.benchmark, other.task) == benchmark[1:] for other in on_base) > 1
        if prefix is None or job.attack_on == "merged" or not several or self.weights is None:
            yield plain_logits
            return
        with prefix.sharing(model, self.weights, benchmark):
            yield prefix.logits

    @contextlib.contextmanager
    def _under(self, job: EvalJob, model: PreTrainedModel | PeftModel) -> Iterator[None]:
        """Apply the job's attack inside the block: to base rows under the adapter, or to merged weights."""
        if job.attack == NO_ATTACK:
            yield
            return
        assert self.weights is not None, "attacks without weights were refused before"
        attack = Attack.parse(job.attack)
        place = merged_weights(model) if job.attack_on == "merged" else contextlib.nullcontext()
        with place, attacked(model, self.weights, attack.kind, attack.k):
            yield

    def _row(self, job: EvalJob, measured: dict[str, Any], batch_size: int, limit: int | None) -> Row:
        common = {
            "benchmark": job.benchmark,
            "task": job.task,
            "attack": job.attack,
            "attack_on": job.attack_on,
            "batch_size": batch_size,
            "limit": limit,
            "max_length": self.max_length,
        }
        merged = common | measured
        suite = self.spec.entry(job).suite
        if suite:
            merged["settings"] = f"{merged['settings']} suite={suite}"
        return {key: merged[key] for key in Row.__annotations__}  # type: ignore[return-value]


def _where(job: EvalJob) -> str:
    """Return the name of a job's benchmark in notes."""
    return f"{job.benchmark}/{job.task}"


def check_readable(spec: EvalSpec, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Read the local benchmarks of a block as a scorer of this model does; nothing is downloaded.

    Raises:
        ConfigError, DataError: an entry cannot be scored with this model as written.
    """
    tokenizer, max_length = _reading(spec, config, tokenizer)
    for section in SECTIONS:
        sources = {name: getattr(entry, "data", None) for name, entry in spec.entries(section).items()}
        local = [name for name, data in sources.items() if data and all(map(is_local, data))]
        if local:
            with quiet_while_scoring():
                benchmark = BENCHMARKS[section](spec, tokenizer, max_length)
                for name in local:
                    benchmark.load(name, spec.entries(section)[name])


def _reading(
    spec: EvalSpec, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedTokenizerBase, int]:
    """Return a tokenizer that follows the block, and the tokens that prompt and answer may take."""
    positions = max_positions(config, tokenizer)
    if spec.max_length and spec.max_length > positions:
        raise ConfigError(f"eval.max_length {spec.max_length} is more than the {positions} positions of this model.")
    return _with_bos(copy.deepcopy(tokenizer), spec.add_bos_token), spec.max_length or positions


def _with_bos(tokenizer: PreTrainedTokenizerBase, add_bos: bool | None) -> PreTrainedTokenizerBase:
    """Switch the bos before texts on or off; None leaves the tokenizer unchanged.

    Raises:
        ConfigError: the tokenizer has no bos token, or cannot be switched.
    """
    if add_bos is None:
        return tokenizer
    bos = tokenizer.bos_token_id
    if bos is None and add_bos:
        raise ConfigError("eval.add_bos_token: this tokenizer has no bos token; leave the key out.")
    tokenizer.add_bos_token = add_bos
    if (tokenizer("a")["input_ids"][:1] == [bos]) != add_bos:
        raise ConfigError("eval.add_bos_token: the bos token of this tokenizer cannot be switched; leave the key out.")
    return tokenizer


def max_positions(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the longest sequence of a model: from its config, else from its tokenizer, else 2048."""
    positions = config_positions(config)
    if positions is not None:
        return positions
    length = tokenizer.model_max_length
    return length if isinstance(length, int) and length < 1_000_000 else 2048


def config_positions(config: PreTrainedConfig) -> int | None:
    """Return the longest sequence that a model's config names, None if it names none."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    lengths = (getattr(text, key, None) for key in _LENGTH_KEYS)
    return next((length for length in lengths if isinstance(length, int) and length > 0), None)


@contextlib.contextmanager
def masks_off(model: PreTrainedModel | PeftModel, drop: MacDrop | None = None) -> Iterator[None]:
    """Switch to eval mode without gradients, and verify that MacDrop masks nothing; modes are restored afterwards.

    Raises:
        MacDropError: `drop` is inside a training step, or dropped entries while scoring.
    """
    if drop is not None and drop.active:
        raise MacDropError("MacDrop masks are on: a model is scored between training steps, never inside one.")
    before = None if drop is None else drop.entries_dropped
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # not inference_mode: cached buffers would stay inference tensors, and training would fail
        with torch.no_grad():
            if any(module.training for module in model.modules()):
                raise MacDropError("Part of the model stays in training mode after model.eval(); it cannot be scored.")
            yield
            if drop is not None and (drop.active or drop.entries_dropped != before):
                raise MacDropError("MacDrop dropped entries while the model was scored; the scores are void.")
    finally:
        for module, training in modes:
            module.training = training

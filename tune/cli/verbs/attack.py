"""`macdrop attack`: perplexity and accuracy of a model without its massive weights, or with them alone."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from macdrop.errors import ConfigError
from tune.cli.console import console, line, table
from tune.cli.options import Adapter, Bf16, Bos, Model, Quantised, Revision, Text, Trust
from tune.cli.scan_tables import quantised
from tune.cli.source import Source, check_adapter

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from macdrop.weights import MassiveWeights
    from tune.analysis.under_attack import Scored
    from tune.config.eval_spec import EvalSpec

#: Rows to zero or retain unless --k or --attack is given.
KS = (1, 3, 5, 10)
KINDS = ("zeroing", "retaining", "random")
#: An option of the tasks, as the command line spells it, and its key of an `eval:` block.
TASK_OPTIONS = {"limit": "--limit", "batch_size": "--batch-size", "num_fewshot": "--num-fewshot"}
EXAMPLES = (
    "Examples: macdrop attack zoo:planted-llama --k 1 --k 3 --k 5 | "
    "macdrop attack MODEL --attack zeroing@2 --attack zeroing@5 --task arc_easy=arc_easy/test.jsonl --limit 100"
)

app = typer.Typer()


@app.command(epilog=EXAMPLES)
def attack(
    model: Model,
    k: Annotated[list[int] | None, typer.Option(min=0, help="Rows to zero or retain; may repeat.")] = None,
    attack: Annotated[
        list[str] | None, typer.Option(help="Attack such as zeroing@2, in place of --k; may repeat.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="Zero-shot task and its rows, scored as by `eval`; may repeat."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items per task (default: all).")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Requests of a task per batch (default: 16).")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples per prompt (default: the task's).")] = None,
    adapter: Adapter = None,
    merged: Annotated[bool, typer.Option("--merged", help="Merge the adapter before the attack.")] = False,
    text: Text = None,
    bos_token_id: Bos = None,
    revision: Revision = None,
    bf16: Bf16 = False,
    quantization_bit: Quantised = None,
    trust_remote_code: Trust = False,
) -> None:
    """Measure perplexity, and accuracy on tasks, with massive weights zeroed, retained, or random rows zeroed."""
    from tune.evaluation.benchmark import check_files
    from tune.training.massive_weights import massive_weights, proof_blocks, proof_text

    source, ks = Source(model, revision, bf16, trust_remote_code, bos_token_id, quantization_bit), k or list(KS)
    if merged:
        _check_merge(adapter, quantization_bit)
    if k and attack:
        raise ConfigError("--k and --attack both say which attacks to make. Give one of them.")
    block = _block(
        attack or [f"{kind}@{count}" for count in ks for kind in KINDS],
        task or [],
        {"limit": limit, "batch_size": batch_size, "num_fewshot": num_fewshot},
    )
    check_adapter(adapter)
    proof_text(text, source.model)
    if attack:
        source.check_attacks(block.attacks[1:])
    else:
        source.check(ks=ks, name="--k", kinds=KINDS)
    check_files(block)
    loaded, tokenizer = source.load()
    weights = massive_weights(source.spec(), loaded, tokenizer, bos_token_id=bos_token_id)
    blocks = proof_blocks(loaded, tokenizer, weights.bos_token_id, text=text, source=source.model)
    attacked = _Attacked(loaded, tokenizer, weights, block)
    with attacked.place(adapter, merged=merged) as scored:
        found = attacked.perplexities(scored, blocks)
        scores = attacked.scores(scored)
    where = "merged weights" if merged else "base rows, adapter in place" if adapter else "base rows"
    line("attack on", f"{where}, layer {weights.layer} of {source.model}")
    for stated in quantised(weights):
        line(*stated)
    line("untouched", f"perplexity {found[block.attacks[0]]:.4g} on {blocks[:, 1:].numel()} tokens")
    if attack or task:
        _show(found, scores, source.model)
    else:
        _show_by_k(found, ks)


def _check_merge(adapter: Path | None, quantization_bit: int | None) -> None:
    """Refuse a merge that cannot be made with a ConfigError."""
    if adapter is None:
        raise ConfigError("--merged needs --adapter: without an adapter there is nothing to merge.")
    if quantization_bit is not None:
        raise ConfigError(
            "--merged needs a base that is not quantised: merged rows would have to be quantised again, and be others. "
            "Leave --merged or --quantization-bit out."
        )


def _block(attacks: list[str], tasks: list[str], options: Mapping[str, int | None]) -> EvalSpec:
    """Return the `eval:` block of attacks, the untouched model first, and of tasks.

    Raises:
        ConfigError: a task has no file, an attack is unknown, one of them is given twice, or an option needs a task.
    """
    from macdrop.attack import Attack
    from tune.config.eval_spec import NO_ATTACK, EvalSpec
    from tune.config.messages import build

    made = Counter(str(Attack.parse(each)) for each in attacks)
    if twice := [each for each, count in made.items() if count > 1]:
        raise ConfigError(f"Given twice: {', '.join(twice)}. Give each attack, or each number of rows, once.")
    given = {key: value for key, value in options.items() if value is not None}
    if given and not tasks:
        names = ", ".join(TASK_OPTIONS[key] for key in given)
        raise ConfigError(
            f"{names} without --task has no effect. Add --task NAME=FILE, such as arc_easy=arc_easy/test.jsonl."
        )
    files: dict[str, dict[str, Any]] = {}
    for text in tasks:
        name, _, file = text.partition("=")
        if not name or not file:
            raise ConfigError(
                f"--task {text!r} is not NAME=FILE. Write, for example, --task arc_easy=arc_easy/test.jsonl; for "
                "data of the Hub\n  macdrop eval MODEL 'eval.zero_shot=[arc_easy]' 'eval.attacks=[none,zeroing@2]'"
            )
        if name in files:
            raise ConfigError(f"--task {name} is given twice. Give each task one file.")
        files[name] = {"data": file}
    made.pop(NO_ATTACK, None)  # the untouched model is measured in any case, and first
    return build(EvalSpec, {"attacks": [NO_ATTACK, *made], "zero_shot": files, **given})


@dataclass(frozen=True)
class _Attacked:
    """A resident model and the attacks that are made on it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    weights: MassiveWeights
    block: EvalSpec

    @contextmanager
    def place(self, adapter: Path | None, *, merged: bool) -> Iterator[PreTrainedModel | PeftModel]:
        """Put an adapter in place, merged if wanted, for the `with` block."""
        from macdrop.attack import Attack, attacked_rows
        from tune.evaluation.adapters import AdapterSlot
        from tune.evaluation.merging import merged_weights

        for made in map(Attack.parse, self.block.attacks):
            attacked_rows(self.weights, made.kind, made.k)  # the massive layer may have fewer rows than others
        slot = AdapterSlot(self.model)
        with slot.adapter(adapter) as scored, merged_weights(scored) if merged else nullcontext():
            for note in slot.notes:
                line("note", note)
            yield scored

    def perplexities(self, scored: PreTrainedModel | PeftModel, blocks: torch.Tensor) -> dict[str, float]:
        """Measure the perplexity under each attack on token ids (n, T)."""
        from macdrop import attacked
        from macdrop.attack import Attack
        from macdrop.proof import perplexity

        found = {}
        with console.status("Measuring perplexity"):
            for name in self.block.attacks:
                made = Attack.parse(name)
                with attacked(scored, self.weights, made.kind, made.k):
                    found[name] = perplexity(scored, blocks)
        return found

    def scores(self, scored: PreTrainedModel | PeftModel) -> dict[str, dict[str, Scored]]:
        """Score the tasks, each under every attack: task -> attack -> score by the task's primary metric."""
        from tune.analysis.under_attack import Scored
        from tune.evaluation.benchmark import BENCHMARKS
        from tune.evaluation.prefix_cache import PrefixCache
        from tune.evaluation.score_names import Column, primary_columns
        from tune.evaluation.scorer import Scorer
        from tune.storage.json_lines import read_jsonl

        found: dict[str, dict[str, Scored]] = {name: {} for name in self.block.zero_shot}
        if not found:
            return found
        scorer, prefix = Scorer(scored, self.tokenizer, self.block, self.weights), PrefixCache()
        with console.status("Reading the tasks"):
            scorer.prepare()
        wanted = scorer.jobs()
        with tempfile.TemporaryDirectory() as folder:
            for number, job in enumerate(wanted, 1):
                answers = Path(folder) / job.file_name
                with console.status(f"Scoring {number} of {len(wanted)}: {job.key}"):
                    rows = scorer.score(job, answers_path=answers, prefix=prefix)
                whole = {Column.of(row): row for row in rows if row["task"] == job.task}
                (column,) = primary_columns(whole)
                items = BENCHMARKS[job.benchmark].items(read_jsonl(answers), whole[column])
                found[job.task][job.attack] = Scored(whole[column], items)
        for note in scorer.notes:
            line("note", note)
        return found


def _show_by_k(found: Mapping[str, float], ks: list[int]) -> None:
    """Print perplexities, one line per number of rows."""
    shown = table("k", "zeroing", "ratio", "retaining", "ratio", "random rows", "ratio")
    untouched, *_ = found.values()
    for count in ks:
        values = [found[f"{kind}@{count}"] for kind in KINDS]
        shown.add_row(str(count), *(cell for value in values for cell in (f"{value:.4g}", f"{value / untouched:.4g}")))
    console.print(shown)


def _show(found: Mapping[str, float], scores: Mapping[str, Mapping[str, Scored]], model: str) -> None:
    """Print one line per attack: perplexity, and each task's score with its difference from the untouched model's."""
    from tune.analysis.under_attack import change
    from tune.report.tables import Table

    untouched = next(iter(found))
    head = ["attack", "perplexity", "ratio"]
    rows = {name: [name, f"{value:.4g}", f"{value / found[untouched]:.4g}"] for name, value in found.items()}
    for task, under in scores.items():
        plain = under[untouched]
        line(task, f"{plain.row['metric']} on {plain.row['n']} items")
        head += [f"{task}\n[95 %]", "difference\n[95 %]"]
        for name, score in under.items():
            amount = "" if name == untouched else change(plain, score).amount.replace(" points", " pts")
            rows[name] += [_cell(score), amount]
    made = Table(f"Attacks on {model}", head, list(rows.values()))
    for part in made.split(console.width):
        console.print(part.rich())
    if scores:
        line(
            "intervals",
            "over items: Wilson's for an accuracy; paired by item for a difference from the untouched model",
        )


def _cell(score: Scored) -> str:
    """Format a score with its interval, a share as percent."""
    value, interval = score.row["value"], score.interval
    share = 0 <= value <= 1
    numbers = [f"{100 * x:.1f}" if share else f"{x:.4g}" for x in (value, *(interval or ()))]
    return f"{numbers[0]}{' %' if share else ''}" + (f" [{', '.join(numbers[1:])}]" if interval else "")

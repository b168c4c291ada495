"""`macdrop data`: training data as the model sees them, before anything is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from macdrop.errors import ConfigError
from tune.cli.console import console, line, table
from tune.cli.options import Config, load_run_file, split_config
from tune.report.escaping import rich_text

if TYPE_CHECKING:
    from tune.preflight.preview import Example, Lengths, Preview

#: Tokens that are shown of a run: of a longer one its ends.
SHOWN = 160
#: Columns of the longest bar.
BAR = 50

app = typer.Typer()


@app.command(
    epilog=(
        "Examples: macdrop data my.yaml   |   macdrop data my.yaml --rows 1 template=chat   |   "
        "macdrop data my.yaml bad_rows=skip max_skipped_share=null   (every bad row, by reason)"
    )
)
def data(
    config: Config = None,
    rows: Annotated[int, typer.Option(min=0, help="Examples to show as tokens, from the first.")] = 3,
) -> None:
    """Show the training data as tokens with and without loss, their lengths, padding, and the rows left out."""
    from tune.config.recipes import recipe
    from tune.preflight.preview import preview
    from tune.training.quiet import quiet_libraries

    file, overrides = split_config(config)
    if not config:
        raise ConfigError("Give a run file, a recipe, or overrides: macdrop data my.yaml")
    spec = load_run_file(recipe(file), overrides)
    quiet_libraries()
    for model, ray in zip(spec.studies(), spec.rays(), strict=True):
        with console.status(f"Tokenising the data for {model.model_name_or_path}"):
            found = preview(model, rows, ray.num_workers)
        line("model", model.model_name_or_path)
        for number, example in enumerate(found.examples, 1):
            _show_example(number, example)
        _show_summary(found)


def _show_example(number: int, example: Example) -> None:
    without, trained = example.count(False), example.count(True)
    counts = f"{without + trained} tokens, {trained} with loss"
    place = f"{example.place}: " if example.place else ""
    console.print(rich_text((f"\nexample {number}", "bold"), "  ", f"{place}{counts}"), soft_wrap=True)
    for run in example.runs:
        name, style = ("loss", "green") if run.loss else ("no loss", "dim")
        head = f"  {name:<8}{len(run.tokens):>6}  "
        console.print(rich_text((head, "bold"), (_text(run.tokens), style)), soft_wrap=True)


def _text(tokens: tuple[str, ...]) -> str:
    """Return tokens as one line, a dot between them."""
    shown = [token.replace("\n", "\\n").replace("\t", "\\t") for token in tokens]
    if len(shown) > SHOWN:
        half = SHOWN // 2
        shown = [*shown[:half], f" ... {len(shown) - 2 * half} more ... ", *shown[-half:]]
    return "·".join(shown)


def _show_summary(found: Preview) -> None:
    from tune.data.batching import describe_mixture
    from tune.data.lost_rows import describe_cutoff, describe_skipped

    info = found.info
    console.print()
    carry = "every token" if info["train_on_prompt"] else ", ".join(info.get("train_on_roles", ["assistant"]))
    line("laid out", f"format {info['format']}, template {info['template']}; loss on {carry}")
    line("data", describe_cutoff(info))
    for sentence in describe_mixture(info):
        line("mixture", sentence)
    for sentence in describe_skipped(info):
        line("skipped", sentence)
    line("examples", f"{info['train']} to train on, {info['validation']} for validation")
    line("padding", f"{found.padding:.0%} of the tokens in padded micro-batches; none in packed ones")
    console.print()
    _show_lengths(found)
    console.print()
    _show_histogram(found.lengths)


def _show_lengths(found: Preview) -> None:
    head = ("shortest", "median", "90 %", "99 %", "longest", "mean")
    shown = table("per example", *head, left=["per example"])
    for name, lengths in (("tokens", found.lengths), ("with loss", found.trained)):
        shown.add_row(name, *map(str, lengths.at), f"{lengths.mean:.4g}")
    console.print(shown)


def _show_histogram(lengths: Lengths) -> None:
    shown = table("tokens", "examples", "", left=[""])
    most = max(count for _, count in lengths.bins)
    ends = [*(start - 1 for start, _ in lengths.bins[1:]), lengths.at[-1]]
    for (start, count), end in zip(lengths.bins, ends, strict=True):
        bar = "#" * max(round(BAR * count / most), 1 if count else 0)
        shown.add_row(f"{start} to {end}" if end > start else str(start), str(count), bar)
    console.print(shown)

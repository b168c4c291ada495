"""The `macdrop` command. Handlers import what they need, so that `--help` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli import app as cluster

app = typer.Typer(
    name="macdrop",
    help="MacDrop (massive weights curriculum dropout): find massive weights, fine-tune, sweep, score, report.",
    epilog="Example: macdrop sweep   (the demo: two built-in models, minutes on two CPU cores)",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
zoo = typer.Typer(
    help="The built-in tiny models (planted: made to show the phenomenon, no evidence for it).",
    epilog="Example: macdrop zoo list",
    no_args_is_help=True,
)
app.add_typer(zoo, name="zoo")
app.add_typer(cluster, name="cluster")

#: Exit codes, also in the README.
TRIALS_FAILED, INTERRUPTED = 1, 130

Model = Annotated[str, typer.Argument(help="Hub id, folder, or zoo:NAME.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Load the model in bfloat16.")]
Text = Annotated[Path | None, typer.Option(help="Text to measure perplexity on (default: a built-in story).")]
Bos = Annotated[int | None, typer.Option(help="Token id to stand for bos; see the README for the default rule.")]


@app.command(epilog="Example: macdrop scan meta-llama/Llama-3.2-1B --prove --text wiki.txt")
def scan(
    model: Model,
    prove: Annotated[bool, typer.Option("--prove", help="Zero, retain and compare with random rows on text.")] = False,
    k: Annotated[int, typer.Option(min=0, help="Rows for the proof and to list.")] = 5,
    text: Text = None,
    output: Annotated[Path | None, typer.Option(help="Also write the finding to this JSON file.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Scan again, even if this checkpoint was scanned.")] = False,
    bos_token_id: Bos = None,
    revision: Revision = None,
    bf16: Bf16 = False,
    trust_remote_code: Trust = False,
) -> None:
    """Find a model's massive weights: the layer, the rows, how clear it is; with --prove, whether they matter."""
    from tune.cli.verbs import scan as scanning

    source = scanning.Source(model, revision, bf16, trust_remote_code, bos_token_id)
    scanning.scan(source, prove=prove, k=k, text=text, output=output, fresh=fresh)


@app.command(epilog="Example: macdrop attack zoo:planted-llama --k 1 --k 3 --k 5")
def attack(
    model: Model,
    k: Annotated[list[int] | None, typer.Option(min=0, help="Rows to zero or retain; repeat for several.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="PEFT adapter folder, left in place under the attack.")] = None,
    merged: Annotated[bool, typer.Option("--merged", help="Merge the adapter first, then attack.")] = False,
    text: Text = None,
    bos_token_id: Bos = None,
    revision: Revision = None,
    bf16: Bf16 = False,
    trust_remote_code: Trust = False,
) -> None:
    """Perplexity of a model whose top-k massive weights are zeroed, or alone retained, beside random rows."""
    from tune.cli.verbs import scan as scanning

    source = scanning.Source(model, revision, bf16, trust_remote_code, bos_token_id)
    scanning.attack(source, ks=k or [1, 3, 5, 10], adapter=adapter, merged=merged, text=text)


@app.command(epilog="Example: macdrop train my.yaml macdrop.p0=0.6 learning_rate=1e-4 output_dir=runs/one")
def train(
    config: Annotated[list[str] | None, typer.Argument(help="A YAML file, then key=value overrides.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in output_dir from its newest checkpoint.")] = False,
) -> None:
    """Fine-tune one adapter with MacDrop (or without: macdrop.p0=0), in this process or on ray.num_workers workers."""
    from tune.cli.verbs import train as commands

    file, overrides = _split(config)
    commands.train(file, overrides, resume=resume)


@app.command("eval", epilog="Example: macdrop eval MODEL --adapter runs/one/adapter --suite paper eval.limit=100")
def evaluate(
    model: Model,
    config: Annotated[list[str] | None, typer.Argument(help="A YAML file with an eval: block, then key=value.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="PEFT adapter folder; without it the base is scored.")] = None,
    suite: Annotated[list[str] | None, typer.Option(help="Shipped suite (see `macdrop suites`); may repeat.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for scores.jsonl and generated answers.")] = None,
    revision: Revision = None,
    bf16: Bf16 = False,
    trust_remote_code: Trust = False,
) -> None:
    """Score one model or adapter on a suite or the benchmarks of an eval: block, plain and under attack."""
    from tune.cli.verbs import eval as commands

    file, overrides = _split(config)
    source = commands.Source(model, revision, bf16, trust_remote_code)
    commands.evaluate(source, file, overrides, adapter=adapter, suites=suite or [], output=output)


@app.command(epilog="Example: macdrop suites paper")
def suites(
    name: Annotated[str | None, typer.Argument(help="Show this suite as YAML; without it, list all.")] = None,
) -> None:
    """The shipped benchmark suites: named, versioned lists of benchmarks and attacks."""
    from tune.cli.verbs import suites as shipped

    shipped.show(name)


@app.command(epilog="Examples: macdrop judge runs/mine model=PATH | macdrop judge runs/mine model=gpt-4o base_url=URL")
def judge(
    run: Annotated[Path, typer.Argument(help="Folder of a run whose generated answers are to be judged.")],
    config: Annotated[list[str] | None, typer.Argument(help="Keys of eval.judge as key=value; else the run's.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Judge again what this judge has judged.")] = False,
) -> None:
    """Judge a run's generated answers from 1 to 5, by a local model or an endpoint; nothing is generated anew."""
    from tune.cli.verbs import judge as judging

    raise typer.Exit(TRIALS_FAILED if judging.judge_run(run, config or [], fresh=fresh) else 0)


@app.command(epilog="Example: macdrop plan llama-3.2-1b sweep.num_samples=40")
def plan(
    config: Annotated[list[str] | None, typer.Argument(help="A YAML file or recipe name, then key=value.")] = None,
    prices: Annotated[Path | None, typer.Option(help="YAML of prices by device (default: the shipped one).")] = None,
    start: Annotated[bool, typer.Option("--start", help="Then start the sweep; asks first when it is large.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Forecast a sweep from a short probe of each model: hours, memory, disk and cost."""
    from tune.cli.verbs import plan as forecast

    file, overrides = _split(config)
    raise typer.Exit(forecast.plan(file, overrides, prices=prices, start=start, yes=yes))


@app.command(epilog="Example: macdrop export runs/mine/trials/NAME --output my-adapter")
def export(
    trial: Annotated[Path, typer.Argument(help="Folder of a finished trial, or of `macdrop train`.")],
    output: Annotated[Path, typer.Option(help="Folder to write; must not hold anything.")],
    merged: Annotated[bool, typer.Option("--merged", help="Merge into the base; prints a logit check.")] = False,
    push: Annotated[str | None, typer.Option(help="Also push to this hub repository (USER/NAME).")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the pushed repository private.")] = False,
) -> None:
    """A trial as a PEFT adapter (or merged weights) with a model card of its setting, data and scores."""
    from tune.cli.verbs import export as exporting

    exporting.export(trial, output, merged=merged, push=push, private=private)


@app.command(epilog="Examples: macdrop sweep | macdrop sweep my.yaml sweep.num_samples=20 --dry-run")
def sweep(
    config: Annotated[
        list[str] | None, typer.Argument(help="A YAML file or the name of a shipped recipe, then key=value overrides.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show spec, trials and resources; start nothing.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in output_dir.")] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="With --resume: also train again what failed or diverged.")
    ] = False,
    clear_orphans: Annotated[
        bool,
        typer.Option(
            "--clear-orphans",
            "--clear-leftovers",
            help="Remove resources held by dead runs without asking. (Also spelled --clear-leftovers.)",
        ),
    ] = False,
    recipes: Annotated[bool, typer.Option("--recipes", help="List the shipped recipes.")] = False,
) -> None:
    """Compare plain and MacDrop adapters on many models: search, train, score, report. No argument: the demo."""
    from tune.cli.verbs import sweep as commands

    if recipes:
        commands.list_recipes()
        return
    file, overrides = _split(config)
    how = {"resume": resume, "retry_failed": retry_failed, "clear_orphans": clear_orphans}
    failures = commands.sweep(file, overrides, dry_run=dry_run, **how)
    raise typer.Exit(TRIALS_FAILED if failures else 0)


@app.command(epilog="Example: macdrop report runs/demo --format markdown")
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    format: Annotated[str, typer.Option(help="What to print: terminal, markdown, csv or latex.")] = "terminal",
    output: Annotated[Path | None, typer.Option(help="Folder for the files (default: the run's own).")] = None,
) -> None:
    """Verdict, tables and figures of runs, half-finished ones too; writes report.html, .md, .csv, .tex, figures/."""
    from tune.cli.verbs import report as reporting

    reporting.report(runs, format=format, output=output)


@app.command(epilog="Example: macdrop compare runs/llama runs/qwen runs/mistral")
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    sort: Annotated[str | None, typer.Option(help="Column to sort by (default: the headline difference).")] = None,
    format: Annotated[str, typer.Option(help="What to print: terminal, markdown, csv or latex.")] = "terminal",
    output: Annotated[Path | None, typer.Option(help="Also write it to this file (.md, .csv or .tex).")] = None,
) -> None:
    """One leaderboard of the models of several runs: verdict, differences and scores side by side."""
    from tune.cli.verbs import compare as leaderboard

    leaderboard.compare(runs, sort=sort, format=format, output=output)


@app.command(epilog="Example: macdrop doctor --ray")
def doctor(
    ray: Annotated[bool, typer.Option("--ray", help="Also start Ray for a moment (some seconds).")] = False,
) -> None:
    """Check this machine: packages, hardware, process groups, DeepSpeed, the zoo; each fault with its remedy."""
    from tune.cli.verbs import doctor as commands

    raise typer.Exit(0 if commands.doctor(ray=ray) else 1)


@zoo.command("list", epilog="Example: macdrop zoo list")
def zoo_list() -> None:
    """The built-in models and data sets, with the names to use them by."""
    from tune.cli.verbs import zoo as commands

    commands.zoo_list()


def _split(arguments: list[str] | None) -> tuple[str | None, list[str]]:
    """A file (or recipe name) may come first; everything else is key=value."""
    given = list(arguments or [])
    if given and ("=" not in given[0] or Path(given[0]).is_file()):
        return given[0], given[1:]
    return None, given


def main() -> None:
    """Entry point of the `macdrop` command; our own errors become a message and an exit code, never a traceback."""
    from cluster.errors import LaunchError
    from macdrop.errors import MacDropError

    try:
        app(prog_name="macdrop")  # also under `python -m`
    except (MacDropError, LaunchError) as error:
        print(f"macdrop: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("macdrop: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()

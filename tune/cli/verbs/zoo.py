"""`macdrop zoo list`: the built-in models and data sets."""

from __future__ import annotations

import typer

from tune.cli.console import lines

KINDS = {True: "sensitive", False: "not sensitive", None: "judge"}

app = typer.Typer(
    help="The built-in tiny models. Their massive weights are planted: a demonstration, not evidence.",
    epilog="Example: macdrop zoo list",
    no_args_is_help=True,
)


@app.command("list", epilog="Example: macdrop zoo list")
def list_zoo() -> None:
    """List the built-in models and data sets by the names that other verbs accept."""
    from tune.zoo.catalog import PREFIX, ZOO, ZOO_DATA

    models = [(PREFIX + model.name, f"{model.description} ({KINDS[model.sensitive]})") for model in ZOO.values()]
    lines([*models, *((PREFIX + data.name, f"{data.kind}: {data.description}") for data in ZOO_DATA.values())])

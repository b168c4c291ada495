"""Arguments and options shared by several verbs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="Hub id, folder, or zoo:NAME.")]
Config = Annotated[list[str] | None, typer.Argument(help="A YAML file or a recipe's name, then key=value overrides.")]
Runs = Annotated[list[Path], typer.Argument(help="Run folders.")]
Adapter = Annotated[Path | None, typer.Option(help="PEFT adapter folder (default: the base model alone).")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Load the model in bfloat16.")]
Text = Annotated[Path | None, typer.Option(help="Text to measure perplexity on (default: a built-in story).")]
Bos = Annotated[int | None, typer.Option(help="Token id to use as bos (default: chosen as `macdrop scan` reports).")]
Format = Annotated[str, typer.Option(help="What to print: terminal, markdown, csv or latex.")]


def split_config(arguments: list[str] | None) -> tuple[str | None, list[str]]:
    """Split arguments into an optional leading file or recipe name and key=value overrides."""
    given = list(arguments or [])
    if given and ("=" not in given[0] or os.path.isfile(given[0])):
        return given[0], given[1:]
    return None, given

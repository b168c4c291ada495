"""`macdrop schema`: the JSON Schema of a run file, for editors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from tune.cli.console import line
from tune.cli.options import check_output

app = typer.Typer()


@app.command(epilog="Example: macdrop schema > macdrop.schema.json")
def schema(
    output: Annotated[Path | None, typer.Option(help="File to write (default: print it).")] = None,
) -> None:
    """Print the JSON Schema of a run file, with which an editor completes and checks it."""
    from tune.config.schema import json_schema
    from tune.storage.atomic import atomic_write_text

    check_output(output)
    text = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    if output is None:
        print(text, end="")
    else:
        atomic_write_text(output, text)
        line("written", str(output))

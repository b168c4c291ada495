"""`macdrop docs`: the shipped documentation, by topic."""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Annotated

import typer

from macdrop.errors import ConfigError, nearest
from tune.cli.console import console, line, lines

#: Stems of files whose topic has another name.
RENAMED = {("cluster", "overview"): "cluster"}

app = typer.Typer()


@app.command(epilog="Example: macdrop docs configuration")
def docs(
    topic: Annotated[str | None, typer.Argument(help="Topic to show (default: list all).")] = None,
) -> None:
    """List the topics of the documentation, or show one: formatted in a terminal, as Markdown in a pipe."""
    known = topics()
    if topic is None:
        lines([(name, _title(file)) for name, file in known.items()])
        line("use", "macdrop docs TOPIC")
        return
    if topic not in known:
        raise ConfigError(f"Unknown topic {topic!r}.{nearest(topic, known)} Topics: {', '.join(known)}.")
    text = known[topic].read_text(encoding="utf-8")
    if not console.is_terminal:
        print(text, end="")
        return
    from rich.markdown import Markdown

    console.print(Markdown(text))


def topics() -> dict[str, Traversable]:
    """Return the Markdown file of each topic, those on sweeps before those on clusters."""
    found = {}
    for package in ("tune", "cluster"):
        for file in sorted(files(package).joinpath("docs").iterdir(), key=lambda file: file.name):
            stem = file.name.removesuffix(".md")
            if stem != file.name:
                found[RENAMED.get((package, stem), stem)] = file
    return found


def _title(file: Traversable) -> str:
    return file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()

"""`macdrop suites`: the shipped benchmark suites."""

from __future__ import annotations

from typing import Annotated

import typer

from tune.cli.console import console, line, lines

app = typer.Typer()


@app.command(epilog="Example: macdrop suites paper")
def suites(
    name: Annotated[str | None, typer.Argument(help="Suite to show as YAML (default: list all).")] = None,
) -> None:
    """List the shipped benchmark suites (named, versioned lists of benchmarks and attacks), or show one."""
    from tune.config.suites import load, names

    if name is not None:
        console.print(as_yaml(name), soft_wrap=True)
        return
    lines([(each, f"version {load(each).version}: {load(each).title}") for each in names()])
    line("use", "macdrop eval MODEL --suite NAME, or suite: NAME (or a list) in the eval: block of a run file")
    line("offline", "eval.local=FOLDER takes the files that `macdrop suites NAME` lists from a folder")


def as_yaml(name: str) -> str:
    """Return one suite as YAML, with its includes written out."""
    import yaml

    from tune.config.suites import load

    class Dumper(yaml.SafeDumper):
        """Writes texts with line ends in quotes, and no anchors."""

        def ignore_aliases(self, data: object) -> bool:
            return True

    def quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None)

    Dumper.add_representer(str, quoted)
    suite = load(name)
    content = {key: getattr(suite, key) for key in ("name", "version", "title", "about", "files", "get", "eval")}
    return yaml.dump(content, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)

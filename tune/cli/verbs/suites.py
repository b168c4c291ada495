"""`macdrop suites`: list the shipped benchmark suites, or show one."""

from __future__ import annotations

from typing import Any

import yaml

from tune.config.suites import load, names


class _Dumper(yaml.SafeDumper):
    """Writes texts with line ends in quotes, and no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _quoted(dumper: _Dumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None)


_Dumper.add_representer(str, _quoted)


def show(name: str | None) -> None:
    """Print one suite as YAML, includes written out, or list all."""
    from tune.cli.console import console, line, lines

    if name is None:
        lines([(each, f"version {load(each).version}: {load(each).title}") for each in names()])
        line("use", "macdrop eval MODEL --suite NAME, or suite: NAME (or a list) in the eval: block of a run file")
        line("offline", "eval.local=FOLDER takes the files that `macdrop suites NAME` lists from a folder")
        return
    suite = load(name)
    content = {key: getattr(suite, key) for key in ("name", "version", "title", "about", "files", "get", "eval")}
    text = yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)
    console.print(text, highlight=False, markup=False, soft_wrap=True)

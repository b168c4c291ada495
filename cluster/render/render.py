"""`macdrop cluster render`: a commented launch file from a few fields, injection-proof."""

from __future__ import annotations

import functools
import ipaddress
import json
import os
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import BadLaunchFile, nearest
from cluster.render.fields import Field, Like, Required, read
from cluster.render.targets import EFA_CARDS, TARGETS, Target

if TYPE_CHECKING:
    import jinja2

TEMPLATES = Path(__file__).parent / "templates"
EXAMPLES = Path(__file__).parent / "examples"


def run(target: str | None, words: Sequence[str], *, output: Path | None, force: bool = False) -> None:
    """List the targets, list the fields of one (no words given, but some required), or render to a file or stdout.

    Raises BadLaunchFile: an unknown target, an invalid field, or a file that exists.
    """
    if target is None:
        list_targets()
        return
    chosen = find(target)
    if not words and any(field.default is Required for field in chosen.fields):
        list_fields(chosen)
        return
    text = render(chosen, words)
    if output is None:
        print(text, end="")
        return
    if output.exists() and not force:
        raise BadLaunchFile(f"{output} exists, and may have been edited: choose another file, or add --force.")
    _write(output, text)
    print(f"{output} written. Review it, then:\n  macdrop cluster check {shlex.quote(str(output))}")


def find(name: str) -> Target:
    """Look up a target by name. Raises BadLaunchFile."""
    if name not in TARGETS:
        raise BadLaunchFile(f"unknown target {name!r}; known: {', '.join(TARGETS)}.{nearest(name, TARGETS)}")
    return TARGETS[name]


def render(target: Target, words: Sequence[str]) -> str:
    """Render a launch file from key=value words. Raises BadLaunchFile."""
    values = read(target.fields, _with_source(target, words), target.name)
    for rule in target.rules:
        wrong = rule(values)
        if wrong:
            raise BadLaunchFile(f"{wrong}.")
    command = shlex.join(["macdrop", "cluster", "render", target.name, *words])
    return environment().get_template(target.template).render(values | _derived(target, values), command=command)


def example(target: Target) -> str:
    """Render the shipped example of a target."""
    return render(target, target.example.split())


def _derived(target: Target, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values that templates need in addition to the fields."""
    derived: dict[str, Any] = {"target": target}
    if "family" in values:
        derived["source_image"] = f"projects/deeplearning-platform-release/global/images/family/{values['family']}"
    if "sync_to" in values:
        derived["extra"] = "[s3]" if values["sync_to"].startswith("s3://") else "[gcs]"
    if values.get("machine") in EFA_CARDS:
        derived["cards"] = EFA_CARDS[values["machine"]]
    return derived


def _with_source(target: Target, words: Sequence[str]) -> list[str]:
    """Add the clone that macdrop runs from as the source, unless one is named or nothing is installed."""
    clone = Path(__file__).parents[2]
    takes = any(field.name == "source" for field in target.fields)
    given = any(word.startswith("source=") or word == "install=none" for word in words)
    return [*words, f"source={clone}"] if takes and not given and (clone / "pyproject.toml").is_file() else list(words)


# --- templates ---


class _Safe(str):
    """Text that went through a filter and may be written to a launch file."""


@functools.cache
def environment() -> jinja2.Environment:
    """Jinja environment in which an unfiltered value is an error, not an injection."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        finalize=_finalized,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {"yaml": _yaml, "sh": _sh, "sh_path": _sh_path, "comment": _comment, "fixed": _fixed}
    made.tests["address"] = _is_address
    made.globals["export"] = _export
    return made


def _finalized(value: Any) -> Any:
    if isinstance(value, _Safe | int) or not value:
        return value
    raise TypeError(f"a template writes {value!r} without a filter")


def _yaml(value: Any) -> _Safe:
    """A YAML flow scalar or list; JSON is YAML as long as it needs no escape that only JSON has."""
    return _Safe(json.dumps(value, ensure_ascii=False))


def _sh(value: Any) -> _Safe:
    """One word of a shell command."""
    return _Safe(shlex.quote(str(value)))


def _sh_path(value: str) -> _Safe:
    """One word of a shell command; a leading ~/ still expands."""
    return _Safe(f'"$HOME"/{shlex.quote(value[2:])}' if value.startswith("~/") else shlex.quote(value))


def _comment(value: str) -> _Safe:
    """The rest of a comment line."""
    return _Safe("".join(letter if letter.isprintable() else " " for letter in value))


def _fixed(value: str) -> _Safe:
    """Text of the templates themselves, never a field."""
    if value not in ("", "head", "worker", "[aws]", "[gcp]", "[azure]", "[s3]", "[gcs]", "efa", "efa-only"):
        raise TypeError(f"{value!r} is not text of the templates")
    return _Safe(value)


def _export(name: str, value: str) -> _Safe:
    """A shell word with an export statement, for the file from which hosts read their variables."""
    return _Safe(shlex.quote(f"export {name}={shlex.quote(value)}"))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


# --- the terminal ---


def list_targets() -> None:
    """Print all targets, one per line."""
    for target in TARGETS.values():
        print(f"{target.name:<12} {target.help}")
    print("\n`macdrop cluster render TARGET` lists the fields of a target.")


def list_fields(target: Target) -> None:
    """Print the fields of a target, required ones first, and an example."""
    rows = [(f"{field.name}={_default(field)}", field.help) for field in target.fields]
    required = [field.default is Required for field in target.fields]
    width = max(len(left) for left, _ in rows)
    print(f"{target.help}. Required fields:")
    for wanted in (True, False):
        if not wanted:
            print("Optional fields, with their defaults:")
        for (left, right), needed in zip(rows, required, strict=True):
            if needed is wanted:
                print(f"  {left:<{width}}  {right}")
    print(f"Example:\n  macdrop cluster render {target.name} {target.example} --output cluster.yaml")


def _default(field: Field) -> str:
    if field.default is Required:
        return field.example
    if isinstance(field.default, Like):
        return f"({field.default.name})"
    return "" if field.default in (None, ()) else str(field.default)


def _write(path: Path, text: str) -> None:
    """Write atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=".", delete=False) as file:
        file.write(text)
    os.replace(file.name, path)

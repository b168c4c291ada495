"""Arguments and options shared by several verbs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from macdrop.errors import ConfigError

if TYPE_CHECKING:
    from tune.config.run_spec import RunSpec

Model = Annotated[str, typer.Argument(help="Hub id, folder, FILE.gguf, or zoo:NAME.")]
Config = Annotated[list[str] | None, typer.Argument(help="A YAML file or a recipe's name, then key=value overrides.")]
Runs = Annotated[list[Path], typer.Argument(help="Run folders, or archives of them.")]
Adapter = Annotated[Path | None, typer.Option(help="PEFT adapter folder (default: the base model alone).")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Load the model in bfloat16.")]
Quantised = Annotated[
    int | None, typer.Option("--quantization-bit", help="Quantise the base: 4 (NF4) or 8 (LLM.int8), by bitsandbytes.")
]
Text = Annotated[
    Path | None, typer.Option(help="Text to measure perplexity on (default: built-in texts of five kinds).")
]
Bos = Annotated[int | None, typer.Option(help="Token id to use as bos (default: chosen as `macdrop scan` reports).")]
Format = Annotated[str, typer.Option(help="What to print: terminal, markdown, csv or latex.")]


def load_run_file(
    file: str | Path | Mapping[str, Any] | None, overrides: list[str], *, trust: bool | None = None
) -> RunSpec:
    """Load a run file with overrides. One that lies in a run folder is data: see `tune.config.recorded.check_orders`.

    file: or what it would hold. trust: `--trust-remote-code` was given; None: the verb has no such option.
    """
    from tune.config.run_spec import dump, load
    from tune.evaluation.own.travel import recorded

    spec = load(file, overrides)
    if not isinstance(file, Mapping):
        check_recorded(file, dump(spec), overrides, trust=trust)
    return recorded(spec)


def check_recorded(
    file: str | Path | None, config: Mapping[str, Any], overrides: list[str], *, trust: bool | None = None
) -> None:
    """Check what the settings of a file ask for if it lies in a run folder."""
    from tune.config.recorded import check_orders

    folder = Path(file or "").parent
    if file is not None and any((folder / name).is_file() for name in ("run.json", "trial.json")):
        check_orders(folder, config, overrides, trust=trust)


def split_config(arguments: list[str] | None) -> tuple[str | None, list[str]]:
    """Split arguments into an optional leading file or recipe name and key=value overrides."""
    given = list(arguments or [])
    if given and ("=" not in given[0] or os.path.isfile(given[0])):
        return given[0], given[1:]
    return None, given


def check_output(output: Path | None, *, folder: bool = False, name: str = "--output") -> None:
    """Refuse an output that cannot be written, before anything is computed for it.

    folder: whether it names a folder, else a file. name: the option.
    """
    if output is None:
        return
    # Not methods of Path, which raise where a folder above may not be entered.
    if os.path.isdir(output) != folder and os.path.exists(output):
        advice = "Give the name of a folder." if folder else f"Give the name of a file in it: {output / 'NAME'}."
        raise ConfigError(f"{name} {output} is a {'file' if folder else 'folder'}. {advice}")
    # A file is written under another name and takes the place of what is there, of a device as well.
    if not folder and (os.path.islink(output) or os.path.exists(output) and not os.path.isfile(output)):
        kind = f"a link to {os.path.realpath(output)}" if os.path.islink(output) else "a device or pipe"
        raise ConfigError(f"{name} {output} is {kind}. Give the name of a file.")
    above = next(place for place in (output.absolute(), *output.absolute().parents) if os.path.exists(place))
    if above != output.absolute() and not os.path.isdir(above):
        raise ConfigError(f"{name} {output} cannot be created: {above} is a file. Choose another place.")
    if not os.access(above, os.W_OK):
        raise ConfigError(f"{name} {output} cannot be written: {above} is closed to this user. Choose another place.")

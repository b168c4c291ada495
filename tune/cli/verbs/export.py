"""`macdrop export`: a finished trial as a folder for others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from macdrop.errors import ConfigError
from tune.cli.console import console, line
from tune.cli.options import Trust, check_output

app = typer.Typer()


@app.command(epilog="Example: macdrop export runs/mine/trials/NAME --output my-adapter")
def export(
    trial: Annotated[Path, typer.Argument(help="Folder of a finished trial, or of `macdrop train`.")],
    output: Annotated[Path, typer.Option(help="Folder to write; must be empty or missing.")],
    merged: Annotated[bool, typer.Option("--merged", help="Merge into the base; prints a logit check.")] = False,
    push: Annotated[str | None, typer.Option(help="Also push to this hub repository (USER/NAME).")] = None,
    trust_remote_code: Trust = False,
    private: Annotated[bool, typer.Option("--private", help="Make the pushed repository private.")] = False,
) -> None:
    """Export a trial as a PEFT adapter or merged weights, with a model card of its setting, data and scores."""
    from tune.config.recorded import check_orders
    from tune.config.run_spec import dump
    from tune.report.trial_export import check_hub, check_output_folder, push_folder, read_trial, write_export
    from tune.training.quiet import quiet_libraries

    content = read_trial(trial)
    if merged:  # loads the base model
        check_orders(trial, dump(content.spec), [], trust=trust_remote_code)
    check_output_folder(output)
    check_output(output, folder=True)
    if push is None and private:
        raise ConfigError("--private is for a pushed repository. Add --push USER/NAME, or leave it out.")
    if push is not None:
        check_hub(push)
    quiet_libraries()
    with console.status("Merging and checking" if merged else "Writing"):
        check = write_export(content, output, merged=merged, place=push or output.name)
    line("written", str(output))
    if merged and content.spec.quantization_bit is not None:
        from macdrop.fingerprint import format_name

        name = format_name(content.spec.quantization_bit)
        line("dequantised", f"the adapter was trained on a base in {name}; these are its dequantised weights, merged")
    if check is not None:
        line("logit check", check.text)
    if push is not None:
        with console.status(f"Pushing to {push}"):
            url = push_folder(output, push, private=private)
        line("pushed", url)

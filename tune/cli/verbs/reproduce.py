"""`macdrop reproduce`: a recorded trial trained again, and its adapter compared byte by byte."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from macdrop.errors import MacDropError
from tune.cli.console import console, line
from tune.cli.options import Trust

app = typer.Typer()


@app.command(epilog="Example: macdrop reproduce runs/demo/trials/NAME")
def reproduce(
    trial: Annotated[Path, typer.Argument(help="Folder of a trial, or of `macdrop train`.")],
    config: Annotated[
        list[str] | None, typer.Argument(help="Where data or model are now: dataset=PATH model_name_or_path=PATH.")
    ] = None,
    trust_remote_code: Trust = False,
) -> None:
    """Train a trial again without Ray and compare the bytes of the adapters; exits with 1 if they differ.

    As many workers are needed as the trial had. Start several with: torchrun --nproc_per_node N -m tune.cli reproduce
    """
    from tune.config.recorded import check_orders
    from tune.config.run_spec import TrainSpec, dump, load
    from tune.training.quiet import quiet_libraries
    from tune.training.reproduce import train_again
    from tune.training.trial_setup import differences, read_setup

    first = int(os.environ.get("RANK", "0")) == 0  # the others of a torchrun print nothing
    trial = trial.absolute()
    quiet_libraries()
    try:
        setup = read_setup(trial)
        spec = load(trial / "config.yaml", config or [], kind=TrainSpec)
        check_orders(trial, dump(spec), config or [], trust=trust_remote_code)
        for text in differences(setup) if first else ():
            line("differs", text)
        outcome = train_again(trial, config or [], observe=_show)
    except MacDropError as error:
        if first:
            raise
        raise typer.Exit(error.exit_code) from error  # raised on every rank alike
    if first:
        line("trained", f"{outcome.step} of {outcome.total_steps} steps in {outcome.seconds:.1f} s")
        raise typer.Exit(0 if _same(trial) else 1)


def _show(metrics: dict[str, Any]) -> None:
    if metrics["step"]:
        console.print(f"step {metrics['step']}  loss {metrics['loss']:.4f}", soft_wrap=True)


def _same(trial: Path) -> bool:
    """Print how the new adapter compares; return False if a recorded one has other bytes."""
    from tune.training.reproduce import compare_adapters

    found = compare_adapters(trial)
    line("adapter", str(found.adapter))
    line("sha256", found.sha256)
    if found.recorded is None:
        line("recorded", f"none in {trial / 'adapter'}: nothing to compare with")
    elif found.recorded == found.sha256:
        line("equal", "the recorded adapter has the same bytes")
    else:
        line("different", f"the recorded adapter has sha256 {found.recorded}; {found.distance}")
    return found.recorded in (None, found.sha256)

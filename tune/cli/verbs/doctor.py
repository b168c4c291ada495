"""`macdrop doctor`: checks of this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tune.cli.console import console

if TYPE_CHECKING:
    from tune.preflight.machine import Check

app = typer.Typer()


@app.command(epilog="Example: macdrop doctor --ray")
def doctor(
    ray: Annotated[bool, typer.Option("--ray", help="Also start Ray for a moment (some seconds).")] = False,
) -> None:
    """Check this machine: packages, hardware, process groups, DeepSpeed, the zoo; print a fix for each problem."""
    from tune.preflight.machine import checks, lines

    with console.status("Checking"):
        found = [*checks(ray=ray), orphaned()]
    for text in lines(found):
        console.print(text, soft_wrap=True)
    raise typer.Exit(0 if all(check.ok or not check.needed for check in found) else 1)


def orphaned() -> Check:
    """Check for Ray processes of dead sweeps on this machine."""
    from tune.preflight.machine import Check

    name, fix = "dead runs", "The next sweep offers to remove them; with --clear-orphans it does so without asking."
    try:
        from tune.distributed.cluster.orphans import on_machine
    except ImportError:
        return Check(name, True, "not checked: Ray is not installed", needed=False)
    found = "; ".join(f"orphaned: {each.what}" for each in on_machine())
    return Check(name, not found, found or "nothing orphaned here", fix if found else "", needed=False)

"""`macdrop doctor`: check this machine."""

from __future__ import annotations

from tune.cli.console import console
from tune.preflight.machine import Check, checks, lines


def doctor(*, ray: bool) -> bool:
    with console.status("Checking"):
        found = [*checks(ray=ray), orphaned()]
    for text in lines(found):
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    return all(check.ok or not check.needed for check in found)


def orphaned() -> Check:
    """Ray processes of dead sweeps on this machine."""
    name, fix = "dead runs", "The next sweep offers to remove them; with --clear-orphans it does so without asking."
    try:
        from tune.distributed.cluster.orphans import on_machine
    except ImportError:
        return Check(name, True, "not checked: Ray is not installed", needed=False)
    found = "; ".join(f"orphaned: {each.what}" for each in on_machine())
    return Check(name, not found, found or "nothing orphaned here", fix if found else "", needed=False)

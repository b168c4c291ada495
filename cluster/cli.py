"""The verbs of `macdrop cluster`, a branch of the `macdrop` command. Each imports its module when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Launch a cluster and run sweeps on it: a thin layer over `ray up`, `kubectl` and `sbatch`.",
    epilog="Example: macdrop cluster render local head_ip=10.0.0.1 worker_ips=10.0.0.2,10.0.0.3 --output cluster.yaml",
    no_args_is_help=True,
)

File = Annotated[Path, typer.Argument(help="Ray cluster YAML, KubeRay manifest or sbatch script.", show_default=False)]
Run = Annotated[str, typer.Argument(help="Name of a run, as shown by `submit` and `status`.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the commands without running them.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")]
Follow = Annotated[bool, typer.Option("--follow/--no-follow", help="Keep printing the log until the job ends.")]
Nodes = Annotated[int | None, typer.Option(min=1, help="Nodes to wait for (default: the head and min_workers).")]
Timeout = Annotated[float, typer.Option(min=0, help="Seconds to wait for the nodes.")]


@app.command(epilog="Example: macdrop cluster render aws region=us-west-2 --output cluster.yaml")
def render(
    target: Annotated[
        str | None, typer.Argument(help="Where to launch, such as aws, local or slurm; omit it to list all.")
    ] = None,
    fields: Annotated[list[str] | None, typer.Argument(help="Fields as key=value; TARGET alone lists them.")] = None,
    output: Annotated[Path | None, typer.Option(help="File to write (default: print to stdout).")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Write a commented launch file from a few fields. Without TARGET: list targets; TARGET alone: list its fields."""
    from cluster.render import render as rendering

    rendering.run(target, fields or [], output=output, force=force)


@app.command(epilog="Example: macdrop cluster check cluster.yaml")
def check(
    file: File,
    after: Annotated[bool, typer.Option("--after", help="Wait for the nodes of a cluster that is up.")] = False,
    nodes: Nodes = None,
    timeout: Timeout = 600,
    crd: Annotated[Path | None, typer.Option(help="Folder with KubeRay's CRDs, to check every key.")] = None,
) -> None:
    """Find mistakes in a launch file. With --after: wait for the nodes of a cluster, and say why one is missing."""
    if after:
        from cluster.commands import up as verb

        raise typer.Exit(verb.check_after(file, nodes=nodes, timeout=timeout))
    from cluster.commands import check as checking

    raise typer.Exit(checking.run(file, crd))


@app.command(epilog="Example: HF_TOKEN=... macdrop cluster up cluster.yaml")
def up(
    file: File,
    nodes: Nodes = None,
    timeout: Timeout = 600,
    dry_run: DryRun = False,
) -> None:
    """Check the file, prepare token and secrets, start the cluster and wait for its nodes."""
    from cluster.commands import up as verb

    raise typer.Exit(verb.up(file, nodes=nodes, timeout=timeout, dry_run=dry_run))


@app.command(epilog="Example: macdrop cluster submit cluster.yaml llama-3.2-1b sweep.num_samples=40 --name llama")
def submit(
    file: File,
    recipe: Annotated[str, typer.Argument(help="A local YAML file, or the name of a shipped recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Overrides of the recipe as key=value.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run (default: the recipe's).")] = None,
    follow: Follow = True,
    dry_run: DryRun = False,
) -> None:
    """Start a sweep and print its log; it continues without this machine. Repeat the command to resume."""
    from cluster.commands import jobs

    raise typer.Exit(jobs.submit(file, recipe, overrides or [], name=name, follow=follow, dry_run=dry_run))


@app.command(epilog="Example: macdrop cluster status cluster.yaml")
def status(file: File, dry_run: DryRun = False) -> None:
    """Show nodes, jobs, and the runs on the storage."""
    from cluster.commands import status as verb

    raise typer.Exit(verb.status(file, dry_run=dry_run))


@app.command(epilog="Example: macdrop cluster logs cluster.yaml llama --follow")
def logs(
    file: File,
    run: Annotated[str | None, typer.Argument(help="Name of a run (default: the newest).")] = None,
    follow: Follow = False,
    dry_run: DryRun = False,
) -> None:
    """Print the log of the newest job of a run."""
    from cluster.commands import jobs

    raise typer.Exit(jobs.logs(file, run, follow=follow, dry_run=dry_run))


@app.command(epilog="Example: macdrop cluster fetch cluster.yaml llama --to runs")
def fetch(
    file: File,
    run: Run,
    to: Annotated[Path, typer.Option(help="Local folder in which to put the folder of the run.")] = Path("runs"),
    everything: Annotated[bool, typer.Option("--all", help="Also copy checkpoints and Ray's own files.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Copy the results of a run here, even while it is running; later calls copy only what is new."""
    from cluster.commands import fetch as verb

    raise typer.Exit(verb.fetch(file, run, to=to, everything=everything, dry_run=dry_run))


@app.command(epilog="Example: macdrop cluster down cluster.yaml --yes")
def down(file: File, yes: Yes = False, dry_run: DryRun = False) -> None:
    """Stop jobs and cluster, and verify that no Ray process is left. Results stay on the storage."""
    from cluster.commands import down as verb

    raise typer.Exit(verb.down(file, yes=yes, dry_run=dry_run))


@app.command("spot-watch", epilog="Example: macdrop cluster spot-watch --cloud aws")
def spot_watch(
    cloud: Annotated[str | None, typer.Option(help="aws, gcp or azure (default: detect).")] = None,
    interval: Annotated[float, typer.Option(min=0.01, help="Seconds between two requests.")] = 5.0,
    node_id: Annotated[str | None, typer.Option(help="Drain only this node (default: all of this host).")] = None,
) -> None:
    """On a spot node: drain the Ray node when the cloud gives notice. Rendered launch files start it."""
    from cluster.remote import spot_watch as verb

    raise typer.Exit(verb.watch(cloud, interval=interval, node_id=node_id))


@app.command("on-head", hidden=True, epilog="Example: macdrop cluster on-head nodes jobs runs")
def on_head(topics: Annotated[list[str], typer.Argument(help="nodes, jobs, runs, log.")]) -> None:
    """Answer the other verbs on the head, as one line of JSON."""
    from cluster.remote import head

    head.report(topics)

"""The verbs of `macdrop cluster`, a branch of the `macdrop` command. Handlers import what they need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Launch a cluster and sweeps on it: a thin shell over `ray up`, `kubectl` and `sbatch`.",
    epilog="Example: macdrop cluster render local head_ip=10.0.0.1 worker_ips=10.0.0.2,10.0.0.3 --output cluster.yaml",
    no_args_is_help=True,
)

File = Annotated[Path, typer.Argument(help="Ray cluster YAML, KubeRay manifest or sbatch script.", show_default=False)]
Run = Annotated[str, typer.Argument(help="Name of a run, as `submit` and `status` tell it.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only print the commands; run none of them.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Follow = Annotated[bool, typer.Option("--follow/--no-follow", help="Go on printing the log until the job ends.")]
Nodes = Annotated[int | None, typer.Option(min=1, help="Nodes to wait for (default: head and min_workers).")]
Timeout = Annotated[float, typer.Option(min=0, help="Seconds to wait for the nodes.")]


@app.command(epilog="Example: macdrop cluster render aws region=us-west-2 --output cluster.yaml")
def render(
    target: Annotated[
        str | None, typer.Argument(help="What to launch on, such as aws, local or slurm; none lists them.")
    ] = None,
    answers: Annotated[list[str] | None, typer.Argument(help="Answers as key=value; TARGET alone lists them.")] = None,
    output: Annotated[Path | None, typer.Option(help="File to write (default: print it).")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Write a commented launch file from a few answers. No TARGET: list them; TARGET alone: list its answers."""
    from cluster.render import render as rendering

    rendering.run(target, answers or [], output=output, force=force)


@app.command(epilog="Examples: macdrop cluster check cluster.yaml | macdrop cluster check cluster.yaml --after")
def check(
    file: File,
    after: Annotated[bool, typer.Option("--after", help="Of a cluster that is up: wait for its nodes.")] = False,
    nodes: Nodes = None,
    timeout: Timeout = 600,
    crd: Annotated[Path | None, typer.Option(help="Folder with KubeRay's CRDs: then every key is checked.")] = None,
) -> None:
    """Before `up`: what Ray lets pass. With --after: wait for the nodes, and tell why one does not come."""
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
    """Check the file, make token and secrets ready, start the cluster and wait for its nodes."""
    from cluster.commands import up as verb

    raise typer.Exit(verb.up(file, nodes=nodes, timeout=timeout, dry_run=dry_run))


@app.command(epilog="Example: macdrop cluster submit cluster.yaml llama-3.2-1b sweep.num_samples=40 --name llama")
def submit(
    file: File,
    recipe: Annotated[str, typer.Argument(help="A YAML file of this machine, or the name of a shipped recipe.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Keys of the recipe as key=value.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run (default: the recipe's). Again: resume.")] = None,
    follow: Follow = True,
    dry_run: DryRun = False,
) -> None:
    """Start a sweep on the cluster and print its log; it goes on when this machine leaves. The same again resumes."""
    from cluster.commands import jobs

    raise typer.Exit(jobs.submit(file, recipe, overrides or [], name=name, follow=follow, dry_run=dry_run))


@app.command(epilog="Example: macdrop cluster status cluster.yaml")
def status(file: File, dry_run: DryRun = False) -> None:
    """Nodes, jobs, and the runs on the cluster's storage."""
    from cluster.commands import status as verb

    raise typer.Exit(verb.status(file, dry_run=dry_run))


@app.command(epilog="Example: macdrop cluster logs cluster.yaml llama --follow")
def logs(
    file: File,
    run: Annotated[str | None, typer.Argument(help="Name of a run (default: the newest).")] = None,
    follow: Follow = False,
    dry_run: DryRun = False,
) -> None:
    """The log of a run's newest job."""
    from cluster.commands import jobs

    raise typer.Exit(jobs.logs(file, run, follow=follow, dry_run=dry_run))


@app.command(epilog="Example: macdrop cluster fetch cluster.yaml llama --to runs")
def fetch(
    file: File,
    run: Run,
    to: Annotated[Path, typer.Option(help="Folder to put the run's folder in.")] = Path("runs"),
    everything: Annotated[bool, typer.Option("--all", help="Checkpoints and Ray's own files too.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Bring a run's results home, also while it is running; fetched again, only what is new is copied."""
    from cluster.commands import fetch as verb

    raise typer.Exit(verb.fetch(file, run, to=to, everything=everything, dry_run=dry_run))


@app.command(epilog="Example: macdrop cluster down cluster.yaml --yes")
def down(file: File, yes: Yes = False, dry_run: DryRun = False) -> None:
    """Stop jobs and cluster, and see to it that no Ray process is left on any host. Results stay on the storage."""
    from cluster.commands import down as verb

    raise typer.Exit(verb.down(file, yes=yes, dry_run=dry_run))


@app.command("spot-watch", epilog="Example: macdrop cluster spot-watch --cloud aws   (on each spot node, by its YAML)")
def spot_watch(
    cloud: Annotated[str | None, typer.Option(help="aws, gcp or azure (default: the one that answers).")] = None,
    interval: Annotated[float, typer.Option(min=0.01, help="Seconds between two questions.")] = 5.0,
    node_id: Annotated[str | None, typer.Option(help="Only this node (default: all Ray nodes of this host).")] = None,
) -> None:
    """On a spot node: when the cloud announces its end, drain the Ray node, so that its work is saved at once."""
    from cluster.remote import spot_watch

    raise typer.Exit(spot_watch.watch(cloud, interval=interval, node_id=node_id))


@app.command("on-head", hidden=True, epilog="Example: macdrop cluster on-head nodes jobs runs")
def on_head(topics: Annotated[list[str], typer.Argument(help="nodes, jobs, runs, log.")]) -> None:
    """What the other verbs ask on the head: one line of JSON."""
    from cluster.remote import head

    head.tell(topics)

"""The `macdrop` command: its verbs put together, and errors turned into exit codes.

Modules of verbs import what they need inside functions, so that `--help` answers at once.
"""

from __future__ import annotations

import errno
import sys

import typer

from cluster.cli import app as cluster
from cluster.errors import LaunchError
from macdrop.errors import ConfigError, MacDropError
from tune.cli.console import warn
from tune.cli.streams import protect
from tune.cli.verbs import (
    attack,
    compare,
    data,
    docs,
    doctor,
    export,
    judge,
    plan,
    report,
    reproduce,
    scan,
    schema,
    suites,
    sweep,
    train,
    zoo,
)
from tune.cli.verbs import eval as evaluate
from tune.config.syntax.user_paths import expand_arguments
from tune.storage.places import check_current_folder, direct_loopback

#: Exit code of typer after Ctrl-C; the errors hold the others.
INTERRUPTED = 130

app = typer.Typer(
    name="macdrop",
    help="MacDrop (massive weights curriculum dropout): find massive weights, fine-tune, sweep, score, report.",
    epilog="Example: macdrop sweep   (the demo: two built-in models, minutes on two CPU cores)",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
SCORING = (scan, attack, data, train, evaluate, suites, judge)
SWEEPING = (plan, sweep, report, compare, export, reproduce)
HELPING = (doctor, schema, docs)
for verb in (*SCORING, *SWEEPING, *HELPING):
    app.registered_commands += verb.app.registered_commands  # before typer 0.15, add_typer needs a name
app.add_typer(zoo.app, name="zoo")
app.add_typer(cluster, name="cluster")


def main() -> None:
    """Run the `macdrop` command; errors raised on purpose become a message and an exit code, never a traceback."""
    protect()
    direct_loopback()
    try:
        check_current_folder()
        app(expand_arguments(sys.argv[1:]), prog_name="macdrop")  # also under `python -m`
    except (MacDropError, LaunchError) as error:
        warn(f"macdrop: {error}")
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        warn(f"macdrop: no file can have a name as long as {str(error.filename)[-60:]!r}")
        sys.exit(ConfigError.exit_code)
    except SystemExit as ended:
        if ended.code == INTERRUPTED:  # typer turns Ctrl-C into this exit, without a word
            warn("macdrop: interrupted")
        raise


if __name__ == "__main__":
    main()

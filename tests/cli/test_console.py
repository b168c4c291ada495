"""What the commands print: text is text, and what cannot be printed ends nothing."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from tune.cli import console
from tune.cli.console import PlainConsole
from tune.cli.progress import Progress
from tune.config.eval_spec import EvalJob
from tune.config.resume import shell_command
from tune.distributed.actors.eval_task import EvalTask, Result
from tune.distributed.sweep.events import unfailing
from tune.scheduling.queue import TaskQueue
from tune.scheduling.tasks import TrainTask

GLOO = "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"
NAMES = [GLOO, "/m/llama[instruct]", "/data/run[v2]", "[link=http://h]x[/link]", "x[/bold]y", ":smile: [bold]", "a\\[b"]


def shown(name: str, *, terminal: bool) -> str:
    """All that the progress of a sweep prints of a name."""
    out = io.StringIO()
    progress = Progress(PlainConsole(file=out, width=400, force_terminal=terminal, color_system=None))
    queue = TaskQueue()
    queue.lane_up("lane", "p", "host")
    queue.place(TrainTask(name, name, {}, "folder", "data", None, "engine", "p"), "trial")
    queue.take("lane", None)
    progress.started(Path(name), name, name)
    progress.study(SimpleNamespace(name=name, count=1))
    progress.stage(SimpleNamespace(name=name), name, 1)
    progress.show(queue.snapshot(), {"model": 1})
    task = EvalTask({"name": name}, EvalJob("zero_shot", name, name), None, "answers")
    progress.scored(name, Result(task, [{"task": name, "attack": name, "value": 0.5}]), "model")
    progress.scored(name, Result(task, [], error=name), "model")
    progress.note(name)
    queue.failed(name, "failed", name)
    progress.ended(queue.entries[name])
    progress.show(queue.snapshot(), {})
    progress.console.print(progress._table())
    progress.finished()
    return out.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_progress_shows_names_and_reasons_as_they_are(name, terminal):
    text = shown(name, terminal=terminal)
    assert text.count(name) >= (12 if terminal else 14)
    assert f"{name} failed ({name})" in text


def test_control_characters_of_names_do_not_reach_the_terminal():
    text = shown("a\x1b[2J\u202eb\x07", terminal=False)
    assert "a\\x1b[2J\\u202eb\\x07" in text and not set("\x1b\u202e\x07") & set(text)


@pytest.mark.parametrize("name", NAMES)
def test_lines_tables_and_questions_show_text_as_it_is(name, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(console, "console", PlainConsole(file=out, width=200))
    console.line(name, name)
    made = console.table(name)
    made.add_row(name)
    console.console.print(made)
    with console.console.status(name):
        pass
    monkeypatch.setattr("builtins.input", lambda: "y")
    assert console._agrees(f"Clear {name}?")
    assert out.getvalue().count(name) == 5 and f"Clear {name}? [y/N] " in out.getvalue()


@pytest.mark.parametrize("error", [EOFError, OSError(5, "gone"), UnicodeDecodeError("utf-8", b"", 0, 1, "")])
def test_a_question_without_an_answer_is_a_no(error, monkeypatch):
    def ended() -> str:
        raise error

    monkeypatch.setattr("builtins.input", ended)
    assert not console._agrees("Start it?")


def test_a_display_that_fails_is_logged_once_and_ends_nothing(caplog):
    class Broken(Progress):
        def note(self, text: str) -> None:
            raise OSError(5, "Input/output error")

    observer = unfailing(Broken(Console(file=io.StringIO())))
    for _ in range(3):
        observer.note("text")
    observer.finished()
    assert [record.getMessage() for record in caplog.records] == [
        "The display failed at 'note': OSError: [Errno 5] Input/output error"
    ]


@pytest.mark.parametrize("word", ["a b'é $(touch x)[v2]", "\x1b[2J\\'\n", "~/x", "", "\u202ea", "*", "a=b", *NAMES])
def test_a_printed_command_says_to_a_shell_what_it_says_here(word, tmp_path):
    command = shell_command("printf", "%s|", "--x=", word, tmp_path)
    assert command.isprintable()
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout == f"--x=|{word}|{tmp_path}|"


# --- streams, in processes of their own ---


def run(*arguments: str, shell: str = "", env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run `macdrop` from bash; `shell`: what follows the command there."""
    script = f'"$0" -m tune.cli "$@" {shell}'
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", script, sys.executable, *arguments],
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.mark.parametrize("shell", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "> /dev/full", "| head -1"])
def test_closed_full_and_broken_streams_end_no_command(shell):
    ended = run("docs", "configuration", shell=shell)
    assert (ended.returncode, "Traceback" in ended.stderr) == (0, False)
    said = "macdrop: cannot write standard output (No space left on device); continuing without it.\n"
    assert ended.stderr == (said if "full" in shell else "")


def test_a_refusal_keeps_its_exit_code_when_nothing_can_be_printed():
    assert run("docs", "nonsense", shell="> /dev/full 2> /dev/full").returncode == 2


def test_a_file_that_is_opened_later_does_not_get_the_number_of_a_closed_stream(tmp_path):
    code = (
        "import sys; from tune.cli.streams import protect; protect(); file = open(sys.argv[1], 'w'); print('lost');"
        "import subprocess; subprocess.run(['echo', 'lost'], check=True); file.write('kept'); file.close()"
    )
    subprocess.run(["bash", "-c", '"$0" -c "$1" "$2" >&-', sys.executable, code, tmp_path / "file"], check=True)
    assert (tmp_path / "file").read_text() == "kept"


def test_characters_that_the_locale_does_not_have_are_replaced():
    ended = run("docs", "method", env={"PYTHONIOENCODING": "ascii"})
    assert ended.returncode == 0 and "Traceback" not in ended.stderr and "?" in ended.stdout

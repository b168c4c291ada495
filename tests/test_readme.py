"""What the README says is so: its commands exist, its code runs, its tables and its file tree match the tree."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import shlex
import subprocess
import typing
from pathlib import Path

import pytest
import typer
import yaml
from pydantic import BaseModel

from tune.cli.main import app
from tune.config import suites
from tune.config.judge_spec import JudgeSpec
from tune.config.parse import ALIASES, read_override
from tune.config.recipes import RECIPES
from tune.config.run_spec import Metric, RunSpec, Space, load

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(*languages: str) -> list[str]:
    """The contents of fenced code blocks."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [content for language, content in found if language in languages]


def section(title: str) -> str:
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)[1]


def commands() -> list[str]:
    """Shell lines: all lines of bash blocks, those behind a prompt in console blocks; comments cut off."""
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    lines += [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]
    parts = [part.strip() for line in lines for part in re.sub(r"\s+#.*", "", line).split("&&")]
    return list(dict.fromkeys(part for part in parts if part))


def own_commands() -> list[str]:
    return [command for command in commands() if command.startswith("macdrop ")]


def parsed(command: str) -> tuple[str, dict]:
    """Verb and arguments as typer's own parser understands them; nothing is run."""
    verb, arguments = typer.main.get_command(app), shlex.split(command)[1:]
    name = "macdrop"
    while hasattr(verb, "commands"):
        name, *arguments = arguments
        assert name in verb.commands, f"{command}: there is no verb {name}"
        verb = verb.commands[name]
    return name, verb.make_context(name, list(arguments)).params


# --- commands ---


def test_the_two_commands_are_there():
    assert {"pip install -e .", "macdrop sweep", "pip install -e '.[test]'", "pytest"} <= set(commands())


@pytest.mark.parametrize("command", own_commands())
def test_every_command_can_be_typed(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bring_suite_files("data", "PATH")
    verb, params = parsed(command)
    words = params.get("config") or []
    if not words or (params.get("resume") and "=" in words[0]):
        return  # the demo, or a run folder's own spec
    if verb == "judge":
        JudgeSpec.model_validate(dict(read_override(word) for word in words))
        return
    file, overrides = (None, words) if "=" in words[0] else (words[0], words[1:])
    if verb == "eval":
        overrides = [*overrides, f"model_name_or_path={params['model']}", "sweep.models=[]"]
    load(yaml_file(file, tmp_path), overrides)


def bring_suite_files(*folders: str) -> None:
    """Lay out empty files as `eval.local` wants them: the keys are checked here, not the data."""
    for suite in suites.names():
        for file in suites.load(suite).files.values():
            for folder in folders:
                path = Path(folder, file)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()


def yaml_file(name: str | None, folder: Path) -> Path | None:
    """A shipped recipe, or the YAML block of the README that begins with the file's name as a comment."""
    if name is None or (RECIPES / f"{name}.yaml").exists():
        return name and RECIPES / f"{name}.yaml"
    content = next(block for block in blocks("yaml") if block.startswith(f"# {name}\n"))
    (folder / name).write_text(content, encoding="utf-8")
    return folder / name


def test_every_verb_is_shown_or_named():
    for verb in typer.main.get_command(app).commands:
        assert re.search(rf"macdrop {verb}\b", README), verb


def test_every_module_and_file_that_a_command_runs_exists():
    for command in commands():
        for word in shlex.split(command):
            if word.startswith("tests/"):
                assert (ROOT / word.partition("::")[0]).exists(), command
        run = re.match(r"python -m ([\w.]+)", command)
        if run:
            path = ROOT / run[1].replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), command


@pytest.mark.parametrize("verb", ["scan", "attack"])
def test_the_tour_prints_what_it_shows(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MACDROP_CACHE", str(tmp_path))
    shown = next(block for block in blocks("console") if block.startswith(f"$ macdrop {verb} "))
    command, _, shown = shown.removeprefix("$ ").partition("\n")
    with pytest.raises(SystemExit) as ended:
        app(shlex.split(command)[1:])
    assert not ended.value.code
    printed = capsys.readouterr().out.split()
    assert len(printed) == len(shown.split())
    for ours, theirs in zip(printed, shown.split(), strict=True):
        assert ours == theirs or number(ours) == pytest.approx(number(theirs), rel=0.02), (ours, theirs)


def number(word: str) -> float:
    """3.7, (644.8), (x23.1)."""
    return float(re.sub(r"[()x,;:]", "", word))


def test_every_recipe_and_suite_is_listed():
    listed = re.findall(r"^\| `([\w.-]+)` \|", section("On real models"), re.MULTILINE)
    assert sorted(listed) == sorted([*(path.stem for path in RECIPES.glob("*.yaml")), *suites.names()])


# --- code ---


@pytest.mark.parametrize("code", [code for code in blocks("python") if "pandas" not in code])
def test_python_blocks_run(code, tmp_path, monkeypatch):
    """Those for a trainer that is not installed are only parsed."""
    monkeypatch.chdir(tmp_path)
    compiled = compile(code, "README.md", "exec")
    for trainer in ("trl", "llamafactory", "axolotl"):
        if f"from {trainer}" in code and importlib.util.find_spec(trainer) is None:
            return
    exec(compiled, {})


def test_the_line_for_pandas_reads_a_run_folder(tmp_path, monkeypatch):
    for file in ("scores.jsonl", "trials/NAME/metrics.jsonl"):
        path = tmp_path / "runs/demo" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"step": 1}\n{"step": 2}\n')
    monkeypatch.chdir(tmp_path)
    (code,) = (code for code in blocks("python") if "pandas" in code)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert len(names["scores"]) == len(names["steps"]) == 2


# --- the table of keys ---


def keys(kind: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Dotted names of all keys with their defaults as YAML, those of named entries under NAME or KEY.

    `validation` has the keys of `eval` and stands in one row; of a list of metrics the table has the keys of one.
    """
    found: dict[str, str] = {}
    for name, field in kind.model_fields.items():
        inner = [part for part in typing.get_args(field.annotation) if is_model(part)]
        if prefix + name == "validation":
            found[name] = "`{}`"
            continue
        if is_model(field.annotation) or inner == [Metric]:
            found |= keys((inner or [field.annotation])[0], f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else f"`{as_yaml(field.get_default(call_default_factory=True))}`"
        found[prefix + name] = default
        if inner:
            named = "" if inner[0] is JudgeSpec else "KEY." if inner[0] is Space else "NAME."
            found |= keys(inner[0], f"{prefix}{name}.{named}")
    return found


def is_model(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def as_yaml(value: object) -> str:
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value)  # YAML as well, and on one line
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()


def test_the_table_of_keys_has_every_key_with_its_default_and_no_other():
    rows = re.findall(r"^\| `([\w.]+)` \| (\S.*?) \| (.+) \|$", section("The YAML file"), re.MULTILINE)
    assert {key: default for key, default, _ in rows} == keys(RunSpec)
    assert len(rows) == len(keys(RunSpec))


def test_the_aliases_are_those_that_are_accepted():
    assert dict(re.findall(r"`([\w.]+)` for `([\w.]+)`", section("The YAML file"))) == ALIASES


# --- the file tree ---


@functools.cache
def tracked() -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def tree() -> list[str]:
    (block,) = re.findall(r"^```text\n(.*?)^```$", section("Files"), re.MULTILINE | re.DOTALL)
    lines = block.splitlines()
    assert all(re.fullmatch(r"\S+ {2,}\S.*", line) for line in lines), "a path, two spaces, what it is"
    return [line.split()[0] for line in lines]


def test_the_tree_has_every_file_or_its_folder():
    listed = tree()
    folders = tuple(path for path in listed if path.endswith("/"))
    files = [name for name in tracked() if name.endswith((".py", ".yaml"))]
    missing = [name for name in files if name not in listed and not name.startswith(folders)]
    assert not missing


def test_the_tree_has_nothing_else():
    listed = tree()
    assert len(set(listed)) == len(listed)
    gone = [path for path in listed if path not in tracked() and not any(name.startswith(path) for name in tracked())]
    assert not gone

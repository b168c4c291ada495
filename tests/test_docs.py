"""The documents are true: their commands exist, their code runs, their tables and trees match the repository."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import re
import shlex
import subprocess
import tomllib
import typing
from pathlib import Path

import pytest
import typer
import yaml
from helpers.documents import ROOT, TEXTS, TOPICS, Block, blocks, commands, fits, own_commands
from helpers.run_folders import make_run
from pydantic import BaseModel

from tune.cli.main import app
from tune.cli.options import split_config
from tune.config import suites
from tune.config.endpoints.server_spec import GenerationServer
from tune.config.judge_spec import JudgeSpec
from tune.config.parse import ALIASES, read_override
from tune.config.run_spec import Metric, RunSpec, Space, load

RECIPES = ROOT / "tune/config/recipes"
README_BYTES, DOCSTRING_WIDTH = 14_000, 120


def parsed(command: str) -> tuple[str, dict]:
    """Verb and arguments as typer's own parser understands them; nothing is run."""
    verb, (name, *arguments) = typer.main.get_command(app), shlex.split(command.partition(" > ")[0])
    while hasattr(verb, "commands"):
        name, *arguments = arguments
        assert name in verb.commands, f"{command}: there is no verb {name}"
        verb = verb.commands[name]
    return name, verb.make_context(name, list(arguments)).params


def settings(tool: str) -> dict:
    """A tool's table in pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"].get(tool, {})


# --- size and shape ---


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].encode()) <= README_BYTES


def test_every_topic_is_there_and_is_shipped():
    for package, stems in TOPICS.items():
        assert sorted(path.stem for path in (ROOT / package / "docs").glob("*.md")) == stems.split()
        assert "docs/*" in settings("setuptools")["package-data"][package]


@pytest.mark.parametrize("name", TEXTS)
def test_internal_links_resolve(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", TEXTS[name], flags=re.M | re.S)):
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / name).parent / file if file else ROOT / name
        assert path.exists(), f"{name} links to {target}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads], target


@pytest.mark.parametrize("name", TEXTS)
def test_paths_of_the_repository_exist(name):
    paths = re.findall(r"`((?:macdrop|tune|cluster|tests|\.ci)/[\w./-]+)`", TEXTS[name])
    assert not [path for path in paths if not (ROOT / path).exists()]


# --- commands ---


def test_the_two_commands_are_there():
    shown = {command.text for command in commands() if command.document == "README.md"}
    assert {"pip install -e .", "macdrop sweep", "pip install -e '.[test]'", "pytest"} <= shown


@pytest.mark.parametrize("command", own_commands(), ids=str)
def test_every_command_can_be_typed(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bring_suite_files("data", "PATH")
    verb, params = parsed(command.text)
    words = params.get("config") or []
    if not words or (params.get("resume") and "=" in words[0]):
        return  # the demo, or a run folder's own settings
    if verb == "judge":
        JudgeSpec.model_validate(dict(read_override(word) for word in words))
        return
    file, overrides = (None, words) if "=" in words[0] else (words[0], words[1:])
    if verb == "eval":
        overrides = [*overrides, f"model_name_or_path={params['model']}", "sweep.models=[]"]
    load(yaml_file(file, command.document, tmp_path), overrides)


def bring_suite_files(*folders: str) -> None:
    """Lay out empty files as `eval.local` wants them: the keys are checked here, not the data."""
    for suite in suites.names():
        for file in suites.load(suite).files.values():
            for folder in folders:
                path = Path(folder, file)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()


def named_yaml(document: str) -> dict[str, str]:
    """File name -> content of the YAML blocks of a document that begin with the name as a comment."""
    found = [re.match(r"# (\S+\.yaml)\n", block.content) for block in blocks("yaml", of=document)]
    return {name[1]: name.string for name in found if name}


def yaml_file(name: str | None, document: str, folder: Path) -> Path | None:
    """A shipped recipe, or the file that the document shows, else the README."""
    if name is None or (RECIPES / f"{name}.yaml").exists():
        return name and RECIPES / f"{name}.yaml"
    (folder / name).write_text((named_yaml("README.md") | named_yaml(document))[name], encoding="utf-8")
    return folder / name


@pytest.mark.parametrize("name", TEXTS)
def test_yaml_blocks_can_be_read(name, tmp_path):
    assert all(isinstance(yaml.safe_load(block.content), dict) for block in blocks("yaml", of=name))
    if "my.yaml" in named_yaml(name):
        load(yaml_file("my.yaml", name, tmp_path), [])


def test_every_verb_is_shown_or_named():
    text = "\n".join(TEXTS.values())
    root = typer.main.get_command(app)
    for verb in root.commands:
        assert re.search(rf"(macdrop|tune\.cli) {verb}\b", text), verb
    cluster = set(root.commands["cluster"].commands) - {"on-head"}  # which the other verbs call on the head
    assert not [verb for verb in cluster if f"macdrop cluster {verb}" not in text]


def test_every_module_and_file_that_a_command_runs_exists():
    for command in commands():
        for word in shlex.split(command.text):
            if word.startswith("tests/"):
                assert (ROOT / word.partition("::")[0]).exists(), command
        run = re.search(r"(?:python|torchrun).* -m ([\w.]+)", command.text)
        if run and run[1] != "venv":
            path = ROOT / run[1].replace(".", "/")
            assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), command


def test_pre_commit_runs_the_quick_checks_of_ci():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    entries = [hook["entry"] for hook in local["hooks"]]
    steps = re.findall(r"^(.*) \|\| status=\$\?$", (ROOT / ".ci/run").read_text(encoding="utf-8"), re.MULTILINE)
    assert [step.removesuffix(" .") for step in steps if "pytest" not in step] == entries[:-1]
    assert entries[-1].startswith("python -m pytest") and entries[-1].endswith("tests/test_architecture.py")


# --- console blocks ---


#: Verbs whose output is the same everywhere; those whose figures depend on the machine, in the order to run them in.
FAST, SLOWER = ("scan", "attack"), ("train", "eval")


def shown_by(*verbs: str) -> list[Block]:
    return [block for verb in verbs for block in blocks("console") if block.content.startswith(f"$ macdrop {verb} ")]


@pytest.mark.parametrize("block", shown_by(*FAST))
def test_the_fast_verbs_print_what_is_shown(block, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MACDROP_CACHE", str(tmp_path))
    command, shown = block.content.removeprefix("$ ").split("\n", 1)
    assert fits(typed(command, capsys).split(), shown.split()), "the document shows something else"


def test_train_and_eval_print_what_is_shown_but_for_its_figures(tmp_path, monkeypatch, capsys):
    """The adapter of the first is what the second scores; each command is run once, wherever it is shown."""
    monkeypatch.setenv("MACDROP_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    printed: dict[str, str] = {}
    for block in shown_by(*SLOWER):
        command, shown = block.content.removeprefix("$ ").split("\n", 1)
        if command not in printed:
            printed[command] = typed(command, capsys)
        assert fits(printed[command].split(), shown.split(), within=float("inf")), block.document
    assert len(printed) == len(SLOWER)


def typed(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command prints."""
    with pytest.raises(SystemExit) as ended:
        app(shlex.split(command)[1:])
    assert not ended.value.code
    return capsys.readouterr().out


def test_words_are_compared_with_what_was_left_out():
    printed = "a 1.00 b c (x2.0) d".split()
    assert fits(printed, "a 1.01 b c (x2) d".split())
    right = ("a ... c ... d", "... d", "a ... ... d", "a 1 b c (x2) d ...")
    assert all(fits(printed, shown.split()) for shown in right)
    wrong = ("a 1.1 b c (x2.0) d", "a ... c", "... c ... b ...", "a 1 b c (x2) d e", "b ...", "a 1 b c (x2)")
    assert not any(fits(printed, shown.split()) for shown in wrong)


@pytest.mark.parametrize("block", blocks("console", of="README.md"), ids=lambda block: block.content.split()[2])
def test_what_the_readme_cuts_is_whole_elsewhere(block):
    """Its lines are lines, or beginnings of lines, of the same verb's console block in a topic."""
    verb, others = block.content.split()[2], [each for each in blocks("console") if each.document != "README.md"]
    (whole,) = (each for each in others if each.content.split()[2] == verb)
    for line in block.content.splitlines()[1:]:
        assert line == "..." or f"\n{line.removesuffix(' ...').rstrip()}" in whole.content, line


def test_the_sweep_of_wandb_starts_fine_tunings_that_train_accepts(tmp_path):
    """The command that W&B's own agent makes of the YAML of the docs, for values such as its searchers draw."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    (block,) = (each for each in blocks("yaml", of="tune/docs/integrations.md") if "${args_no_hyphens}" in each.content)
    sweep = yaml.safe_load(block.content)
    drawn = {key: each["values"][-1] if "values" in each else each["min"] for key, each in sweep["parameters"].items()}
    made = utils.create_sweep_command_args({"args": {key: {"value": value} for key, value in drawn.items()}})
    words: list[str] = []
    for word in sweep["command"]:
        found = {"${program}": [sweep["program"]], "${args_no_hyphens}": made["args_no_hyphens"]}
        words += found.get(word, [word])
    assert words[:3] == ["macdrop", "train", "my.yaml"]
    (tmp_path / "my.yaml").write_text("model_name_or_path: zoo:planted-llama\n")
    file, overrides = split_config([str(tmp_path / "my.yaml"), *words[3:]])
    spec = load(file, overrides)
    (model,) = spec.studies()
    assert (model.macdrop.p0, model.macdrop.k, model.learning_rate, spec.report_to) == (0.2, 5, 1e-5, ["wandb"])


# --- tables of the README ---


def test_every_recipe_is_listed_with_what_it_says_of_itself():
    rows = re.findall(r"^\| `([\w.-]+)` \| (.*) \|$", TEXTS["README.md"], re.MULTILINE)
    assert dict(rows) == {path.stem: about(path) for path in sorted(RECIPES.glob("*.yaml"))}


def about(recipe: Path) -> str:
    """The first comment of a recipe, without the command at its end."""
    comments = [line for line in recipe.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    first = next(line for line in comments if "yaml-language-server" not in line)
    return re.sub(r" `macdrop sweep.*`$", "", first.removeprefix("# "))


def test_every_suite_is_listed():
    assert set(re.findall(r"^\| `([\w.-]+)` \|", TEXTS["tune/docs/benchmarks.md"], re.MULTILINE)) == set(suites.names())


# --- code ---


@pytest.mark.parametrize("block", [block for block in blocks("python") if "pandas" not in block.content])
def test_python_blocks_run(block, tmp_path, monkeypatch):
    """Those for a trainer that is not installed are only compiled, and a sweep is one that has ended."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tune.cli.verbs.sweep.runner", lambda spec: ended_sweep)
    compiled = compile(block.content, block.document, "exec")
    for trainer in ("trl", "llamafactory", "axolotl"):
        if f"from {trainer}" in block.content and importlib.util.find_spec(trainer) is None:
            return
    exec(compiled, {})


def ended_sweep(spec: RunSpec, **options: typing.Any) -> int:
    """Leave what a sweep leaves, and return the number of its failures."""
    make_run(Path(str(spec.output_dir)), tried=2, items=10)
    return 0


def test_the_line_for_pandas_reads_a_run_folder(tmp_path, monkeypatch):
    for file in ("scores.jsonl", "trials/NAME/metrics.jsonl"):
        path = tmp_path / "runs/demo" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"step": 1}\n{"step": 2}\n')
    monkeypatch.chdir(tmp_path)
    (block,) = (block for block in blocks("python") if "pandas" in block.content)
    names: dict = {}
    exec(compile(block.content, block.document, "exec"), names)
    assert len(names["scores"]) == len(names["steps"]) == 2


# --- the tables of keys ---


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
            named = "" if inner[0] in (JudgeSpec, GenerationServer) else "KEY." if inner[0] is Space else "NAME."
            found |= keys(inner[0], f"{prefix}{name}.{named}")
    return found


def is_model(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def as_yaml(value: object) -> str:
    if isinstance(value, str) and "\n" in value:
        return json.dumps(value)  # YAML as well, and on one line
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n...\n").strip()


def test_the_tables_of_keys_have_every_key_with_its_default_and_no_other():
    _, _, tables = TEXTS["tune/docs/configuration.md"].partition("<!-- fields -->")
    rows = re.findall(r"^\| `([\w.]+)` \| (\S.*?) \| (.+) \|$", tables, re.MULTILINE)
    assert {key: default for key, default, _ in rows} == keys(RunSpec)
    assert len(rows) == len(keys(RunSpec))


def test_the_aliases_are_those_that_are_accepted():
    shown = re.findall(r"`([\w.]+)` for\s+`([\w.]+)`", TEXTS["tune/docs/configuration.md"])
    assert dict(shown) == ALIASES and len(shown) == len(ALIASES)


# --- the tree ---


@functools.cache
def tracked() -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def modules() -> list[str]:
    return [name for name in tracked() if name.endswith(".py") and name.startswith(("macdrop/", "tune/", "cluster/"))]


def tree() -> list[str]:
    """Paths of the README's tree, in its order."""
    (block,) = blocks("text", of="README.md")
    lines = block.content.splitlines()
    assert all(re.fullmatch(r"\S+ {2,}\S.*", line) for line in lines), "a path, two spaces, what it is"
    return [line.split()[0] for line in lines]


def test_the_tree_has_every_package_once():
    packages = [name.removesuffix("__init__.py") for name in modules() if name.endswith("/__init__.py")]
    listed = tree()
    assert len(set(listed)) == len(listed)
    assert set(packages) <= set(listed)


def test_the_tree_answers_what_a_newcomer_asks():
    wanted = {
        "the decay schedule": "macdrop/schedules.py",
        "the retry policy": "tune/scheduling/failures.py",
        "the report's attack figure": "tune/report/html/attacks.py",
        "the AWS template": "cluster/render/templates/aws.yaml.j2",
    }
    assert set(wanted.values()) <= set(tree())


def test_the_tree_has_nothing_else():
    assert not [path for path in tree() if not any(name.startswith(path) for name in tracked())]


@pytest.mark.parametrize("above", ["tune", "cluster"])
def test_the_tree_lists_packages_from_the_top_layer_to_the_bottom(above):
    layers = [c["layers"] for c in settings("importlinter")["contracts"] if above in c.get("containers", ())]
    order = [name for layer in layers[0] for name in re.findall(r"\w+", layer) if (ROOT / above / name).is_dir()]
    assert [path.split("/")[1] for path in tree() if re.fullmatch(rf"{above}/\w+/", path)] == order


@pytest.mark.parametrize("name", modules())
def test_every_module_says_in_one_line_what_it_is(name):
    first, *more = (ast.get_docstring(ast.parse((ROOT / name).read_text(encoding="utf-8"))) or "").split("\n")
    assert first and len(first) <= DOCSTRING_WIDTH and not (more and more[0]), f"{name} begins with {first!r}"

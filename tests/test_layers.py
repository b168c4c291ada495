"""The layout holds: which package may import what, what an import loads, how long files and functions may be."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("macdrop", "tune", "cluster")
FILE_LINES, TEST_LINES, FUNCTION_LINES = 350, 450, 80

#: The only place that imports Ray when it is imported; all else works where Ray is not installed.
RAY_ROOM = "tune/distributed/"
#: package -> what it never imports, not even inside a function.
NEVER = {
    "macdrop": {"ray", "lm_eval", "datasets", "optuna", "pydantic", "typer", "rich", "tune", "cluster"},
    "tune": {"cluster"},
    "cluster": {"macdrop", "tune"},
}
#: package -> what it imports inside functions only.
LATE = {
    "macdrop": {"deepspeed", "peft"},
    "tune": {"lm_eval", "optuna"},
}
#: The files around lm-eval's own task classes, themselves imported late.
LM_EVAL_FILES = {"tune/evaluation/zero_shot.py", "tune/evaluation/zero_shot_rows.py"}
#: The front door: all packages are open to it, and nobody goes through it.
FRONT_DOOR = "tune.cli.main"
#: module -> what importing it must not load.
LIGHT = {
    "macdrop": {"torch", "transformers", "ray", "deepspeed", "peft", "lm_eval", "datasets"},
    "cluster.cli": {"torch", "transformers", "ray", "deepspeed", "pydantic", "pandas", "numpy", "yaml", "jinja2"},
    "tune.cli.main": {"torch", "transformers", "ray", "deepspeed", "peft", "lm_eval", "datasets", "pydantic", "pandas"},
    "tune.config.run_spec": {"torch", "transformers", "ray", "deepspeed", "peft", "lm_eval", "datasets"},
    "tune.scheduling.study": {"torch", "transformers", "ray", "deepspeed", "peft", "lm_eval", "datasets"},
    "tune.report.report": {"torch", "transformers", "ray", "deepspeed", "peft", "lm_eval", "datasets"},
    "tune.zoo.catalog": {"torch", "transformers", "ray", "deepspeed", "peft", "lm_eval", "datasets"},
}
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:root|home|work|Users|mnt|scratch)/\w")


@functools.cache
def tracked() -> tuple[str, ...]:
    """Files of the repository: git's list, and what is new but not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout", allow_module_level=True)
    return tuple(sorted(name for name in listed.stdout.splitlines() if (ROOT / name).is_file()))


def sources(*tops: str) -> list[str]:
    return [name for name in tracked() if name.endswith(".py") and name.split("/")[0] in tops]


@functools.cache
def tree(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), name)


def module_of(name: str) -> str:
    """tune/zoo/__init__.py -> tune.zoo.catalog"""
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(name: str, *, everywhere: bool) -> Iterator[str]:
    """Dotted names that a file imports, "a.b" for `from a import b` too; for type checkers only does not count.

    everywhere: inside functions as well, else only what importing the file runs.
    """
    waiting: list[ast.AST] = [tree(name)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: write imports absolutely"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
        elif everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)


def tops(name: str, *, everywhere: bool) -> set[str]:
    return {imported.split(".")[0] for imported in imports(name, everywhere=everywhere)}


@pytest.mark.parametrize("name", sources(*PACKAGES))
def test_imports_go_one_way(name):
    package = name.split("/")[0]
    if module_of(name) != FRONT_DOOR:
        forbidden = NEVER[package] & tops(name, everywhere=True)
        assert not forbidden, f"{name} imports {sorted(forbidden)}"
    early = LATE.get(package, set()) & tops(name, everywhere=False) - ({"lm_eval"} if name in LM_EVAL_FILES else set())
    assert not early, f"{name} imports {sorted(early)} at module level; import it where it is used"


def test_only_one_room_imports_ray_at_module_level():
    found = {name for name in sources("tune") if "ray" in tops(name, everywhere=False)}
    assert all(name.startswith(RAY_ROOM) for name in found)


def test_nothing_imports_the_front_door():
    inside = [name for name in sources(*PACKAGES) if name != "tune/cli/__main__.py"]
    door = [n for n in inside for i in imports(n, everywhere=True) if f"{i}.".startswith(f"{FRONT_DOOR}.")]
    assert not door


def test_ray_tune_is_not_imported_under_the_name_of_our_package():
    wrong = [name for name in sources(*PACKAGES, "tests") if any(map(_from_ray_import_tune, ast.walk(tree(name))))]
    assert not wrong, "write `from ray.tune import Tuner` or `import ray.tune`"


def _from_ray_import_tune(node: ast.AST) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "ray" and "tune" in [alias.name for alias in node.names]


def test_test_folders_do_not_shadow_the_packages():
    folders = {name.split("/")[1] for name in tracked() if name.startswith("tests/")}
    assert not folders & {*PACKAGES, "ray", "torch"}


@pytest.mark.parametrize("module", sorted(LIGHT))
def test_light_modules_load_nothing_heavy(module):
    code = f"import sys, {module}; print(*sorted(set({sorted(LIGHT[module])}) & set(sys.modules)))"
    assert _run(code).split() == []


def test_everything_but_the_ray_files_imports_without_ray():
    names = set(sources("macdrop", "tune")) - LM_EVAL_FILES
    modules = sorted(module_of(name) for name in names if not name.startswith(RAY_ROOM))
    code = (
        "import importlib, sys\n"
        "sys.modules['ray'] = None  # an import of it raises, as where it is not installed\n"
        f"for name in {modules}:\n"
        "    importlib.import_module(name)\n"
        "print(*sorted({'deepspeed', 'lm_eval', 'optuna'} & set(sys.modules)))"
    )
    assert _run(code).split() == []


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", sources(*PACKAGES, "tests"))
def test_files_and_functions_stay_short(name):
    lines = len((ROOT / name).read_text(encoding="utf-8").splitlines())
    assert lines <= (TEST_LINES if name.startswith("tests/") else FILE_LINES), f"{name} has {lines} lines; split it"
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= FUNCTION_LINES, f"{name}: {node.name} has {length} lines; split it"


def test_no_path_of_a_machine_is_in_the_tree():
    found = []
    for name in tracked():
        if Path(name).suffix in (".safetensors", ".png", ".jsonl"):
            continue
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1):
            if MACHINE_PATH.search(line):
                found.append(f"{name}:{number}: {line.strip()[:80]}")
    assert not found, "\n".join(found)

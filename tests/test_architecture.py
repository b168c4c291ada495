"""The house keeps its shape: what import-linter and the type checker cannot say.

Layers and circles are contracts in pyproject.toml (`lint-imports`). Here: one room for Ray, the size of folders, files
and functions, names, what an import loads, one owner of a literal, words, and nothing that tests alone use.
"""

from __future__ import annotations

import ast
import functools
import io
import re
import subprocess
import sys
import tarfile
import tokenize
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("macdrop", "tune", "cluster")
MODULES = 17
#: Lines of a file and of a function: in the product, and in tests.
FILE_LINES, FUNCTION_LINES = (350, 450), (60, 80)
#: The only package of tune/ that imports Ray, and the only modules that touch what Ray does not promise to keep.
RAY_ROOM = "tune/distributed/"
RAY_INTERNALS = {"tune/distributed/cluster/ray_internals.py", "cluster/remote/ray_internals.py"}
#: What is imported inside functions only: it costs seconds, and most commands do without it.
LATE = {"deepspeed", "lm_eval", "optuna"}
#: The files around lm-eval's own task classes, themselves imported late.
LM_EVAL_FILES = {
    f"tune/evaluation/zero_shot/{stem}.py"
    for stem in ("documents", "harness", "task_loader", "task_scoring", "zero_shot_rows")
}
#: Own modules are imported at the top, but for the command line (its start-up) and these, each with its reason.
LATE_OWN: dict[str, str] = {}
#: module -> what importing it must not load.
HEAVY = {"torch", "transformers", "ray", "deepspeed", "peft", "lm_eval", "datasets"}
LIGHT = {
    "macdrop": HEAVY,
    "cluster.cli": HEAVY | {"pydantic", "pandas", "numpy", "yaml", "jinja2"},
    "tune": HEAVY | {"pydantic", "pandas", "numpy", "yaml", "typer"},
    "tune.cli.main": HEAVY | {"pydantic", "pandas"},
    "tune.config.run_spec": HEAVY,
    "tune.scheduling.study": HEAVY,
    "tune.report.report": HEAVY,
    "tune.zoo.catalog": HEAVY,
}
#: Packages from which users import names, each loaded on first use.
FRONT_DOORS = ("macdrop/__init__.py", "tune/__init__.py")
#: A literal that several modules need has one owner, from which they import it.
OWNERS = {
    "node:__internal_head__": {"tune", "cluster"},
    "finalists.json": {"tune"},
    "scores.jsonl": {"tune"},
}
#: Stems that may occur twice: a verb is named as what it does.
SHARED_STEMS = re.compile(r"tune/cli/|tune/report/(html|sections)/|__init__|__main__")
MACHINE_PATH = re.compile(r"(?<![\w.~-])/(?:root|home|work|Users|mnt|scratch)/\w")
#: Phrases that a native engineer would not write.
STILTED = re.compile(
    r"(?<!\bthere )\bis no (?:\w+ )?(?:key|name|file|folder|number|text|run|model|list|block|mapping)\b"
    r"|\b(?:is|are|was|were|be) told\b|\bgo(?:es)? on (?:with|from)\b|\bgone on with\b|\banew\b|\bin words\b",
    re.IGNORECASE,
)


#: A docstring begins with a noun phrase (module, class) or an imperative (function).
QUESTION = re.compile(r"(What|Whether|Which|How|Where|Who|Whose|Why|When|That|If)\b")


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
def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def texts(name: str) -> Iterator[tuple[str, str]]:
    """A file and its text, or those of the files in an archive."""
    if not name.endswith(".tar.xz"):
        yield name, text(name)
        return
    with tarfile.open(ROOT / name) as archive:
        for member in archive:
            if (content := archive.extractfile(member)) is not None:
                yield f"{name}/{member.name}", content.read().decode()


@functools.cache
def tree(name: str) -> ast.Module:
    return ast.parse(text(name), name)


def module_of(name: str) -> str:
    """tune/zoo/__init__.py -> tune.zoo"""
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(name: str, *, everywhere: bool) -> Iterator[str]:
    """Dotted names that a file imports, "a.b" for `from a import b` too.

    everywhere: inside functions and for type checkers as well, else only what importing the file runs.
    """
    waiting: list[ast.AST] = [tree(name)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: write imports absolutely"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING") and not everywhere:
            waiting += node.orelse
        elif everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)


def tops(name: str, *, everywhere: bool) -> set[str]:
    return {imported.split(".")[0] for imported in imports(name, everywhere=everywhere)}


# --- imports ---


def test_ray_is_in_one_room():
    found = [name for name in sources("macdrop", "tune") if "ray" in tops(name, everywhere=True)]
    outside = [name for name in found if not name.startswith(RAY_ROOM)]
    assert not outside, f"only {RAY_ROOM} imports Ray"


@pytest.mark.parametrize("name", [name for name in sources("tune", "cluster") if name not in RAY_INTERNALS])
def test_ray_internals_have_one_module(name):
    private = [each for each in imports(name, everywhere=True) if re.match(r"ray\.(_|core\.generated)", each)]
    private += re.findall(r"\bray\._\w+", re.sub(r"`[^`]*`", "", _code(name)))
    assert not private, f"{name} uses {private}: put it into ray_internals.py, with the version it was read from"


def _code(name: str) -> str:
    """A file's source without strings and comments."""
    tokens = tokenize.generate_tokens(io.StringIO(text(name)).readline)
    return "".join(token.string for token in tokens if token.type not in (tokenize.STRING, tokenize.COMMENT))


@pytest.mark.parametrize("name", sources(*PACKAGES))
def test_heavy_imports_are_late(name):
    late = LATE | ({"peft"} if name.startswith("macdrop/") else set())
    early = late & tops(name, everywhere=False) - ({"lm_eval"} if name in LM_EVAL_FILES else set())
    assert not early, f"{name} imports {sorted(early)} at module level; import it where it is used"


@pytest.mark.parametrize("name", sources(*PACKAGES))
def test_own_imports_stand_at_the_top(name):
    if name.startswith(("tune/cli/", "cluster/cli.py")) or name in LATE_OWN:
        return
    late = {each for each in imports(name, everywhere=True) if each.split(".")[0] in PACKAGES}
    late -= set(imports(name, everywhere=False)) | set(_for_types(name))
    assert not late, f"{name} imports {sorted(late)} inside a function; move it to the top"


def _for_types(name: str) -> Iterator[str]:
    for node in tree(name).body:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for each in ast.walk(node):
                if isinstance(each, ast.ImportFrom):
                    yield from (f"{each.module}.{alias.name}" for alias in each.names)


def test_ray_tune_is_not_imported_under_the_name_of_our_package():
    wrong = [name for name in sources(*PACKAGES, "tests") if any(map(_from_ray_import_tune, ast.walk(tree(name))))]
    assert not wrong, "write `from ray.tune import Tuner` or `import ray.tune`"


def _from_ray_import_tune(node: ast.AST) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "ray" and "tune" in [alias.name for alias in node.names]


@pytest.mark.parametrize("module", sorted(LIGHT))
def test_light_modules_load_nothing_heavy(module):
    code = f"import sys, {module}; print(*sorted(set({sorted(LIGHT[module])}) & set(sys.modules)))"
    assert _run(code).split() == []


def test_everything_outside_the_ray_room_imports_without_ray():
    names = set(sources("macdrop", "tune")) - LM_EVAL_FILES
    modules = sorted(module_of(name) for name in names if not name.startswith(RAY_ROOM))
    code = (
        "import importlib, sys\n"
        "sys.modules['ray'] = None  # an import of it raises, as where it is not installed\n"
        f"for name in {modules}:\n"
        "    importlib.import_module(name)\n"
        f"print(*sorted(set({sorted(LATE)}) & set(sys.modules)))"
    )
    assert _run(code).split() == []


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- printing ---


#: The only modules that make a rich console, and the only one that asks the standard streams what they are.
CONSOLES = {"tune/cli/console.py", "cluster/core/tables.py"}
STREAMS = "tune/cli/streams.py"
MARKUP = re.compile(r"\[/?(?:bold|dim|italic|underline|red|green|yellow|blue|cyan|magenta|white|link)\b[^\]]*\]")


@pytest.mark.parametrize("name", sources("macdrop", "tune"))
def test_what_is_printed_is_never_markup(name):
    """Names, paths and reasons hold brackets: a style comes from `rich_text`, and one console prints."""
    code = _code(name)
    unsafe = re.findall(r"\b(?:from_markup|render_markup|markup=True)\b", code.replace(" ", ""))
    unsafe += [each for each in imports(name, everywhere=True) if each.startswith("rich.markup")]
    unsafe += re.findall(r"\bConsole\(", code) if name not in CONSOLES else []
    strings = [node.value for node in ast.walk(tree(name)) if isinstance(node, ast.Constant)]
    unsafe += [each for each in strings if isinstance(each, str) and MARKUP.search(each)]
    assert not unsafe, f"{name}: {unsafe}"


@pytest.mark.parametrize("name", sources("macdrop", "tune"))
def test_streams_may_be_closed(name):
    assert name == STREAMS or not re.search(r"sys\.std\w+\.isatty", _code(name)), f"{name}: use {STREAMS}"


@pytest.mark.parametrize("name", sources("tune", "cluster"))
def test_a_command_to_type_is_quoted(name):
    """A value in a printed command has been through `shell_command` or `shlex.quote`."""
    found = re.findall(r"macdrop (?:cluster )?[a-z]+ (?:[^`\"\n]*[ =])?\{[\w.]+\}", text(name))
    plain = [each for each in found if not re.search(r"\{(?:[\w.]*quoted|path|run|recipe|target|file)\b", each)]
    assert not plain, f"{name}: {plain}"


# --- sizes and names ---


def test_a_folder_is_small():
    counts = Counter(str(Path(name).parent) for name in sources(*PACKAGES) if Path(name).name != "__init__.py")
    crowded = {folder: count for folder, count in counts.items() if count > MODULES}
    assert not crowded
    loose = [name for name in sources("tune") if name.count("/") == 1 and Path(name).stem not in ("__init__", "errors")]
    assert not loose, "tune/ holds packages only"


def test_the_floors_are_listed_from_the_top():
    layers = tomllib.loads(text("pyproject.toml"))["tool"]["importlinter"]["contracts"][0]["layers"]
    assert re.findall(r"^(\w+) {2,}", ast.get_docstring(tree("tune/__init__.py")), re.MULTILINE) == layers


def test_a_module_name_says_where_it_is():
    stems = Counter(Path(name).stem for name in sources("tune") if not SHARED_STEMS.search(name))
    assert not {stem: count for stem, count in stems.items() if count > 1}


def test_test_folders_do_not_shadow_the_packages():
    folders = {name.split("/")[1] for name in tracked() if name.startswith("tests/")}
    assert not folders & {*PACKAGES, "ray", "torch"}


@pytest.mark.parametrize("name", sources(*PACKAGES))
def test_a_module_says_what_it_is(name):
    about = ast.get_docstring(tree(name))
    assert about and len(about.splitlines()[0]) <= 120, f"{name} needs a docstring whose first line fits"
    if name.endswith("/__init__.py") and name not in FRONT_DOORS:
        code = [node for node in tree(name).body[1:] if not isinstance(node, ast.ImportFrom)]
        assert not code, f"{name} holds code; an __init__ says what its package is"


@pytest.mark.parametrize("name", sources(*PACKAGES, "tests"))
def test_files_and_functions_stay_short(name):
    lines, in_tests = len(text(name).splitlines()), name.startswith("tests/")
    assert lines <= FILE_LINES[in_tests], f"{name} has {lines} lines; split it"
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= FUNCTION_LINES[in_tests], f"{name}: {node.name} has {length} lines; split it"


# --- one owner, no dead code ---


@pytest.mark.parametrize("literal", sorted(OWNERS))
def test_a_literal_has_one_owner(literal):
    for package in OWNERS[literal]:
        nodes = [(name, node) for name in sources(package) for node in ast.walk(tree(name))]
        found = [name for name, node in nodes if isinstance(node, ast.Constant) and node.value == literal]
        assert len(found) <= 1, f"{literal!r} stands in {found}; import it from one of them"


def test_nothing_is_for_tests_alone():
    """A public function or class of the product that nothing in the product names."""
    words = Counter(word for name in sources(*PACKAGES) for word in re.findall(r"\w+", _without_docstrings(name)))
    dead = []
    for name in sources(*PACKAGES):
        for node in tree(name).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                if words[node.name] < 2 and not node.decorator_list:
                    dead.append(f"{name}: {node.name}")
    assert not dead


def _without_docstrings(name: str) -> str:
    lines = text(name).splitlines()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(lines)


# --- words ---


@pytest.mark.parametrize("name", [n for n in tracked() if n.endswith((".py", ".md", ".yaml", ".j2", ".sbatch"))])
def test_words(name):
    """Docstrings, comments, messages and docs are plain English."""
    if name == "tests/test_architecture.py":
        return
    prose = _prose(name) if name.endswith(".py") else enumerate(text(name).splitlines(), 1)
    found = [f"{number}: {line.strip()[:100]}" for number, line in prose if STILTED.search(line)]
    assert not found, "\n".join(found)


def _prose(name: str) -> Iterator[tuple[int, str]]:
    """Lines of a file's strings and comments, with their numbers."""
    for token in tokenize.generate_tokens(io.StringIO(text(name)).readline):
        if token.type in (tokenize.STRING, tokenize.COMMENT):
            yield from enumerate(token.string.splitlines(), token.start[0])


@pytest.mark.parametrize("name", sources(*PACKAGES))
def test_a_docstring_names_the_thing(name):
    found = []
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            about = ast.get_docstring(node) or ""
            if QUESTION.match(about):
                found.append(f"{getattr(node, 'name', name)}: {about.splitlines()[0]}")
    assert not found, "\n".join(found)


def test_no_path_of_a_machine_is_in_the_tree():
    found = []
    for name in tracked():
        if Path(name).suffix in (".safetensors", ".png", ".jsonl"):
            continue
        for place, content in texts(name):
            for number, line in enumerate(content.splitlines(), 1):
                if match := MACHINE_PATH.search(line):
                    found.append(f"{place}:{number}: {line[max(0, match.start() - 40) :][:80].strip()}")
    assert not found, "\n".join(found)

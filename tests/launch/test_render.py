"""`macdrop cluster render`: answers, their mistakes, and values that try to break out of the file."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cluster.cli import app
from cluster.core import launch_file
from cluster.errors import BadLaunchFile
from cluster.render import fields, render
from cluster.render.targets import TARGETS, Target

LOCAL = "head_ip=10.0.0.1 worker_ips=10.0.0.2,10.0.0.3 user=me install=none".split()


def refused(name: str, *words: str) -> str:
    with pytest.raises(BadLaunchFile) as raised:
        render.render(TARGETS[name], words)
    assert raised.value.exit_code == 2
    return str(raised.value)


# --- answers ---


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("hed_ip=1", "local has no answer 'hed_ip'. Did you mean 'head_ip'?"),
        ("zzz=1", "local has no answer 'zzz'. `macdrop cluster render local` lists them."),
        ("head_ip", "'head_ip' is no answer: write key=value"),
        ("head_ip=10.0.0.1 head_ip=10.0.0.1", "head_ip= is given twice."),
        ("head_ip=", "head_ip= has no value."),
        ("storage=", "storage= has no value. Folder that all hosts share, for runs and the cache. Leave it out for"),
        ("head_ip=10.0.0.1", "worker_ips=10.0.0.2,10.0.0.3"),
        ("head_ip=10.0.0.256", "head_ip='10.0.0.256': must be an IP address or a host name"),
        ("head_ip=a_b", "must be an IP address or a host name"),
        ("worker_ips=10.0.0.2,10.0.0.2", "names one twice"),
        ("gpus=-1", "must be a whole number from 0 to 10000"),
        ("gpus=1e3", "must be a whole number"),
        ("storage=shared", "must be an absolute path"),
        ("storage=/a/../b", "must be an absolute path"),
        ("source=./here", "must be a path on this machine that begins with / or ~/"),
        ("install=conda", "must be one of uv, pip, none."),
        ("install=uvv", "Did you mean 'uv'?"),
        ("secrets=hf_token", "the name of an environment variable, never its value"),
        ("secrets=HF_TOKEN=x", "never its value"),
        ("name=Lab", "must be a name of 1 to 40"),
        ("user=Robert'); DROP", "must be a user's login name"),
    ],
)
def test_a_mistake_is_named_with_what_is_allowed(words, message):
    assert message in refused("local", *shlex.split(words.replace("'", "\\'")))


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("local", "head_ip=10.0.0.2 worker_ips=10.0.0.2 user=me", "a host has one role"),
        ("local", "head_ip=10.0.0.2 worker_ips= user=me", "worker_ips= has no value"),
        ("aws", "workers=3 max_workers=2", "max_workers=2 is below workers=3"),
        ("aws", "workers=0", "the head takes no tasks"),
        ("aws", "zones=eu-west-1a", "zones=eu-west-1a is not in region=us-west-2"),
        ("aws", "image=me/x:1", "add install=none"),
        ("aws", "region=us-wst", "must be an AWS region"),
        ("aws-efa", "machine=g5.xlarge", "must be one of p4d.24xlarge"),
        ("slurm", "time=soon", "must be a time limit"),
        ("kuberay", "memory=lots", "must be an amount"),
    ],
)
def test_answers_that_do_not_go_together(name, words, message):
    given = {word.partition("=")[0]: word for word in TARGETS[name].example.split()}
    given |= {word.partition("=")[0]: word for word in words.split()}
    assert message in refused(name, *given.values())


def test_an_unknown_target_is_named_with_the_nearest():
    with pytest.raises(BadLaunchFile, match="no target 'kuberey': aws, .* Did you mean 'kuberay'"):
        render.find("kuberey")


def test_the_clone_that_macdrop_runs_from_is_installed_unless_told_otherwise():
    words = LOCAL[:3]
    own = launch_file.parse(render.render(TARGETS["local"], words), Path("x"))
    assert own.content["file_mounts"]["~/macdrop-source"] == str(Path(render.__file__).parents[2])
    none = launch_file.parse(render.render(TARGETS["local"], [*words, "install=none"]), Path("x"))
    assert "~/macdrop-source" not in none.content["file_mounts"]


def test_a_container_has_storage_and_shared_memory():
    words = [*TARGETS["aws"].example.split()[:4], "image=me/macdrop:1", "install=none", "shm_gb=64"]
    docker = launch_file.parse(render.render(TARGETS["aws"], words), Path("x")).content["docker"]
    assert docker["image"] == "me/macdrop:1"
    assert {"--shm-size=64g", "-v /shared:/shared"} <= set(docker["run_options"])


# --- the command ---


def run(*words: str):
    return CliRunner().invoke(app, ["render", *words])


def test_targets_and_answers_are_listed():
    listed = run().output
    assert all(f"\n{name} " in f"\n{listed}" for name in TARGETS)
    for target in TARGETS.values():
        shown = run(target.name).output
        assert all(f"  {answer.name}=" in shown for answer in target.answers)
        assert f"render {target.name} {target.example}" in shown


def test_a_file_is_never_written_over_silently(tmp_path):
    path = tmp_path / "deep/cluster.yaml"
    words = ["local", *LOCAL, "--output", str(path)]
    first = run(*words)
    assert first.exit_code == 0 and f"macdrop cluster check {path}" in first.output
    path.write_text("edited")
    second = run(*words)
    assert isinstance(second.exception, BadLaunchFile) and "--force" in str(second.exception)
    assert path.read_text() == "edited"
    assert run(*words, "--force").exit_code == 0
    assert path.read_text() == render.render(TARGETS["local"], LOCAL)
    assert [each.name for each in path.parent.iterdir()] == ["cluster.yaml"]


# --- values that try to break out ---

HOSTILE = [
    "x\ny: z",
    'x"\nrun: "y',
    "$(touch pwned)",
    "`touch pwned`",
    "'; touch pwned; '",
    '"; touch pwned; "',
    "a b",
    "*alias",
    "&anchor",
    "!!python/object/apply:os.system ['touch pwned']",
    "{{ 7 * 7 }}",
    "{% raw %}",
    "#SBATCH --uid=0",
    "x # comment",
    "yes",
    "null",
    "1e3",
    "- x",
    "\u2028x",
    "\x85x",
    "\u202etxt",
    "\ud800",
    "漢字🙂",
    "A" * 100_000,
    "../../etc/passwd",
    "-v /:/host",
    "\\",
    "%n%s",
    "",
]
#: (target, answer) of every answer that takes text.
TEXTS = [
    (target.name, answer.name)
    for target in TARGETS.values()
    for answer in target.answers
    if answer.kind not in ("count", "positive", "choice")
]


#: Where the example is written in another way than a word: an address, which Ray is told once more.
TAME = {"head_ip": "head.example"}


def paths(value: object, prefix: tuple = ()) -> set[tuple]:
    """Every key path of a YAML, with the place in lists."""
    if isinstance(value, dict):
        return {prefix} | {path for key, inner in value.items() for path in paths(inner, (*prefix, key))}
    if isinstance(value, list | tuple):
        return {prefix} | {path for place, inner in enumerate(value) for path in paths(inner, (*prefix, place))}
    return {prefix}


def rendered(target: Target, name: str, value: str) -> launch_file.ClusterFile | None:
    """With one answer replaced; None where it is refused."""
    given = dict(word.partition("=")[::2] for word in target.example.split())
    given |= {"source": "~/macdrop"} if any(a.name == "source" for a in target.answers) else {}
    given[name] = value
    if name == "image" and "install" in [answer.name for answer in target.answers]:
        given["install"] = "none"
    try:
        text = render.render(target, [f"{key}={each}" for key, each in given.items()])
    except BadLaunchFile as error:
        assert len(str(error)) < 1000 and "\n" not in str(error).partition(value[:1])[0]
        return None
    return launch_file.parse(text, Path("x"))


def held(file: launch_file.ClusterFile, tame: launch_file.ClusterFile) -> None:
    """The same shape as with a tame value, and shell that is the same command with another word."""
    assert file.kind == tame.kind and paths(file.documents) == paths(tame.documents)
    assert file.directives.keys() == tame.directives.keys()
    for document in file.documents:
        for text in (document.get("data") or {}).values():
            assert shlex.split(text, comments=True)
    # Words of the shell: as many as before, or the value broke out of its quotes.
    assert len(launch_file._words(file.shell)) == len(launch_file._words(tame.shell))


@pytest.mark.parametrize(("target", "name"), TEXTS)
def test_hostile_values_are_refused_or_stay_in_their_place(target, name):
    target = TARGETS[target]
    answer = next(each for each in target.answers if each.name == name)
    tame = rendered(target, name, TAME.get(name, answer.example.partition(",")[0]))
    assert tame is not None
    for value in HOSTILE:
        if answer.many and "," in value or value == "":
            continue
        file = rendered(target, name, value)
        if file is not None:
            held(file, tame)


@given(st.text(min_size=1, max_size=40))
@example("~/a'b $(x)")
@example("~/ #")
@example("/: |")
@settings(max_examples=60, deadline=None)
def test_any_text_as_a_path_stays_in_its_place(text):
    """Paths of the user's own machine may hold anything that can be printed."""
    for name, target in (("key", "local"), ("venv", "slurm")):
        tame = rendered(TARGETS[target], name, "~/tame")
        file = rendered(TARGETS[target], name, f"~/{text}")
        if file is not None:
            held(file, tame)
            if target == "local":
                assert file.content["auth"]["ssh_private_key"] == f"~/{text}"


def test_a_path_with_a_shell_in_it_is_one_word(tmp_path):
    """Bash itself reads what was rendered."""
    venv = '~/it\'s $(touch pwned) `touch pwned` "x"'
    script = render.render(TARGETS["slurm"], [f"venv={venv}", "storage=/shared"])
    line = next(line for line in script.splitlines() if line.startswith("export PATH="))
    env = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    shown = subprocess.run(
        ["bash", "-c", f'{line}; echo "$PATH"'], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert shown.stdout == f"{tmp_path}{venv[1:]}/bin:/usr/bin:/bin\n"
    assert list(tmp_path.iterdir()) == []


def test_a_template_cannot_write_a_value_without_a_filter():
    with pytest.raises(TypeError, match="without a filter"):
        render.environment().from_string("a: {{ x }}").render(x="y")
    assert render.environment().from_string("a: {{ x | yaml }}").render(x="y") == 'a: "y"'


def test_every_kind_of_answer_is_used_and_known():
    used = {answer.kind for target in TARGETS.values() for answer in target.answers}
    assert used == set(fields.KINDS) | {"choice"}


def test_every_example_of_an_answer_is_a_value_of_it():
    for target in TARGETS.values():
        for answer in target.answers:
            assert answer.example, (target.name, answer.name)
            answer.read(answer.example)

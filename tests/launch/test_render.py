"""`macdrop cluster render`: fields, invalid fields, and values that try to break out of the file."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cluster.backends import registry
from cluster.cli import app
from cluster.core.launch_file import LaunchFile, shell_words
from cluster.core.slurm_file import SlurmFile
from cluster.errors import BadLaunchFile
from cluster.render import fields, render
from cluster.render.targets import TARGETS, Target

LOCAL = "head_ip=10.0.0.1 worker_ips=10.0.0.2,10.0.0.3 user=me install=none".split()


def refused(name: str, *words: str) -> str:
    with pytest.raises(BadLaunchFile) as raised:
        render.render(TARGETS[name], words)
    assert raised.value.exit_code == 2
    return str(raised.value)


# --- fields ---


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("hed_ip=1", "local: unknown field 'hed_ip'. Did you mean 'head_ip'?"),
        ("zzz=1", "local: unknown field 'zzz'. `macdrop cluster render local` lists the fields."),
        ("head_ip", "not key=value: 'head_ip'. Write, for example, head_ip=..."),
        ("head_ip=10.0.0.1 head_ip=10.0.0.1", "head_ip= is given twice."),
        ("head_ip=", "head_ip= has no value."),
        (
            "storage=",
            "storage= has no value. Folder that all hosts share, for runs and the cache. Omit it to use the default.",
        ),
        ("head_ip=10.0.0.1", "worker_ips=10.0.0.2,10.0.0.3"),
        ("head_ip=10.0.0.256", "head_ip='10.0.0.256': must be an IP address or a host name"),
        ("head_ip=a_b", "must be an IP address or a host name"),
        ("worker_ips=10.0.0.2,10.0.0.2", "repeats a value"),
        ("gpus=-1", "must be a whole number from 0 to 10000"),
        ("gpus=1e3", "must be a whole number"),
        ("storage=shared", "must be an absolute path"),
        ("storage=/a/../b", "must be an absolute path"),
        ("source=./here", "must be a path on this machine that starts with / or ~/"),
        ("install=conda", "must be one of uv, pip, none."),
        ("install=uvv", "Did you mean 'uv'?"),
        ("secrets=hf_token", "the name of an environment variable, never its value"),
        ("secrets=HF_TOKEN=x", "never its value"),
        ("name=Lab", "must be a name of 1 to 40"),
        ("user=Robert'); DROP", "must be a user's login name"),
    ],
)
def test_invalid_field_is_refused_with_what_is_allowed(words, message):
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
        ("skypilot", "sync_to=/runs", "must be s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"),
        ("skypilot", "sync_to=s3://bucket", "must be s3://BUCKET/PREFIX or gs://BUCKET/PREFIX"),
        ("skypilot", "accelerators=8xH100", "must be a GPU's name and how many"),
        ("skypilot", "config=~/my.yaml", "recipe= and config= are both given"),
        ("skypilot", "nfs=", "nodes=2: all nodes write the run folder"),
        ("skypilot", "volume=runs", "nfs= and volume= are both given"),
        ("skypilot", "image=me/macdrop:1 install=none", "nfs= cannot be mounted within a container"),
    ],
)
def test_conflicting_fields_are_refused(name, words, message):
    given = {word.partition("=")[0]: word for word in TARGETS[name].example.split()}
    given |= {word.partition("=")[0]: word for word in words.split()}
    assert message in refused(name, *given.values())


def test_unknown_target_names_the_nearest():
    with pytest.raises(BadLaunchFile, match="unknown target 'kuberey'; known: aws, .* Did you mean 'kuberay'"):
        render.find("kuberey")


def test_own_clone_is_installed_by_default():
    words = LOCAL[:3]
    own = registry.parse(render.render(TARGETS["local"], words), Path("x"))
    assert own.content["file_mounts"]["~/macdrop-source"] == str(Path(render.__file__).parents[2])
    none = registry.parse(render.render(TARGETS["local"], [*words, "install=none"]), Path("x"))
    assert "~/macdrop-source" not in none.content["file_mounts"]


def test_a_container_has_storage_and_shared_memory():
    words = [*TARGETS["aws"].example.split()[:4], "image=me/macdrop:1", "install=none", "shm_gb=64"]
    docker = registry.parse(render.render(TARGETS["aws"], words), Path("x")).content["docker"]
    assert docker["image"] == "me/macdrop:1"
    assert {"--shm-size=64g", "-v /shared:/shared"} <= set(docker["run_options"])


# --- the command ---


def run(*words: str):
    return CliRunner().invoke(app, ["render", *words])


def test_targets_and_fields_are_listed():
    listed = run().output
    assert all(f"\n{name} " in f"\n{listed}" for name in TARGETS)
    for target in TARGETS.values():
        shown = run(target.name).output
        assert all(f"  {field.name}=" in shown for field in target.fields)
        assert f"render {target.name} {target.example}" in shown


def test_existing_file_is_overwritten_only_with_force(tmp_path):
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
#: (target, field) of every field that takes text.
TEXTS = [
    (target.name, field.name)
    for target in TARGETS.values()
    for field in target.fields
    if field.type not in ("count", "positive", "choice")
]


#: Fields of an example that another field excludes.
EXCLUDED = {
    ("skypilot", "config"): ("recipe",),
    ("skypilot", "volume"): ("nfs",),
    ("skypilot", "image"): ("nfs", "nodes", "source"),
}
#: Replacements for examples that render differently from words: an address is also passed to Ray.
TAME = {"head_ip": "head.example"}


def paths(value: object, prefix: tuple = ()) -> set[tuple]:
    """Every key path of a YAML document, with list indices."""
    if isinstance(value, dict):
        return {prefix} | {path for key, inner in value.items() for path in paths(inner, (*prefix, key))}
    if isinstance(value, list | tuple):
        return {prefix} | {path for place, inner in enumerate(value) for path in paths(inner, (*prefix, place))}
    return {prefix}


def rendered(target: Target, name: str, value: str) -> LaunchFile | None:
    """Render with one field replaced; None if it is refused."""
    given = dict(word.partition("=")[::2] for word in target.example.split())
    given |= {"source": "~/macdrop"} if any(a.name == "source" for a in target.fields) else {}
    given[name] = value
    if name == "image" and "install" in [field.name for field in target.fields]:
        given["install"] = "none"
    for excluded in EXCLUDED.get((target.name, name), ()):
        given.pop(excluded, None)
    try:
        text = render.render(target, [f"{key}={each}" for key, each in given.items()])
    except BadLaunchFile as error:
        assert len(str(error)) < 1000 and "\n" not in str(error).partition(value[:1])[0]
        return None
    return registry.parse(text, Path("x"))


def held(file: LaunchFile, tame: LaunchFile) -> None:
    """Assert the same structure as with a tame value, and the same shell command but for one word."""
    assert type(file) is type(tame) and paths(file.documents) == paths(tame.documents)
    if isinstance(file, SlurmFile) and isinstance(tame, SlurmFile):
        assert file.directives.keys() == tame.directives.keys()
    for document in file.documents:
        for text in (document.get("data") or {}).values():
            assert shlex.split(text, comments=True)
    # Words of the shell: as many as before, or the value broke out of its quotes.
    assert len(shell_words(file.shell)) == len(shell_words(tame.shell))


@pytest.mark.parametrize(("target", "name"), TEXTS)
def test_hostile_values_are_refused_or_stay_quoted(target, name):
    target = TARGETS[target]
    field = next(each for each in target.fields if each.name == name)
    tame = rendered(target, name, TAME.get(name, field.example.partition(",")[0]))
    assert tame is not None
    for value in HOSTILE:
        if field.many and "," in value or value == "":
            continue
        file = rendered(target, name, value)
        if file is not None:
            held(file, tame)


@given(st.text(min_size=1, max_size=40))
@example("~/a'b $(x)")
@example("~/ #")
@example("/: |")
@settings(max_examples=60, deadline=None)
def test_any_text_as_a_path_stays_quoted(text):
    """Paths on the user's machine may contain any printable character."""
    for name, target in (("key", "local"), ("venv", "slurm")):
        tame = rendered(TARGETS[target], name, "~/tame")
        file = rendered(TARGETS[target], name, f"~/{text}")
        if file is not None:
            held(file, tame)
            if target == "local":
                assert file.content["auth"]["ssh_private_key"] == f"~/{text}"


def test_path_with_shell_syntax_is_one_word(tmp_path):
    """Bash itself parses the rendered file."""
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


def test_every_field_type_is_used_and_known():
    used = {field.type for target in TARGETS.values() for field in target.fields}
    assert used == set(fields.FIELD_TYPES) | {"choice"}


def test_every_example_of_a_field_is_valid():
    for target in TARGETS.values():
        for field in target.fields:
            assert field.example, (target.name, field.name)
            field.read(field.example)

"""A run folder from elsewhere is data: code, endpoints, keys and machines in it need words on the command line."""

from __future__ import annotations

import json
import shlex

import pytest
import yaml
from helpers.judge_fixtures import Endpoint
from helpers.run_folders import make_resumable_run, make_run

from macdrop.errors import ConfigError
from tune.config.recorded import check_orders, orders_of
from tune.config.run_spec import RunSpec, dump, load

JUDGE = {"model": "far", "base_url": "http://h:1/v1", "api_key_env": "AWS_SECRET_ACCESS_KEY"}
#: What a run folder says, and the words that allow it.
ASKED = {
    "code": ({"trust_remote_code": True}, ["--trust-remote-code"]),
    "code of one of its models": (
        {"sweep": {"models": [{"model_name_or_path": "a"}, {"model_name_or_path": "b", "trust_remote_code": True}]}},
        ["--trust-remote-code"],
    ),
    "code of its judge": ({"eval": {"judge": {"model": "m", "trust_remote_code": True}}}, ["--trust-remote-code"]),
    "a copy": ({"sync_to": "s3://bucket/x"}, ["sync_to=s3://bucket/x"]),
    "an endpoint": ({"eval": {"judge": {"model": "m", "base_url": "http://h"}}}, ["eval.judge.base_url=http://h"]),
    "a key": (
        {"eval": {"judge": JUDGE}},
        ["eval.judge.base_url=http://h:1/v1", "eval.judge.api_key_env=AWS_SECRET_ACCESS_KEY"],
    ),
    "a cluster": ({"ray": {"address": "ray://h:10001"}}, ["ray.address=ray://h:10001"]),
    "nothing": ({"trust_remote_code": False, "ray": {"address": "auto"}, "eval": {"judge": "local"}}, []),
    "not a mapping": ({"eval": [1], "sweep": 3, "ray": None}, []),
}


@pytest.mark.parametrize("case", ASKED)
def test_what_a_folder_asks_for_needs_its_words(case, tmp_path):
    config, words = ASKED[case]
    assert list(orders_of(config)) == words
    given = [word for word in words if not word.startswith("--")]
    check_orders(tmp_path, config, given, trust=True)
    for number, word in enumerate(words):
        rest = words[:number] + words[number + 1 :]
        with pytest.raises(ConfigError) as refused:
            check_orders(tmp_path, config, [w for w in rest if w in given], trust="--trust-remote-code" in rest)
        assert shlex.split(str(refused.value).splitlines()[-1]) == [word]


def test_another_value_than_the_recorded_one_allows_nothing(tmp_path):
    with pytest.raises(ConfigError, match="sends the key in .AWS_SECRET_ACCESS_KEY"):
        check_orders(tmp_path, {"eval": {"judge": JUDGE}}, ["eval.judge.api_key_env=OTHER"], trust=False)


@pytest.mark.parametrize("spelled", ["http://h:1/v1/", "http://h:1/v1/chat/completions"])
def test_an_endpoint_may_be_named_in_any_spelling(tmp_path, spelled):
    config = {"eval": {"judge": {"model": "m", "base_url": "http://h:1/v1"}}}
    check_orders(tmp_path, config, [f"eval.judge.base_url={spelled}"], trust=False)


@pytest.fixture
def run(shell):
    """A finished run whose settings trust code, in the folder of the shell; the code itself is missing."""
    folder = make_resumable_run(shell.folder / "run")
    spec = dump(load(folder / "config.yaml", ["trust_remote_code=true"]))
    (folder / "config.yaml").write_text(yaml.safe_dump(spec))
    about = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(about | {"spec": spec}))
    for file in folder.glob("trials/*/config.yaml"):
        file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"trust_remote_code": True}))
        (file.parent / "reproduce.json").write_text(json.dumps({"workers": 1}))
    return folder


def test_no_verb_runs_code_of_a_folder_unasked(shell, run):
    trial = next(file.parent for file in sorted(run.glob("trials/*/trial.json")) if '"done"' in file.read_text())
    recorded = f"{run}/config.yaml"
    for words in (
        ["export", str(trial), "--merged", "--output", "out"],
        ["reproduce", str(trial)],
        ["sweep", "--resume", f"output_dir={run}"],
        ["sweep", recorded, "output_dir=new"],
        ["sweep", recorded, "output_dir=new", "--dry-run"],
    ):
        message = shell.refused(*words)
        assert "runs the code that comes with zoo:planted-llama" in message, words
        assert message.strip().endswith("--trust-remote-code")
    assert shell.refused("train", recorded, "output_dir=new").strip().endswith("trust_remote_code=true")
    allowed = shell("sweep", recorded, "output_dir=new", "--dry-run", "--trust-remote-code")
    assert "ask for more than this command allows" not in allowed.err


def test_no_key_and_no_answer_leaves_unasked(shell, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "word")
    with Endpoint(lambda number, body: "[RESULT] 5") as server:
        run = make_run(shell.folder / "run", seeds=(1,), tried=1, items=2, attacks=("none",))
        config = run.config()
        config["eval"]["judge"] = {**JUDGE, "base_url": server.url}
        (run.run_dir / "config.yaml").write_text(yaml.safe_dump(config))
        message = shell.refused("judge", "run")
        assert f"sends answers to {server.url}" in message and "sends the key in $AWS_SECRET_ACCESS_KEY" in message
        assert "base_url" not in shell.refused("judge", "run", f"base_url={server.url}").splitlines()[-1]
        assert not server.requests
        named = shlex.split(message.splitlines()[-1])
        ended = shell("judge", "run", *named)
        assert ended.code == 0 and server.requests, ended.err
        assert f"far at {server.url} with the key in $AWS_SECRET_ACCESS_KEY" in ended.out


def test_a_key_in_the_address_of_an_endpoint_is_refused_and_never_shown(shell):
    for address in ("http://h/v1?key=SECRET", "http://h/v1#SECRET", "ftp://h?SECRET"):
        message = shell.refused("sweep", "demo", "--dry-run", "eval.judge.model=m", f"eval.judge.base_url={address}")
        assert "SECRET" not in message and "api_key_env" in message
    problems: list[str] = []
    from tune.config.messages import believable

    believable(RunSpec, {"eval": {"judge": {"model": "m", "base_url": "http://h?SECRET"}}}, "config.yaml", problems)
    assert problems and "SECRET" not in "".join(problems)


def test_a_command_that_names_a_copy_decides_where_to(tmp_path):
    for word in ("sync_to=s3://other/x", "sync_to=null"):
        check_orders(tmp_path, {"sync_to": "s3://bucket/x"}, [word], trust=False)

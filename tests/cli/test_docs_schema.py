"""`macdrop docs` and `macdrop schema`: what a user reads beside a run file."""

from __future__ import annotations

import io
import json

import pytest
from helpers.documents import ROOT, TOPICS
from rich.console import Console

from tune.cli.verbs import docs
from tune.config.schema import json_schema


def test_every_topic_is_listed_with_its_title(shell):
    listed = dict(line.split(maxsplit=1) for line in shell("docs").out.splitlines())
    stems = [*TOPICS["tune"].split(), *TOPICS["cluster"].replace("overview", "cluster").split()]
    assert sorted(listed) == sorted([*stems, "use"])
    assert listed["run-folder"] == "The run folder" and listed["cluster"] == "Launching a cluster"


@pytest.mark.parametrize(("topic", "file"), [("failures", "tune/docs/failures.md"), ("aws", "cluster/docs/aws.md")])
def test_a_topic_is_markdown_in_a_pipe(shell, topic, file):
    ended = shell("docs", topic)
    assert ended.code == 0 and ended.out == (ROOT / file).read_text(encoding="utf-8")


def test_a_topic_is_formatted_in_a_terminal(shell, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(docs, "console", Console(file=out, width=100, force_terminal=True))
    assert shell("docs", "failures").code == 0
    assert "Failures and resuming" in out.getvalue() and "# Failures" not in out.getvalue()


def test_an_unknown_topic_names_the_nearest(shell):
    message = shell.refused("docs", "configuratoin")
    assert "Unknown topic 'configuratoin'. Did you mean 'configuration'?" in message and "kubernetes" in message


def test_the_schema_is_printed_or_written(shell):
    ended = shell("schema")
    assert ended.code == 0 and json.loads(ended.out) == json_schema()
    written = shell("schema", "--output", "macdrop.schema.json")
    assert written.new == ["macdrop.schema.json"]
    assert (shell.folder / "macdrop.schema.json").read_text(encoding="utf-8") == ended.out

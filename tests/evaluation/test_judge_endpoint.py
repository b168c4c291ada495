"""A judge behind an endpoint: a real server on loopback, working and with every failure of the protocol."""

from __future__ import annotations

import json
import socket
import threading

import pytest
from helpers.judge_fixtures import ANSWERS, GOOD, Endpoint, answered_run, completion

from macdrop.errors import ConfigError
from tune.analysis.items import Items
from tune.cli.verbs.judge import judge_run
from tune.errors import BenchmarkError
from tune.evaluation.judge import endpoint as judge_endpoint
from tune.evaluation.score_names import Column

pytestmark = pytest.mark.timeout(60)
FILES = 2  # base and the final trial; the trial of the search is not judged
ALL = FILES * ANSWERS


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Back-off in hundredths of a second."""
    import openai._base_client as client

    monkeypatch.setattr(client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(judge_endpoint, "BACKOFF_S", (0.01, 0.02))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def run(tmp_path):
    return answered_run(tmp_path / "run")


def judge(run_folder, endpoint, *more, **options):
    given = ["model=judge", f"base_url={endpoint if isinstance(endpoint, str) else endpoint.url}", *more]
    return judge_run(run_folder.run_dir, given, **options)


def kept(run_folder, trial="final-1"):
    """Return the judgements of a trial, of all judges, in the order they were stored."""
    folder = run_folder.answers_dir("zoo:planted-llama", trial).with_name("judgements")
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


def scores(run_folder, trial="final-1", metric="judge_score"):
    rows = [row for row in run_folder.score_rows() if (row["trial"], row["metric"]) == (trial, metric)]
    return {row["task"]: row for row in rows}


def test_run_is_judged(run, capsys):
    with Endpoint(lambda number, body: GOOD) as server:
        assert judge(run, server, "max_concurrent=3") == 0
    assert len(server.requests) == ALL and server.most_at_once <= 3
    first = server.requests[0]
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("judge", 0.0, 512) and "seed" not in first
    (message,) = first["messages"]
    assert message["role"] == "user" and message["content"].endswith("###Feedback: ")
    rows = kept(run)
    assert sorted(row["item"] for row in rows) == ["481/1", "482/1", "81/1", "81/2", "82/1", "82/2"]
    row = rows[0]
    assert (row["score"], row["feedback"], row["attempts"], row["error"]) == (4, [GOOD], 1, None)
    reported = row["judge"]
    assert (reported["kind"], reported["model"], reported["revision"]) == ("endpoint", "judge", "judge-2026-01-01/fp_1")
    assert reported["rubric"].startswith("spec_bench@1#") and reported["date"].endswith("+00:00")
    whole = scores(run)["spec_bench"]
    assert (whole["value"], whole["n"], whole["stderr"], whole["arm"], whole["limit"]) == (4.0, 6, 0.0, "macdrop", 2)
    settings = dict(word.split("=", 1) for word in whole["settings"].split())
    assert settings["judge"] == "judge@judge-2026-01-01/fp_1" and settings["suite"] == "paper@1"
    assert settings["date"] == reported["date"][:10] and settings["unparsable"] == settings["failed"] == "0"
    assert (run.run_dir / whole["judgements"]).is_file()
    assert set(scores(run)) == {f"spec_bench{part}" for part in ("", "/multi_turn", "/writing", "/qa")}
    assert scores(run, "base")["spec_bench"]["value"] == 4.0 and not scores(run, "search-1")
    assert kept(run, "search-1") == []
    out = capsys.readouterr().out
    assert "12 answer(s) in 12 request(s), 1200 prompt and 84 new tokens; 0 were judged before" in out


def test_answers_under_attack_are_judged_separately(tmp_path):
    run_folder = answered_run(tmp_path / "run", attacks=("none", "zeroing@3"))
    with Endpoint(lambda n, body: "?" if "\nAda." in body["messages"][0]["content"] else GOOD) as server:
        assert judge(run_folder, server) == 0
    for row in run_folder.score_rows():  # whoever compares trials finds the items of every score
        if row["metric"] == "judge_score" and row["n"]:
            items = Items(run_folder, row["model"]).read(row["trial"], Column.of(row))
            assert sum(value == 4 for value in items.values()) == row["n"]
            assert set(items) >= ({"81/1", "81/2"} if "qa" not in row["task"] else {"481/1", "482/1"})
    found = {(row["attack"], row["attack_on"], row["entry"]) for row in run_folder.score_rows() if row["value"] == 4.0}
    assert found == {("none", None, "spec_bench"), ("zeroing@3", "base", "spec_bench")}
    names = [file.name for file in (run_folder.trial("final-1").folder / "judgements").iterdir()]
    assert sorted(name.partition("--")[0] for name in names) == ["spec_bench", "spec_bench-zeroing@3-base"]


def too_many(number, body):
    return {"status": 429, "headers": {"Retry-After": "0.1"}, "body": {"error": {"message": "slow"}}}


TROUBLE = {
    "429, then well": lambda n, body: too_many(n, body) if n < 2 else GOOD,
    "500 and 503, then well": lambda n, body: {"status": 500 + 3 * n} if n < 2 else GOOD,
    "an overloaded proxy's page": lambda n, body: {"status": 502, "body": b"<html>bad gateway"} if n < 2 else GOOD,
    "no JSON, then well": lambda n, body: {"body": b'{"choices": [{"mess'} if n < 2 else GOOD,
    "JSON of another kind": lambda n, body: {"body": {"hello": 1}} if n < 2 else GOOD,
    "no choices": lambda n, body: {"body": {"choices": []}} if n < 2 else GOOD,
    "a page instead": lambda n, body: {"body": b"<html>", "headers": {"Content-Type": "text/html"}} if n < 2 else GOOD,
    "time-out, then well": lambda n, body: {"delay": 1.2, "body": completion(GOOD)} if n < 2 else GOOD,
}


@pytest.mark.parametrize("name", TROUBLE)
def test_transient_errors_are_retried(run, name):
    with Endpoint(TROUBLE[name]) as server:
        assert judge(run, server, "timeout_s=0.6", "max_concurrent=2") == 0
    assert len(server.requests) >= ALL + 2
    assert [row["score"] for row in kept(run)] == [4] * ANSWERS and scores(run)["spec_bench"]["n"] == ANSWERS


def test_retry_after_is_honoured(run):
    import time

    with Endpoint(lambda n, body: too_many(n, body) | {"headers": {"Retry-After": "1"}} if not n else GOOD) as server:
        began = time.monotonic()
        assert judge(run, server) == 0
        assert time.monotonic() - began >= 1


LASTING = {
    "HTTP 500": {"status": 500, "body": {"error": {"message": "it broke"}}},
    "HTTP 429: slow": {"status": 429, "body": {"error": {"message": "slow"}}},
    "HTTP 400: too long": {"status": 400, "body": {"error": {"message": "too long"}}},
    "no chat completion came back (JSONDecodeError": {"body": b"gibberish"},
    "no chat completion came back (KeyError": {"body": {"object": "list"}},
    "no answer in 0.4 s, 3 times": {"delay": 0.8, "body": completion(GOOD)},
}


@pytest.mark.parametrize("reported", LASTING)
def test_failed_answer_is_reported_and_the_rest_continues(run, reported, capsys):
    """One answer of each file fails permanently; a second session requests only these two."""
    mended = threading.Event()

    def answer(number, body):
        broken = "###Response to evaluate:\nAda." in body["messages"][0]["content"] and not mended.is_set()
        return LASTING[reported] if broken else GOOD

    with Endpoint(answer) as server:
        assert judge(run, server, "timeout_s=0.4", "request_retries=2") == FILES
        check_one_failed(run, reported, capsys.readouterr().out)
        mended.set()
        asked = len(server.requests)
        assert judge(run, server, "timeout_s=0.4", "request_retries=2") == 0
        assert len(server.requests) == asked + FILES
    assert scores(run)["spec_bench"]["n"] == ANSWERS and "failed=0" in scores(run)["spec_bench"]["settings"]


def check_one_failed(run, reported, out):
    row = next(row for row in kept(run) if row["item"] == "481/1")
    assert row["score"] is None and row["feedback"] == [] and reported in row["error"]
    assert reported in out
    assert scores(run)["spec_bench"]["n"] == ANSWERS - 1 and "failed=1" in scores(run)["spec_bench"]["settings"]
    assert scores(run, metric="judge_unparsed")["spec_bench"]["value"] == 1 / ANSWERS


def test_unparsable_feedback_is_requested_again_with_other_seeds(run):
    asked: dict[str, list[dict]] = {}

    def answer(number, body):
        text = body["messages"][0]["content"]
        asked.setdefault(text, []).append(body)
        attempt = (len(asked[text]) - 1) % 3 + 1  # the base gave the same answers
        if "###Response to evaluate:\nAda." in text:
            return f"No number here, {attempt}."
        return GOOD if attempt == 3 or "\nPoem." not in text else ""

    with Endpoint(answer) as server:
        assert judge(run, server, "max_concurrent=1", "retry_temperature=0.7", "seed=5") == 0
    row = {row["item"]: row for row in kept(run)}
    assert row["481/1"]["score"] is None and row["481/1"]["error"] is None
    assert row["481/1"]["feedback"] == [f"No number here, {n}." for n in (1, 2, 3)]
    assert (row["81/2"]["score"], row["81/2"]["feedback"], row["81/2"]["attempts"]) == (4, ["", "", GOOD], 3)
    seeds = [(body["temperature"], body.get("seed")) for text, all_ in asked.items() if "Ada." in text for body in all_]
    assert seeds[:3] == [(0.0, None), (0.7, 6), (0.7, 7)]
    whole = scores(run)["spec_bench"]
    assert whole["n"] == 5 and "unparsable=1" in whole["settings"]
    # Unparsable is a result: nothing is requested from the server, which is gone.
    assert judge(run, server, "max_concurrent=1", "retry_temperature=0.7", "seed=5") == 0


def test_wrong_key_ends_judging_at_once(run, monkeypatch):
    refusal = {"status": 401, "body": {"error": {"message": "Incorrect API key"}}}
    with Endpoint(lambda number, body: refusal) as server:
        with pytest.raises(ConfigError, match=r"refuses the key \(OPENAI_API_KEY is not set\): HTTP 401, Incorrect"):
            judge(run, server, "max_concurrent=1")
        assert len(server.requests) <= 2
        monkeypatch.setenv("MY_KEY", "secret-word")
        with pytest.raises(ConfigError, match="refuses the key in MY_KEY") as refused:
            judge(run, server, "api_key_env=MY_KEY")
    assert server.keys[-1] == "Bearer secret-word" and "secret-word" not in str(refused.value)
    assert not scores(run)
    with pytest.raises(ConfigError, match="YOUR_KEY, and this environment variable is not set"):
        judge(run, server, "api_key_env=YOUR_KEY")


def test_unknown_model_ends_judging_at_once(run):
    missing = {"status": 404, "body": {"error": {"message": "The model `judge` does not exist"}}}
    with Endpoint(lambda number, body: missing) as server:
        with pytest.raises(ConfigError, match="has no model 'judge'.*HTTP 404, The model `judge` does not exist"):
            judge(run, server, "max_concurrent=1")
    assert len(server.requests) <= 2


def test_exhausted_quota_ends_judging(run):
    reported = {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}
    with Endpoint(lambda number, body: {"status": 429, "body": reported}) as server:
        with pytest.raises(BenchmarkError, match="no quota left for this key: You exceeded"):
            judge(run, server, "request_retries=0")


def test_unreachable_endpoint_is_reported_after_the_retries(run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with pytest.raises(BenchmarkError, match=rf"127.0.0.1:{port}/v1 cannot be reached .*; tried 3 times in"):
        judge(run, f"http://127.0.0.1:{port}/v1", "request_retries=2")
    assert not kept(run) and not scores(run)


def test_judging_ends_after_repeated_failures(run):
    with Endpoint(lambda number, body: {"status": 500}) as server:
        with pytest.raises(BenchmarkError, match="gave no answer 10 times in a row"):
            judge(run, server, "request_retries=0", "max_concurrent=1")
    assert len(server.requests) < ALL


def test_judge_that_fails_midway_loses_nothing(run, capsys):
    """After seven answers the key is revoked: they are kept, the base is scored, a second session requests five."""
    died = threading.Event()

    def answer(number, body):
        if number < 7 or died.is_set():
            return GOOD
        return {"status": 401, "body": {"error": {"message": "revoked"}}}

    with Endpoint(answer) as server:
        with pytest.raises(ConfigError, match="revoked"):
            judge(run, server, "max_concurrent=1")
        assert len(kept(run, "base")) == ANSWERS and len(kept(run)) == 1
        assert scores(run, "base")["spec_bench"]["n"] == ANSWERS and not scores(run)
        # As after a power cut in the middle of a line.
        file = next((run.trial("final-1").folder / "judgements").glob("*.jsonl"))
        file.write_text(file.read_text() + '{"item": "81/2", "sco')
        died.set()
        before = len(server.requests)
        assert judge(run, server, "max_concurrent=1") == 0
        assert len(server.requests) - before == ANSWERS - 1
        assert "5 answer(s) in 5 request(s)" in capsys.readouterr().out
    assert len(kept(run)) == ANSWERS and scores(run)["spec_bench"]["n"] == ANSWERS


def test_fresh_judges_again_and_archives_earlier_judgements(run):
    with Endpoint(lambda number, body: GOOD if number < ALL else "[RESULT] 2") as server:
        judge(run, server)
        judge(run, server)
        assert len(server.requests) == ALL
        judge(run, server, fresh=True)
    assert len(server.requests) == 2 * ALL
    assert scores(run)["spec_bench"]["value"] == 2.0 and [row["score"] for row in kept(run)] == [2] * ANSWERS
    (earlier,) = (run.trial("final-1").folder / "judgements" / "earlier").iterdir()
    assert [json.loads(line)["score"] for line in earlier.read_text().splitlines()] == [4] * ANSWERS


def test_another_judge_and_a_changed_answer_are_judged_again(run):
    with Endpoint(lambda number, body: GOOD if body["model"] == "judge" else "[RESULT] 1") as server:
        judge(run, server)
        judge_run(run.run_dir, ["model=other", f"base_url={server.url}", "rubric=helpfulness"])
        assert scores(run)["spec_bench"]["value"] == 1.0
        assert "judge=other@" in scores(run)["spec_bench"]["settings"]
        assert sorted(row["score"] for row in kept(run)) == [1] * ANSWERS + [4] * ANSWERS
        asked = len(server.requests)
        judge(run, server)  # the newest word is the first judge's, from what it has judged
        assert scores(run)["spec_bench"]["value"] == 4.0 and len(server.requests) == asked
        file = next((run.trial("final-1").folder / "answers").glob("generation-*.jsonl"))
        file.write_text(file.read_text().replace('"Ada."', '"Grace."'))
        judge(run, server)
        assert len(server.requests) == asked + 1


def test_no_proxy_stands_before_an_endpoint_on_this_machine(run, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    with Endpoint(lambda number, body: GOOD) as server:
        assert judge(run, server) == 0


def test_proxy_that_does_not_serve_an_endpoint_is_named(run, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://me:secret@127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    with pytest.raises(BenchmarkError) as refused:
        judge(run, "http://judge.invalid:8000/v1")
    text = str(refused.value)
    assert "through the proxy http://127.0.0.1:9" in text and "NO_PROXY=judge.invalid" in text and "secret" not in text

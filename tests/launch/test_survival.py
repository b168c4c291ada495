"""Sweeps on three hosts, from `render` to `down`: hosts are killed, cut off, preempted; laptop and head disappear."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from netlab import HOME, until
from onprem import FILE, SAVED_EVERY, STEPS, Cluster, Run, ray_processes

from tune.storage.run_folder import SCORE_KEY, RunFolder

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster(lab) -> Iterator[Cluster]:
    """A cluster of three nodes; taken down at the end, which must leave no Ray process on any host."""
    cluster = Cluster(lab)
    cluster.say(f"up: {cluster.up():.1f} s to 3 nodes")
    yield cluster
    assert "no Ray process is left" in cluster.verb("down", FILE, "--yes")
    assert ray_processes(lab.hosts) == {}
    cluster.say("no Ray process is left on any host")


def test_cluster_refuses_clients_without_the_token(cluster):
    head, worker, laptop = cluster.head, cluster.workers[0], cluster.lab.laptop
    token = Path(f"{laptop.root}{HOME}", ".ray/auth_token")
    assert token.stat().st_mode & 0o077 == 0
    for machine in (worker, laptop):
        assert machine.run("bash", "-c", f"echo > /dev/tcp/{head.address}/22").returncode == 0
        assert "refused" in machine.run("bash", "-c", f"echo > /dev/tcp/{head.address}/8265").stdout
    hidden = token.with_name("hidden")
    token.rename(hidden)
    try:
        assert "has no Ray token" in cluster.verb("check", FILE, "--after", code=None)
    finally:
        hidden.rename(token)
    join = ("macdrop", "sweep", "demo", "output_dir=refused", f"ray.address={head.address}:6379")
    done = worker.run(*join, timeout=240, RAY_AUTH_MODE="disabled")
    cluster.say("without the token:", done.stdout[-600:])
    assert done.returncode == 3 and "needs RAY_AUTH_MODE=token here" in done.stdout, done.stdout
    assert "Traceback" not in done.stdout


def test_sweep_survives_the_loss_of_hosts_and_laptop(cluster, tmp_path):
    lab, run = cluster.lab, Run(cluster, "survivor")
    log = tmp_path / "submit.log"
    submit = cluster.submit(run.name, log=log)
    until(run.training, 240, "the first trial", 0.5)
    lab.cut("laptop")
    cluster.say("the laptop is cut off during submit")
    losses = [run.hit(lambda host: lab.kill(host.name), "kill")]
    lab.boot(losses[0].host.name)
    lab.reconnect("laptop")
    cluster.say("the laptop and the killed host are back")
    cluster.wait_for_nodes()
    losses.append(run.hit(lambda host: lab.cut(host.name), "cut"))
    assert max(loss.repeated for loss in losses) <= SAVED_EVERY, losses
    until(run.ended, 400, "the sweep to end", 0.5)
    lab.reconnect(losses[1].host.name)
    assert submit.wait(60) == 0, "submit reconnected to its job and reported its end"
    cluster.say(f"submit ended: {log.read_text().splitlines()[-1]}")
    cluster.verb("status", FILE)
    check_whole(run, cluster.verb("logs", FILE, run.name), trials=7)
    cluster.verb("fetch", FILE, run.name)
    home = Path(f"{lab.laptop.root}{HOME}", "runs", run.name)
    assert (home / "scores.jsonl").read_bytes() == (run.folder / "scores.jsonl").read_bytes()
    assert (home / "report.html").exists() and list(home.glob("trials/*/adapter/adapter_model.safetensors"))


def test_notice_saves_at_once_and_a_new_head_resumes_the_run(cluster, tmp_path):
    lab, run = cluster.lab, Run(cluster, "headless")
    few = ("sweep.num_samples=1", "sweep.seeds=1")
    cluster.wait_for_nodes()
    cluster.listen_for_notices()
    cluster.submit(run.name, *few, log=tmp_path / "first.log")
    assert run.hit(cluster.notice, "post a notice to").repeated <= 1, "a notice triggers a checkpoint"
    until(lambda: run.done() and run.training(), 300, "a trial to be done and another to be in training", 0.5)
    done = run.done()
    cluster.say(f"kill the head; done: {', '.join(done)}")
    before = {trial: run.adapter(trial) for trial in done}
    lab.kill(cluster.head.name)
    lab.boot(cluster.head.name)
    cluster.verb("up", FILE)
    again = cluster.submit(run.name, *few, log=tmp_path / "again.log")
    assert again.wait(400) == 0, (tmp_path / "again.log").read_text()
    assert {trial: run.adapter(trial) for trial in done} == before, "finished trials are not repeated"
    log = (tmp_path / "again.log").read_text()
    assert not any(f"{trial} is training" in log for trial in done)
    check_whole(run, "", trials=4)


def check_whole(run: Run, log: str, *, trials: int) -> None:
    """Assert that every trial is done, every step and score is there exactly once, and the report is written."""
    assert RunFolder.open(run.folder).run()["status"] == "done"
    states = {name: facts["status"] for name, facts in run.trials().items()}
    assert len(states) == trials and set(states.values()) == {"done"}, states
    for trial in states:
        steps = run.steps(trial)
        assert steps == sorted(set(steps)) and steps[-1] == STEPS and len(steps) >= STEPS, f"{trial}: {steps}"
        assert log.count(f"{trial} done ") <= 1
    scores = [json.loads(line) for line in (run.folder / "scores.jsonl").read_text().splitlines()]
    keys = Counter(tuple(str(score.get(name)) for name in SCORE_KEY) for score in scores)
    assert max(keys.values()) == 1, [key for key, count in keys.items() if count > 1]
    assert {score["trial"] for score in scores} == {*states, "base"}
    assert (run.folder / "report.html").stat().st_size > 10_000

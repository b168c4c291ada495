"""Copies of a run in S3 and GCS (local servers) and in a folder: whole or not at all, retried, restored by hashes."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.object_stores import SECRET, gcs_server, make_bucket, s3_server, use_gcs, use_s3
from helpers.run_folders import make_run

from macdrop.errors import ConfigError
from tune.cli.copies import find_run
from tune.errors import ResourceError
from tune.storage.remote import background
from tune.storage.remote.background import RemoteSync
from tune.storage.remote.copied_units import OWNER, REPORT
from tune.storage.remote.copier import STATE_FILE, Copier, TakenOver, check_place
from tune.storage.remote.object_store import ObjectStore
from tune.storage.remote.restore import MARK, holds_run, is_restoring, restore
from tune.storage.run_folder import RunFolder, TrialFolder
from tune.storage.states import TaskState


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A finished run with a report, and what is of this machine alone."""
    folder = make_run(tmp_path_factory.mktemp("made") / "run", seeds=(1,), tried=1, items=2, attacks=("none",)).run_dir
    trials = sorted((folder / "trials").iterdir())
    for trial in trials[2:]:
        shutil.rmtree(trial)
    for file in folder.rglob("answers/*.jsonl"):
        if "text" not in file.name:
            file.unlink()
    for number, trial in enumerate(trials[:2]):
        for name in ("adapter/adapter_model.safetensors", "checkpoints/step-00000001/state.json", "stacks/rank0.txt"):
            (trial / name).parent.mkdir(parents=True, exist_ok=True)
            (trial / name).write_bytes(bytes([number]) * 2000)
    (folder / "report.html").write_text("<p>report</p>")
    (folder / "figures").mkdir()
    (folder / "figures" / "a.json").write_text("{}")
    (folder / "ray").mkdir()
    (folder / "ray" / "orders.jsonl").write_text("{}\n")
    return folder


@pytest.fixture
def run_dir(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture(scope="module")
def s3():
    with s3_server() as address:
        yield address


@pytest.fixture(scope="module")
def gcs():
    with gcs_server() as address:
        yield address


@pytest.fixture(params=["file", "s3", "gs"])
def url(request, tmp_path, monkeypatch) -> str:
    if request.param == "file":
        return (tmp_path / "copy").as_uri()
    bucket = f"bucket-{tmp_path.name.lower().replace('_', '-')[-50:].strip('-')}"
    if request.param == "gs":
        use_gcs(monkeypatch, request.getfixturevalue("gcs"), bucket)
    else:
        pytest.importorskip("s3fs")
        use_s3(monkeypatch, request.getfixturevalue("s3"))
        make_bucket(bucket)
    return f"{request.param}://{bucket}/runs/one"


def copy(run_dir: Path, url: str) -> Copier:
    copier = Copier(run_dir, ObjectStore(url))
    copier.copy()
    assert copier.record(None) == []
    return copier


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a run folder that a copy has."""
    local = ("checkpoints", "stacks", "ray", STATE_FILE, "in_use.json", ".in_use.lock")
    files = (file for file in folder.rglob("*") if file.is_file())
    found = {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}
    return {path: content for path, content in found.items() if not set(path.split("/")) & set(local)}


# --- copying and restoring ---


def test_a_restored_run_equals_the_run_without_what_is_local(run_dir, url, tmp_path):
    copy(run_dir, url)
    assert holds_run(url)
    assert restore(f"{url}/", tmp_path / "new") == []
    assert contents(tmp_path / "new") == contents(run_dir)
    assert not (tmp_path / "new" / "ray").exists() and not list((tmp_path / "new").rglob("checkpoints"))
    assert not is_restoring(tmp_path / "new")
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not [file for file in files if SECRET.encode() in file.read_bytes()]
    # The same run: it may be copied to the same place.
    assert check_place(url, tmp_path / "new", resume=True) is None


def test_only_changes_are_copied(run_dir, tmp_path):
    url = (tmp_path / "copy").as_uri()
    copier = copy(run_dir, url)
    written: list[str] = []
    copier.store.write, plain = lambda key, data: (written.append(key), plain(key, data)), copier.store.write
    copier.store.upload, upload = lambda key, file: (written.append(key), upload(key, file)), copier.store.upload
    copier.copy()
    assert written == []
    RunFolder(run_dir).add_scores([{**RunFolder(run_dir).score_rows()[0], "value": 0.125}])
    copier.copy()
    assert written == ["sync/run.json", "scores.jsonl", "sync/run.json"]
    again = Copier(run_dir, ObjectStore(url))
    again.store.write, again.store.upload = copier.store.write, copier.store.upload
    written.clear()
    again.copy()
    assert written == [OWNER], "a resumed run compares hashes and copies nothing twice"


def test_unfinished_trials_wait_and_a_trial_that_starts_again_is_no_error(run_dir, tmp_path):
    url = (tmp_path / "copy").as_uri()
    one, other = sorted((run_dir / "trials").iterdir())[:2]
    record = json.loads((one / "trial.json").read_text())
    (one / "trial.json").write_text(json.dumps({**record, "status": "running"}))
    copier = copy(run_dir, url)
    assert json.loads((run_dir / STATE_FILE).read_text())["unfinished"] == [one.name]
    restore(url, tmp_path / "new")
    assert not (tmp_path / "new/trials" / one.name).exists() and (tmp_path / "new/trials" / other.name).exists()
    TrialFolder(one).finish(TaskState.DONE)
    copier.copy()
    restore(url, tmp_path / "newer")
    assert contents(tmp_path / "newer") == contents(run_dir)


class Killed(Exception):
    """The process is killed."""


def kill_at(copier: Copier, number: int) -> None:
    """Let the write `number` of a copier and all later ones fail."""
    left = [number]

    def dying(method):
        def call(*arguments):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return method(*arguments)

        return call

    for name in ("write", "upload", "delete"):
        setattr(copier.store, name, dying(getattr(copier.store, name)))


def test_killed_at_any_write_a_copy_restores_old_or_new_and_never_a_mixture(run_dir, tmp_path):
    """First of a new copy, then of one whose files all change: every trial, and every other file, is of one time."""
    copied = tmp_path / "copy"
    old = contents(run_dir)
    older = tmp_path / "older"
    for round_, before in enumerate(({}, old)):
        if round_:
            copy(run_dir, copied.as_uri())
            shutil.copytree(copied, older)
            for trial in sorted((run_dir / "trials").iterdir()):
                TrialFolder(trial).note(judged=7)
                (trial / "adapter/adapter_model.safetensors").write_bytes(b"new" * 900)
                (trial / "answers/more.jsonl").write_text("{}\n")
            (run_dir / "report.html").write_text("newer")
        now, number, restored_trials = contents(run_dir), 0, set()
        while True:
            shutil.rmtree(copied, ignore_errors=True)
            if round_:
                shutil.copytree(older, copied)
            copier = Copier(run_dir, ObjectStore(copied.as_uri()))
            kill_at(copier, number)
            try:
                copier.copy()
                killed = False
            except Killed:
                killed = True
            new = tmp_path / f"new-{round_}-{number}"
            if holds_run(copied.as_uri()):
                restore(copied.as_uri(), new)
                found = contents(new)
                for trial in {path.split("/")[1] for path in found if path.startswith("trials/")}:
                    part = {path: content for path, content in found.items() if f"trials/{trial}/" in path}
                    whole = [{p: c for p, c in each.items() if f"trials/{trial}/" in p} for each in (before, now)]
                    assert part in whole, (number, trial)
                    restored_trials.add(trial)
                assert all(content in (before.get(path), now.get(path)) for path, content in found.items())
                shutil.rmtree(new)
            if not killed:
                break
            # The next process finishes what the killed one began.
            copy(run_dir, copied.as_uri())
            assert restore(copied.as_uri(), new) == [] and contents(new) == now
            shutil.rmtree(new)
            number += 1 if number < 6 else 5
        assert number > 10 and len(restored_trials) == len(list((run_dir / "trials").iterdir()))


def test_a_damaged_copy_gives_only_what_is_whole(run_dir, tmp_path):
    url = (tmp_path / "copy").as_uri()
    copy(run_dir, url)
    one, other = sorted(path.name for path in (tmp_path / "copy/trials").iterdir())[:2]
    (tmp_path / "copy/trials" / one / "adapter/adapter_model.safetensors").write_bytes(b"x")
    (tmp_path / "copy/sync/trials" / f"{other}.json").write_text("{")
    (tmp_path / "copy/environment.json").unlink()
    notes = restore(url, tmp_path / "new")
    assert [note.partition(" at ")[0] for note in notes] == [
        f"trials/{one} is damaged",
        f"the manifest of trials/{other} is damaged",
        "environment.json is missing or damaged",
    ]
    assert not {one, other} & {path.name for path in (tmp_path / "new/trials").iterdir()}
    for name in ("run.json", "config.yaml"):
        (tmp_path / "copy" / name).write_text("x")
    with pytest.raises(ConfigError, match="neither run.json nor config.yaml is whole"):
        restore(url, tmp_path / "newer")


def test_a_manifest_may_name_no_file_elsewhere(run_dir, tmp_path):
    url = (tmp_path / "copy").as_uri()
    copy(run_dir, url)
    unit = next((tmp_path / "copy/sync/trials").iterdir())
    manifest = json.loads(unit.read_text())
    for path in ("../../evil", "/tmp/evil", "run.json", f"trials/{unit.stem}/../../evil"):
        unit.write_text(json.dumps({"files": {**manifest["files"], path: {"sha256": "0", "size": 1}}}))
        assert f"the manifest of trials/{unit.stem} is damaged" in restore(url, tmp_path / f"n{len(path)}")[0]
    assert not list(tmp_path.rglob("evil"))


def test_an_interrupted_restoration_continues(run_dir, tmp_path, monkeypatch):
    url, new = (tmp_path / "copy").as_uri(), tmp_path / "new"
    copy(run_dir, url)
    plain, count = ObjectStore.download, [0]

    def failing(self, key, file):
        count[0] += 1
        if count[0] == 9:
            raise ConnectionError("reset")
        plain(self, key, file)

    monkeypatch.setattr(ObjectStore, "download", failing)
    with pytest.raises(ResourceError, match="ConnectionError: reset.*\n.*it continues where it stopped"):
        restore(url, new)
    assert is_restoring(new)
    from tune.storage.repair import check_run

    with pytest.raises(ConfigError, match="is being restored"):
        check_run(new)
    first = count[0]
    assert restore(url, new) == [] and contents(new) == contents(run_dir)
    total = len(contents(run_dir))
    assert count[0] - first == total - 8, "what is there is not downloaded again"
    assert not (new / MARK).exists()


# --- the place ---


def test_a_place_of_another_run_is_refused(run_dir, tmp_path):
    url = (tmp_path / "copy").as_uri()
    assert check_place(url, run_dir, resume=False) is None
    copy(run_dir, url)
    assert check_place(url, run_dir, resume=True) is None
    with pytest.raises(ConfigError, match="holds a copy of another run"):
        check_place(url, tmp_path / "other", resume=False)
    with pytest.raises(ConfigError, match="holds no copy of a run"):
        restore(f"{url}x", tmp_path / "new")


def test_a_place_with_other_files_or_in_the_run_is_refused(run_dir, tmp_path):
    (tmp_path / "alien").mkdir()
    (tmp_path / "alien" / "config.yaml").write_text("x: 1\n")
    with pytest.raises(ConfigError, match="holds config.yaml, which is no copy of a run"):
        check_place((tmp_path / "alien").as_uri(), run_dir, resume=False)
    with pytest.raises(ConfigError, match="lies in the run folder"):
        check_place((run_dir / "copy").as_uri(), run_dir, resume=False)


def test_a_store_out_of_reach_refuses_a_new_run_and_lets_an_old_one_resume(run_dir, s3, monkeypatch):
    pytest.importorskip("s3fs")
    use_s3(monkeypatch, s3)
    with pytest.raises(ResourceError, match="sync_to s3://no-such-bucket/x cannot be used: NoSuchBucket"):
        check_place("s3://no-such-bucket/x", run_dir, resume=False)
    assert "NoSuchBucket" in (check_place("s3://no-such-bucket/x", run_dir, resume=True) or "")


def test_two_processes_do_not_copy_to_one_place(run_dir, tmp_path):
    one = copy(run_dir, (tmp_path / "copy").as_uri())
    copy(run_dir, (tmp_path / "copy").as_uri())
    (run_dir / "report.html").write_text("newer")
    with pytest.raises(TakenOver):
        one.copy()


# --- the thread ---


def settle(condition, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)


@contextmanager
def expired():
    """A server that answers every request as S3 answers expired credentials."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = (
                b"<Error><Code>ExpiredToken</Code><Message>The token ASIAABCDEFGHIJKLMNOP has expired</Message></Error>"
            )
            self.send_response(400)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_PUT = do_HEAD = do_POST = do_DELETE = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_expired_credentials_are_reported_and_renewed_ones_are_used(run_dir, s3, tmp_path, monkeypatch):
    pytest.importorskip("s3fs")
    monkeypatch.setattr(background, "EVERY_S", 0.05)
    monkeypatch.setattr(background, "RETRY_S", 0.05)
    notes: list[str] = []
    with expired() as dead:
        use_s3(monkeypatch, dead)
        sync = RemoteSync("s3://renewed-bucket/x", run_dir, notes.append)
        settle(lambda: sync._failures >= 3)
        assert len(notes) == 1, "one message per reason"
        assert "expired" in notes[0] and "Renew the credentials" in notes[0]
        assert "ASIA" not in notes[0]
        use_s3(monkeypatch, s3)
        make_bucket("renewed-bucket")
        settle(lambda: len(notes) == 2)
    assert notes[1] == "Copies to s3://renewed-bucket/x work again."
    assert sync.close() == [] == json.loads((run_dir / STATE_FILE).read_text())["not_copied"]
    assert restore("s3://renewed-bucket/x", tmp_path / "new") == []


def test_the_end_says_what_was_not_copied_and_a_later_run_copies_it(run_dir, tmp_path, monkeypatch):
    pytest.importorskip("s3fs")
    notes: list[str] = []
    with expired() as dead:
        use_s3(monkeypatch, dead)
        sync = RemoteSync("s3://bucket-dead/x", run_dir, notes.append)
        begun = time.monotonic()
        missing = sync.close()
    assert time.monotonic() - begun < 20, "expired credentials are not waited for"
    trials = [f"trials/{path.name}" for path in sorted((run_dir / "trials").iterdir())]
    assert set(missing) > {*trials, "run", "report"}
    assert notes[-1].startswith(f"Not copied to s3://bucket-dead/x: {trials[0]}, ") and "expired" in notes[-1]
    state = json.loads((run_dir / STATE_FILE).read_text())
    assert state["not_copied"] == missing and "expired" in state["error"] and state["copied"] == 0
    assert RemoteSync((tmp_path / "copy").as_uri(), run_dir, notes.append).close() == []


def test_a_store_that_hangs_blocks_neither_the_run_nor_its_end(run_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(background, "CLOSE_S", 0.3)
    release = threading.Event()
    monkeypatch.setattr(ObjectStore, "write", lambda *_: release.wait())
    notes: list[str] = []
    begun = time.monotonic()
    sync = RemoteSync((tmp_path / "copy").as_uri(), run_dir, notes.append)
    assert time.monotonic() - begun < 1
    assert "run" in sync.close() and time.monotonic() - begun < 5
    assert "nothing moved for" in notes[-1]
    release.set()


def test_the_report_is_copied_alone_and_what_was_missing_stays_named(run_dir, tmp_path):
    url = (tmp_path / "copy").as_uri()
    copy(run_dir, url)
    state = json.loads((run_dir / STATE_FILE).read_text())
    (run_dir / STATE_FILE).write_text(json.dumps({**state, "not_copied": ["trials/x"], "error": "e"}))
    (run_dir / "report.html").write_text("newest")
    assert RemoteSync(url, run_dir, pytest.fail, frozenset({REPORT})).close() == []
    assert (tmp_path / "copy/report.html").read_text() == "newest"
    after = json.loads((run_dir / STATE_FILE).read_text())
    assert (after["not_copied"], after["error"], after["copied"]) == (["trials/x"], "e", state["copied"])


# --- the command ---


def test_resume_restores_into_an_empty_folder_and_leaves_one_with_the_run_alone(run_dir, tmp_path, capsys):
    url, new = (tmp_path / "copy").as_uri(), tmp_path / "new"
    words = [f"output_dir={new}", f"sync_to={url}"]
    assert find_run(None, words, required=False) is False, "nothing was copied yet: it starts"
    with pytest.raises(ConfigError, match="holds no copy of a run"):
        find_run(None, words, required=True)
    copy(run_dir, url)
    assert find_run(None, words, required=False) is True
    assert contents(new) == contents(run_dir)
    (new / "report.html").write_text("mine")
    assert find_run(None, words, required=True) is True
    assert (new / "report.html").read_text() == "mine"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ConfigError, match="exists and is not empty"):
        find_run(None, [f"output_dir={tmp_path / 'full'}", f"sync_to={url}"], required=True)
    with pytest.raises(ConfigError, match="sync_to: .*must begin with"):
        find_run(None, [f"output_dir={new}", "sync_to=elsewhere"], required=True)
    with pytest.raises(ConfigError, match="--resume-if-exists needs output_dir"):
        find_run(None, [], required=False)

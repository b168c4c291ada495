"""Scores in memory are those of the file, and each line of it is parsed once."""

from __future__ import annotations

import json
import os
import pickle
import random
import threading

import pytest

from macdrop.errors import ConfigError
from tune.storage import json_lines, known_scores
from tune.storage.json_lines import GrowingFile, append_jsonl
from tune.storage.known_scores import KnownScores
from tune.storage.records import SCORE_KEY, check_score
from tune.storage.run_folder import RunFolder


def score(number: int, trial: str = "t-1", value: float = 0.5) -> dict[str, object]:
    names = dict.fromkeys(SCORE_KEY, "none")
    return {**names, "model": "m", "arm": "plain", "trial": trial, "task": f"task-{number}", "value": value}


def reference(file) -> list[dict]:
    """The file read from its beginning: the last row of each key, trial by trial in the order they first came."""
    lines = file.read_text().split("\n")[:-1]
    while lines and lines[-1].endswith(" "):
        lines.pop()
    rows = [{"split": "test", **json.loads(line)} for line in lines]
    trials = list(dict.fromkeys(row["trial"] for row in rows))
    last = {tuple(row.get(name) for name in SCORE_KEY): row for row in rows}.values()
    return sorted(last, key=lambda row: trials.index(row["trial"]))


@pytest.mark.parametrize("seed", range(8))
def test_the_table_equals_a_file_that_is_read_again_whatever_happens_to_it(tmp_path, seed):
    chance, file = random.Random(seed), tmp_path / "scores.jsonl"
    table = KnownScores(file, None, within=tmp_path)
    for step in range(60):
        rows = [score(chance.randrange(12), f"t-{chance.randrange(3)}", step + part) for part in range(3)]
        match chance.choice(["append", "append", "append", "torn", "replaced", "shortened", "removed", "edited"]):
            case "append":
                append_jsonl(file, rows)
            case "torn" if file.exists():
                with file.open("ab") as tail:
                    tail.write(chance.choice([b'{"a', json.dumps(rows[0]).encode() + b" \n"]))
            case "replaced":
                append_jsonl(tmp_path / "other", rows * 40)
                os.replace(tmp_path / "other", file)
            case "shortened" if file.exists():
                os.truncate(file, file.stat().st_size // 2)
                append_jsonl(file, rows)
            case "removed":
                file.unlink(missing_ok=True)
            case "edited" if file.exists():
                text = file.read_text().replace("task-1", "task-9")
                file.write_text(text)
                os.utime(file, ns=(step, step))
        expected = reference(file) if file.exists() else []
        assert table.rows() == expected
        assert [table.rows(f"t-{n}") for n in range(3)] == [
            [row for row in expected if row["trial"] == f"t-{n}"] for n in range(3)
        ]


def test_each_line_is_parsed_once(tmp_path, monkeypatch):
    parsed = []
    monkeypatch.setattr(known_scores, "check_score", lambda row: (parsed.append(row["task"]), check_score(row)))
    table = KnownScores(tmp_path / "scores.jsonl", None, within=tmp_path)
    for number in range(50):
        append_jsonl(tmp_path / "scores.jsonl", [score(number)])
        assert len(table.rows("t-1")) == number + 1
    assert parsed == [f"task-{number}" for number in range(50)]


def test_a_damaged_line_is_named_by_its_number_in_the_file(tmp_path):
    file = tmp_path / "scores.jsonl"
    append_jsonl(file, [score(1), score(2)])
    problems: list[str] = []
    strict, lenient = KnownScores(file, None, within=tmp_path), KnownScores(file, problems, within=tmp_path)
    strict.rows(), lenient.rows()
    with file.open("a") as tail:
        tail.write("broken\n")
    append_jsonl(file, [score(3)])
    for _ in range(2):  # again and again, until it is mended
        with pytest.raises(ConfigError, match="line 3"):
            strict.rows()
    assert [row["task"] for row in lenient.rows()] == ["task-1", "task-2", "task-3"]
    assert len(problems) == 1 and "line 3" in problems[0]


def test_threads_see_whole_tables(tmp_path):
    table, seen = KnownScores(tmp_path / "scores.jsonl", None, within=tmp_path), []
    readers = [threading.Thread(target=lambda: seen.extend(len(table.rows()) for _ in range(200))) for _ in range(3)]
    for reader in readers:
        reader.start()
    for number in range(100):
        append_jsonl(tmp_path / "scores.jsonl", [score(2 * number), score(2 * number + 1)])
    for reader in readers:
        reader.join()
    assert len(table.rows()) == 200 and not [count for count in seen if count % 2]


def test_a_pickled_run_folder_carries_no_scores(tmp_path):
    run_folder = RunFolder.create(tmp_path / "run", {"sweep": {"models": ["m"]}}, command="macdrop sweep")
    run_folder.add_scores([score(number) for number in range(500)])
    assert len(run_folder.score_rows()) == 500
    assert len(pickle.dumps(run_folder)) < 2000
    assert len(pickle.loads(pickle.dumps(run_folder)).score_rows()) == 500


def taken(reader: GrowingFile) -> tuple[bool, list]:
    whole, rows = reader.read()
    return whole, list(rows)


def test_a_missing_file_has_no_rows_and_then_some(tmp_path):
    reader = GrowingFile(tmp_path / "x.jsonl")
    assert taken(reader) == (True, [])
    append_jsonl(tmp_path / "x.jsonl", [{"a": 1}])
    assert taken(reader) == (True, [{"a": 1}])
    assert taken(reader) == (False, [])
    append_jsonl(tmp_path / "x.jsonl", [{"a": 2}])
    assert taken(reader) == (False, [{"a": 2}])


def test_after_an_error_in_the_middle_all_rows_are_read_again(tmp_path):
    file = tmp_path / "x.jsonl"
    reader = GrowingFile(file)
    append_jsonl(file, [{"a": 1}])
    assert taken(reader) == (True, [{"a": 1}])
    good = file.read_text()
    file.write_text(good + '{"a": 2}\nnonsense\n')
    for _ in range(2):
        with pytest.raises(ConfigError, match="line 3"):
            taken(reader)
    file.write_text(good + '{"a": 2}\n')
    assert taken(reader) == (True, [{"a": 1}, {"a": 2}])


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 22])
def test_blocks_of_any_size_give_the_same_rows(block, tmp_path, monkeypatch):
    file = tmp_path / "x.jsonl"
    groups = [[{"a": "ü" * size, "b": number} for number in range(size)] for size in (1, 3, 2)]
    for group in groups:
        append_jsonl(file, group)
    with file.open("ab") as torn:
        torn.write(b'{"a": 1} \n{"a"')
    monkeypatch.setattr(json_lines, "_BLOCK", block)
    assert taken(GrowingFile(file)) == (True, [row for group in groups for row in group])

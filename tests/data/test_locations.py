"""tune.data.locations: folders, patterns, shards, endings and compression, or what a file is instead."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import datasets
import pytest

from macdrop.errors import ConfigError, DataError
from tune.config.train.data_keys import DatasetEntry
from tune.data.local_rows import read_documents, read_rows
from tune.data.readers import read_file
from tune.data.sources import find_sources, open_source

ROWS = [{"text": f"row {n}"} for n in range(4)]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def train_rows(path: str | Path, **keys: str) -> list[dict]:
    entry = DatasetEntry(path=str(path), **keys)
    (source,) = find_sources([entry], format="auto", max_samples=None)
    return [dict(row.values) for row in open_source(source)[1]()]


def benchmark_rows(path: str | Path) -> list[dict]:
    return read_rows([str(path)]).rows


# --- folders ---


def test_a_folder_that_datasets_saved_is_read(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict(train=data, test=data.select([3])).save_to_disk(tmp_path / "both")
    assert train_rows(tmp_path / "one") == train_rows(tmp_path / "both") == ROWS
    assert train_rows(tmp_path / "both", split="test") == ROWS[3:]
    with pytest.raises(DataError, match="has no split 'tset'. Did you mean 'test'.* Splits: test, train"):
        train_rows(tmp_path / "both", split="tset")
    # A benchmark is given its files.
    with pytest.raises(DataError, match=r"is a folder, not a file. Give its files, for example '.*/one/\*.arrow'"):
        benchmark_rows(tmp_path / "one")
    assert benchmark_rows(tmp_path / "one/*.arrow") == ROWS


def test_a_saved_part_is_no_other_one(tmp_path):
    folder = tmp_path / "one"
    datasets.Dataset.from_list(ROWS).save_to_disk(folder)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "_split": "test"}))
    assert train_rows(folder, split="test") == ROWS
    with pytest.raises(DataError, match="has no split 'train'. Splits: test"):
        train_rows(folder)
    (folder / "state.json").write_text(json.dumps({**state, "_data_files": []}))
    with pytest.raises(DataError, match="holds no rows"):
        train_rows(folder)


def test_only_the_files_that_datasets_lists_are_read(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one", num_shards=2)
    (tmp_path / "one/data-00000-of-00001.arrow").write_bytes(b"left by an earlier save")
    assert train_rows(tmp_path / "one") == ROWS
    (tmp_path / "one/state.json").write_text("{")
    with pytest.raises(DataError, match="state.json is damaged"):
        train_rows(tmp_path / "one")


def test_a_folder_with_the_layout_of_the_hub_is_read(tmp_path):
    folder = tmp_path / "hub"
    (folder / "data").mkdir(parents=True)
    for number in (0, 1):
        part = datasets.Dataset.from_list(ROWS[2 * number : 2 * number + 2])
        part.to_parquet(folder / f"data/train-0000{number}-of-00002.parquet")
    datasets.Dataset.from_list(ROWS[:1]).to_parquet(folder / "data/test-00000-of-00001.parquet")
    assert train_rows(folder) == ROWS and train_rows(folder, split="test") == ROWS[:1]
    assert not list(Path(datasets.config.HF_DATASETS_CACHE).glob("*hub_default*"))


def test_configurations_of_a_readme_are_followed(tmp_path):
    for name in ("en", "de"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text(lines([{"text": name}]))
    configs = "".join(f"- config_name: {name}\n  data_files: {name}/*.jsonl\n" for name in ("en", "de"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    assert train_rows(tmp_path, name="de") == [{"text": "de"}]
    with pytest.raises(DataError, match=r"pick one among the available configs: \['en', 'de'\]"):
        train_rows(tmp_path)


def test_shards_of_a_folder_are_one_data_set(tmp_path):
    for number, row in enumerate(ROWS):
        (tmp_path / f"part-{number}.jsonl").write_text(lines([row]))
    assert train_rows(tmp_path) == train_rows(tmp_path / "part-*.jsonl") == ROWS
    assert benchmark_rows(tmp_path / "*.jsonl") == ROWS
    with pytest.raises(DataError, match="No file matches"):
        train_rows(tmp_path / "*.csv")


def test_a_change_in_any_shard_is_another_data_set(tmp_path):
    for number in (0, 1):
        (tmp_path / f"part-{number}.jsonl").write_text(lines([ROWS[number]]))

    def identity() -> str:
        (source,) = find_sources(str(tmp_path), format="auto", max_samples=None)
        return open_source(source)[0]

    before = identity()
    (tmp_path / "part-1.jsonl").write_text(lines([ROWS[3]]))
    assert identity() != before


def test_an_empty_folder_is_named(tmp_path):
    (tmp_path / "notes.doc").write_text("x")
    with pytest.raises(DataError, match="finds no data.*\n.*It holds: notes.doc"):
        train_rows(tmp_path)


# --- endings ---


@pytest.mark.parametrize("name", ["rows.JSONL", "rows.Json", "rows.jsonl.gz", "ROWS.JSONL.GZ"])
def test_endings_in_capitals_and_compressed_files_are_read(tmp_path, name):
    path = tmp_path / name
    content = lines(ROWS).encode()
    path.write_bytes(gzip.compress(content) if name.lower().endswith(".gz") else content)
    assert train_rows(path) == benchmark_rows(path) == ROWS
    assert read_documents([str(path)], "text") == [row["text"] for row in ROWS]
    assert next(read_file(path)).place == f"{path}, line 1"


def test_compressed_texts_lists_and_tables_are_read(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\ntwo\n"))
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"text\n" + b"".join(f"{r['text']}\n".encode() for r in ROWS)))
    assert read_documents([f"{tmp_path}/a.txt.gz"], "text") == ["one\ntwo\n"]
    assert train_rows(tmp_path / "a.json.gz") == train_rows(tmp_path / "a.csv.gz") == ROWS
    assert train_rows(tmp_path / "a.txt.gz") == [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", POINTER, "is a Git LFS pointer, not the data.\nRun: git lfs pull"),
        ("a.parquet", POINTER, "is a Git LFS pointer"),
        ("a.jsonl.gz", gzip.compress(lines(ROWS).encode(), mtime=0)[:-20], "not a whole .gz file"),
        ("a.jsonl.gz", b"not compressed", "not a whole .gz file"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd", "zst"),
        ("a.parquet.gz", gzip.compress(b"x", mtime=0), "cannot be read compressed. Unpack it first"),
        ("a.arrow", b"no arrow", "not a valid arrow file"),
        (
            "a.jsonl",
            b'{\n "data": [\n  {"text": "a"}\n ]\n}\n',
            "keys 'data'. If the rows are the list",
        ),
        ("a.jsonl", b'{\n "text": "a"\n}\n{\n "text": "b"\n}\n', "Its objects take several lines each"),
        ("a.csv", b"text,text\na,b\n", "the column 'text' is there twice"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b", "text": ""}\n', "line 2.*'text' is given twice in one object"),
        ("a.json", b'[{"text": "a", "n": {"x": 1, "x": 2}}]', "line 1.*'x' is given twice in one object"),
        (
            "a.jsonl",
            b'{"text": ' + b"9" * 5000 + b"}\n",
            r"line 1: not valid JSON \(a number with thousands",
        ),
    ],
)
@pytest.mark.parametrize("user", [train_rows, benchmark_rows])
def test_what_cannot_be_read_is_named_for_what_it_is(tmp_path, user, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        user(tmp_path / name)


def test_duplicate_columns_of_parquet_are_refused(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="the column 'text' is there twice"):
        train_rows(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["x" * 300, "d/" + "x" * 300 + ".jsonl", "y" * 5000 + "/a.jsonl"])
def test_names_that_no_file_can_have_are_refused(name):
    with pytest.raises(ConfigError, match="longer than the 255 bytes that a file's name may have"):
        find_sources(name, format="auto", max_samples=None)
    with pytest.raises(DataError, match="does not exist"):
        benchmark_rows(name)


def test_rows_inside_an_object_on_one_line_are_hinted_at(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"data": ROWS}))
    hint = "If the rows are the list under 'data', save that list as the file."
    with pytest.raises(DataError, match=hint):
        read_documents([str(file)], "text")


def test_a_pipe_and_a_dead_link_are_named_for_what_they_are(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    (tmp_path / "gone.jsonl").symlink_to("nowhere.jsonl")
    with pytest.raises(DataError, match="is a pipe or device, and rows are read more than once. Save them to a file"):
        benchmark_rows(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match=r"is a link to 'nowhere.jsonl', which leads nowhere"):
        benchmark_rows(tmp_path / "gone.jsonl")

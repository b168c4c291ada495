"""tune.data.readers: every kind of file, damaged ones with their place, and all users on the same path."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.benchmark_fixtures import byte_tokenizer

from macdrop.errors import DataError
from tune.config.eval_entries import Perplexity
from tune.config.eval_spec import EvalSpec
from tune.config.messages import build
from tune.data.formats import detect_format
from tune.data.local_rows import read_documents, read_rows
from tune.data.readers import read_file
from tune.data.sources import find_sources, open_source
from tune.evaluation.benchmark import check_files
from tune.evaluation.perplexity import load

BOM = b"\xef\xbb\xbf"
GOOD = {
    "rows.json": b'[{"text": "a"},\n {"text": "b"}]',
    "rows.jsonl": b'{"text": "a"}\n\n{"text": "b"}\n',
    "rows.csv": b"text\na\nb\n",
    "rows.tsv": b"text\na\nb\n",
    "rows.txt": b"a\nb\n",
}
DEEP = b"[" * 100_000
#: file name, content, what the refusal says. Each has a good first row.
BAD = {
    "short CSV row": ("r.csv", b"prompt,reference\na,b\nc\n", "line 3: fewer values than the 2 columns"),
    "long CSV row": ("r.csv", b"prompt,reference\na,b\n\nc,d,e\n", "line 4: more values than the 2 columns"),
    "open quote": ("r.csv", b'prompt,reference\na,b\n"c,d\n', "line 3: not valid CSV"),
    "short TSV row": ("r.tsv", b"prompt\treference\na\tb\nc\n", "line 3: fewer values than the 2 columns"),
    "no column names": ("r.csv", b"\na,b\n", "line 1: no column names"),
    "broken JSON line": ("r.jsonl", b'{"prompt": "a", "reference": "b"}\n{"prompt": \n', "line 2: not valid JSON"),
    "broken JSON list": ("r.json", b'[{"prompt": "a", "reference": "b"},\n {"prompt": }]', "line 2: not valid JSON"),
    "no comma": ("r.json", b'[{"prompt": "a", "reference": "b"}\n {"prompt": ""}]', "line 2: not valid JSON"),
    "trailing comma": ("r.json", b'[{"prompt": "a", "reference": "b"},\n]', "line 2: not valid JSON"),
    "text after the list": ("r.json", b'[{"prompt": "a", "reference": "b"}]\nmore', "line 2: not valid JSON"),
    "half a pair in a line": ("r.jsonl", b'{"prompt": "a"}\n{"prompt": ["\\ud83d"]}\n', "line 2: \\\\ud83d"),
    "half a pair in a list": ("r.json", b'[{"prompt": "a"},\n{"prompt": "\\ude00"}]', "line 2: \\\\ude00"),
    "deep JSON line": ("r.jsonl", b'{"prompt": "a", "reference": "b"}\n' + DEEP, "line 2: nested too deeply"),
    "deep JSON list": ("r.json", b'[{"prompt": "a", "reference": "b"},\n' + DEEP, "line 2: nested too deeply"),
    "huge number": ("r.jsonl", b'{"prompt": "a", "reference": "b"}\n{"a": ' + b"1" * 5000 + b"}", "line 2: not valid"),
    "no object": ("r.jsonl", b'{"prompt": "a", "reference": "b"}\n3\n', "line 2: expected an object .* found int"),
    "no UTF-8": ("r.jsonl", b'{"prompt": "a", "reference": "b"}\n\xff\xfe', "not UTF-8 text"),
    "no parquet": ("r.parquet", b"no parquet", "not a parquet file"),
}


def written(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


def train_rows(path: str) -> list[dict]:
    """Rows as training reads them."""
    (source,) = find_sources(path, format="auto", max_samples=None)
    return [dict(row.values) for row in open_source(source)[1]()]


def check(section: str, path: str) -> None:
    """Open a file as a benchmark."""
    check_files(build(EvalSpec, {section: {"mine": {"data": path}}}))


@pytest.mark.parametrize("bom", [b"", BOM], ids=["plain", "bom"])
@pytest.mark.parametrize("name", GOOD)
def test_training_and_benchmarks_read_the_same_rows(tmp_path, name, bom):
    path = written(tmp_path, name, bom + GOOD[name])
    assert train_rows(path) == [{"text": "a"}, {"text": "b"}]
    if name == "rows.txt":
        assert read_documents([path], "text") == ["a\nb\n"]  # perplexity takes a text file as one document
        with pytest.raises(DataError, match="rows are read from"):
            read_rows([path])
    else:
        assert read_rows([path]).rows == [{"text": "a"}, {"text": "b"}]
        assert read_documents([path], "text") == ["a", "b"]


def test_parquet_rows_hold_plain_lists(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"context": "2+2=", "choices": ["4", "5"], "label": 0},
        {"context": "1+1=", "choices": ["3", "2"], "label": 1},
    ]
    path = str(tmp_path / "qa.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert train_rows(path) == read_rows([path]).rows == rows
    check("zero_shot", path)
    assert [row.place for row in read_file(Path(path))] == [f"{path}, row 1", f"{path}, row 2"]


@pytest.mark.parametrize("damage", BAD)
@pytest.mark.parametrize("user", ["training", "zero_shot", "perplexity", "generation"])
def test_damaged_files_are_refused_with_their_place_everywhere(tmp_path, user, damage):
    name, content, message = BAD[damage]
    path = written(tmp_path, name, content)
    with pytest.raises(DataError, match=message) as caught:
        if user == "training":
            train_rows(path)
        else:
            check(user, path)
    assert path in str(caught.value) and len(str(caught.value)) < 400


def test_bom_reaches_no_column_name_and_no_text(tmp_path):
    path = written(tmp_path, "g.csv", BOM + b"prompt,reference\na,b\n")
    assert list(read_rows([path]).rows[0]) == ["prompt", "reference"]
    check("generation", path)
    assert read_documents([written(tmp_path, "t.txt", BOM + b"a")], "text") == ["a"]


def test_places_of_rows_are_the_lines_they_start_on(tmp_path):
    path = Path(written(tmp_path, "r.csv", b'text\n"a\nb"\n\nc\n'))
    assert [row.place for row in read_file(path)] == [f"{path}, line 2", f"{path}, line 5"]
    path = Path(written(tmp_path, "r.json", b'\n[{"text":\n "a"},\n\n{"text": "b"}]'))
    assert [row.place for row in read_file(path)] == [f"{path}, line 2", f"{path}, line 5"]


def test_rows_of_a_list_on_one_line_are_numbered(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"text": "a"}, {"text": "b"}]) + "\n")
    assert [row.place for row in read_file(file)] == [f"{file}, line 1, row 1", f"{file}, line 1, row 2"]


def test_documents_that_are_not_text_are_refused(tmp_path):
    path = written(tmp_path, "t.jsonl", json.dumps({"text": ["the cat", "sat on"]}).encode())
    with pytest.raises(DataError, match=r"t.jsonl, line 1: 'text' must be text, not \['the cat', 'sat on'\]"):
        check("perplexity", path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "reference": True}, "'reference' must be a text, or a list of texts, not True"),
        ({"prompt": "a", "reference": 5}, "'reference' must be a text, or a list of texts, not 5"),
        ({"prompt": "a", "reference": [["b"], ["c"]]}, "'reference' must be a text, or a list of texts, not"),
        ({"prompt": "a", "reference": []}, "'reference' must be a text, or a list of texts, not"),
        ({"prompt": "a", "reference": None}, "'reference' is null, and needed for format reference"),
        ({"instruction": "a", "output": "b", "input": 3}, "'input' must be a text, not 3"),
        ({"prompt": "a", "reference": "b", "question_id": 1.5}, "'question_id' must be a text or a whole number"),
        ({"question_id": 1, "category": 2, "turns": ["a"]}, "'category' must be a text, not 2"),
        ({"prompts": "a", "reference": "b"}, "no 'instruction', 'output' for format reference"),
    ],
)
def test_generation_takes_texts_alone(tmp_path, row, message):
    path = written(tmp_path, "g.jsonl", json.dumps(row).encode())
    with pytest.raises(DataError) as caught:
        check("generation", path)
    assert message in str(caught.value) and "g.jsonl, line 1" in str(caught.value)


@pytest.mark.parametrize("value", [["a"], {"a": 1}, 12345678, True])
def test_perplexity_takes_texts_alone_from_files_and_from_the_hub(tmp_path, monkeypatch, value):
    import datasets

    path = written(tmp_path, "t.jsonl", json.dumps({"text": value}).encode())
    with pytest.raises(DataError, match="line 1: 'text' must be text"):
        read_documents([path], "text")
    hub = datasets.Dataset.from_list([{"text": value}, {"text": value}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: hub)
    entry = build(Perplexity, {"data": ["someone/texts"]})
    with pytest.raises(DataError, match=r"someone/texts \[test\], row 0: 'text' must be text"):
        load(entry, byte_tokenizer(), 64)


def test_real_files_read_as_json_reads_them(shared):
    for file in ("alpaca_en_demo/train.json", "piqa/validation.jsonl", "spec_bench/question.jsonl", "gsm8k/test.jsonl"):
        path = shared / "data" / file
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.split("\n") if line]
        assert train_rows(str(path)) == read_rows([str(path)]).rows == rows
    first = next(iter(read_file(shared / "data/alpaca_en_demo/train.json")))
    assert detect_format(first) == "alpaca"


def test_a_damaged_zst_file_is_named(tmp_path, monkeypatch):
    class ZstdError(Exception):
        """That of the package, which need not be installed."""

    def damaged(*_, **__):
        raise ZstdError("zstd decompress error: Data corruption detected")

    monkeypatch.setitem(sys.modules, "zstandard", SimpleNamespace(open=damaged))
    (tmp_path / "rows.jsonl.zst").write_bytes(b"no frame")
    with pytest.raises(DataError, match=r"rows.jsonl.zst: not a whole .zst file \(zstd decompress error"):
        read_rows([str(tmp_path / "rows.jsonl.zst")])


@pytest.mark.parametrize("indent", [None, 2])
def test_one_object_of_columns_is_a_table(tmp_path, indent):
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"instruction": ["a", "b"], "output": ["c", None]}, indent=indent))
    rows = list(read_file(file))
    assert [dict(row.values) for row in rows] == [
        {"instruction": "a", "output": "c"},
        {"instruction": "b", "output": None},
    ]
    assert [row.place for row in rows] == [f"{file}, row 1", f"{file}, row 2"]
    file.write_text(json.dumps({"instruction": ["a", "b"], "output": ["c"]}, indent=indent))
    with pytest.raises(DataError, match="columns differ in length: 'instruction' 2, 'output' 1"):
        list(read_file(file))


@pytest.mark.parametrize(
    "rows",
    [
        [{"messages": [{"role": "user", "content": "x"}]}],
        [{"text": "x", "tags": ["a"]}],
        [{"choices": ["a", "b"]}, {"choices": ["c", "d"]}],
    ],
)
def test_rows_with_lists_are_not_taken_for_columns(tmp_path, rows):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [dict(row.values) for row in read_file(file)] == rows

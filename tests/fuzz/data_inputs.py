"""Damaged files of benchmarks, read as a scorer reads them, and data set entries with values of wrong kinds.

What works must be what was written: prompts and documents are texts, and a data set entry keeps every value as given.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml
from helpers.benchmark_fixtures import byte_tokenizer
from hypothesis import strategies as st

from fuzz.mutations import ODD, Damage, damaged_file, damages
from macdrop.errors import MacDropError
from tune.config.eval_spec import EvalSpec
from tune.config.messages import build
from tune.config.run_spec import load
from tune.data.local_rows import read_rows
from tune.data.sources import find_sources, open_source
from tune.evaluation import generation, perplexity
from tune.evaluation.benchmark import check_files

POSITIONS = 256
ROWS: dict[str, list[dict[str, Any]]] = {
    "zero_shot": [{"context": "2+2=", "choices": ["4", "5"], "label": n} for n in (0, 1)],
    "perplexity": [{"text": "some words of text"}, {"text": "and more"}],
    "reference": [{"prompt": "Say a.", "reference": ["a", "A"], "question_id": 3}, {"prompt": "b", "reference": "b"}],
    "instruction": [{"instruction": "Add.", "input": "2 and 3", "output": "5"}, {"instruction": "Hi", "output": "Ho"}],
    "spec_bench": [{"question_id": 81, "category": "writing", "turns": ["One?", "Two?"], "reference": ["a", "b"]}] * 2,
}
#: The section of the eval block that reads rows of a kind, if it is not its name.
SECTION = dict.fromkeys(("reference", "instruction", "spec_bench"), "generation")
Drawn = tuple[int, list[Damage]]


def good_files() -> dict[str, tuple[str, bytes]]:
    """File name -> the section that reads it, and its content."""
    found: dict[str, tuple[str, bytes]] = {"text.txt": ("perplexity", b"plain words\n\nand more of them")}
    for kind, rows in ROWS.items():
        section = SECTION.get(kind, kind)
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        found |= {f"{kind}.jsonl": (section, lines), f"{kind}.json": (section, json.dumps(rows).encode())}
        found[f"{kind}.JSONL.gz"] = (section, gzip.compress(lines, mtime=0))
        written = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:1]), written)
        found[f"{kind}.parquet"] = (section, written.getvalue())
    found["table.csv"] = ("generation", b'prompt,reference\nSay a.,a\n"Two\nlines",b\n')
    found["table.tsv"] = ("perplexity", b"text\tnote\none\t1\ntwo\t2\n")
    return found


# --- files of benchmarks ---


def benchmark_files(folder: Path) -> Callable[[Drawn], str]:
    """Return the check of one damaged file."""
    files = good_files()
    names = sorted(files)
    tokenizer = byte_tokenizer(chat_template="{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")

    def read(drawn: Drawn) -> str:
        name = names[drawn[0] % len(names)]
        section, content = files[name]
        file = folder / name
        file.write_bytes(damaged_file(name, content, drawn[1]))
        try:
            score_ready(section, str(file), tokenizer)
        except MacDropError as error:
            assert str(error).strip() and len(str(error)) < 2000, "a message of no use"
            return f"{section}: {type(error).__name__}"
        finally:
            file.unlink()
        return f"{section}: works"

    return read


def score_ready(section: str, path: str, tokenizer: Any) -> None:
    """Do with a file all that is done before a model is asked."""
    block = build(EvalSpec, {section: {"mine": {"data": path}}})
    check_files(block)
    entry = block.entries(section)["mine"]
    if section == "zero_shot":
        for row in read_rows([path]).rows:
            assert isinstance(row["context"], str) and row["choices"][row["label"]]
    elif section == "perplexity":
        assert perplexity.load(entry, tokenizer, POSITIONS).windows
    else:
        resident = generation.load("mine", entry, tokenizer, POSITIONS)
        for question in resident.questions:
            assert all(isinstance(text, str) for text in (*question.turns, *question.references, question.category))
            assert generation.prompt(resident, tokenizer, question, []).ids
            json.dumps(question.kept)


def file_inputs() -> st.SearchStrategy[Drawn]:
    return st.tuples(st.integers(0, 200), damages())


# --- entries of `dataset` ---


def entries(folder: Path) -> Callable[[Any], str]:
    """Return the check of one drawn value of `dataset`."""
    (folder / "rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (folder / "shards").mkdir()
    for number in (0, 1):
        (folder / f"shards/part-{number}.csv").write_text(f"text\nrow {number}\n")
    recipe = folder / "recipe.yaml"

    def read(drawn: Any) -> str:
        given = json.loads(json.dumps(drawn).replace("FOLDER", str(folder)))
        recipe.write_text(yaml.safe_dump({"model_name_or_path": "zoo:planted-llama", "dataset": given}))
        try:
            spec = load(recipe)
            kept = spec.model_dump(mode="json")["dataset"]
            assert kept == given, f"{given!r} became {kept!r}"
            for source in find_sources(spec.dataset, format=spec.format, max_samples=spec.max_samples):
                if source.files:
                    assert [row.values for row in open_source(source)[1]()]
        except MacDropError as error:
            assert str(error).strip() and len(str(error)) < 2000, "a message of no use"
            return type(error).__name__
        return "works"

    return read


def entry_inputs() -> st.SearchStrategy[Any]:
    plain = st.text(alphabet="abc ?[", max_size=6)
    # Other folders of the machine may hold anything.
    odd = ODD.filter(lambda value: not isinstance(value, str) or ("/" not in value and value.strip(".~ ")))
    path = st.one_of(st.sampled_from(["FOLDER/rows.jsonl", "FOLDER/shards", "FOLDER/*.jsonl", "zoo:train"]), plain, odd)
    keys = {
        "path": path,
        "format": st.one_of(st.sampled_from(["auto", "text", "alpaca"]), ODD),
        "split": st.one_of(st.sampled_from(["train", "test"]), ODD),
        "name": st.one_of(st.just("default"), ODD),
        "max_samples": st.one_of(st.integers(1, 3), ODD),
    }
    entry = st.fixed_dictionaries(
        {"path": path}, optional={key: keys[key] for key in keys if key != "path"} | {"fromat": ODD}
    )
    value = st.one_of(path, st.lists(st.one_of(path, entry), max_size=3), entry)
    return value.filter(_is_json)


def _is_json(value: Any) -> bool:
    """Values that JSON, and so the comparison with what was given, keeps."""
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except ValueError:
        return False

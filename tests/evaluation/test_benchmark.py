"""tune.evaluation.benchmark: every kind follows the protocol, and a new one is registered from outside."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from helpers import benchmark_fixtures as fix
from pydantic import Field

from macdrop.errors import ConfigError, DataError
from tune.analysis.items import Items
from tune.config.eval_entries import ENTRIES, BenchmarkEntry, Paths
from tune.config.eval_spec import EvalJob, EvalSpec, jobs
from tune.config.messages import build
from tune.config.parse import SECTIONS
from tune.config.run_spec import RunSpec, load
from tune.config.schema import json_schema
from tune.data.local_rows import read_rows
from tune.evaluation.benchmark import BENCHMARKS, Benchmark, check_files, register_benchmark
from tune.evaluation.score_names import Column
from tune.evaluation.scorer import Scorer
from tune.storage.run_folder import RunFolder


class LastToken(BenchmarkEntry):
    """Texts whose last token is to be guessed."""

    data: Paths = Field(description="Files of rows with `text`.")
    skip: int = Field(0, description="Texts to leave out at the start.")


class LastTokenBenchmark:
    """The share of texts whose last token is the model's first choice."""

    def __init__(self, spec, tokenizer, max_length) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    @staticmethod
    def check(name, entry, spec) -> None:
        read_rows(entry.data).require(["text"], f"last_token.{name}")

    def load(self, name, entry) -> tuple[str, list[list[int]]]:
        texts = [row["text"] for row in read_rows(entry.data).rows][entry.skip :]
        return name, [self.tokenizer(text)["input_ids"][-self.max_length :] for text in texts]

    def count(self, data, limit) -> int:
        return len(data[1][:limit])

    def score(self, data, model, batch_size, limit, logits):
        name, texts = data
        hits = []
        for ids in texts[:limit]:
            guessed = logits(model, torch.tensor([ids[:-1]]))[0, -1].argmax().item()
            hits.append(float(guessed == ids[-1]))
        row = {"task": name, "version": "1", "metric": "acc", "value": sum(hits) / len(hits), "stderr": None}
        row |= {"n": len(hits), "higher_is_better": True, "num_fewshot": None, "settings": ""}
        return [row], [{"text": i, "hit": hit} for i, hit in enumerate(hits)]

    @staticmethod
    def items(records, row):
        return {f"text {record['text']}": record["hit"] for record in records}


@pytest.fixture
def last_token() -> Iterator[None]:
    register_benchmark("last_token", LastToken, LastTokenBenchmark)
    yield
    SECTIONS.remove("last_token")
    for table in (ENTRIES, BENCHMARKS, EvalSpec.model_fields):
        del table["last_token"]
    for kind in (EvalSpec, RunSpec):
        kind.model_rebuild(force=True)


def test_a_new_kind_is_registered_from_outside_and_scored(tmp_path, last_token):
    path = fix.write_jsonl(tmp_path / "t.jsonl", [{"text": word} for word in fix.WORDS])
    spec = build(EvalSpec, {"attacks": ["none", "zeroing@3"], "last_token": {"words": {"data": path, "skip": 2}}})
    assert jobs(spec) == [EvalJob("last_token", "words"), EvalJob("last_token", "words", "zeroing@3", "base")]
    check_files(spec)
    model, tokenizer = fix.tiny_llama(), fix.byte_tokenizer()
    scorer = Scorer(model, tokenizer, spec, fix.massive(model))
    run_folder = RunFolder.create(tmp_path / "run", run_of(path))
    for job in scorer.jobs():
        place = run_folder.answers_file("m", "t", job)
        (row,) = scorer.score(job, answers_path=place)
        ids = [tokenizer(word)["input_ids"] for word in fix.WORDS[2:]]
        if job.attack == "none":
            with torch.no_grad():
                hits = [model(torch.tensor([i[:-1]])).logits[0, -1].argmax().item() == i[-1] for i in ids]
            assert row["value"] == sum(hits) / 6
        assert (row["benchmark"], row["task"], row["n"], row["attack"]) == ("last_token", "words", 6, job.attack)
        assert scorer.items(job) == 6 and scorer.items(job, limit=4) == 4
        run_folder.add_scores([{**row, "model": "m", "arm": "plain", "trial": "t", "seed": 1, "split": "test"}])
        found = Items(run_folder, "m").read("t", Column.of(row))
        assert list(found) == [f"text {i}" for i in range(6)]


def run_of(path: str) -> dict:
    """A run file with the new section, as a mapping."""
    return {
        "dataset": "zoo:train",
        "model_name_or_path": "zoo:planted-llama",
        "eval": {"last_token": {"words": path}},
    }


def test_a_new_kind_is_a_section_like_the_others_in_a_run_file(tmp_path, last_token):
    path = fix.write_jsonl(tmp_path / "t.jsonl", [{"text": "a"}])
    file = tmp_path / "run.yaml"
    file.write_text(f"dataset: zoo:train\nmodel_name_or_path: zoo:planted-llama\neval:\n  last_token: {{w: {path}}}\n")
    other = fix.write_jsonl(tmp_path / "o.jsonl", [{"txt": "a"}])
    overrides = ["eval.last_token.w.skip=1", f"validation.last_token.v.data={other}", "validation.last_token.v.skip=2"]
    spec = load(file, overrides)
    assert (spec.eval.last_token["w"].skip, spec.validation.last_token["v"].skip) == (1, 2)
    assert "last_token" in json_schema()["$defs"]["EvalSpec"]["properties"]
    with pytest.raises(ConfigError, match="eval.last_token.w.skp is .*Did you mean 'skip'"):
        load(file, ["eval.last_token.w.skp=1"])
    with pytest.raises(DataError, match="line 1: no 'text' for last_token.w"):
        check_files(build(EvalSpec, {"last_token": {"w": other}}))


def test_without_registration_the_section_is_unknown():
    with pytest.raises(ConfigError, match="last_token"):
        build(EvalSpec, {"last_token": {"w": "x"}})
    assert list(BENCHMARKS) == list(ENTRIES) == SECTIONS


@pytest.mark.parametrize("section", BENCHMARKS)
def test_every_kind_has_the_members_of_the_protocol(section):
    for name, member in inspect.getmembers(Benchmark, inspect.isfunction):
        if name in vars(Benchmark) and not name.startswith("_"):
            theirs = inspect.signature(getattr(BENCHMARKS[section], name))
            assert list(theirs.parameters) == list(inspect.signature(member).parameters), name


def test_kinds_are_listed_without_torch_and_lm_eval():
    code = (
        "import sys, tune.evaluation.benchmark; "
        "print([m for m in ('torch', 'transformers', 'lm_eval', 'datasets', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

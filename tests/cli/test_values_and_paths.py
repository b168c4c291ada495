"""Odd values and paths on a command line: no traceback, and none is silently read as something else."""

from __future__ import annotations

import json

import pytest

MODEL = "sweep.models=[zoo:planted-llama]"
LONG = "x" * 300
#: A list of values that is longer than any name of a file.
SPACE = f"sweep.parameters.learning_rate=[{', '.join(f'{n}e-5' for n in range(1, 81))}]"


@pytest.mark.parametrize("verb", ["train", "sweep", "eval", "plan"])
@pytest.mark.parametrize("first", [f"{LONG}=1", f"nonsense={LONG}", LONG, f"./{LONG}/a.yaml"])
def test_a_first_word_longer_than_a_file_name_is_refused(shell, verb, first):
    shell.refused(verb, first)


def test_a_long_first_override_is_an_override(shell):
    refused = shell.refused("sweep", SPACE, MODEL, "nonsense=1", "--dry-run")
    assert refused.startswith("macdrop: nonsense is an unknown key")


@pytest.mark.parametrize(
    "words",
    [
        ("train", f"dataset={LONG}.jsonl", MODEL),
        ("train", f"output_dir={LONG}", MODEL),
        ("train", f"model_name_or_path=./{LONG}"),
        ("train", 'output_dir="a\\0b"', MODEL),
        ("train", 'dataset="a\\0b.jsonl"', MODEL),
        ("sweep", f"sweep.models=[./{LONG}]", "--dry-run"),
        ("sweep", MODEL, f"eval.perplexity.t.data={LONG}.txt", "--dry-run"),
        ("sweep", MODEL, f"eval.zero_shot.t.data=./{LONG}", "--dry-run"),
        ("sweep", MODEL, f"eval.local={LONG}", "eval.suite=spec-bench", "--dry-run"),
        ("sweep", f"output_dir={LONG}", "--resume"),
        ("eval", "zoo:planted-llama", f"eval.generation.g.data={LONG}.jsonl"),
        ("scan", f"./{LONG}"),
        ("report", LONG),
        ("export", LONG, "--output", "there"),
        ("reproduce", LONG),
        ("plan", MODEL, "--prices", LONG),
    ],
    ids=lambda words: " ".join(words)[:40],
)
def test_names_longer_than_a_file_name_are_refused(shell, words):
    shell.refused(*words)


@pytest.fixture
def home(shell, monkeypatch):
    """A home folder with a data file and a benchmark in it."""
    folder = shell.folder / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    rows = [{"instruction": f"name {n}", "output": "a"} for n in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.txt").write_text("some words of text")
    return folder


def test_the_home_folder_is_expanded_in_every_path(shell, home):
    words = ["dataset=~/rows.jsonl", "eval.perplexity.t.data=~/text.txt", "output_dir=~/runs/x", "cutoff_len=64"]
    shown = shell("sweep", MODEL, *words, "val_size=2", "sweep.num_samples=1", "max_steps=2", "--dry-run")
    assert shown.code == 0, shown.err
    for name in ("rows.jsonl", "text.txt", "runs/x"):
        assert str(home / name) in shown.out
    assert "~" not in shown.out and not (shell.folder / "~").exists()
    assert f"{home}/no.jsonl" in shell.refused("sweep", "dataset=[{path: ~/no.jsonl}]", MODEL, "--dry-run")


def test_the_home_folder_is_expanded_in_arguments(shell, home):
    assert str(home / "no") in shell.refused("report", "~/no")
    assert str(home / "no") in shell.refused("eval", "zoo:planted-llama", "eval.zero_shot=[piqa]", "--adapter=~/no")
    assert str(home / "no.yaml") in shell.refused("train", "~/no.yaml")


def test_a_home_folder_of_nobody_is_refused(shell):
    assert "stands for a home folder" in shell.refused("train", "output_dir=~no-such-user/x", MODEL)


def test_what_cutoff_len_removes_is_printed(shell):
    rows = [{"instruction": "name", "output": "a b"}] * 11 + [{"instruction": "name " * 99, "output": "a"}]
    (shell.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("sweep", MODEL, "dataset=rows.jsonl", "cutoff_len=64", "val_size=2", "max_steps=2", "sweep.num_samples=1")
    shown = shell(*words, "--dry-run")
    assert "planted-llama: 12 rows; at cutoff_len 64 1 dropped (8.3%), as no answer token fits" in shown.out
    assert "1 of 12 rows (8.3%)" in shell.refused(*words, "max_dropped_share=0.08", "--dry-run")

"""The paper's benchmarks, measured as their authors do: perplexity, LongBench, and other splits of hub data."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
from helpers import benchmark_fixtures as fix
from helpers.benchmark_fixtures import TEXT, score, slow_greedy, values

from macdrop.errors import ConfigError, DataError
from tune.config import suites
from tune.config.eval_spec import EvalSpec
from tune.config.messages import build
from tune.errors import BenchmarkError
from tune.evaluation import check
from tune.evaluation.benchmark import check_files
from tune.evaluation.decode import fit_middle
from tune.evaluation.scorer import Scorer

SETS = {name.removeprefix("zero_shot/"): file for name, file in suites.load("longbench").files.items()}
WORDS = "the mill and a river ran past stones where bread was made of old wheat".split()


@pytest.fixture(scope="module")
def model():
    return fix.tiny_llama(positions=768)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    fix.refuse_connections(monkeypatch)


# --- perplexity as Sun et al. 2024 measure it ---


def documents(n: int, words: int) -> list[str]:
    return [
        " ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(words)) + "\n" if i % 3 else "" for i in range(n)
    ]


@torch.no_grad()
def published(model, ids: torch.Tensor, length: int, most: int | None) -> tuple[float, int]:
    """Follow their procedure: consecutive sequences of `length` of ids (1, tokens), mean loss times length."""
    sequences = [ids[:, i * length : (i + 1) * length] for i in range(ids.numel() // length)][:most]
    losses = []
    for sequence in sequences:
        logits = model(sequence).logits
        loss = torch.nn.CrossEntropyLoss()(logits[0, :-1], sequence[0, 1:])
        losses.append(loss.float() * sequence.numel())
    return torch.exp(torch.stack(losses).sum() / (len(sequences) * length)).item(), len(sequences)


@pytest.mark.parametrize("bos", [True, False])
def test_suite_perplexity_follows_the_published_procedure(tmp_path, model, bos):
    tokenizer, length = fix.byte_tokenizer(bos), 96
    rows = {"wikitext": documents(12, 30), "c4": documents(20, 15), "pg19": documents(8, 40)}
    for entry, file in suites.load("perplexity").files.items():
        (tmp_path / file).parent.mkdir()
        fix.write_jsonl(tmp_path / file, [{"text": text} for text in rows[entry.partition("/")[2]]])
    cuts = {"c4": {"documents": 17, "windows": 4}, "pg19": {}}
    entries = {name: {"max_window": length, **cuts.get(name, {})} for name in rows}
    spec = build(EvalSpec, {"suite": "perplexity", "local": str(tmp_path), "perplexity": entries})
    scorer = Scorer(model, tokenizer, spec)
    found = {job.task: scorer.score(job)[0] for job in scorer.jobs()}

    def ids(text: str, special: bool) -> torch.Tensor:
        return tokenizer(text, return_tensors="pt", add_special_tokens=special).input_ids

    wanted = {
        "wikitext": published(model, ids("\n\n".join(rows["wikitext"]), False), length, None),
        "c4": published(model, ids(" ".join(rows["c4"][:17]), True), length, 4),
        "pg19": published(model, ids(" ".join(rows["pg19"][:5]), True), length, 100),
    }
    for name, (value, windows) in wanted.items():
        assert windows > 2 and f"windows={windows} " in found[name]["settings"]
        assert found[name]["value"] == pytest.approx(value, rel=1e-5), name
        assert f"window={length} " in found[name]["settings"] and "full_windows=True" in found[name]["settings"]
    assert ("bos=text" in found["c4"]["settings"]) == bos and "join=<space>" in found["c4"]["settings"]
    assert found["c4"]["settings"].endswith("suite=perplexity@1+max_window+documents+windows")


def test_suite_windows_are_4096_or_the_models_maximum(tmp_path, tokenizer):
    path = fix.write_jsonl(tmp_path / "w.jsonl", [{"text": TEXT * 6}])
    block = {"suite": "perplexity", "limit": 1, "perplexity": {"c4": False, "pg19": False, "wikitext": path}}
    for positions, window in ((256, 256), (8192, 4096)):
        [row] = score(fix.tiny_llama(positions=positions), tokenizer, block)
        assert f"window={window} " in row["settings"] and row["n"] == window - 1


def test_text_without_a_full_window_is_refused(tmp_path, model, tokenizer):
    path = fix.write_jsonl(tmp_path / "w.jsonl", [{"text": "short"}])
    with pytest.raises(DataError, match="5 tokens of text do not make a full window of 768"):
        score(model, tokenizer, {"perplexity": {"w": {"data": path, "full_windows": True}}})


# --- LongBench ---


def longbench_row(name: str, i: int) -> dict:
    """Make a row in the schema of LongBench's own files, with a context longer than the model's maximum."""
    answers = {"longbench_passage_count": "7", "longbench_passage_retrieval_en": f"Paragraph {i}"}
    classes = ["Date", "Number"] if name == "longbench_trec" else None
    answer = classes[i % 2] if classes else answers.get(name, f"{WORDS[i]} {WORDS[i + 1]}")
    context = " ".join(WORDS[(i + j * j) % len(WORDS)] for j in range(200))
    return {
        "input": f"Where is {WORDS[i]}?",
        "context": context,
        "answers": [answer],
        "length": 200,
        "dataset": name,
        "language": "en",
        "all_classes": classes,
        "_id": f"{name}{i}",
    }


@pytest.fixture(scope="module")
def longbench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "longbench").mkdir()
    for name, file in SETS.items():
        fix.write_jsonl(folder / file, [longbench_row(name, i) for i in range(2)])
    return folder


def longbench_block(folder, **keys) -> dict:
    return {
        "suite": "longbench",
        "local": str(folder),
        "zero_shot": {name: {"max_new_tokens": 4, **keys} for name in SETS},
    }


def test_all_sixteen_longbench_sets_are_scored_from_their_own_schema(longbench, model, tokenizer):
    pytest.importorskip("rouge")
    spec = build(EvalSpec, longbench_block(longbench))
    check_files(spec)
    scorer = Scorer(model, tokenizer, spec)
    rows = [row for job in scorer.jobs() for row in scorer.score(job) if row["metric"] == "score"]
    assert [row["task"] for row in rows] == list(SETS) and len(SETS) == 16
    for row in rows:
        assert row["n"] == 2 and 0 <= row["value"] <= 1 and row["max_length"] == 768
        assert "truncation=middle shortened=2" in row["settings"] and "suite=longbench@1" in row["settings"]


def test_long_prompts_keep_their_first_and_last_half(tmp_path, longbench, model, tokenizer):
    """hotpotqa's answers end at eos only, so they are greedy to the last token."""
    pytest.importorskip("rouge")
    name, new, longest = "longbench_hotpotqa", 5, 301
    block = longbench_block(longbench, max_length=longest) | {"batch_size": 2}
    block["zero_shot"] = {other: False for other in SETS if other != name} | {
        name: {"max_new_tokens": new, "max_length": longest}
    }
    score(model, tokenizer, block, answers_path=tmp_path / "items.jsonl")
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    for i, item in enumerate(items):
        row = longbench_row(name, i)
        asked = "Answer the question based on the given passages."
        asked += " Only give me the answer and do not output any other words."
        passages = f"The following are given passages.\n{row['context']}"
        prompt = f"{asked}\n\n{passages}\n\n{asked}\n\nQuestion: {row['input']}\nAnswer:"
        ids = tokenizer(prompt).input_ids
        half = (longest - new) // 2
        kept = ids[:half] + ids[-half:]
        assert ids[0] == tokenizer.bos_token_id and len(ids) > longest
        assert item["answers"] == [tokenizer.decode(slow_greedy(model, kept, new), skip_special_tokens=True)]


@pytest.mark.parametrize(("n", "room"), [(5, 6), (6, 6), (7, 6), (20, 7), (3, 2)])
def test_fit_middle_keeps_short_prompts_and_both_halves_of_long_ones(n, room):
    ids = list(range(n))
    kept = fit_middle(ids, room)
    assert kept == ids if n <= room else kept == ids[: room // 2] + ids[n - room // 2 :]
    assert len(kept) <= room and kept[0] == 0 and kept[-1] == n - 1


def test_middle_truncation_without_generation_is_refused(tmp_path, longbench, model, tokenizer):
    path = fix.write_jsonl(tmp_path / "p.jsonl", fix.hub_rows("piqa"))
    with pytest.raises(ConfigError, match="piqa: truncation middle is for tasks that generate"):
        score(model, tokenizer, {"zero_shot": {"piqa": {"data": path, "truncation": "middle"}}})
    pytest.importorskip("rouge")
    block = longbench_block(longbench, max_new_tokens=767)
    with pytest.raises(
        ConfigError, match="leave no room for a prompt in 768.*\n?.*longbench_narrativeqa.max_new_tokens"
    ):
        score(model, tokenizer, block)


def test_missing_packages_are_reported_with_the_install_command(monkeypatch, longbench):
    monkeypatch.setattr(check, "PACKAGES", {"longbench": (("json", "no_such_package"), "macdrop[longbench]")})
    for block in (longbench_block(longbench), {"suite": "longbench"}):
        with pytest.raises(ConfigError, match=r"needs no_such_package.*\n.*pip install 'macdrop\[longbench\]'"):
            check_files(build(EvalSpec, block))


# --- splits of the hub's data ---


@pytest.fixture
def piqa_on_the_hub(tmp_path, monkeypatch):
    """A folder with the data set's name in the working directory, which `datasets` loads in its place."""
    folder = tmp_path / "baber" / "piqa"
    folder.mkdir(parents=True)
    rows = fix.hub_rows("piqa", 12)
    for split, part in {"train": rows[:4], "validation": rows[4:]}.items():
        fix.write_jsonl(folder / f"{split}.jsonl", part)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return {"train": rows[:4], "validation": rows[4:]}


def test_another_split_is_scored(tmp_path, piqa_on_the_hub, model, tokenizer):
    for split, rows in piqa_on_the_hub.items():
        path = fix.write_jsonl(tmp_path / f"{split}.jsonl", rows)
        local = score(model, tokenizer, {"zero_shot": {"piqa": path}})
        found = score(model, tokenizer, {"zero_shot": {"piqa": {"split": split}}})
        assert values(found) == values(local) and found[0]["n"] == len(rows)
        assert f"data=hub split={split}" in found[0]["settings"]
    assert score(model, tokenizer, {"zero_shot": ["piqa"]})[0]["n"] == 8  # the task's own


def test_unknown_split_is_refused(piqa_on_the_hub, model, tokenizer):
    with pytest.raises(ConfigError, match="'piqa' has no split 'trian'"):
        score(model, tokenizer, {"zero_shot": {"piqa": {"split": "trian"}}})
    with pytest.raises(ConfigError, match="split is for single tasks, and 'ai2_arc' is a group"):
        check_files(build(EvalSpec, {"zero_shot": {"ai2_arc": {"split": "train"}}}))
    with pytest.raises(BenchmarkError, match="Loading the data"):
        score(model, tokenizer, {"zero_shot": {"arc_easy": {"split": "validation"}}})

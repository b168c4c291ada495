"""Prompts as the model gets them: rows of our own as written, long ones cut behind their bos, long texts in windows."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import benchmark_fixtures as fix
from helpers.benchmark_fixtures import TEXT, score, values

from macdrop.errors import ConfigError, DataError
from tune.config.eval_spec import EvalJob, EvalSpec
from tune.config.messages import build
from tune.errors import BenchmarkError
from tune.evaluation.benchmark import check_files
from tune.evaluation.scorer import Scorer


@torch.no_grad()
def slow(model, ids: list[int], answer: int) -> float:
    """The log-likelihood of the last `answer` ids: one forward pass, no batch, no padding."""
    logits = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
    return sum(logits[at - 1, ids[at]].item() for at in range(len(ids) - answer, len(ids)))


def answers(path) -> list[list[float]]:
    """Log-likelihoods of the choices, document by document."""
    return [[ll for ll, _ in json.loads(line)["answers"]] for line in path.read_text().splitlines()]


ODD = [
    {"context": "12", "choices": ["the cat", "a dog"], "label": 0},
    {"context": "{{ label }} {% if x %}", "choices": ["{{context}}", "7"], "label": 1},
    {"context": "[1, 2]", "choices": ["0", "1"], "label": 1},
    {"context": "  a river\n", "choices": ["['b']", "Zürich 🌊"], "label": 0},
    {"context": "0", "choices": ["1", "0"], "label": 0},
]


@pytest.mark.parametrize("shift", range(len(ODD)))
def test_own_rows_are_scored_as_they_are_written(tmp_path, model, tokenizer, shift):
    """Whatever row comes first: lm-eval takes the first for the kind of all."""
    rows = ODD[shift:] + ODD[:shift]
    entry = {"data": fix.write_jsonl(tmp_path / "t.jsonl", rows), "target_delimiter": "|"}
    file = tmp_path / "items.jsonl"
    found = score(model, tokenizer, {"zero_shot": {"mine": entry}}, answers_path=file)
    wanted = []
    for row in rows:
        before = row["context"].rstrip()
        lengths = [len(f"{row['context'][len(before) :]}|{choice}".encode()) for choice in row["choices"]]
        texts = [f"{row['context']}|{choice}" for choice in row["choices"]]
        wanted.append([slow(model, tokenizer(text).input_ids, n) for text, n in zip(texts, lengths, strict=True)])
    for got, expected in zip(answers(file), wanted, strict=True):
        assert got == pytest.approx(expected, abs=1e-4)
    hits = [scores.index(max(scores)) == row["label"] for scores, row in zip(wanted, rows, strict=True)]
    assert values(found)["mine", "acc"] == sum(hits) / len(hits)


def test_examples_of_own_rows_are_as_they_are_written(tmp_path, model, tokenizer):
    shots = fix.write_jsonl(tmp_path / "s.jsonl", [{"context": "7", "choices": ["8", "9"], "label": 1}] * 2)
    data = fix.write_jsonl(tmp_path / "t.jsonl", [{"context": "12", "choices": ["13", "{{1}}"], "label": 0}])
    entry = {"data": data, "fewshot_data": shots, "num_fewshot": 1}
    file = tmp_path / "items.jsonl"
    score(model, tokenizer, {"zero_shot": {"mine": entry}}, answers_path=file)
    texts = [f"7 9\n\n12 {choice}" for choice in ("13", "{{1}}")]
    wanted = [slow(model, tokenizer(text).input_ids, len(text) - len("7 9\n\n12")) for text in texts]
    assert answers(file)[0] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("bos", [True, False])
def test_contexts_without_a_word(tmp_path, model, bos):
    """Nothing, or spaces alone: the first token is conditioned on bos, or on eos without one."""
    rows = [{"context": context, "choices": ["ab", "cd"], "label": 0} for context in ("", "  ")]
    tokenizer = fix.byte_tokenizer(bos=bos)
    entry = {"data": fix.write_jsonl(tmp_path / "t.jsonl", rows), "target_delimiter": ""}
    file = tmp_path / "items.jsonl"
    score(model, tokenizer, {"zero_shot": {"mine": entry}}, answers_path=file)
    first = tokenizer.bos_token_id if bos else tokenizer.eos_token_id
    for row, got in zip(rows, answers(file), strict=True):
        texts = [row["context"] + choice for choice in row["choices"]]
        ids = [[first, *tokenizer(text, add_special_tokens=False).input_ids] for text in texts]
        assert got == pytest.approx([slow(model, each, len(each) - 1) for each in ids], abs=1e-4)


def test_white_space_must_stand_in_the_same_place_in_all_rows(tmp_path):
    rows = [{"context": context, "choices": ["ab", "cd"], "label": 0} for context in ("x", "y ")]
    path = fix.write_jsonl(tmp_path / "t.jsonl", rows)
    with pytest.raises(ConfigError, match=r"target_delimiter"):
        check_files(build(EvalSpec, {"zero_shot": {"mine": path}}))
    check_files(build(EvalSpec, {"zero_shot": {"mine": {"data": path, "target_delimiter": ""}}}))


# --- long prompts ---


def long_rows(tmp_path) -> str:
    rows = [
        {"context": "a river that ran past the mill", "choices": ["here", "there"], "label": 0},
        {"context": "to", "choices": ["be", "me"], "label": 1},
    ]
    return fix.write_jsonl(tmp_path / "t.jsonl", rows)


@pytest.mark.parametrize("bos", [True, False])
def test_a_long_prompt_is_cut_behind_its_bos(tmp_path, model, bos):
    tokenizer, file = fix.byte_tokenizer(bos=bos), tmp_path / "items.jsonl"
    spec = build(EvalSpec, {"max_length": 12, "zero_shot": {"mine": long_rows(tmp_path)}})
    scorer = Scorer(model, tokenizer, spec)
    rows = scorer.score(scorer.jobs()[0], answers_path=file)
    # The last token of an answer is never fed to the model: prompt and answer are 13 tokens.
    lead = [tokenizer.bos_token_id] if bos else []
    text = tokenizer("a river that ran past the mill", add_special_tokens=False).input_ids
    for got, choice in zip(answers(file)[0], (" here", " there"), strict=True):
        answer = tokenizer(choice, add_special_tokens=False).input_ids
        kept = text[len(text) - (13 - len(lead) - len(answer)) :]
        assert got == pytest.approx(slow(model, lead + kept + answer, len(answer)), abs=1e-4)
    assert all(row["settings"].endswith(" prompts_cut_left=1") for row in rows)
    note = "zero_shot/mine: 1 of 2 prompts (50%) are too long for max_length 12 and were cut on the left"
    assert scorer.notes == [note]
    scorer.score(scorer.jobs()[0])
    assert scorer.notes == [note]


def test_prompts_that_fit_are_not_counted(tmp_path, model, tokenizer):
    rows = score(model, tokenizer, {"zero_shot": {"mine": long_rows(tmp_path)}})
    assert all(row["settings"].endswith(" prompts_cut_left=0") for row in rows)


def test_a_long_prompt_of_a_generative_task_is_cut_behind_its_bos(tmp_path, tokenizer):
    from tune.evaluation.zero_shot.harness import Harness

    model = fix.tiny_llama(positions=48)
    rows = [{"question": "How many are ten and two and three and four?", "answer": "#### 19"}, fix.hub_rows("gsm8k")[0]]
    entry = {"data": fix.write_jsonl(tmp_path / "t.jsonl", rows), "num_fewshot": 0, "max_new_tokens": 8}
    block = {"zero_shot": {"gsm8k": entry}}
    found = score(model, tokenizer, block)
    assert all(row["settings"].endswith(" prompts_cut_left=1") for row in found)
    harness = Harness(model, fix.byte_tokenizer(), 48)
    harness.use(model, 2, build(EvalSpec, block).zero_shot["gsm8k"])
    ids, mask = harness.tok_batch_encode([TEXT[:60], "Hi"], left_truncate_len=40)
    assert ids[0].tolist() == [0, *tokenizer(TEXT[:60]).input_ids[-39:]] and mask[0].all()
    assert ids[1, -3:].tolist() == tokenizer("Hi").input_ids and mask[1].tolist() == [0] * 37 + [1] * 3


def test_an_answer_that_is_too_long_is_refused_before_anything_is_scored(tmp_path, model, tokenizer):
    rows = [
        {"context": "a", "choices": ["b", "c"], "label": 0},
        {"context": "a", "choices": ["b", "far too long an answer"], "label": 0},
    ]
    path = fix.write_jsonl(tmp_path / "t.jsonl", rows)
    spec = build(EvalSpec, {"max_length": 12, "zero_shot": {"mine": path}})
    with pytest.raises(DataError, match=r"t.jsonl, line 2: the answer 'far too .* has 22 tokens.*may have 12"):
        Scorer(model, tokenizer, spec).prepare()
    spec = build(EvalSpec, {"max_length": 12, "limit": 1, "zero_shot": {"mine": path}})
    Scorer(model, tokenizer, spec).prepare()


def test_an_answer_without_a_token_of_its_own_is_named(tmp_path, model, tokenizer, monkeypatch):
    from tune.evaluation.zero_shot.harness import Harness

    monkeypatch.setattr(Harness, "_encode_pair", lambda self, context, continuation: ([0, 5], []))
    with pytest.raises(BenchmarkError, match="' here' has no token of its own"):
        score(model, tokenizer, {"zero_shot": {"mine": long_rows(tmp_path)}})


def test_another_limit_is_another_set_of_documents(tmp_path, model, tokenizer):
    spec = build(EvalSpec, {"zero_shot": {"mine": long_rows(tmp_path)}})
    scorer = Scorer(model, tokenizer, spec)
    job = EvalJob("zero_shot", "mine")
    assert [scorer.score(job, limit=limit)[0]["n"] for limit in (1, None, 1)] == [1, 2, 1]


# --- long texts ---


@pytest.mark.parametrize("positions", [64, 2048])
def test_the_windows_of_a_rolling_task_begin_with_one_bos(tmp_path, tokenizer, positions):
    """word_perplexity by definition: bos, then each window behind the last token of the one before."""
    model, page = fix.tiny_llama(positions=positions), TEXT[:300].strip()
    path = fix.write_jsonl(tmp_path / "t.jsonl", [{"page": page}])
    found = values(score(model, tokenizer, {"zero_shot": {"wikitext": path}}))
    ids, total = [0, *tokenizer(page, add_special_tokens=False).input_ids], 0.0
    for start in range(1, len(ids), positions):
        window = ids[start : start + positions]
        behind = max(0, start + len(window) - 1 - positions)  # lm-eval fills the last window up
        total += slow(model, ids[behind : start + len(window)], len(window))
    words = len(page.split())
    assert found["wikitext", "word_perplexity"] == pytest.approx(2.718281828459045 ** (-total / words), rel=1e-4)

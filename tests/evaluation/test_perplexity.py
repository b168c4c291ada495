"""Perplexity on a tiny random model, against a token-by-token loop."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers import benchmark_fixtures as fix
from helpers.benchmark_fixtures import TEXT, score

from macdrop.errors import ConfigError
from tune.evaluation import logits
from tune.evaluation.perplexity import cut


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    fix.refuse_connections(monkeypatch)


@torch.no_grad()
@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("stride", [None, 10])
def test_perplexity_equals_a_token_by_token_loop(tmp_path, model, bos, stride):
    tokenizer, size, text = fix.byte_tokenizer(bos), 24, TEXT[:150]
    (tmp_path / "t.txt").write_text(text)
    block = {"batch_size": 4, "perplexity": {"t": {"data": str(tmp_path / "t.txt"), "window": size, "stride": stride}}}
    [row] = score(model, tokenizer, block)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    lead = [0] if bos else []
    room, losses, done = size - len(lead), [], 0 if bos else 1
    for start in range(0, len(ids), stride or room):
        for at in range(max(done, start if bos else start + 1), min(start + room, len(ids))):
            logits = model(torch.tensor([lead + ids[start:at]])).logits[0, -1]
            losses.append(-torch.log_softmax(logits, -1)[ids[at]].item())
        done = max(done, min(start + room, len(ids)))
    assert row["n"] == len(losses) and row["value"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert row["higher_is_better"] is False and f"window={size}" in row["settings"]


@pytest.mark.parametrize("bos", [None, 7])
@pytest.mark.parametrize("stride", [None, 1, 3])
@pytest.mark.parametrize("n", [1, 2, 5, 6, 7, 23])
def test_every_token_is_scored_once(bos, stride, n):
    ids = list(range(100, 100 + n))
    scored = [token for window in cut(ids, 5, stride, bos) for token in window.ids[window.first :]]
    if stride is None and bos is None:
        ids = [token for at, token in enumerate(ids) if at % 5]
    assert scored == (ids if bos is not None or stride is None else ids[1:])
    assert all(len(window.ids) <= 5 and (bos is None or window.ids[0] == bos) for window in cut(ids, 5, stride, bos))


def test_perplexity_stderr_is_that_of_a_ratio_of_sums(tmp_path, model, tokenizer):
    (tmp_path / "t.txt").write_text(TEXT)
    block = {"limit": 6, "perplexity": {"t": {"data": str(tmp_path / "t.txt"), "window": 32}}}
    [row] = score(model, tokenizer, block, answers_path=tmp_path / "items.jsonl")
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    means = torch.tensor([item["nll"] / item["tokens"] for item in items], dtype=torch.float64)  # windows of one length
    assert row["stderr"] == pytest.approx(row["value"] * means.std().item() / math.sqrt(6))
    assert row["value"] == pytest.approx(means.mean().exp().item())


def test_jsonl_and_text_give_the_same_windows(tmp_path, model, tokenizer):
    (tmp_path / "t.txt").write_text("one text\n\nanother text")
    rows = fix.write_jsonl(tmp_path / "t.jsonl", [{"body": "one text"}, {"body": "another text"}])
    [a] = score(model, tokenizer, {"perplexity": {"t": str(tmp_path / "t.txt")}})
    [b] = score(model, tokenizer, {"perplexity": {"t": {"data": rows, "column": "body"}}})
    assert a == b and a["stderr"] is None


@pytest.mark.parametrize("entry", [{"window": 300}, {"stride": 256}])
def test_windows_that_do_not_fit_are_refused(tmp_path, model, tokenizer, entry):
    (tmp_path / "t.txt").write_text(TEXT)
    with pytest.raises(ConfigError, match="256"):
        score(model, tokenizer, {"perplexity": {"t": {"data": str(tmp_path / "t.txt"), **entry}}})


@pytest.mark.parametrize("stride", [None, 10])
def test_a_score_depends_on_neither_batch_size_nor_chunk(tmp_path, model, tokenizer, monkeypatch, stride):
    (tmp_path / "t.txt").write_text(TEXT[:200])
    entry = {"data": str(tmp_path / "t.txt"), "window": 24, "stride": stride}
    found = []
    for batch_size, positions in ((1, 1000), (1, 3), (3, 7), (16, 1000), (16, 7)):
        monkeypatch.setattr(logits, "CHUNK_BYTES", positions * 4 * 258)
        path = tmp_path / "items.jsonl"
        [row] = score(model, tokenizer, {"batch_size": batch_size, "perplexity": {"t": entry}}, answers_path=path)
        found.append([row["value"], *(json.loads(line)["nll"] for line in path.read_text().splitlines())])
        [again] = score(model, tokenizer, {"batch_size": batch_size, "perplexity": {"t": entry}})
        assert again == row
    assert all(values == pytest.approx(found[0], rel=1e-6) for values in found)

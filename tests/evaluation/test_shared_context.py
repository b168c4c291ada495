"""Requests that share their contexts are answered as one by one, by every family; where that fails, apart."""

from __future__ import annotations

import random

import pytest
import torch
from evaluation.test_recurrent_models import KINDS, tiny
from helpers import benchmark_fixtures as fix
from helpers import tiny as small
from helpers.zoo_of_families import FAMILIES, build_family, with_lora

from macdrop.masking import attacked
from tune.config.eval_spec import EvalSpec
from tune.config.messages import build
from tune.evaluation.logits import plain_logits
from tune.evaluation.prefix_cache import PrefixCache
from tune.evaluation.scorer import Scorer
from tune.evaluation.zero_shot.request_scorer import RequestScorer
from tune.evaluation.zero_shot.shared_context import Batch, batches_of, input_of, trees_of
from tune.forward.row_attention import Rows

#: Whose attention takes no mask of ours: ALiBi is made from the mask.
APART = {"bloom"}


def items(seed: int = 0, vocabulary: int = 64, scale: int = 1) -> list[tuple[list[int], list[int]]]:
    """Questions with choices; questions with options in the context; choices of a token each; duplicates; one bos."""
    draw = random.Random(seed)

    def words(number: int) -> list[int]:
        return [draw.randrange(3, vocabulary) for _ in range(number * scale)]

    pairs = []
    for _ in range(4):
        question = [1, *words(draw.randint(4, 9))]
        pairs += [(question, words(draw.randint(1, 5))) for _ in range(3)]
        head, tail = [1, *words(draw.randint(2, 6))], words(4)
        pairs += [(head + words(draw.randint(1, 2)), tail) for _ in range(2)]
        pairs += [(question, [token]) for token in range(5, 9)]
    pairs += [pairs[0], pairs[1], ([1], words(2)), ([1], words(1)), (pairs[0][0] + pairs[0][1], words(2))]
    draw.shuffle(pairs)
    return pairs


@torch.no_grad()
def alone(model, pair) -> tuple[float, bool]:
    """Slow: one forward pass, no batch, no padding, log-softmax in double precision."""
    context, continuation = pair
    logits = model(input_ids=torch.tensor([input_of(pair)]), use_cache=False).logits[0, len(context) - 1 :].double()
    found = torch.log_softmax(logits, -1).gather(1, torch.tensor(continuation)[:, None]).sum().item()
    return found, logits.argmax(-1).tolist() == continuation


def check(model, pairs, scorer, batch_size=4, logits=plain_logits, within=1e-4):
    found = scorer.score(model, pairs, batch_size, logits)
    wanted = [alone(model, pair) for pair in pairs]
    assert [ll for ll, _ in found] == pytest.approx([ll for ll, _ in wanted], abs=within)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    return found


# --- the rows ---


def path_of(batch: Batch, row: int, place: int) -> list[int]:
    """The tokens that a place of a row attends to, by the mask."""
    mask = batch.mask(torch.float32, torch.device("cpu"))
    if isinstance(mask, Rows):
        in_rows, at = divmod(mask.places[place].item(), mask.tokens.shape[1])
        seen = mask.tokens[in_rows, mask.mask[in_rows, 0, at] == 0].tolist()
    else:
        seen = list(range(place + 1)) if mask is None else (mask[row, 0, place] == 0).nonzero().flatten().tolist()
    assert batch.depths is None or batch.depths[row, seen].tolist() == list(range(len(seen)))
    return batch.ids[row, seen].tolist()


@pytest.mark.parametrize("share, packed", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("seed", range(5))
def test_each_position_that_is_read_attends_to_its_own_input_alone(seed, share, packed):
    pairs = items(seed, vocabulary=6)
    trees = trees_of(pairs, range(len(pairs)), 64, share)
    assert sorted(number for tree in trees for number in tree.paths) == list(range(len(pairs)))
    tokens = sum(len(tree.tokens) for tree in trees)
    assert tokens < sum(len(input_of(pair)) for pair in pairs)
    assert share or not any(tree.branches for tree in trees)
    batch = Batch.of(trees, pairs, packed)
    assert (batch.mask(torch.float32, torch.device("cpu")) is None) == (not share)
    rows, columns = (each.tolist() for each in batch.at)
    assert len(set(zip(rows, columns, strict=True))) == len(rows)  # no position is read twice
    for number, answer in batch.answers.items():
        context, continuation = pairs[number]
        for upto, ((n, k), token) in enumerate(zip(answer, continuation, strict=True)):
            assert batch.targets[n, k] == token
            assert path_of(batch, rows[n], columns[n]) == context + continuation[:upto]


def test_a_packed_batch_holds_each_distinct_beginning_once():
    pairs = items(vocabulary=6)
    trees = trees_of(pairs, range(len(pairs)), 64, True)
    batch = Batch.of(trees, pairs, packed=True)
    inputs = [input_of(pair) for pair in pairs]
    assert batch.ids.shape == (1, len({tuple(each[: n + 1]) for each in inputs for n in range(len(each))}))
    assert batch.ids.shape[1] < sum(len(tree.tokens) for tree in trees) < Batch.of(trees, pairs).ids.numel()


def test_what_is_shared_is_computed_once():
    question = [1, 7, 8, 9]
    pairs = [(question, [n]) for n in (10, 11, 12)] + [(question, [20, 21, 22]), (question, [20, 21, 23, 24])]
    (tree,) = trees_of(pairs, range(5), 64, True)
    assert tree.tokens == [1, 7, 8, 9, 20, 21, 23] and not tree.branches
    batch = Batch.of([tree], pairs)
    assert len(batch.at[0]) == 4 and batch.targets.shape == (4, 4)  # five tokens of the question's end, two of them 20


def test_batches_are_the_cheapest_within_the_budget():
    draw = random.Random(0)
    for _ in range(20):
        pairs = [([1] * draw.randint(1, 12), [n + 2, 5]) for n in range(6)]
        trees = trees_of(pairs, range(6), 0, False)
        budget, overhead = draw.choice([8, 24, 60]), draw.choice([0, 5, 12])
        batches = list(batches_of(trees, budget, overhead))
        widths = [len(tree.tokens) for batch in batches for tree in batch]
        assert widths == sorted(widths, reverse=True) and len(widths) == len(trees)
        assert all(len(b) == 1 or len(b) * len(b[0].tokens) <= budget for b in batches)
        cost = sum(len(b) * len(b[0].tokens) + overhead for b in batches)
        assert cost == min(_costs([len(tree.tokens) for batch in batches for tree in batch], budget, overhead))


def _costs(widths, budget, overhead):
    """Slow: the cost of every way to cut a list into batches."""
    if not widths:
        yield 0
    for size in range(1, len(widths) + 1):
        if size == 1 or size * widths[0] <= budget:
            yield from (size * widths[0] + overhead + rest for rest in _costs(widths[size:], budget, overhead))


def test_no_batch_holds_more_tokens_than_batch_size_requests_of_the_longest():
    pairs, seen = items(), []

    def counted(model, ids, *rest, **named):
        seen.append(ids.numel())
        return plain_logits(model, ids, *rest, **named)

    longest = max(len(input_of(pair)) for pair in pairs)
    for batch_size in (1, 3, 16):
        check(small.build(), pairs, RequestScorer(), batch_size, counted)
        assert max(seen) <= batch_size * longest
        seen.clear()


# --- the models ---


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_as_one_by_one(family, adapter):
    model = build_family(family)
    if adapter:
        model = with_lora(family, model)
    scorer = RequestScorer()
    check(model, items(), scorer)
    assert scorer.apart == (family in APART)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_both_kinds_of_attention(family, attention):
    model = build_family(family)
    model.set_attn_implementation(attention)
    scorer = RequestScorer()
    check(model, items(), scorer)
    assert not scorer.apart


@pytest.mark.parametrize("kind", KINDS)
def test_models_with_a_state_answer_apart(kind):
    model, scorer = tiny(kind), RequestScorer()
    check(model, items(), scorer)
    assert scorer.apart


def test_alibi_answers_apart():
    model = build_family("falcon", alibi=True)
    scorer = RequestScorer()
    check(model, items(), scorer)
    assert scorer.apart


@pytest.mark.parametrize("family", ["gemma3", "mistral", "gpt_oss"])
def test_a_layer_that_looks_back_less_far_than_an_input_sees_no_more(family):
    """Short inputs share their contexts, and those beyond the window do not."""
    layers = (
        {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]} if family != "mistral" else {}
    )
    model = build_family(family, sliding_window=12, **layers)
    pairs = items(scale=2)
    assert min(len(input_of(pair)) for pair in pairs) < 12 < max(len(input_of(pair)) for pair in pairs)
    scorer = RequestScorer()
    check(model, pairs, scorer)
    assert not scorer.apart


@pytest.mark.parametrize("family", ["gemma3", "mistral"])
def test_an_input_beyond_the_window_is_in_no_batch_with_a_mask(family):
    """A mask takes the place of the model's own in all rows: the long input would see all of itself."""
    layers = {"layer_types": ["sliding_attention"] * 3} if family == "gemma3" else {}
    question = list(range(3, 12))
    pairs = [(question, [token, token + 1, token + 2]) for token in (20, 30, 40)] + [(list(range(5, 20)), [7, 8])]
    assert len(input_of(pairs[0])) < 12 < len(input_of(pairs[3]))
    scorer = RequestScorer()
    check(build_family(family, sliding_window=12, **layers), pairs, scorer)
    assert not scorer.apart


def deaf(dtype=torch.float32):
    """A model whose decoder looks at no mask, and whose attention stays its own."""
    model = small.build(dtype=dtype)
    own, attention = model.model.forward, model.config._attn_implementation

    def forward(*inputs, attention_mask=None, **named):
        model.config._attn_implementation_internal = attention
        return own(*inputs, **named)

    model.model.forward = forward
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_ignores_the_mask_answers_apart(dtype):
    model, scorer = deaf(dtype), RequestScorer()
    check(model, items(), scorer, within=1e-4 if dtype == torch.float32 else 2)
    assert scorer.apart
    model, scorer = small.build(dtype=dtype), RequestScorer()
    scorer.score(model, items(), 4, plain_logits)
    assert not scorer.apart


def test_nothing_to_share_needs_no_proof():
    model, scorer = deaf(), RequestScorer()
    check(model, [([1, 5], [6, 7]), ([1, 5], [8]), ([2, 9, 9], [7])], scorer)
    assert not scorer.apart


def test_answers_do_not_depend_on_the_batch_size_and_repeat_bit_for_bit():
    model, pairs = small.build(), items()
    found = {size: check(model, pairs, RequestScorer(), size) for size in (1, 2, 5, 64)}
    for size, answers in found.items():
        assert RequestScorer().score(model, pairs, size, plain_logits) == answers
        assert [greedy for _, greedy in answers] == [greedy for _, greedy in found[1]]
        assert [ll for ll, _ in answers] == pytest.approx([ll for ll, _ in found[1]], abs=1e-4)
    same = [i for i, pair in enumerate(pairs) if pairs.count(pair) > 1]
    assert len(same) >= 4
    assert all(found[5][i] == found[5][pairs.index(pairs[i])] for i in same)  # to the bit


@pytest.mark.parametrize("family", small.FAMILIES)
def test_attacks_share_layers_on_top(family):
    model, weights = small.build(family), small.massive_weights(family)
    pairs, prefix, scorer = items(), PrefixCache(), RequestScorer()
    plain = None
    for k in (0, 2, 5):
        with prefix.sharing(model, weights, "items"), attacked(model, weights, "zeroing", k):
            found = check(model, pairs, scorer, logits=prefix.logits)
            assert found == RequestScorer().score(model, pairs, 4, plain_logits)  # to the bit
        plain = plain or found
        assert (found == plain) == (k == 0)
    assert prefix.calls_saved > 0


# --- scores ---


def test_a_row_says_where_contexts_are_not_shared(tmp_path, tokenizer):
    path = fix.write_jsonl(tmp_path / "t.jsonl", fix.hub_rows("arc_easy"))
    for model, word in ((fix.tiny_llama(), False), (tiny("RecurrentGemma"), True)):
        scorer = Scorer(model, tokenizer, build(EvalSpec, {"max_length": 128, "zero_shot": {"arc_easy": path}}))
        (row, *_) = scorer.score(scorer.jobs()[0])
        assert ("contexts=apart" in row["settings"].split()) == word
        assert ["not share their contexts" in note for note in scorer.notes] == [True] * word


def theirs(model, tokenizer, scorer, job) -> dict:
    """lm-eval's own results for a job of `scorer`: choices and log-likelihoods by document, and its metrics."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=model, tokenizer=tokenizer, max_length=scorer.max_length, softmax_dtype="float32")
    harness.batch_size_per_gpu = 16
    return evaluate(harness, scorer._data(job).loaded, limit=scorer.spec.limit, bootstrap_iters=0, log_samples=True)


TASKS = {"arc_easy": "test", "arc_challenge": "test", "piqa": "validation", "winogrande": "validation"}


@pytest.mark.parametrize("limit", [24, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("task", TASKS)
def test_scores_of_a_real_model_are_those_of_lm_eval(shared, task, limit):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, data = shared / "models" / "stories260k", shared / "data" / task / f"{TASKS[task]}.jsonl"
    if not folder.is_dir() or not data.is_file():
        pytest.skip("no real checkpoint or data")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    scorer = Scorer(model, tokenizer, build(EvalSpec, {"limit": limit, "zero_shot": {task: str(data)}}))
    (job,) = scorer.jobs()
    rows = scorer.score(job)
    result = theirs(model, AutoTokenizer.from_pretrained(folder), scorer, job)
    assert {row["metric"]: row["value"] for row in rows} == {
        row["metric"]: result["results"][task][f"{row['metric']},none"] for row in rows
    }
    harness = scorer._benchmark(job)._harness
    requests = [request for each in scorer._data(job).loaded["tasks"].values() for request in each.instances]
    answers = iter(harness.loglikelihood(requests))
    for sample in sorted(result["samples"][task], key=lambda sample: sample["doc_id"]):
        found = [next(answers) for _ in sample["resps"]]
        wanted = [pair for (pair,) in sample["resps"]]
        assert [ll for ll, _ in found] == pytest.approx([ll for ll, _ in wanted], abs=1e-3)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
        assert max(found) == found[[ll for ll, _ in wanted].index(max(wanted)[0])]
    assert not harness.apart


def test_proof_is_made_again_for_longer_rows(monkeypatch):
    from tune.evaluation.zero_shot import request_scorer

    proven = []
    agree = request_scorer._agree
    monkeypatch.setattr(
        request_scorer,
        "_agree",
        lambda model, trees, *rest: proven.append(len(trees[-1].tokens)) or agree(model, trees, *rest),
    )
    model, scorer, pairs = small.build(), RequestScorer(), items()
    short = [pair for pair in pairs if len(input_of(pair)) < 9]
    for some in (short, short, pairs, pairs, short):
        scorer.score(model, some, 4, plain_logits)
    assert len(proven) == 2 and proven == sorted(proven)
    with_adapter = small.lora(small.build()).eval()
    scorer.score(with_adapter, pairs, 4, plain_logits)
    assert len(proven) == 3


def test_running_out_of_memory_in_the_proof_is_no_answer(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr("tune.evaluation.zero_shot.request_scorer.plain_logits", full)
    with pytest.raises(torch.OutOfMemoryError):
        RequestScorer().score(small.build(), items(), 4, plain_logits)

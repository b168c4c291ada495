"""Sharing among the attacks of one benchmark changes no bit of a score, and saves the calls it reports."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import transformers
from helpers import benchmark_fixtures as fix
from helpers.benchmark_fixtures import TEXT

from macdrop.families import find_ffns
from tune.config.eval_spec import EvalSpec
from tune.config.messages import build
from tune.evaluation.prefix_cache import PrefixCache
from tune.evaluation.scorer import Scorer

LAYERS, LAYER = 3, 1
ATTACKS = ["none", "zeroing@3", "retaining@3", "random@5"]
_COMMON = {"vocab_size": 258, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_GATED = {"intermediate_size": fix.FFN, "num_key_value_heads": 2}
FAMILIES = {
    "LlamaConfig": _SIZES | _GATED,
    "Phi3Config": _SIZES | _GATED,
    "GPT2Config": {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 256, "n_inner": fix.FFN},
    "OPTConfig": _SIZES | {"ffn_dim": fix.FFN, "word_embed_proj_dim": 32},
    "GPTNeoXConfig": _SIZES | {"intermediate_size": fix.FFN, "use_parallel_residual": True},
    "MixtralConfig": _SIZES | _GATED | {"num_local_experts": 4, "num_experts_per_tok": 2},
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    fix.refuse_connections(monkeypatch)


@pytest.fixture
def block(tmp_path):
    (tmp_path / "t.txt").write_text(TEXT[:150])
    return {
        "attacks": ATTACKS,
        "batch_size": 4,
        "zero_shot": {"piqa": fix.write_jsonl(tmp_path / "t.jsonl", fix.hub_rows("piqa", 4))},
        "perplexity": {"text": {"data": str(tmp_path / "t.txt"), "window": 32}},
    }


def random_model(family: str, adapter: str | None = None) -> tuple[torch.nn.Module, object]:
    """Make a random model with a random adapter, and massive weights of its middle layer."""
    torch.manual_seed(0)
    config = getattr(transformers, family)(**_COMMON, **FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    ffn = find_ffns(model)[LAYER]
    weights = dataclasses.replace(
        fix.massive(model), layer=LAYER, path=ffn.path, kind=ffn.kind, expert=2 if ffn.num_experts else None
    )
    if adapter:
        model = adapted(model, adapter)
    return model.eval(), weights


def adapted(model, kind: str, seed: int = 1):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    return get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, use_dora=kind == "dora")
    ).eval()


def scored(scorer, model, folder, prefix=None) -> dict:
    """Return rows and items of every job."""
    found = {}
    for job in scorer.jobs():
        answers = folder / "items.jsonl"
        rows = scorer.score(job, model=model, answers_path=answers, prefix=prefix)
        found[job.key] = rows, answers.read_text()
    return found


#: Of piqa (4 rows of two choices) and of the text (5 windows by 4). In each, layer 0 and the attention of layer 1 are
#: shared under three attacks, but for the one batch that is computed in full to prove it.
BATCHES = 1 + 2

CASES = [(family, kind) for family in ("LlamaConfig", "Phi3Config", "GPT2Config") for kind in (None, "lora", "dora")]
CASES += [("OPTConfig", None), ("GPTNeoXConfig", None), ("MixtralConfig", None)]


@pytest.mark.parametrize(("family", "adapter"), CASES)
def test_scores_and_items_are_bit_identical(family, adapter, block, tokenizer, tmp_path):
    model, weights = random_model(family, adapter)
    scorer = Scorer(model, tokenizer, build(EvalSpec, block), weights)
    plain = scored(scorer, model, tmp_path)
    prefix = PrefixCache()
    assert scored(scorer, model, tmp_path, prefix) == plain
    values = {key: rows[0]["value"] for key, (rows, _) in plain.items() if key.startswith("perplexity")}
    assert len(set(values.values())) == len(ATTACKS)  # the attacks do something
    assert prefix.calls_saved == 2 * ((BATCHES * 3) - 1)
    assert all("forward" not in vars(module) for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_adapters_and_merges_share_nothing(block, tokenizer, tmp_path):
    base, weights = random_model("LlamaConfig")
    scorer = Scorer(base, tokenizer, build(EvalSpec, block | {"attack_on": "both"}), weights)
    prefix = PrefixCache()
    for seed in (1, 2):
        model = adapted(base, "lora", seed)
        plain = scored(scorer, model, tmp_path)
        saved = prefix.calls_saved
        assert scored(scorer, model, tmp_path, prefix) == plain
        assert prefix.calls_saved - saved == 2 * (BATCHES * 3 - (seed == 1))  # none of it on merged weights
        base = model.unload()


def test_validation_benchmarks_share_too(block, tokenizer, tmp_path):
    model, weights = random_model("LlamaConfig")
    scorer = Scorer(model, tokenizer, build(EvalSpec, block), weights)
    prefix = PrefixCache()
    for job in scorer.jobs():
        scorer.score(dataclasses.replace(job, split="validation"), prefix=prefix)
    assert prefix.calls_saved == 2 * (BATCHES * 3 - 1)


def test_generation_does_not_use_the_cache(tokenizer, tmp_path):
    model, weights = random_model("LlamaConfig")
    entry = {"g": {"data": "zoo:generate", "limit": 2, "max_new_tokens": 4, "metrics": ["chrf"]}}
    scorer = Scorer(model, tokenizer, build(EvalSpec, {"attacks": ATTACKS, "generation": entry}), weights)
    prefix = PrefixCache()
    assert scored(scorer, model, tmp_path, prefix) == scored(scorer, model, tmp_path)
    assert prefix.calls_saved == 0


def test_batches_beyond_the_budget_are_computed_again(block, tokenizer, tmp_path):
    model, weights = random_model("LlamaConfig")
    scorer = Scorer(model, tokenizer, build(EvalSpec, block), weights)
    plain = scored(scorer, model, tmp_path)
    saved = []
    for budget in (0, 36_000, 1 << 30):  # four windows of the text take 33 kB, the fifth one 8
        prefix = PrefixCache(budget)
        assert scored(scorer, model, tmp_path, prefix) == plain
        saved.append(prefix.calls_saved)
    assert saved[0] == 0 < saved[1] < saved[2]


class Whispering(transformers.LlamaForCausalLM):
    """A model whose first layer passes something to the last one outside the hidden state."""

    def __init__(self, config):
        super().__init__(config)
        heard = {}
        first, last = self.model.layers[0].mlp, self.model.layers[-1]
        first.register_forward_hook(lambda _module, _args, output: heard.update(mean=output.mean(-1, keepdim=True)))
        last.register_forward_hook(lambda _module, _args, output: output + heard["mean"])


def test_model_that_fails_the_replay_check_shares_nothing(block, tokenizer, tmp_path):
    torch.manual_seed(0)
    model = Whispering(transformers.LlamaConfig(**_COMMON, **FAMILIES["LlamaConfig"])).eval()
    weights = dataclasses.replace(fix.massive(model), layer=LAYER, path=f"model.layers.{LAYER}.mlp")
    scorer = Scorer(model, tokenizer, build(EvalSpec, block), weights)
    plain = scored(scorer, model, tmp_path)
    prefix = PrefixCache()
    assert scored(scorer, model, tmp_path, prefix) == plain
    assert prefix.calls_saved == 0


def test_error_during_replay_does_not_fail_the_score(block, tokenizer, tmp_path, monkeypatch):
    model, weights = random_model("LlamaConfig")
    scorer = Scorer(model, tokenizer, build(EvalSpec, block), weights)
    plain = scored(scorer, model, tmp_path)
    monkeypatch.setattr("tune.evaluation.prefix_cache._copy", lambda value: "no tensor" if value is not None else None)
    monkeypatch.setattr("tune.evaluation.prefix_cache._size", lambda value: 0)
    prefix = PrefixCache()
    assert scored(scorer, model, tmp_path, prefix) == plain
    assert prefix.calls_saved == 0


def test_in_place_writes_to_outputs_do_not_change_the_cache(tokenizer):
    model, weights = random_model("LlamaConfig")
    model.model.layers[0].register_forward_hook(lambda _module, _args, output: output.mul_(2.0))
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        want = model(ids).logits
    prefix = PrefixCache()
    with prefix.sharing(model, weights, "text"):
        assert all(torch.equal(prefix.logits(model, ids), want) for _ in range(4))
        other = prefix.logits(model, ids, torch.ones_like(ids))
        assert torch.equal(other, want)
    assert prefix.calls_saved == 2 * 2


def test_scores_equal_those_of_lm_eval(block, tokenizer):
    """With its KV cache, its own tokenisation of each request and its own compilation of each prompt."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    model, weights = random_model("LlamaConfig")
    scorer = Scorer(model, tokenizer, build(EvalSpec, block), weights)
    job = scorer.jobs()[0]
    (row, *_) = scorer.score(job, prefix=PrefixCache())
    theirs = HFLM(
        pretrained=model, tokenizer=copy.deepcopy(tokenizer), max_length=256, batch_size=4, softmax_dtype="float32"
    )
    loaded = scorer._data(job).loaded
    found = evaluate(theirs, loaded, bootstrap_iters=0, log_samples=True)
    assert found["results"]["piqa"]["acc,none"] == row["value"]
    ours = evaluate(scorer._benchmark(job)._harness, loaded, bootstrap_iters=0, log_samples=True)
    for mine, wanted in zip(ours["samples"]["piqa"], found["samples"]["piqa"], strict=True):
        assert [ll for ((ll, _),) in mine["resps"]] == pytest.approx([ll for ((ll, _),) in wanted["resps"]], abs=1e-4)
        assert [greedy for ((_, greedy),) in mine["resps"]] == [greedy for ((_, greedy),) in wanted["resps"]]

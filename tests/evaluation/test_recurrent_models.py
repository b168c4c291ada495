"""Models that carry a state from token to token answer each prompt of a batch as if it were alone."""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers import benchmark_fixtures as fix
from helpers.benchmark_fixtures import score

from tune.evaluation.decode import greedy, one_length_a_batch

SIZE = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
KINDS = {
    "Mamba": {"state_size": 8, "initializer_range": 0.3},
    "Mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "initializer_range": 0.3},
    "RecurrentGemma": {**HEADS, "lru_width": 32, "block_types": ["recurrent", "attention"]},
    "FalconH1": {**HEADS, **MAMBA, "initializer_range": 0.3, "max_position_embeddings": 128},
}
PROMPTS = ["a river", "and the old mill that nobody knew", "to", "it", "where it came from"]


def tiny(kind: str):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZE, **KINDS[kind])
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "embed" not in name and "A_log" not in name:
                weight *= 3  # so that what lies before a prompt shows in its answer
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_answers_of_a_batch_are_those_of_single_prompts(kind):
    model, tokenizer = tiny(kind), fix.byte_tokenizer()
    assert one_length_a_batch(model)
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    alone = [greedy(model, tokenizer, [ids], max_new_tokens=8, batch_size=1)[0].tokens for ids in prompts]
    batch = greedy(model, tokenizer, prompts, max_new_tokens=8, batch_size=4)
    assert [answer.tokens for answer in batch] == alone


def test_generative_tasks_of_lm_eval_likewise(tmp_path):
    model, tokenizer = tiny("RecurrentGemma"), fix.byte_tokenizer()
    rows = [{"question": text, "answer": "#### 1"} for text in PROMPTS]
    entry = {"data": fix.write_jsonl(tmp_path / "t.jsonl", rows), "num_fewshot": 0, "max_new_tokens": 8}
    files = {size: tmp_path / f"items{size}.jsonl" for size in (1, 4)}
    for size, file in files.items():
        block = {"batch_size": size, "max_length": 128, "zero_shot": {"gsm8k": entry}}
        score(model, tokenizer, block, answers_path=file)
    assert files[1].read_text() == files[4].read_text()


def test_models_without_a_state_are_padded():
    assert not one_length_a_batch(fix.tiny_llama())

"""A tiny random Llama with a byte tokenizer that has no padding token, massive weights for it, and small task files."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from macdrop.weights import Confidence, MassiveWeights
from tune.config.eval_spec import EvalJob, EvalSpec
from tune.config.messages import build
from tune.evaluation.scorer import Scorer

FFN = 48
TEXT = "The river ran past the old mill, and nobody in the village knew where it came from. " * 12
LORA_TARGETS = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]


def byte_tokenizer(bos: bool = True, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per byte; ids 0 <s>, 1 </s>; bos before every text unless `bos` is false."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"eos_token": "</s>"}
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        special["bos_token"] = "<s>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **special)


def tiny_llama(seed: int = 0, positions: int = 256, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=FFN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def massive(model: LlamaForCausalLM) -> MassiveWeights:
    """Make up massive weights: attacks are tested here, not the scan."""
    confidence = Confidence("strong", 100.0, 100.0, 100.0, 1.0, "made up")
    return MassiveWeights(
        model="tiny",
        fingerprint="tiny",
        layer=0,
        path="model.layers.0.mlp",
        kind="gated",
        expert=None,
        indices=tuple(range(FFN))[::-1],
        magnitudes=tuple(float(i) for i in range(FFN))[::-1],
        intermediate_size=FFN,
        hidden_size=32,
        bos_token_id=0,
        bos_rule="tokenizer",
        layers=(),
        confidence=confidence,
    )


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


WORDS = ["river", "a tall tree", "stone", "the sun", "bread", "a red boat", "glass", "wool"]


def hub_rows(task: str, n: int = 6) -> list[dict]:
    """Make rows in the schema of the hub data set of an lm-eval task."""

    def word(i: int) -> str:
        return WORDS[i % len(WORDS)]

    def arc(i: int) -> dict:
        choices = {"text": [word(i), word(i + 3), word(i + 5)], "label": ["A", "B", "C"]}
        return {
            "id": f"q{i}",
            "question": f"What is like {word(i + 1)}?",
            "choices": choices,
            "answerKey": "ABC"[i % 3],
        }

    makers = {
        "arc_easy": arc,
        "arc_challenge": arc,
        "piqa": lambda i: {"goal": f"Use {word(i)}", "sol1": word(i + 1), "sol2": word(i + 3), "label": i % 2},
        "boolq": lambda i: {"question": f"is {word(i)} real", "passage": f"About {word(i)}.", "idx": i, "label": i % 2},
        "winogrande": lambda i: {
            "sentence": f"The {word(i)} was near the stone, but _ moved.",
            "option1": word(i),
            "option2": "the stone",
            "answer": str(1 + i % 2),
        },
        "hellaswag": lambda i: {
            "ind": i,
            "activity_label": "Walking",
            "ctx_a": f"A man sees {word(i)}.",
            "ctx_b": "he",
            "ctx": "x",
            "endings": [f"takes {word(i + j)}." for j in range(4)],
            "source_id": "s",
            "split": "val",
            "split_type": "indomain",
            "label": str(i % 4),
        },
        "gsm8k": lambda i: {"question": f"What is {i} + 1?", "answer": f"It is so.\n#### {i + 1}"},
    }
    return [makers[task](i) for i in range(n)]


def score(model, tokenizer, block, attack="none", on=None, **options):
    """Score the only entry of `block`."""
    spec = build(EvalSpec, block)
    scorer = Scorer(model, tokenizer, spec, weights=options.pop("weights", None))
    first = scorer.jobs()[0]
    return scorer.score(EvalJob(first.benchmark, first.task, attack, on), **options)


def values(rows):
    return {(row["task"], row["metric"]): row["value"] for row in rows}


@torch.no_grad()
def slow_greedy(model, ids, n):
    new = []
    while len(new) < n and (not new or new[-1] != 1):
        new.append(model(torch.tensor([list(ids) + new])).logits[0, -1].argmax().item())
    return new


def refuse_connections(monkeypatch) -> None:
    """Fail on any connection attempt: everything in these tests is local."""

    def refuse(*_: object) -> None:
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)

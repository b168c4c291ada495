"""Real judges for tests: an HTTP server that speaks the protocol and fails on request, a tiny model that answers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.benchmark_fixtures import byte_tokenizer
from helpers.loopback import LoopbackHandler, LoopbackServer
from tune.storage.run_folder import RunFolder
from tune.storage.states import TaskState

GOOD = "Feedback: It is right. [RESULT] 4"


def completion(text: str | None) -> dict:
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "judge-2026-01-01",
        "system_fingerprint": "fp_1",
        "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107},
    }


class Endpoint(LoopbackServer):
    """``/v1/chat/completions`` on loopback. `answer(request number, request body)` -> a text, or a dict of

    status, headers, body (bytes or a dict), delay (seconds).
    """

    def __init__(self, answer: Callable[[int, dict], str | dict]) -> None:
        self.requests: list[dict] = []
        self.keys: list[str] = []
        self.most_at_once = self._now = 0
        lock = threading.Lock()
        endpoint = self

        class Handler(LoopbackHandler):
            def do_POST(self) -> None:
                body = self.posted()
                with lock:
                    number = len(endpoint.requests)
                    endpoint.requests.append(body)
                    endpoint.keys.append(self.headers["Authorization"])
                    endpoint._now += 1
                    endpoint.most_at_once = max(endpoint.most_at_once, endpoint._now)
                reply = answer(number, body)
                reply = {"body": completion(reply)} if isinstance(reply, str) else reply
                if self.path != "/v1/chat/completions":
                    reply = {"status": 404, "body": {"error": {"message": "no such path"}}}
                time.sleep(reply.get("delay", 0))
                data = reply.get("body", b"")
                data = data if isinstance(data, bytes) else json.dumps(data).encode()
                with lock:
                    endpoint._now -= 1
                try:
                    headers = {"Content-Type": "application/json", **reply.get("headers", {})}
                    self.send(reply.get("status", 200), data, headers)
                except OSError:
                    pass  # the client has given up

        super().__init__(Handler)


def talking_model(folder: Path, says: str = "[RESULT]4", positions: int = 4096, doubt: tuple = ()) -> str:
    """Save a Llama that says one text after a space, whatever it was asked: each byte is followed by the next.

    Its layers add nothing to the embeddings, which are one-hot, and its head is the table of successors. `says` has no
    byte twice, and no space. doubt: (byte, another one after it, by how much its logit is above the right one's).
    """
    assert len(set(says)) == len(says) and " " not in says
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=258,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=positions,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    chain = [*ids(" "), *ids(says), 1]
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(258))
        head = model.lm_head.weight.zero_()
        head[1, :] = 1.0  # what is not in the text ends it
        scale = 258**0.5  # the norm makes a one-hot vector this long
        for token, after in zip(chain, chain[1:], strict=False):
            head[after, token] = 40 / scale
        if doubt:
            head[ids(doubt[1])[0], ids(doubt[0])[0]] = (40 + doubt[2]) / scale
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


CONVERSATIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Shorten it."], "answers": ["A poem.", "Poem."]},
    {"question_id": 82, "category": "writing", "turns": ["Sing.", "Again."], "answers": ["La.", ""]},
    {"question_id": 481, "category": "qa", "turns": ["Who?"], "answers": ["Ada."], "reference": ["Ada Lovelace."]},
    {"question_id": 482, "category": "qa", "turns": ["Where?"], "answers": ["There."]},
]
#: Answers in CONVERSATIONS.
ANSWERS = 6


def answered_run(folder: Path, config: dict | None = None, *, attacks: tuple[str, ...] = ("none",)) -> RunFolder:
    """Make a run of one model: its base, a final trial and a search trial, all with answers to CONVERSATIONS."""
    base = {"model_name_or_path": "zoo:planted-llama", "eval": {"generation": {"spec_bench": {"data": "q.jsonl"}}}}
    run_folder = RunFolder.create(folder, {**base, **(config or {})}, command="test")
    model = "zoo:planted-llama"
    for trial, stage in {"base": None, "final-1": "final", "search-1": "search"}.items():
        if trial != "base":
            record = run_folder.trial(trial)
            record.start({}, model=model, arm="macdrop", seed=1)
            record.finish(TaskState.DONE, stage=stage)
        for attack in attacks:
            on = None if attack == "none" else "base"
            place = run_folder.answers_dir(model, trial)
            place.mkdir(parents=True, exist_ok=True)
            name = "-".join(part for part in ("generation-spec_bench", attack, on) if part)
            rows = [{**row, "attack": attack, "attack_on": on} for row in CONVERSATIONS]
            (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            run_folder.add_scores(
                [
                    {
                        **{"model": model, "arm": "base" if trial == "base" else "macdrop", "trial": trial, "seed": 1},
                        **{"benchmark": "generation", "task": "spec_bench", "entry": "spec_bench", "limit": 2},
                        **{"metric": "new_tokens", "attack": attack, "attack_on": on, "value": 3.0},
                        "settings": "format=spec_bench suite=paper@1",
                    }
                ]
            )
    return run_folder

"""A server on loopback that speaks the completions protocol of vLLM or SGLang and decodes with models of its own."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from helpers import benchmark_fixtures as fix
from helpers.loopback import LoopbackHandler, LoopbackServer

BASE = "tiny"


def save_adapter(folder: Path, *, dora: bool = False, seed: int = 1) -> Path:
    """Write an adapter of the tiny Llama that changes its answers."""
    torch.manual_seed(seed)
    model: Any = get_peft_model(fix.tiny_llama(), LoraConfig(r=4, target_modules=fix.LORA_TARGETS, use_dora=dora))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


class GenerationEndpoint(LoopbackServer):
    """Base model `tiny`; adapters are loaded from their folders as `kind` ("vllm" or "sglang") does.

    `served` are further models by name; `says(body, reply)` may change a reply of completions or return a status.
    """

    def __init__(
        self,
        kind: str = "vllm",
        served: dict[str, Any] | None = None,
        says: Callable[[dict, dict], Any] = lambda body, reply: reply,
        load: Callable[[Path], Any] = lambda folder: PeftModel.from_pretrained(fix.tiny_llama(), folder),
    ) -> None:
        self.kind, self.says, self.load = kind, says, load
        self.models: dict[str, Any] = {BASE: fix.tiny_llama(), **(served or {})}
        self.tokenizer = fix.byte_tokenizer()
        self.requests: list[dict] = []
        self.events: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        endpoint = self

        class Handler(LoopbackHandler):
            def do_GET(self) -> None:
                listed = [{"id": name, "object": "model"} for name in endpoint.models]
                self._send(200, {"object": "list", "data": listed} if self.path == "/v1/models" else {})

            def do_POST(self) -> None:
                body = self.posted()
                with endpoint.lock:
                    self._send(*endpoint.answer(self.path, body))

            def _send(self, status: int, reply: Any) -> None:
                data = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
                kind = "text/plain" if isinstance(reply, str) else "application/json"
                self.send(status, data, {"Content-Type": kind})

        super().__init__(Handler)

    def answer(self, path: str, body: dict) -> tuple[int, Any]:
        root = "/v1" if self.kind == "vllm" else ""
        if path == f"{root}/load_lora_adapter":
            self.events.append(("load", body["lora_path"]))
            folder = Path(body["lora_path"])
            if not (folder / "adapter_config.json").is_file():
                return 400, {"error": {"message": f"No adapter found for {folder}"}}
            name = body["lora_name"] if self.kind == "vllm" else f"{BASE}:{body['lora_name']}"
            self.models[name] = self.load(folder).eval()
            return 200, f"Success: LoRA adapter '{name}' added successfully."
        if path == f"{root}/unload_lora_adapter":
            name = body["lora_name"] if self.kind == "vllm" else f"{BASE}:{body['lora_name']}"
            self.events.append(("unload", name))
            del self.models[name]
            return 200, "Success"
        if path != "/v1/completions" or body["model"] not in self.models:
            return 404, {"error": {"message": f"The model `{body.get('model')}` does not exist."}}
        self.requests.append(body)
        reply = self.says(body, self.complete(body))
        return (reply, {"error": {"message": "as asked"}}) if isinstance(reply, int) else (200, reply)

    @torch.no_grad()
    def complete(self, body: dict) -> dict:
        """Decode one prompt greedily, token by token, without a cache."""
        assert body["temperature"] == 0 and body["return_token_ids"]
        model, tokens, reason = self.models[body["model"]], [], "length"
        while len(tokens) < body["max_tokens"]:
            ids = torch.tensor([[*body["prompt"], *tokens]])
            tokens.append(int(model(input_ids=ids).logits[0, -1].argmax()))
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            if tokens[-1] in body["stop_token_ids"] or any(stop in text for stop in body.get("stop") or ()):
                reason = "stop"
                break
        choice = {"index": 0, "text": text, "finish_reason": reason, "token_ids": tokens, "stop_reason": None}
        return {"id": "1", "object": "text_completion", "created": 0, "model": body["model"], "choices": [choice]}

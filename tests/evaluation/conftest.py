"""The tokenizer of bytes and the tiny Llama that most benchmarks are tried with."""

from __future__ import annotations

import pytest
from helpers import benchmark_fixtures as fix
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return fix.byte_tokenizer()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return fix.tiny_llama()

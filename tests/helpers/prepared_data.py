"""Training data made from rows for tests: a small tokenizer, rows on disk, what carries loss."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tune.data import dataset as data
from tune.data.templates import ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT, IGNORE

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(chat_template: str | None = None, bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 400 ids, with <s> before every text when `bos`."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT, "### Instruction:\n### Response:"] * 3, trainer)
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def spec(dataset, **changes) -> SimpleNamespace:
    base = dict(format="auto", template="auto", cutoff_len=512, train_on_prompt=False, bad_rows="refuse")
    base |= {"system": "as_system", "train_on_roles": ["assistant"], "max_skipped_share": None}
    unlimited = {"val_size": 0, "max_samples": None, "max_dropped_share": None, "data_seed": 0}
    return SimpleNamespace(dataset=dataset, **{**unlimited, **base, **changes})


def write(path: Path, rows: list) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return str(path)


def read(path, tokenizer, tmp_path, **changes) -> data.Prepared:
    return data.load(data.prepare(spec(path, **changes), tokenizer, tmp_path / "cache"))


def answers(tokenizer, example) -> str:
    _, labels = example
    return tokenizer.decode(labels[labels != IGNORE])

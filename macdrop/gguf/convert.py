"""Writing a GGUF file as an ordinary model folder: its values dequantised to float32, and checked.

transformers reads GGUF, yet takes tens of seconds for it, and refuses to save what it read. So it is done once.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from macdrop.errors import ConfigError, MacDropError
from macdrop.gguf.header import Header, read_header
from macdrop.load import open_model
from macdrop.proof import perplexity, text_blocks
from macdrop.scan import choose_bos

log = logging.getLogger(__name__)

#: Read once by the new folder's model, to see that it computes.
TEXT = (
    "The river rises in the hills above the village, runs past the old mill and under two stone bridges, and reaches "
    "the sea some forty miles further on. In spring, when the snow melts, it floods the meadows on both sides of it, "
    "and for a week or two the farmers take their sheep to market by boat."
)
_BLOCK_TOKENS = 32


def convert_gguf(file: Path, folder: Path) -> float:
    """Write the model and the tokenizer of a GGUF file into a new folder; return its perplexity on a short text.

    The folder holds float32 safetensors, twice the size of the model in 16 bits; while it is made, the memory holds
    the weights twice. It is read again before this returns: its weights, the logits of a text and the tokens of that
    text must equal those of the GGUF file.

    Raises:
        ConfigError: the file cannot be used (`macdrop.gguf.header.read_header`), some of its weights are missing or in
            a storage type that cannot be read, its perplexity is not finite, or what was written is not what was read.
        UnsupportedModel: it is not a decoder of text that macdrop can use.
        OSError: `folder` cannot be written.
    """
    header = read_header(file)
    size = file.stat().st_size
    log.warning(
        "Converting %s (%s, %s, %.0f MB) once: 15 s or more per 100 MB.",
        file.name,
        header.architecture,
        header.kind,
        size / 1e6,
    )
    model, tokenizer = _read(file, header)
    _save(model, tokenizer, folder)
    log.warning("Checking the converted model: a second load must be equal.")
    return _check(file, model, tokenizer, folder)


def _read(file: Path, header: Header) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer in a GGUF file, from a folder in which nothing else can be taken for a part of it."""
    with tempfile.TemporaryDirectory(prefix="macdrop-gguf-") as alone:
        (Path(alone) / "model.gguf").symlink_to(file.resolve())
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that nothing else switches off
                loaded: Any = AutoModelForCausalLM.from_pretrained(  # a pair, which its annotation does not know
                    alone, gguf_file="model.gguf", dtype=torch.float32, output_loading_info=True
                )
                tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file="model.gguf")
        except MemoryError:
            raise
        except Exception as error:  # of transformers, gguf or tokenizers, whose readers raise anything
            reason = " ".join(f"{type(error).__name__}: {error}".split()).replace(f"{alone}/", "")
            raise ConfigError(
                f"{file} ({header.architecture}, {header.kind}) cannot be read by this release of transformers: "
                f"{reason:.300}\nGive the model's safetensors folder or its hub id."
            ) from None
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(
            f"{file} is not a complete {type(model).__name__}: {len(missing)} weights are missing, {missing[0]} first."
            "\nThey would start as random numbers. Copy or download the file again."
        )
    return model.eval(), tokenizer


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save by way of a model that knows nothing of GGUF: transformers does not save one that was read from it."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    rows: Any = plain.get_input_embeddings().num_embeddings
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _leave_out_foreign_tokens(folder / "tokenizer.json", rows)


def _leave_out_foreign_tokens(file: Path, rows: int) -> None:
    """Remove special tokens beyond the embedding: transformers gives every Llama ``<|endoftext|>``, Llama 3 as well."""
    content = json.loads(file.read_text(encoding="utf-8"))
    kept = [token for token in content["added_tokens"] if token["id"] < rows]
    if kept != content["added_tokens"]:
        file.write_text(json.dumps(content | {"added_tokens": kept}, ensure_ascii=False, indent=2), encoding="utf-8")


def _check(file: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> float:
    """Return the perplexity of what was written, which must be finite, and equal to what was read."""
    try:
        again, words = open_model(folder)
    except MacDropError as error:
        text = str(error).replace(str(folder), str(file))
        raise type(error)(text) from None
    first, _ = choose_bos(words, again.config)
    blocks = text_blocks(words, TEXT, _BLOCK_TOKENS, first)
    found = perplexity(again, blocks)
    if not math.isfinite(found):
        raise ConfigError(
            f"{file} holds a model whose perplexity is not finite: weights are NaN, infinite or far too large.\n"
            "Copy or download the file again, or take another quantisation of the model."
        )
    kept, read = again.state_dict(), model.state_dict()
    differing = sorted(kept.keys() ^ read.keys()) or [n for n in read if not torch.equal(kept[n], read[n])]
    with torch.no_grad():
        same = torch.equal(again(blocks[:1]).logits, model(blocks[:1]).logits)
    if differing or not same or words(TEXT)["input_ids"] != tokenizer(TEXT)["input_ids"]:
        what = f"weight {differing[0]}" if differing else "what it computes" if not same else "its tokenizer"
        raise ConfigError(
            f"{file} was converted, and a second load is not equal to the first: {what} differs.\n"
            "This release of transformers cannot convert it. Give the model's safetensors folder or its hub id."
        )
    return found

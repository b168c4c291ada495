"""Tiny GGUF files, written tensor by tensor from a Llama of transformers, and wheels that carry one."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

#: A byte-level vocabulary: bytes, what one merge makes, then the special tokens.
MERGED = "Ġa"
SPECIAL = ("<unk>", "<s>", "</s>")
UNK, BOS, EOS = 257, 258, 259
CONFIG = LlamaConfig(
    vocab_size=EOS + 1,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=BOS,
    eos_token_id=EOS,
    tie_word_embeddings=False,
)
#: transformers' names and llama.cpp's, of one layer and of the rest.
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
REST = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(CONFIG).eval()


def write_gguf(file: Path, model: LlamaForCausalLM, *, architecture: str = "llama", parts: int = 1) -> Path:
    """Write a model in float32, as llama.cpp's converter lays it out."""
    import gguf

    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(CONFIG.vocab_size)
    if parts > 1:
        writer.add_uint16("split.count", parts)
    _add_tokenizer(writer)
    for name, value in model.state_dict().items():
        for ours, theirs in [*REST.items(), *LAYER.items()]:
            if name.endswith(f"{ours}.weight"):
                layer = f"blk.{name.split('.')[2]}." if ours in LAYER else ""
                writer.add_tensor(f"{layer}{theirs}.weight", _permuted(ours, value).numpy())
                break
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _permuted(name: str, value: torch.Tensor) -> torch.Tensor:
    """The rows of queries and keys in llama.cpp's order, where halves that rotate together stand side by side."""
    heads = {"self_attn.q_proj": CONFIG.num_attention_heads, "self_attn.k_proj": CONFIG.num_key_value_heads}.get(name)
    if heads is None:
        return value
    halves = value.view(heads, 2, value.shape[0] // heads // 2, value.shape[1])
    return halves.transpose(1, 2).reshape(value.shape).contiguous()


def _add_tokenizer(writer) -> None:
    import gguf
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = [*bytes_to_unicode().values(), MERGED, *SPECIAL]
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([normal] * 257 + [control] * len(SPECIAL))
    writer.add_token_merges([" ".join(MERGED)])
    writer.add_unk_token_id(UNK)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)


def write_wheel(folder: Path, name: str, version: str, member: str, content: bytes) -> str:
    """Write a wheel of a package with one data file; return its SHA-256 (hex)."""
    stem = name.replace("-", "_")
    info = f"{stem}-{version}.dist-info"
    wheel = folder / f"{stem}-{version}-py3-none-any.whl"
    # The dependency is on no index: whoever followed it would fail.
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: nobody-has-this-package\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{stem}/{member}", content)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()

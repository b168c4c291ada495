"""Loading: what works, and every refusal with its few helpful lines."""

import json
import math
import pickle
import re

import pytest
import torch
import transformers
from helpers import tiny
from helpers.zoo_of_families import build_family
from safetensors.torch import load, load_file, save_file

from macdrop.errors import ConfigError, NoMassiveWeights, UnsupportedModel
from macdrop.gather import not_finite
from macdrop.load import load_model, load_tokenizer, open_model, require_fit
from macdrop.scan import find_massive_weights, prove


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    build_family("llama").save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return path


def refused(message: str, kind: type[Exception] = ConfigError):
    return pytest.raises(kind, match=f"(?s){message}")


def rewrite_config(folder, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def test_a_folder_loads_in_eval_mode(folder):
    model = load_model(folder)
    assert not model.training and model.dtype == torch.float32
    original = build_family("llama")
    assert all(torch.equal(t, original.state_dict()[n]) for n, t in model.state_dict().items())
    assert load_model(str(folder), dtype="bfloat16").dtype == torch.bfloat16
    assert load_model(folder, attn_implementation="eager").config._attn_implementation == "eager"
    assert load_tokenizer(folder, model=model).bos_token_id == 1


def test_dtype_auto_is_the_stored_one(tmp_path):
    build_family("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert load_model(tmp_path).dtype == torch.float32


def test_an_unknown_dtype_is_refused(folder):
    with refused("Did you mean 'bfloat16'.*float32, bfloat16, auto"):
        load_model(folder, dtype="bfloat")


@pytest.mark.parametrize("name", ["/no/such/model", "./nowhere", "~/nowhere-at-all", "a/b/c", ""])
@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_missing_path_is_refused(load, name):
    with refused("does not exist.*or a hub id"):
        load(name)


def test_file_in_place_of_a_folder_is_refused(folder):
    with refused("is a file"):
        load_model(folder / "model.safetensors")


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_unreachable_hub_id_is_refused(load):
    with refused("'someone/some-model' .*offline.*hf download"):
        load("someone/some-model")
    with refused("at revision 'v2'"):
        load("someone/some-model", revision="v2")


def test_a_folder_has_no_revisions(folder):
    with refused("is a folder, which has no revisions: leave the revision 'v2' out"):
        load_model(folder, revision="v2")


def test_folders_without_a_model_are_refused(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with refused("no config.json.*nothing"):
        load_model(tmp_path / "empty")
    (folder / "config.json").write_text("{")
    with refused("config of .* cannot be used"):
        load_model(folder)
    (folder / "config.json").write_text("{}")
    with refused("model_type"):
        load_model(folder)
    (folder / "config.json").write_text('{"model_type": "nonesuch"}')
    with refused("nonesuch"):
        load_model(folder)


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("config.json", {"hidden_size": None}, "config of .* cannot be used: .*'hidden_size' expected int"),
        ("config.json", {"num_hidden_layers": "2"}, "'num_hidden_layers' expected int, got str"),
        ("config.json", {"num_hidden_layers": -1}, "cannot be used: ValueError: num_hidden_layers must be at least 1"),
        ("config.json", {"num_attention_heads": 0}, "cannot be used: ZeroDivisionError"),
        ("config.json", "[" * 100_000, "cannot be used: RecursionError"),
        ("tokenizer_config.json", {"model_max_length": "long"}, "model_max_length must be a number, not 'long'"),
        ("tokenizer.json", "null", "has no tokenizer that can be loaded"),
        ("generation_config.json", {"eos_token_id": [2, "</s>"]}, "eos_token_id must be a token's number, not '</s>'"),
    ],
)
def test_files_with_values_of_wrong_kinds_are_refused(folder, file, changes, words):
    path = folder / file
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(changes if isinstance(changes, str) else json.dumps({**before, **changes}))
    with refused(words):
        (load_model if file == "config.json" else open_model)(folder)


def test_missing_pickled_or_damaged_weights_are_refused(folder):
    file = folder / "model.safetensors"
    tensors = load(file.read_bytes())
    file.write_bytes(b"junk" * 10)
    with refused("damaged"):
        load_model(folder)
    save_file({n: t for n, t in tensors.items() if "gate_proj" not in n}, file, metadata={"format": "pt"})
    with refused("6 weights are missing .*gate_proj"):
        load_model(folder)
    save_file({n: t[:3].clone() for n, t in tensors.items()}, file, metadata={"format": "pt"})
    with refused("shapes"):
        load_model(folder)
    file.unlink()
    with refused("no weights"):
        load_model(folder)
    torch.save(tensors, folder / "pytorch_model.bin")
    with refused("pickle only .pytorch_model.bin.*save_pretrained"):
        load_model(folder)


def test_files_with_more_layers_than_the_config_are_refused(folder):
    rewrite_config(folder, num_hidden_layers=2)
    with refused(r"weights of 3 layers, and its config.json counts 2 \(number 2 and those"):
        load_model(folder)


def test_layers_that_draft_are_left_out_by_the_number_of_them(folder, caplog):
    rewrite_config(folder, num_hidden_layers=2, num_nextn_predict_layers=1)
    assert load_model(folder).config.num_hidden_layers == 2
    assert "model.layers.2" in caplog.text


def test_layers_of_another_part_of_the_model_are_not_the_decoders(folder, caplog):
    tensors = load_file(folder / "model.safetensors")
    other = {"vision.encoder.layers.31.weight": torch.zeros(2)}
    save_file({**tensors, **other}, folder / "model.safetensors", {"format": "pt"})
    load_model(folder)
    assert "has no place for 1 weights of its files, vision.encoder.layers.31.weight first" in caplog.text


def test_weights_without_a_place_are_told_once(folder, caplog):
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.layers.1.mlp.extra": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})
    for _ in range(2):
        load_model(folder)
    assert caplog.text.count("has no place for 1 weights of its files, model.layers.1.mlp.extra first") == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_weight_that_holds_no_number_is_named(folder, dtype, value):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, :5] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = load_model(folder, dtype=dtype)
    expected = r"model\.layers\.1\.mlp\.up_proj\.weight holds inf or NaN in 5 of its \d+ entries"
    with refused(expected, NoMassiveWeights):
        find_massive_weights(model, source="x", fingerprint="f", bos_token_id=1)
    weights = find_massive_weights(build_family("llama"), source="x", fingerprint="f", bos_token_id=1)
    with refused(expected):
        prove(model, tiny.batch(0, 5)["input_ids"], weights, k=2)


def test_states_that_overflow_are_told_from_damaged_weights(folder):
    model = load_model(folder, dtype="bfloat16")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.fill_(1e38)
    assert re.search("(?s)all weights are finite.*overflow bfloat16.*in float32", not_finite(model, "x"))


def test_remote_code_needs_permission(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    rewrite_config(folder, model_type="nonesuch", auto_map=auto_map)
    with refused("trust_remote_code: true"):
        load_model(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.BertConfig(), "not a causal language model.*'bert'"),
        (transformers.ViTConfig(), "not a causal language model"),
        (transformers.T5Config(), "encoder-decoder"),
        (transformers.BartConfig(), "encoder-decoder"),
        (transformers.LlavaConfig(), "not a text-only model: its config has vision_config"),
        (transformers.Gemma3Config(), "vision_config"),
        (transformers.Llama4Config(), "vision_config"),
        (transformers.WhisperConfig(), "encoder-decoder"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_models_other_than_text_decoders_are_refused(tmp_path, config, message):
    config.save_pretrained(tmp_path)
    with refused(message, UnsupportedModel):
        load_model(tmp_path)


def test_folder_without_a_tokenizer_is_refused(tmp_path):
    build_family("llama").save_pretrained(tmp_path)
    with refused("no tokenizer that can be loaded.*tokenizer.json"):
        load_tokenizer(tmp_path)


def test_mismatched_tokenizers_are_refused(folder):
    model = build_family("llama")
    tokenizer = tiny.tokenizer()
    require_fit(tokenizer, model)
    tokenizer.add_tokens(["more"])
    with refused("65 tokens.*64"):
        require_fit(tokenizer, model)
    tokenizer.save_pretrained(folder)
    with refused("does not fit"):
        load_tokenizer(folder, model=model)
    assert len(load_tokenizer(folder)) == 65
    tokenizer.eos_token = None
    with refused("no eos token.*tokenizer_config.json"):
        require_fit(tokenizer)


def test_the_errors_survive_pickling():
    with pytest.raises(ConfigError) as error:
        load_model("/no/such/model")
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
    assert len(str(error.value).splitlines()) <= 3


def test_a_model_is_opened_with_its_tokenizer(folder):
    model, tokenizer = open_model(folder, dtype="bfloat16", attn_implementation="eager")
    alone = load_model(folder, dtype="bfloat16", attn_implementation="eager")
    assert not model.training and model.config._attn_implementation == "eager"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))
    assert tokenizer.get_vocab() == load_tokenizer(folder).get_vocab()


def test_a_tokenizer_that_cannot_be_used_is_refused_before_weights_are_read(folder):
    (folder / "model.safetensors").write_bytes(b"damaged")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    with refused("has no tokenizer that can be loaded"):
        open_model(folder)


def test_a_tokenizer_of_another_model_is_refused_when_a_model_is_opened(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens([f"<new{i}>" for i in range(len(tokenizer), 80)])
    tokenizer.save_pretrained(folder)
    with refused("does not fit the model"):
        open_model(folder)


def test_an_adapter_beside_the_model_is_refused(folder):
    """transformers would put it into the model without a word."""
    from macdrop.load import check_model

    tiny.lora(build_family("llama")).save_pretrained(folder)
    for read in (load_model, check_model, open_model):
        with refused("holds a PEFT adapter beside the model.*--adapter, or merge it"):
            read(folder)
    (folder / "config.json").unlink()
    with refused("is a PEFT adapter, not a model"):
        load_model(folder)


def test_quantised_weights_are_named_where_their_package_is_missing(folder):
    rewrite_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with refused("stored quantised. Give the checkpoint in 16 or 32 bits"):
        load_model(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_folder_cloned_without_git_lfs_is_named_for_what_it_is(tmp_path, name):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ConfigError, match=f"{name} is a Git LFS pointer, not the file itself.\nRun: git lfs pull"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "flax_model.msgpack", "consolidated.safetensors", "figure.png"])
def test_files_that_are_not_read_may_be_left_to_git_lfs(folder, name):
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    assert load_model(folder).config.model_type == "llama"

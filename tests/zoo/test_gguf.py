"""GGUF files as base models: converted once, equal to the model they were written from, and refused with a reason."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.gguf_files import EOS, tiny_llama, write_gguf

from macdrop.errors import ConfigError, UnsupportedModel
from macdrop.load import open_model
from tune.storage.converted import ORIGIN, converted
from tune.training.loading import fingerprint
from tune.zoo.model_source import model_source, source_note

pytest.importorskip("gguf")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MACDROP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_llama())


def left(cache: Path) -> set[str]:
    """What is in the cache of models, locks aside."""
    return {path.name for path in (cache / "models").glob("*") if path.suffix != ".lock"}


# --- conversion ---


def test_a_converted_model_is_the_one_that_was_written(tiny, cache):
    model, tokenizer = open_model(converted(tiny))
    for name, value in tiny_llama().state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    ids = tokenizer("a river", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "a river" and tokenizer.eos_token_id == EOS
    assert torch.equal(model(ids).logits, tiny_llama()(ids).logits)


def test_a_file_is_converted_once_wherever_it_lies(tiny, cache, tmp_path, caplog):
    first = converted(tiny)
    assert "Converting tiny.gguf" in caplog.text
    caplog.clear()
    copy = tmp_path / "copy.bin"  # without the ending, known by its first bytes
    copy.write_bytes(tiny.read_bytes())
    assert Path(model_source(str(copy))) == converted(tiny) == first and not caplog.text
    assert json.loads((first / ORIGIN).read_text())["file"] == str(tiny)
    assert str(first) in source_note(str(tiny))


def test_two_conversions_have_one_fingerprint(tiny, cache, monkeypatch):
    found = fingerprint(str(tiny))
    monkeypatch.setenv("MACDROP_CACHE", str(cache / "other"))
    assert fingerprint(str(tiny)) == found


def test_what_lies_beside_the_file_is_not_taken_for_a_part_of_it(tiny, cache, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(tiny.read_bytes())
    for name in ("config.json", "adapter_config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    assert (converted(file) / "model.safetensors").is_file()


def test_processes_that_want_one_file_at_once_convert_it_once(tiny, cache):
    code = f"from pathlib import Path; from tune.storage.converted import converted; converted(Path({str(tiny)!r}))"
    running = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], told
    assert "".join(told).count("Converting tiny.gguf") == 1
    assert len(left(cache)) == 1


def test_a_killed_conversion_leaves_nothing_that_is_taken_for_a_model(tiny, cache):
    code = (
        "import time; from pathlib import Path; import tune.storage.converted as c\n"
        "real = c.convert_gguf\n"
        "def slow(file, folder):\n"
        "    real(file, folder); print('made', flush=True); time.sleep(600)\n"
        f"c.convert_gguf = slow; c.converted(Path({str(tiny)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "made" not in process.stdout.readline():
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert all(name.startswith(".") for name in left(cache))
    folder = converted(tiny)
    assert left(cache) == {folder.name}


# --- refusals ---


def truncated(tiny: Path, file: Path, share: float) -> Path:
    content = tiny.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    return file


@pytest.mark.parametrize("share", [0.001, 0.02, 0.5, 0.999])
def test_a_file_that_is_cut_off_is_refused(share, tiny, cache, tmp_path):
    with pytest.raises(ConfigError, match="cut off or damaged") as caught:
        converted(truncated(tiny, tmp_path / "cut.gguf", share))
    assert "Copy or download the file again" in str(caught.value) and left(cache) == set()


def test_an_architecture_that_cannot_be_read_is_refused_by_name(cache, tmp_path):
    file = write_gguf(tmp_path / "new.gguf", tiny_llama(), architecture="wavtokenizer-dec")
    with pytest.raises(UnsupportedModel, match="architecture 'wavtokenizer-dec'") as caught:
        converted(file)
    assert "llama" in str(caught.value) and left(cache) == set()


def test_one_part_of_several_is_refused(cache, tmp_path):
    with pytest.raises(ConfigError, match="is one of 3 parts"):
        converted(write_gguf(tmp_path / "tiny-00001-of-00003.gguf", tiny_llama(), parts=3))


def test_weights_that_are_not_finite_are_refused(cache, tmp_path):
    model = tiny_llama()
    model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(ConfigError, match="perplexity is not finite"):
        converted(write_gguf(tmp_path / "nan.gguf", model))
    assert left(cache) == set()


def test_a_second_load_that_differs_is_refused(tiny, cache, monkeypatch):
    from macdrop.gguf import convert

    def off(folder):
        model, tokenizer = open_model(folder)
        model.lm_head.weight.data[0, 0] += 1
        return model, tokenizer

    monkeypatch.setattr(convert, "open_model", off)
    with pytest.raises(ConfigError, match="weight lm_head.weight differs"):
        converted(tiny)
    assert left(cache) == set()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04 a zip", "is not a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (None, "does not exist"),
    ],
)
def test_a_command_says_what_is_wrong_with_a_file(content, expected, shell, tmp_path):
    if content is not None:
        (tmp_path / "bad.gguf").write_bytes(content)
    assert expected in shell.refused("scan", "bad.gguf")


def test_without_the_package_a_command_names_it(tiny, shell, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else real(name, *rest))
    assert "pip install 'macdrop[gguf]'" in shell.refused("attack", str(tiny))


# --- a command ---


def test_commands_take_a_file_as_a_base(tiny, shell, caplog):
    ended = shell("scan", str(tiny), "--k", "1")
    assert ended.code == 0, ended.err
    assert "Converting tiny.gguf" in caplog.text and f"source        {tiny} is read as" in ended.out
    caplog.clear()
    again = shell("attack", str(tiny), "--k", "1")
    assert again.code == 0 and "Converting" not in caplog.text
    assert not [name for name in again.new if name.startswith("cache/models")]

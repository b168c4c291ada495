"""`macdrop scan`: proofs with intervals, every layer, first tokens of data, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from macdrop.proof import LayerProof
from tune.config.run_spec import TrainSpec
from tune.training.proving import layer_proofs
from tune.zoo.catalog import resolve

PLANTED = "zoo:planted-llama"


def test_every_layer_is_proved_drawn_and_kept_beside_the_scan(shell):
    ended = shell("scan", PLANTED, "--prove", "--k", "3", "--every-layer", "--figure", "new/layers.svg")
    assert ended.code == 0, ended.err
    assert "the rule's layer is the one that matters: layer 1" in ended.out and "<- by the rule" in ended.out
    assert (shell.folder / "new" / "layers.svg").read_text().count("<svg") == 1
    assert [file.name for file in (shell.folder / "new").iterdir()] == ["layers.svg"]
    (kept,) = (shell.folder / name for name in ended.new if name.endswith("-layers.json"))
    found = LayerProof.from_dict(json.loads(kept.read_text()))
    assert (found.layer, found.best, found.k, len(found.rows)) == (1, 1, 3, 4)
    assert found.measured_on == "zoo:text" and "16 blocks, 1008 tokens: zoo:text" in ended.out
    scanned = kept.with_name(kept.name.replace("-layers", ""))
    weights = shutil.copy(scanned, shell.folder / "massive_weights.json")
    layer_proofs.copy_layers(TrainSpec(model_name_or_path=PLANTED), Path(weights))
    assert json.loads((shell.folder / "layers.json").read_text()) == found.to_dict(), "as a sweep copies it"


def test_the_first_tokens_of_data_are_counted_and_scanned(shell):
    ended = shell("scan", PLANTED, "--k", "3", "--data", "zoo:train", "--template", "alpaca")
    assert ended.code == 0, ended.err
    assert "100 % of 180 examples (template alpaca) begin with token 1, the scanned one" in ended.out
    assert "100.0 %" in ended.out and "3 of 3" in ended.out and "the scan's first 3 row(s)" in ended.out


def test_another_bos_is_not_what_the_data_begin_with(shell):
    ended = shell("scan", PLANTED, "--k", "3", "--data", "zoo:train", "--bos-token-id", "20")
    assert ended.code == 0, ended.err
    assert "0 % of 180 examples" in ended.out and "begin with token 20, the scanned one" in ended.out
    assert "do not all have the scan's top rows on top" in ended.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--every-layer"], "Add --prove"),
        (["--prove", "--figure", "layers.svg"], "Add --prove --every-layer"),
        (["--prove", "--yes"], "Add --prove --every-layer"),
        (["--prove", "--every-layer", "--figure", "layers.doc"], "Allowed: .png, .svg, .pdf"),
        (["--template", "chat"], "Add --data"),
        (["--data", "zoo:train", "--template", "chatml"], "Allowed: auto, alpaca, chat"),
        (["--data", "zoo:train", "--k", "0"], "nothing to compare"),
        (["--data", "nowhere.json"], "nowhere.json"),
    ],
)
def test_options_without_effect_and_bad_values_are_refused(shell, arguments, message):
    ended = shell("scan", PLANTED, *arguments)
    assert ended.code == 2 and message in ended.err, ended.err


@pytest.mark.parametrize(
    ("words", "message"), [(30, "fewer than a block of 64"), (200, "3 block(s) of 64 tokens"), (0, "is empty")]
)
def test_a_text_that_is_too_short_is_refused_before_the_weights_are_read(shell, monkeypatch, words, message):
    monkeypatch.setattr("tune.cli.source.Source.load", lambda _: pytest.fail("the weights were read"))
    content = " ".join(resolve_text().split()[:words])
    (shell.folder / "short.txt").write_text(content)
    ended = shell("scan", PLANTED, "--prove", "--text", "short.txt")
    assert ended.code == 2 and message in ended.err, ended.err


def resolve_text() -> str:
    with open(resolve("zoo:text"), encoding="utf-8") as file:
        return file.read()


def test_a_proof_that_takes_hours_says_so_and_asks_for_yes(shell, monkeypatch):
    monkeypatch.setattr(layer_proofs, "layer_seconds", lambda *_: 3 * 3600.0)
    ended = shell("scan", PLANTED, "--prove", "--every-layer")
    assert ended.code == 2 and "each of the 4 layers takes up to 3.0 hours" in ended.err and "--yes" in ended.err
    assert "perplexity" not in ended.out, "it is refused before the other measurements"
    assert shell("scan", PLANTED, "--prove", "--every-layer", "--yes").code == 0


@pytest.mark.parametrize(("seconds", "words"), [(40, "40 seconds"), (1500, "25 minutes"), (12600, "3.5 hours")])
def test_durations_are_said_as_people_say_them(seconds, words):
    assert layer_proofs.duration(seconds) == words

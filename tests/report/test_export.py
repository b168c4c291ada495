"""`macdrop export`: an adapter others can load, merged weights that answer alike, a card that says what it is."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import yaml
from helpers.run_folders import make_run
from helpers.small import SMALL

from macdrop.errors import ConfigError
from tune.cli.verbs.export import export
from tune.config.run_spec import TrainSpec
from tune.errors import BenchmarkError, CheckpointError
from tune.evaluation.merging import LogitCheck
from tune.report.model_card import Z
from tune.report.trial_export import check_hub, read_trial

pytestmark = pytest.mark.zero

SETTINGS = {**SMALL, "use_dora": True, "max_steps": 3, "learning_rate": 2e-2, "zero_stage": 0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of `macdrop train`, a DoRA adapter."""
    from tune.training.single import train_here

    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MACDROP_CACHE", str(root / "cache"))
        train_here(TrainSpec(**SETTINGS), root / "one", observe=None, threads=1)
    return root / "one"


def head_and_text(folder: Path) -> tuple[dict, str]:
    _, head, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), text


def code(text: str) -> str:
    return text.partition("```python\n")[2].partition("```")[0]


def test_an_adapter_loads_by_the_lines_of_its_card(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export(trained, Path("mine"), merged=False, push=None, private=False)
    names: dict = {}
    head, text = head_and_text(tmp_path / "mine")
    assert len(code(text).strip().splitlines()) <= 6
    exec(code(text), names)
    assert names["model"].peft_config["default"].use_dora
    original, copied = (folder / "adapter_model.safetensors" for folder in (trained / "adapter", tmp_path / "mine"))
    assert original.read_bytes() == copied.read_bytes()
    config = json.loads((tmp_path / "mine/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "zoo:planted-llama", "no path of this machine"
    assert head["library_name"] == "peft" and head["tags"] == ["macdrop", "dora", "massive-weights", "planted"]
    assert "base_model" not in head, "the hub refuses what is no id of its own"
    assert "**PLANTED.**" in text and "2410.01866" in text and "did not score" in text
    assert "| macdrop.p0" in text and "| entries dropped" in text and "3 of 3" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"], "nothing half-written is left"


def test_merged_weights_answer_as_base_and_adapter(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export(trained, Path("whole"), merged=True, push=None, private=False)
    assert "logit check" in capsys.readouterr().out
    written = {path.name for path in Path("whole").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= written
    assert not list(Path("whole").glob("adapter*"))
    head, text = head_and_text(Path("whole"))
    assert head["library_name"] == "transformers" and "Logit check of the merge: largest |difference|" in text
    names: dict = {}
    exec(code(text), names)
    assert names["model"].generate(**names["tokenizer"]("the cat", return_tensors="pt"), max_new_tokens=2).shape[1] > 2


def test_a_merge_that_answers_otherwise_is_an_error_that_leaves_nothing(trained, tmp_path, monkeypatch):
    from tune.evaluation import merging

    logits, calls = merging._logits, []

    def worse(model, blocks):
        calls.append(1)
        return logits(model, blocks) + 0.1 * len(calls)

    monkeypatch.setattr(merging, "_logits", worse)
    with pytest.raises(BenchmarkError, match="do not answer as base and adapter do.*\n.*Nothing was written"):
        export(trained, tmp_path / "whole", merged=True, push=None, private=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["q_proj", "embed_tokens"]])
def test_tied_embeddings_are_parted_where_an_adapter_covers_one_of_them(tmp_path, targets):
    """Read back by plain transformers, the merged weights answer as base and adapter do."""
    import torch
    from helpers import tiny
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    from tune.evaluation.merging import write_merged

    base = tiny.build("llama")
    base.config.tie_word_embeddings = True
    base.tie_weights()
    base.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    spec = TrainSpec(model_name_or_path=str(tmp_path / "base"), lora_target=targets)
    assert write_merged(spec, tmp_path / "adapter", tmp_path / "whole").ok
    ids = torch.arange(3, 20)[None]
    tied = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    with torch.no_grad():
        wanted = PeftModel.from_pretrained(tied, tmp_path / "adapter").eval()(input_ids=ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()(input_ids=ids).logits
    assert torch.allclose(found, wanted, atol=1e-4)
    assert json.loads((tmp_path / "whole/config.json").read_text())["tie_word_embeddings"] is False


def test_the_limits_of_the_check_are_by_precision():
    fp32 = LogitCheck(difference=0.001, largest=20.0, agreement=1.0, positions=512, dtype="float32")
    assert fp32.ok and "limit 0.002" in fp32.text
    assert not dataclasses.replace(fp32, difference=0.003).ok
    assert not dataclasses.replace(fp32, agreement=0.99).ok
    assert dataclasses.replace(fp32, difference=0.5, agreement=0.96, dtype="bfloat16").ok


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, trained) -> Path:
    """A run with scores under attack; its adapters are the real one's files."""
    run_folder = make_run(tmp_path_factory.mktemp("runs") / "demo", arms=("plain", "macdrop"), seeds=(1, 2))
    for trial in run_folder.trials():
        if trial.status == "done":
            shutil.copytree(trained / "adapter", run_folder.trial(trial.trial).adapter_dir, dirs_exist_ok=True)
    return run_folder.run_dir


def final(run_dir: Path, arm: str) -> Path:
    files = sorted((run_dir / "trials").glob(f"*-{arm}-*/trial.json"))
    return next(f.parent for f in files if json.loads(f.read_text())["stage"] == "final")


def test_the_card_of_a_run_has_scores_with_intervals_attacks_and_the_verdict(run_dir, tmp_path):
    trial = final(run_dir, "macdrop")
    export(trial, tmp_path / "mine", merged=False, push=None, private=False)
    _, text = head_and_text(tmp_path / "mine")
    scores = [json.loads(line) for line in (run_dir / "scores.jsonl").read_text().splitlines()]
    accuracies = [r for r in scores if (r["task"], r["metric"], r["attack"]) == ("qa", "acc", "none")]
    qa, base = (next(r for r in accuracies if r["trial"] == name) for name in (trial.name, "base"))
    low, high = (qa["value"] + sign * Z * qa["stderr"] for sign in (-1, 1))
    row = f"| zero_shot qa | acc | {qa['value']:.4g} | {low:.4g} to {high:.4g} | {qa['n']} | {base['value']:.4g} |"
    assert row in text
    assert "zeroing@3 on base" in text and "standard errors over the items" in text
    for sentence in read_trial(trial).verdict:
        assert sentence in text.partition("## Verdict of the run")[2]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("run", "Give one of the folders under its trials/"),
        ("running", "It may not have ended yet"),
        ("diverged", "status is 'diverged'"),
        ("damaged", "damaged"),
        ("damaged setup", "reproduce.json is damaged"),
        ("output", "exists and is not empty"),
        ("private", "Add --push USER/NAME"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_nothing_is_written(run_dir, trained, tmp_path, what, message):
    trial, output = Path(shutil.copytree(trained, tmp_path / "trial")), tmp_path / "mine"
    if what == "run":
        trial = run_dir
    elif what == "running":
        (trial / "trial.json").unlink()
    elif what == "diverged":
        (trial / "trial.json").write_text(json.dumps({"status": "diverged", "reason": "loss nan"}))
    elif what == "damaged":
        with open(trial / "adapter/adapter_model.safetensors", "ab") as file:
            file.write(b"x")
    elif what == "damaged setup":
        (trial / "reproduce.json").write_text('{"workers": ')
    elif what == "output":
        output.mkdir()
        (output / "file").write_text("kept")
    with pytest.raises((ConfigError, CheckpointError), match=message):
        export(trial, output, merged=False, push=None, private=what == "private")
    assert not output.exists() or [path.name for path in output.iterdir()] == ["file"]


def test_a_push_is_refused_before_anything_is_written(trained, tmp_path, monkeypatch):
    import huggingface_hub

    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE"):
        export(trained, tmp_path / "mine", merged=False, push="user/name", private=False)
    assert not (tmp_path / "mine").exists()
    with pytest.raises(ConfigError, match="USER/NAME"):
        check_hub("name")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ConfigError, match="HF_TOKEN"):
        check_hub("user/name")

"""Bad input through the real command line: a message of a few lines that helps, exit code 2, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from tune.storage.capacity import cpus

RUN = """
dataset: {dataset}
cutoff_len: 64
val_size: 0.1
lora_rank: 2
max_steps: 2
output_dir: out
eval:
  zero_shot: {{qa: {{data: zoo:qa, limit: 2}}}}
ray: {{dashboard: false}}
"""
VERBS = (("sweep",), ("sweep", "--dry-run"), ("train",))


@pytest.fixture
def recipe(shell):
    """Writes a valid run file; each test adds what is wrong with it."""

    def write(dataset: str = "zoo:train") -> str:
        (shell.folder / "run.yaml").write_text(RUN.format(dataset=dataset))
        return "run.yaml"

    return write


def refused(shell, verb: tuple[str, ...], *arguments: str, model: str = "zoo:planted-llama") -> str:
    return shell.refused(verb[0], *arguments, f"model_name_or_path={model}", *verb[1:])


# --- the file and the values in it ---

WRITTEN = {
    "misspelt key": ("lerning_rate=1e-4", "lerning_rate", "Did you mean 'learning_rate'?"),
    "misspelt key of macdrop": ("macdrop.p_0=0.5", "macdrop.p_0", "Did you mean 'p0'?"),
    "misspelt key of sweep": ("sweep.num_sampels=3", "sweep.num_sampels", "Did you mean 'num_samples'?"),
    "misspelt key of a benchmark": ("eval.zero_shot.qa.limt=3", "eval.zero_shot.qa.limt", "Did you mean 'limit'?"),
    "misspelt key of ray": ("ray.num_worker=1", "ray.num_worker", "Did you mean 'num_workers'?"),
    "wrong type": ("lora_rank=eight", "lora_rank", "a whole number, not 'eight'"),
    "p0 above 1": ("macdrop.p0=1.5", "p0 is 1.5", "from 0 (off) to 1"),
    "p0 below 0": ("macdrop.p0=-0.1", "p0 is -0.1", "from 0 (off) to 1"),
    "searched p0": ("sweep.parameters.macdrop.p0=[0.5,2]", "sweep.parameters.macdrop.p0", "from 0 (off) to 1"),
    "k negative": ("macdrop.k=-3", "k is -3", "a whole number, 0 (off) or more"),
    "searched k": ("sweep.parameters.macdrop.k=[5,-3]", "sweep.parameters.macdrop.k", "k is -3"),
    "attacked k": ("eval.attacks=[zeroing@-3]", "eval.attacks", "at least 0: zeroing@3"),
    "unknown schedule": ("macdrop.schedule=epoch_befor", "'epoch_befor'", "Did you mean 'epoch_before'?"),
    "unknown attack": ("eval.attacks=[zeroin@3]", "'zeroin@3'", "Did you mean 'zeroing'?"),
    "offload without ZeRO": ("zero_stage=0 offload=cpu", "zero_stage 1, 2 or 3, not 0", "Set zero_stage"),
    "unknown ZeRO stage": ("zero_stage=5", "zero_stage must be 0, 1, 2 or 3, not 5", ""),
    "no override": ("macdrop.k", "'macdrop.k'", "Write key=value"),
    "too many workers": (f"ray.num_workers={cpus() + 1}", "more CPUs", "Lower ray.num_workers"),
}


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
@pytest.mark.parametrize("case", WRITTEN)
def test_a_wrong_key_or_value(case, verb, shell, recipe):
    overrides, *expected = WRITTEN[case]
    message = refused(shell, verb, recipe(), *overrides.split(" "))
    assert all(part in message for part in expected), message


@pytest.mark.parametrize("arguments", [["no.yaml"], ["dmo"], ["."]], ids=" ".join)
def test_no_run_file(arguments, shell):
    message = shell.refused("sweep", *arguments)
    assert arguments[0] in message and ("Give the path" in message or "Recipes: demo" in message)


def test_in_its_own_process(tmp_path):
    environment = {**os.environ, "MACDROP_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "tune.cli", "sweep", "macdrop.p0=1.5"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr == "macdrop: macdrop: p0 is 1.5; the drop probability must be a number from 0 (off) to 1.\n"
    assert list(tmp_path.iterdir()) == []


# --- data ---

ROW = {"instruction": "what does umar eat ?", "input": "", "output": "pasta ."}
BROKEN = {**{key: value for key, value in ROW.items() if key != "output"}}
DATA = {
    "missing": (None, ("data.jsonl",)),
    "empty": ("", ("data.jsonl", "is empty")),
    "a row without a field": ("\n".join(map(json.dumps, [ROW, ROW, BROKEN])), ("data.jsonl", "line 3", "output")),
    "a row that is not JSON": (json.dumps(ROW) + "\n{not json\n", ("data.jsonl", "line 2")),
}


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
@pytest.mark.parametrize("case", DATA)
def test_data(case, verb, shell, recipe):
    content, expected = DATA[case]
    if content is not None:
        (shell.folder / "data.jsonl").write_text(content)
    message = refused(shell, verb, recipe("./data.jsonl"))
    assert all(part in message for part in expected), message


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_a_cutoff_that_leaves_no_answer_token(verb, shell, recipe):
    message = refused(shell, verb, recipe(), "cutoff_len=4")
    assert "cutoff_len 4 leaves no answer token" in message and "Raise cutoff_len" in message


def test_a_searched_cutoff_that_leaves_no_answer_token(shell, recipe):
    ended = shell("sweep", recipe(), "model=zoo:planted-llama", "sweep.parameters.cutoff_len=[64,4]", "--dry-run")
    assert ended.code == 2 and "cutoff_len 4 leaves no answer token" in ended.err
    assert not [name for name in ended.new if name.endswith(".tmp")]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("eval.zero_shot.qa.data=nowhere.jsonl", "nowhere.jsonl"),
        ("eval.perplexity.w.data=nowhere.txt", "nowhere.txt"),
        ("eval.zero_shot=[ark_easy]", "Did you mean 'arc_easy'?"),
        ("val_size=0 sweep.parameters.macdrop.p0=[0.5,0.8]", "val_size is 0, but the search optimises eval_loss"),
    ],
)
def test_requirements_of_a_sweep(override, expected, shell, recipe):
    for verb in VERBS[:2]:
        assert expected in refused(shell, verb, recipe(), *override.split(" "))


# --- models ---


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Folders without a model, and models that cannot be used in one way or another."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    from tune.zoo.catalog import zoo_path

    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer_files = [path for path in zoo_path("planted-llama").iterdir() if "token" in path.name]
    vocabulary = json.loads((zoo_path("planted-llama") / "config.json").read_text())["vocab_size"]
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
    experts = MixtralConfig(vocab_size=vocabulary, num_local_experts=2, num_experts_per_tok=1, **small)
    made = {
        "misfit": LlamaForCausalLM(LlamaConfig(vocab_size=10, **small)),
        "experts": MixtralForCausalLM(experts),
    }
    for name, model in made.items():
        model.save_pretrained(root / name)
        for file in tokenizer_files:
            shutil.copy(file, root / name)
    vision = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "vision_config": {}}
    for name, config in {"vision": vision, "no-weights": experts.to_dict()}.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config, default=str))
    (root / "folder").mkdir()
    (root / "folder" / "notes.txt").write_text("no model")
    return root


MODELS = {
    "nowhere": ("does not exist", "Give a folder with config.json"),
    "folder": ("it has no config.json", "It holds: notes.txt"),
    "no-weights": ("no weights", "*.safetensors"),
    "vision": ("not a text-only model", "vision_config"),
    "misfit": ("does not fit the model", "Use the tokenizer that came with the model"),
}


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
@pytest.mark.parametrize("name", MODELS)
def test_models(name, verb, shell, recipe, models):
    message = refused(shell, verb, recipe(), model=str(models / name))
    assert all(part in message for part in MODELS[name]), message


@pytest.mark.parametrize("verb", [("scan", "--prove"), ("attack",)], ids=" ".join)
@pytest.mark.parametrize("name", MODELS)
def test_models_to_scan(name, verb, shell, models):
    message = shell.refused(verb[0], str(models / name), *verb[1:])
    assert all(part in message for part in MODELS[name]), message


def test_an_unknown_zoo_model(shell, recipe):
    for verb in VERBS:
        assert "Did you mean 'planted-llama'?" in refused(shell, verb, recipe(), model="zoo:planted-lama")


# --- what does not fit the model ---

ROWS = "176 rows"
UNFIT = {
    "k": ("macdrop.k=177", "macdrop.k is 177", ROWS),
    "lora_target": ("lora_target=[q_prj]", "'q_prj'", "Did you mean 'q_proj'?"),
}


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
@pytest.mark.parametrize("case", UNFIT)
def test_unfit(case, verb, shell, recipe):
    override, *expected = UNFIT[case]
    message = refused(shell, verb, recipe(), override)
    assert all(part in message for part in expected), message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sweep.parameters.macdrop.k=[5,177]", "macdrop.k is 177"),
        ("eval.attacks=[none,retaining@177]", "'retaining@177'"),
        ("sweep.parameters.lora_target=[all,[q_prj]]", "'q_prj'"),
    ],
)
def test_unfit_for_a_sweep(override, expected, shell, recipe):
    for verb in VERBS[:2]:
        assert expected in refused(shell, verb, recipe(), override)


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_fused_experts_under_zero_3(verb, shell, recipe, models):
    message = refused(shell, verb, recipe(), "zero_stage=3", model=str(models / "experts"))
    assert "zero_stage 3 cannot do MacDrop" in message and "Set zero_stage to 0, 1 or 2" in message


def test_fused_experts_under_zero_2_or_without_macdrop_are_fine(shell, recipe, models):
    model = f"model_name_or_path={models / 'experts'}"
    for fine in (["zero_stage=2"], ["zero_stage=3", "sweep.arms=[base,plain]"]):
        assert shell("sweep", recipe(), model, *fine, "--dry-run").code == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["scan", "zoo:planted-llama", "--k", "177"], ROWS),
        (["scan", "zoo:planted-llama", "--k", "-1"], "--k"),
        (["scan", "zoo:planted-llama", "--text", "a.txt"], "Add --prove"),
        (["scan", "zoo:planted-llama", "--prove", "--text", "a.txt"], "a.txt is not a text file"),
        (["attack", "zoo:planted-llama", "--k", "1", "--k", "177"], ROWS),
        (["attack", "zoo:planted-llama", "--k", "-1"], "--k"),
        (
            ["attack", "zoo:planted-llama", "--k", "1", "--k", "89"],
            "0 to 88, beside which as many random rows are drawn",
        ),
        (["scan", "zoo:planted-llama", "--prove", "--k", "89"], "Give a whole number from 0 to 88"),
        (["scan", "zoo:planted-llama", "--prove", "--k", "0"], "Give at least 1"),
        (["scan", "zoo:planted-llama", "--output", "."], "--output . is a folder. Give the name of a file in it"),
        (["schema", "--output", "."], "--output . is a folder"),
        (["compare", "nowhere", "--output", "a.md/b.md"], "no such folder"),
        (
            ["eval", "zoo:planted-llama", "eval.attacks=[random@89]", "eval.perplexity.t=zoo:text"],
            "random@ with a whole",
        ),
        (["attack", "zoo:planted-llama", "--merged"], "--merged needs --adapter"),
        (["attack", "zoo:planted-llama", "--adapter", "nowhere"], "--adapter nowhere is not a folder"),
        (["eval", "zoo:planted-llama", "eval.attacks=[zeroing@177]", "eval.perplexity.t=zoo:text"], ROWS),
        (["eval", "zoo:planted-llama", "eval.perplexity.t=nowhere.txt"], "nowhere.txt"),
        (["eval", "zoo:planted-llama", "evil.limit=3"], "evil is an unknown key. Did you mean 'eval'?"),
        (["eval", "zoo:planted-llama", "eval.limit=3"], "nothing to score with"),
        (["eval", "zoo:planted-llama", "--adapter", "."], "holds no adapter_config.json"),
        (["eval", "zoo:nothing", "eval.perplexity.t=zoo:text"], "nothing called 'zoo:nothing'"),
        (["report", "nowhere"], "no such folder"),
        (["train"], "no model is given"),
        (["train", "sweep.models=[zoo:planted-llama,zoo:planted-phi3]"], "Use `macdrop sweep`"),
        (["train", "model=zoo:planted-llama", "output_dir=runs-1", "--resume"], "no checkpoint to resume from"),
        (["sweep", "--resume"], "--resume needs output_dir"),
        (["sweep", "output_dir=runs-1", "--resume"], "not a run folder"),
        (["sweeep"], "sweeep"),
    ],
    ids=" ".join,
)
def test_other_verbs(arguments, expected, shell):
    assert expected in shell.refused(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["scan", "zoo:planted-llama"],
        ["eval", "zoo:planted-llama", "eval.perplexity.t=zoo:text"],
        ["schema"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_an_output_that_cannot_be_written_is_refused_first(arguments, shell, monkeypatch):
    (shell.folder / "file").write_text("")
    message = shell.refused(*arguments, "--output", "file/deep/name")
    assert "--output file/deep/name cannot be created" in message and "file is a file" in message
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "is closed to this user" in shell.refused(*arguments, "--output", "new/name")


def test_an_unusable_text(shell):
    (shell.folder / "empty.txt").write_text(" \n")
    (shell.folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, expected in (("empty", "is empty"), ("binary", "not UTF-8 text")):
        assert expected in shell.refused("scan", "zoo:planted-llama", "--prove", "--text", f"{name}.txt")


# --- folders ---


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_a_folder_with_files_is_left_untouched(verb, shell, recipe):
    (shell.folder / "full").mkdir()
    (shell.folder / "full" / "thesis.txt").write_text("important")
    message = refused(shell, verb, recipe(), "output_dir=full")
    assert "exists and is not empty" in message and "choose another output_dir" in message
    assert (shell.folder / "full" / "thesis.txt").read_text() == "important"


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_a_folder_below_a_file(verb, shell, recipe):
    (shell.folder / "file").write_text("")
    assert "is a file" in refused(shell, verb, recipe(), "output_dir=file/run")


def test_an_output_never_takes_the_place_of_a_device_or_a_link(shell, tmp_path):
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(tmp_path / "file")
    for place, kind in ((pipe, "a device or pipe"), (link, f"a link to {tmp_path / 'file'}")):
        assert f"is {kind}. Give the name of a file" in shell.refused("schema", "--output", str(place))
    assert pipe.is_fifo() and link.is_symlink() and not link.exists()

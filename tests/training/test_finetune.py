"""One fine-tuning alone in one process: what the reuse proof on two processes (`test_engine.py`) does not vary."""

from __future__ import annotations

import functools
import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.run_folders import contents
from helpers.small import SMALL

from macdrop.errors import ConfigError, TrainingInvariantError
from tune.config.run_spec import TrainSpec
from tune.errors import TrainingDiverged

pytestmark = [pytest.mark.zero, pytest.mark.usefixtures("own_cache")]

SETTINGS = {**SMALL, "max_steps": 4, "zero_stage": 0}


def train(folder: Path, observe=None, **changes) -> tuple[list[dict], object]:
    """Metrics of every step, and the outcome."""
    from tune.training.single import train_here

    rows: list[dict] = []

    def watch(metrics: dict) -> str:
        rows.append(metrics)
        return observe(metrics) if observe else "go_on"

    outcome = train_here(TrainSpec(**{**SETTINGS, **changes}), folder, observe=watch, threads=1)
    return rows, outcome


def stop_after(step: int, word: str = "stop"):
    return lambda metrics: word if metrics["step"] >= step else "go_on"


def losses(rows: list[dict]) -> list[float]:
    return [row["loss"] for row in rows if "loss" in row]


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> list[float]:
    return losses(train(tmp_path_factory.mktemp("reference"))[0])


@pytest.mark.parametrize("stage", [2, 3])
def test_cpu_offload_trains_the_same(tmp_path, reference, stage):
    assert losses(train(tmp_path, zero_stage=stage, offload="cpu")[0]) == pytest.approx(reference, rel=1e-4)


@pytest.mark.parametrize("stage", [0, 3])
def test_gradient_checkpointing_trains_the_same(tmp_path, reference, stage):
    rows, _ = train(tmp_path, zero_stage=stage, gradient_checkpointing=True)
    assert losses(rows) == pytest.approx(reference, rel=1e-5)


def test_accumulation_is_one_large_batch(tmp_path, reference):
    """The loss is a mean over the step's answer tokens, however they are spread over micro-steps."""
    plain = losses(train(tmp_path / "one", macdrop={"p0": 0.0})[0])
    spread = losses(
        train(tmp_path / "four", macdrop={"p0": 0.0}, per_device_train_batch_size=1, gradient_accumulation_steps=4)[0]
    )
    assert spread == pytest.approx(plain, rel=1e-5)
    assert plain != pytest.approx(reference, rel=1e-5)


def test_rslora_scales_by_the_root_of_the_rank(tmp_path):
    train(tmp_path, use_rslora=True, lora_rank=4)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["use_rslora"] is True and config["inference_mode"] is True
    from peft import PeftModel

    from macdrop import load_model
    from tune.zoo.catalog import resolve

    model = PeftModel.from_pretrained(load_model(resolve(SETTINGS["model_name_or_path"])), tmp_path / "adapter")
    layer = next(module for module in model.modules() if hasattr(module, "lora_A"))
    assert layer.scaling["default"] == pytest.approx(4 / math.sqrt(4))


def test_adapter_on_disk_is_the_model_that_was_trained(tmp_path):
    """The validation loss by PEFT and transformers alone equals the one that training reported."""
    import torch
    from peft import PeftModel

    from macdrop import load_model, load_tokenizer
    from tune.data import dataset as data
    from tune.storage.places import cache_dir
    from tune.zoo.catalog import resolve

    spec = TrainSpec(**SETTINGS)
    _, outcome = train(tmp_path)
    source = resolve(spec.model_name_or_path)
    prepared = data.load(data.prepare(spec, load_tokenizer(source), cache_dir() / "data"))
    model = PeftModel.from_pretrained(load_model(source), tmp_path / "adapter").eval()
    total = tokens = 0.0
    with torch.no_grad():
        for number in range(len(prepared.validation)):
            ids, labels = (torch.tensor(part)[None] for part in prepared.validation[number])
            count = int((labels[:, 1:] != -100).sum())
            total += float(model(input_ids=ids, labels=labels).loss) * count
            tokens += count
    assert outcome.eval_loss == pytest.approx(total / tokens, rel=1e-5)


def test_divergence_is_a_clear_error_and_leaves_no_partial_files(tmp_path):
    with pytest.raises(TrainingDiverged, match="Lower learning_rate"):
        train(tmp_path, learning_rate=1e30)
    assert not (tmp_path / "adapter").exists()
    assert not list(tmp_path.glob(".tmp-*"))


def test_changed_base_is_detected(tmp_path):
    """Somebody writes to a frozen weight during training."""
    import gc

    from transformers import LlamaForCausalLM

    def tamper(metrics: dict) -> str:
        for thing in gc.get_objects():
            held = isinstance(thing, LlamaForCausalLM) and hasattr(thing, "peft_config")
            if held and thing.lm_head.weight.dim() == 2:  # not one that a finished ZeRO-3 engine left partitioned
                thing.lm_head.weight.data[0, 0] += 1
        return "go_on"

    with pytest.raises(TrainingInvariantError, match="base weights changed"):
        train(tmp_path, tamper)
    assert not (tmp_path / "adapter").exists()


def test_unchanged_adapter_is_detected(tmp_path):
    """One step, and its learning rate is the first of the warm-up: 0."""
    with pytest.raises(TrainingInvariantError, match="did not learn anything.*lora_B"):
        train(tmp_path, max_steps=1, warmup_ratio=1.0, macdrop={"schedule": "constant"})


@pytest.mark.parametrize("stage, bf16", [(0, False), (0, True), (1, True), (3, False)])
def test_every_tensor_of_an_embedding_s_adapter_moves(tmp_path, stage, bf16):
    from safetensors.torch import load_file

    targets = ["q_proj", "embed_tokens"]
    _, outcome = train(tmp_path, lora_target=targets, zero_stage=stage, bf16=bf16, save_steps=0)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert outcome.unmoved == [] and sum("lora_embedding" in name for name in tensors) == 2
    assert all(tensor.any() for tensor in tensors.values())


def cut_off(monkeypatch, layers: range) -> None:
    """Cut the outputs of these layers' q_proj off from the loss."""
    from tune.training import engine

    def built(base, spec):
        model = add_adapter(base, spec)
        for number in layers:
            layer = model.get_submodule(f"base_model.model.model.layers.{number}.self_attn.q_proj")
            layer.register_forward_hook(lambda module, args, output: output.detach())
        return model

    add_adapter = engine.add_adapter
    monkeypatch.setattr(engine, "add_adapter", built)


@pytest.mark.parametrize("checkpointing, seen", [(True, 9), (False, 0)])
def test_an_adapter_that_no_gradient_reaches_ends_at_once(tmp_path, monkeypatch, checkpointing, seen):
    cut_off(monkeypatch, range(4))
    rows: list[dict] = []
    with pytest.raises(TrainingInvariantError, match="lora_target"):
        train(
            tmp_path,
            lambda row: rows.append(row) or "go_on",
            lora_target=["q_proj"],
            max_steps=30,
            gradient_checkpointing=checkpointing,
        )
    assert len(losses(rows)) == seen and not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_micro_batch_that_reaches_no_layer_of_the_adapter_adds_nothing(tmp_path, monkeypatch, stage):
    """Its rank goes on, as others may wait for it in the next collective."""
    from tune.forward.answer_loss import AnswerLoss

    taken = itertools.count()
    nats = AnswerLoss.__call__

    def every_other(self, *targets, **inputs):
        found = nats(self, *targets, **inputs)
        return found.detach() if found.requires_grad and next(taken) % 2 else found

    monkeypatch.setattr(AnswerLoss, "__call__", every_other)
    rows, outcome = train(tmp_path, zero_stage=stage, gradient_accumulation_steps=2, packing="off")
    assert outcome.status == "done" and outcome.unmoved == [] and all(map(math.isfinite, losses(rows)))


@pytest.mark.parametrize("stage, bf16", [(0, False), (2, True), (3, False)])
def test_layers_without_a_gradient_are_named_and_the_adapter_is_kept(tmp_path, monkeypatch, stage, bf16):
    """The output of one layer's q_proj is cut off from the loss; weight decay moves its drawn factor all the same."""
    cut_off(monkeypatch, range(1, 2))
    _, outcome = train(tmp_path, zero_stage=stage, bf16=bf16, weight_decay=0.1)
    layer = "base_model.model.model.layers.1.self_attn.q_proj"
    assert sorted(outcome.unmoved) == [f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"]
    assert json.loads((tmp_path / "trial.json").read_text())["unmoved"] == list(outcome.unmoved)
    assert adapter_of(tmp_path)
    assert train(tmp_path, zero_stage=stage, bf16=bf16, weight_decay=0.1)[1] == outcome, "a finished one still tells"


def test_drawn_factors_are_not_missed_after_a_single_update(tmp_path):
    assert train(tmp_path, max_steps=1, lr_scheduler_type="constant")[1].unmoved == []


def test_dora_on_weights_without_a_direction_is_refused(tmp_path):
    """One column of the planted model's embeddings is zero, and PEFT would compute 0 / 0."""
    with pytest.raises(ConfigError, match="DoRA cannot be trained on model.embed_tokens: 1 of its 64"):
        train(tmp_path, lora_target=["embed_tokens"], use_dora=True)


def test_a_refused_resume_names_the_keys_and_changes_nothing(tmp_path):
    train(tmp_path, stop_after(2), save_steps=2)
    (tmp_path / "checkpoints" / ".tmp-left").mkdir()
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="other settings") as caught:
        train(tmp_path, save_steps=2, seed=1, learning_rate=1e-5)
    for line in ("seed: 0 when it was started, 1 now", "learning_rate: 0.002 when it was started, 1e-05 now"):
        assert line in str(caught.value)
    assert "save_steps" not in str(caught.value) and "lora_rank" not in str(caught.value)
    assert contents(tmp_path) == before and (tmp_path / "checkpoints" / ".tmp-left").is_dir()
    assert train(tmp_path, save_steps=2)[1].resumed_from == 2
    assert not (tmp_path / "checkpoints").exists()


def test_a_resume_on_other_data_is_refused_by_the_steps(tmp_path):
    file = tmp_path / "rows.jsonl"
    row = json.dumps({"instruction": "say cat", "output": "cat"})
    settings = {"max_steps": None, "num_train_epochs": 4, "dataset": str(file), "val_size": 2, "save_steps": 1}
    file.write_text(f"{row}\n" * 10)
    train(tmp_path / "run", stop_after(2), **settings)
    file.write_text(f"{row}\n" * 20)
    with pytest.raises(ConfigError, match="optimizer steps of the whole fine-tuning .*: 8 when .*, 20 now"):
        train(tmp_path / "run", **settings)


def test_counts_continue_over_a_resume(tmp_path, monkeypatch):
    from tune.training import finetune

    def clock(tick: float) -> SimpleNamespace:
        return SimpleNamespace(monotonic=functools.partial(next, itertools.count(step=tick)))

    _, whole = train(tmp_path / "whole")
    monkeypatch.setattr(finetune, "time", clock(1000.0))
    train(tmp_path / "cut", stop_after(2), save_steps=2)
    monkeypatch.setattr(finetune, "time", clock(1.0))
    rows, resumed = train(tmp_path / "cut", save_steps=2)
    assert resumed.resumed_from == 2 and losses(rows)
    assert resumed.seconds >= 1000 and resumed.seconds % 1000, "those before the checkpoint, and those after it"
    assert (resumed.entries_dropped, resumed.entries_masked) == (whole.entries_dropped, whole.entries_masked)
    metrics = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").open()]
    assert [row["step"] for row in metrics if "loss" in row] == [1, 2, 3, 4]


def test_an_engine_refuses_a_spec_it_was_not_built_for(tmp_path):
    from tune.data import dataset as data
    from tune.storage.places import cache_dir
    from tune.training.engine import Engine
    from tune.training.finetune import finetune
    from tune.training.process_group import prepare_process

    prepare_process()
    spec = TrainSpec(**SETTINGS, macdrop={"p0": 0.0})
    engine = Engine(spec)
    prepared = data.load(data.prepare(spec, engine.tokenizer, cache_dir() / "data"))
    with pytest.raises(ConfigError, match="built for other settings"):
        finetune(engine, spec.model_copy(update={"lora_rank": 8}), prepared, tmp_path)
    with pytest.raises(ConfigError, match="massive weights"):
        finetune(engine, TrainSpec(**SETTINGS), prepared, tmp_path)


@pytest.mark.parametrize("arm", ["random_rows", "all_rows", "activations"])
def test_a_placebo_trains_and_drops(arm, tmp_path):
    from tune.config.sections import ARMS

    block = {"p0": 0.5, "schedule": "constant", "scope": ARMS[arm]}
    _, outcome = train(tmp_path / "run", max_steps=2, macdrop=block)
    assert outcome.status == "done" and outcome.rows_hooked > 0
    assert abs(outcome.entries_dropped / outcome.entries_masked - 0.5) < 0.1
    assert json.loads((tmp_path / "run" / "trial.json").read_text())["arm"] == arm


def test_a_placebo_registered_from_outside_trains_and_drops(tmp_path, monkeypatch):
    from macdrop import config
    from tune.config import sections

    monkeypatch.setitem(config.SCOPES, "bottom", config.Scope(lambda weights, k, seed: weights.indices[-k:]))
    monkeypatch.setitem(sections.ARMS, "bottom_rows", "bottom")
    _, outcome = train(tmp_path / "run", max_steps=2, macdrop={"p0": 0.5, "scope": "bottom"})
    assert outcome.status == "done" and outcome.rows_hooked > 0
    assert json.loads((tmp_path / "run" / "trial.json").read_text())["arm"] == "bottom_rows"


def adapter_of(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def steps_saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("*"))


def test_leaving_saves_at_once_and_loses_nothing(tmp_path):
    """Asked to leave at a step without a checkpoint, it saves one there; the final bits are the same."""
    train(tmp_path / "whole")
    rows, left = train(tmp_path / "cut", stop_after(1, "leave"), save_steps=0)
    assert (left.status, left.step, len(losses(rows))) == ("left", 2, 2)
    assert steps_saved(tmp_path / "cut") == ["step-00000002"] and not (tmp_path / "cut" / "adapter").exists()
    rows, done = train(tmp_path / "cut", save_steps=0)
    assert (done.status, done.resumed_from, [row["step"] for row in rows]) == ("done", 2, [3, 4])
    assert adapter_of(tmp_path / "cut") == adapter_of(tmp_path / "whole")
    assert train(tmp_path / "late", stop_after(3, "leave"))[1].status == "done", "heard at the last step"


def test_finished_fine_tuning_keeps_no_checkpoint_and_is_not_repeated(tmp_path):
    rows, done = train(tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    assert train(tmp_path) == ([], done)
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    assert losses(train(tmp_path)[0]) == losses(rows), "a damaged one is trained again"
    assert train(tmp_path, seed=1)[0], "another fine-tuning"


@pytest.mark.parametrize("save_steps, saved", [(None, [1, 2, 3]), (0, []), (2, [2])])
def test_checkpoints_are_made_every_tenth_of_the_steps_by_default(save_steps, saved, tmp_path):
    """Steps as they were there after each step; two are kept."""
    seen = []

    def look(metrics: dict) -> str:
        seen.append(steps_saved(tmp_path))
        return "go_on"

    train(tmp_path, look, save_steps=save_steps)
    names = [f"step-{step:08d}" for step in saved]
    assert seen[-1] == names[-2:] and set().union(*seen) == set(names)


def test_failing_observer_ends_the_fine_tuning(tmp_path):
    def fail(metrics: dict) -> str:
        if metrics["step"] >= 2:
            raise OSError("no metrics can be written")
        return "go_on"

    with pytest.raises(OSError, match="no metrics"):
        train(tmp_path, fail)
    assert not (tmp_path / "adapter").exists()

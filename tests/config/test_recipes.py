"""Every shipped recipe can be read and planned, without its models, its data or a network."""

from __future__ import annotations

from pathlib import Path

import pytest

import tune
from tune.config.eval_spec import jobs
from tune.config.run_spec import load
from tune.data.batching import total_steps
from tune.scheduling.resources import resources
from tune.scheduling.study import studies

RECIPES = sorted((Path(tune.__file__).parent / "config" / "recipes").glob("*.yaml"))


def recipe(name: str):
    return load(next(path for path in RECIPES if path.stem == name))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
class TestEveryRecipe:
    def test_begins_with_a_description_and_its_command(self, path):
        first, second = path.read_text(encoding="utf-8").splitlines()[:2]
        command = "macdrop sweep" if path.stem == "demo" else f"macdrop sweep {path.stem}"
        assert first.startswith("# ") and first.endswith(f". `{command}`") and len(first) <= 120
        assert second.startswith("#")

    def test_compares_macdrop_with_plain_adapters_and_the_base(self, path):
        spec = load(path)
        for study in studies(spec):
            assert study.base and study.plain
            assert study.trials is None or study.trials, "a grid whose every point is a baseline"
            assert study.count > len(study.plain)

    def test_scores_all_of_them_plain_and_under_attack(self, path):
        attacks = {job.attack for job in jobs(load(path).eval)}
        assert "none" in attacks and len(attacks) > 1

    def test_no_schedule_is_always_zero(self, path):
        """`epoch_after` is 0 throughout a run of one epoch, so such a trial would be plain under another name."""
        spec = load(path)
        space = spec.sweep.parameters.get("macdrop.schedule")
        names = [spec.macdrop.schedule, *(space.values if space else [])]
        several = spec.max_steps is None and spec.num_train_epochs > 1
        assert several or not {"epoch_before", "epoch_after"} & set(names)

    def test_resources_can_be_computed(self, path):
        needed = resources(load(path).ray, cluster_gpus=8)
        assert needed.cpus >= 1 and "GPU" in needed.sum


def test_the_papers_recipe_is_the_papers_set_up():
    spec = recipe("paper")
    assert spec.per_device_train_batch_size * spec.gradient_accumulation_steps * spec.ray.num_workers == 256
    held_out = round(52_002 * spec.val_size)
    assert total_steps(spec, 52_002 - held_out, 256) == 579  # alpaca_gpt4_en has 52,002 rows
    assert (spec.learning_rate, spec.warmup_ratio, spec.adam_beta1, spec.adam_beta2) == (1e-4, 0.05, 0.9, 0.999)
    assert (spec.lora_rank, spec.lora_alpha, spec.lora_target) == (16, 16, "all")
    assert (spec.macdrop.k, spec.macdrop.p0, spec.macdrop.schedule) == (5, 0.8, "step")
    assert [study.name for study in studies(spec)] == ["Meta-Llama-3-8B", "Mistral-7B-v0.1"]
    for study in studies(spec):
        assert [plain.use_dora for plain in study.plain] == [False, True]
        assert [study.searched(values).use_dora for values in study.trials] == [False, True]
    tasks = {job.task for job in jobs(spec.eval) if job.benchmark == "zero_shot" and job.attack == "zeroing@3"}
    assert tasks == {"arc_easy", "arc_challenge", "boolq", "piqa", "winogrande"}


def test_the_recipe_for_real_input_covers_every_kind_of_benchmark_with_lora_and_dora():
    spec = recipe("real")
    assert (spec.zero_stage, spec.ray.num_workers, spec.sweep.search_alg) == (3, 2, "optuna")
    assert spec.sweep.num_samples >= 8 and spec.sweep.parameters["use_dora"].values == [False, True]
    assert {job.benchmark for job in jobs(spec.eval)} == {"zero_shot", "perplexity", "generation"}


def test_a_recipes_paths_are_relative_and_can_be_named_on_the_command_line():
    path = next(path for path in RECIPES if path.stem == "real")
    spec = load(path, ["sweep.models=[elsewhere/model]", "eval.zero_shot.arc_easy.data=elsewhere/arc.jsonl"])
    assert spec.sweep.models == [{"model_name_or_path": "elsewhere/model"}]
    assert spec.eval.zero_shot["arc_easy"].data == ["elsewhere/arc.jsonl"]
    assert spec.eval.zero_shot["arc_easy"].limit == 100

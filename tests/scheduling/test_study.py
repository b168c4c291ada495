"""What a run will do: one plain baseline for each setting that is not MacDrop's, no trial twice, arms, resources."""

from __future__ import annotations

import pytest

from macdrop.errors import ConfigError
from tune.config.run_spec import RaySpec, load
from tune.scheduling.resources import check_local, gpu_shares, one_lane, resources
from tune.scheduling.study import Study, benchmark_runs, outline, studies
from tune.training.optimizers.snr_record import AdapterSnr, SnrRecord

MODEL = "model_name_or_path=zoo:planted-llama"


def study(*overrides: str) -> Study:
    (found,) = studies(load(None, [MODEL, *overrides]))
    return found


def points(found: Study) -> list[tuple]:
    return [tuple(values.values()) for values in found.trials]


def space(**axes: str) -> list[str]:
    return [f"sweep.parameters.{key.replace('__', '.')}={value}" for key, value in axes.items()]


def test_without_search_one_plain_and_one_macdrop_trial():
    found = study()
    assert found.base and len(found.plain) == 1 and found.plain[0].arm == "plain"
    assert found.trials == ({},) and found.searched({}).arm == "macdrop"


def test_the_plain_arm_is_trained_once_and_not_once_per_macdrop_setting():
    found = study(*space(macdrop__k="[1, 3, 5]", macdrop__p0="[0.2, 0.8]"))
    assert len(found.plain) == 1 and found.samples == 6 and found.searched_count == 7
    assert {found.searched(values).arm for values in found.trials} == {"macdrop"}


def test_one_baseline_for_each_setting_of_the_other_keys():
    found = study(*space(macdrop__p0="[0.2, 0.8]", use_dora="[false, true]", lora_rank="[2, 4, 8]"))
    wanted = [(dora, rank) for dora in (False, True) for rank in (2, 4, 8)]
    assert [(plain.use_dora, plain.lora_rank) for plain in found.plain] == wanted
    assert found.samples == 12
    for values in found.trials:
        plain = found.searched(values).model_copy(update={"macdrop": found.plain[0].macdrop})
        assert plain in found.plain, "every MacDrop trial has the baseline that differs in nothing else"


def test_what_is_the_baseline_in_other_words_is_no_trial():
    found = study(*space(macdrop__k="[0, 3]", macdrop__p0="[0, 0.5]"))
    assert points(found) == [(3, 0.5)] and len(found.plain) == 1


def test_equal_points_are_trained_once():
    found = study(*space(macdrop__schedule="[step, exp]", macdrop__alpha="[0.01, 0.05]", macdrop__k="[3, 3]"))
    assert points(found) == [("step", 0.01, 3), ("exp", 0.01, 3), ("exp", 0.05, 3)]
    assert len({found.searched(values).trial_id() for values in found.trials}) == 3


@pytest.mark.parametrize(
    ("arms", "base", "plain", "trials"),
    [
        ("[base]", True, 0, 0),
        ("[plain]", False, 2, 0),
        ("[base, plain]", True, 2, 0),
        ("[macdrop]", False, 0, 2),
        ("[plain, macdrop]", False, 2, 2),
        ("[base, plain, macdrop]", True, 2, 2),
    ],
)
def test_arms(arms, base, plain, trials):
    found = study(f"sweep.arms={arms}", *space(macdrop__p0="[0, 0.5]", lora_rank="[2, 4]"))
    assert (found.base, len(found.plain), found.samples) == (base, plain, trials)


def test_a_searcher_draws_its_trials():
    found = study("sweep.search_alg=optuna", "sweep.num_samples=5", *space(macdrop__p0="{min: 0.1, max: 1}"))
    assert found.trials is None and found.samples == 5 and len(found.plain) == 1 and found.searched_count == 6


def test_with_a_searcher_listed_values_have_their_baselines_and_ranges_the_default():
    found = study(
        "sweep.search_alg=random",
        *space(use_dora="[false, true]", learning_rate="{min: 0.001, max: 0.1}", macdrop__k="[1, 2]"),
    )
    assert [(plain.use_dora, plain.learning_rate) for plain in found.plain] == [(False, 1e-4), (True, 1e-4)]


def test_no_more_baselines_than_trials_drawn():
    listed = space(use_dora="[false, true]", lora_rank="[2, 4, 8]", macdrop__p0="[0.5]")
    assert len(study("sweep.search_alg=random", "sweep.num_samples=5", *listed).plain) == 1
    assert len(study("sweep.search_alg=random", "sweep.num_samples=6", *listed).plain) == 6


def test_a_searcher_without_the_macdrop_arm_has_no_macdrop_keys_to_draw():
    only_macdrop = space(macdrop__p0="{min: 0.1, max: 1}")
    found = study("sweep.search_alg=optuna", "sweep.arms=[base, plain]", *only_macdrop)
    assert (found.trials, found.samples, len(found.plain)) == ((), 0, 1)
    found = study("sweep.search_alg=optuna", "sweep.arms=[plain]", *only_macdrop, *space(lora_rank="[2, 4]"))
    assert list(found.parameters) == ["lora_rank"] and found.trials is None
    assert found.searched({"lora_rank": 4}).arm == "plain"


def test_several_models_are_several_studies():
    run = load(None, ["sweep.models=[zoo:planted-llama, {model: zoo:planted-phi3, use_dora: true}]"])
    first, second = studies(run)
    assert (first.name, second.name) == ("planted-llama", "planted-phi3")
    assert not first.plain[0].use_dora and second.plain[0].use_dora
    assert first.plain[0].trial_id() != second.plain[0].trial_id()


@pytest.mark.parametrize(
    ("models", "told"),
    [("[a/m, a/m]", "a/m more than once"), ("[a/m, b/m]", "a/m and b/m: both would be called m")],
)
def test_two_models_of_one_name_are_refused(models, told):
    with pytest.raises(ConfigError, match=".") as caught:
        studies(load(None, [f"sweep.models={models}"]))
    assert told in str(caught.value)


def test_a_grid_with_an_impossible_point_is_refused():
    with pytest.raises(ConfigError, match="zero_stage"):
        study(*space(zero_stage="[0, 2]", offload="[none, cpu]"))


# --- resources ---


def test_the_sum_is_written_out():
    spec = RaySpec(num_workers=2, lanes=3, evaluators=2, cpus_per_worker=1.5, cpus_per_evaluator=0.5)
    found = resources(spec, cluster_gpus=0)
    assert (found.cpus, found.gpus) == (3 * 2 * 1.5 + 2 * 0.5, 0)
    assert found.sum.endswith("= 10 CPU, 0 GPU")
    assert resources(spec, cluster_gpus=8).gpus == 8


@pytest.mark.parametrize(
    ("asked", "cluster", "shares"),
    [((None, None), 0, (0, 0)), ((None, None), 4, (1, 1)), ((0.5, 0.25), 1, (0.5, 0.25)), ((0.0, None), 2, (0, 1))],
)
def test_gpu_shares(asked, cluster, shares):
    spec = RaySpec(gpus_per_worker=asked[0], gpus_per_evaluator=asked[1])
    assert gpu_shares(spec, cluster) == shares


def test_more_cpus_than_there_are_are_refused_with_the_arithmetic(monkeypatch):
    cpus = 3  # of a machine that may have more: by affinity or a cgroup
    monkeypatch.setattr("tune.scheduling.resources.cpus", lambda: cpus)
    check_local(RaySpec(num_workers=cpus))
    with pytest.raises(ConfigError) as caught:
        check_local(RaySpec(num_workers=cpus + 1))
    assert f"{cpus + 1} of {cpus}" in str(caught.value) and "Lower ray.num_workers" in str(caught.value)
    with pytest.raises(ConfigError, match="ray.cpus_per_evaluator 1 ="):
        check_local(RaySpec(num_workers=cpus, cpus_per_evaluator=1.0))
    check_local(RaySpec(num_workers=cpus + 1, address="auto"))
    check_local(one_lane(RaySpec(num_workers=cpus, lanes=2, cpus_per_evaluator=1.0)))


# --- stages ---

OPTUNA = "sweep.search_alg=optuna"


@pytest.mark.parametrize(
    ("overrides", "search", "searched", "final"),
    [
        ([], False, 0, 6),
        (["sweep.seeds=0"], False, 0, 2),
        (space(macdrop__p0="[0.2, 0.8]"), True, 3, 6),
        ([*space(macdrop__p0="[0.2, 0.8]"), "sweep.seeds=0"], True, 3, 0),
        ([*space(macdrop__p0="[0.2, 0.8]"), "sweep.seeds=0", "sweep.arms=[macdrop, all_rows]"], True, 2, 1),
        ([*space(macdrop__p0="[0.2, 0.8]"), "sweep.finalists=5"], True, 3, 9),
        (space(use_dora="[false, true]"), False, 0, 12),
        (space(lora_rank="[2, 4]"), True, 4, 6),
        (["sweep.arms=[base]"], False, 0, 0),
        (["sweep.arms=[plain]"], False, 0, 3),
        (["sweep.arms=[plain]", *space(lora_rank="[2, 4]")], True, 2, 3),
        ([OPTUNA, *space(macdrop__p0="{min: 0.1, max: 1}")], True, 9, 6),
        ([OPTUNA, *space(learning_rate="{min: 0.1, max: 1}", use_dora="[true, false]")], True, 12, 12),
    ],
)
def test_the_search_and_the_final_stage_are_counted(overrides, search, searched, final):
    found = study(*overrides)
    assert (found.search, found.searched_count, found.final_count) == (search, searched, final)


def test_fresh_seeds_follow_the_searchs_and_never_are_it():
    assert study("seed=4", "sweep.seeds=2").seeds == (5, 6) and study("seed=4", "sweep.seeds=2").reseeded
    assert study("seed=4", "sweep.seeds=0").seeds == (4,) and not study("seed=4", "sweep.seeds=0").reseeded
    with pytest.raises(ConfigError, match="seed"):
        study(f"seed={2**31 - 2}", "sweep.seeds=3")


def test_cells_are_kinds_of_adapter():
    found = study(*space(use_dora="[false, true]", use_rslora="[false, true]", lora_rank="[2, 4]"))
    assert found.cells == 4 and found.cell(found.plain[0]) == {"use_dora": False, "use_rslora": False}
    assert study().cells == 1 and study().cell(found.plain[0]) == {}


def test_the_outline_says_what_selects_and_what_is_compared():
    run = load(
        None,
        [
            MODEL,
            *space(macdrop__p0="[0.2, 0.8]"),
            "sweep.arms=[base, plain, macdrop, all_rows]",
            "eval.zero_shot=[a]",
            "validation.zero_shot=[b, c]",
        ],
    )
    (found,) = studies(run)
    told = dict(outline(run, found))
    assert told["base"] == "scored on 1 benchmark(s) and 2 for validation"
    assert told["search"] == "3 fine-tunings on seed 0; the best by eval_loss (minimize) advance"
    assert told["final"] == "plain, the best macdrop, all_rows on seeds 1, 2, 3: 9 fine-tunings"
    assert benchmark_runs(run, [found]) == (9 + 1) * 1 + (3 + 1) * 2


def test_placebos_of_nothing_are_refused():
    with pytest.raises(ConfigError, match="no trial of planted-llama drops"):
        study("macdrop.p0=0", "sweep.arms=[plain, macdrop, random_rows]")


def test_a_study_without_a_search_scores_no_validation():
    run = load(None, [MODEL, "eval.zero_shot=[a]", "validation.zero_shot=[b]"])
    assert benchmark_runs(run, studies(run)) == 6 + 1


AUTO = ("zero_stage=0", "optimizer=slimadam", "slimadam_rules=auto")


@pytest.mark.parametrize(
    "overrides, kinds",
    [
        (("zero_stage=0",), 0),
        ((*AUTO, "sweep.parameters.optimizer=[adamw, lion]"), 0),
        ((*AUTO, "sweep.arms=[base]"), 0),
        (AUTO, 1),
        ((*AUTO, "sweep.parameters.optimizer=[adamw, slimadam]", "sweep.parameters.learning_rate=[1e-4, 2e-4]"), 1),
        ((*AUTO, "sweep.parameters={use_dora: [false, true], lora_target: [[q_proj], all]}"), 4),
    ],
)
def test_rules_are_measured_for_each_kind_of_adapter_if_a_trial_can_need_them(overrides, kinds):
    found = study(*overrides)
    assert len(found.unruled) == kinds
    told = dict(outline(load(None, [MODEL, *overrides]), found))
    assert ("rules" in told) == (kinds > 0)


def test_measured_rules_name_the_trials_of_every_arm():
    found = study(*AUTO, "sweep.parameters={optimizer: [adamw, slimadam], macdrop.p0: [0.0, 0.8]}")
    rules, others = ({"q_proj/A": rule} for rule in ("fan_out", "fan_in"))
    (kind,) = SnrRecord.model_construct(adapters=[AdapterSnr.model_construct(**_own(found), kinds={})]).rules()
    ruled, other = (found.with_measured({kind: each}) for each in (rules, others))
    names = [{spec.trial_id() for spec in (*each.plain, *map(each.searched, each.trials))} for each in (ruled, other)]
    assert len(names[0]) == 4 and len(names[0] & names[1]) == 2, "trials of adamw keep their names"
    specs = [*ruled.plain, *map(ruled.searched, ruled.trials)]
    assert {str(spec.slimadam_rules) for spec in specs if spec.optimizer == "slimadam"} == {str(rules)}


def _own(found: Study) -> dict:
    return {key: getattr(found.spec, key) for key in ("use_dora", "use_rslora", "lora_target")}

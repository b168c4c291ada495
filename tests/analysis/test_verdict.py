"""tune.analysis.verdict: what is said of runs with a known effect, and that no run is said more of than it allows."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from helpers.run_folders import make_run

from tune.analysis.comparison import Comparison, Sample, compare, corrected
from tune.analysis.stats import holm
from tune.analysis.verdict import Verdict, verdicts
from tune.evaluation.score_names import Column, mean_columns
from tune.storage.run_folder import RunFolder

MODEL = "zoo:planted-llama"
EFFECT = {("macdrop", "none"): -0.3, ("macdrop", "zeroing@3"): 0.4}
SMALL = {"items": 40, "tried": 2, "attacks": ("none", "zeroing@3"), "seed_sd": 0.004, "correlation": 0.9}
ABOUT = {"arm": "macdrop", "label": "MacDrop", "against": "plain LoRA"}
ACC = Column("zero_shot", "qa", "acc", higher_is_better=True)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> RunFolder:
    """Five seeds; MacDrop is worse without attack and better under it, random rows change nothing."""
    return make_run(tmp_path_factory.mktemp("runs") / "run", seeds=(1, 2, 3, 4, 5), effect=EFFECT, **SMALL)


@pytest.fixture(scope="module")
def found(run_folder) -> list[Verdict]:
    return verdicts(run_folder, MODEL)


def row(verdict: Verdict, name: str) -> Comparison:
    (one,) = [row for row in verdict.rows if row.column.name == name]
    return one


def sample(differences, plain=0.5, column=ACC) -> Sample:
    d = np.asarray(differences, dtype=float)
    per_seed = d.mean(axis=1)
    return Sample(column, tuple(range(len(d))), (plain,) * len(d), tuple(plain + per_seed), d)


# --- runs ---


def test_planted_effects_are_found_and_placebos_are_not(found):
    macdrop, random = found
    assert [one.arm for one in found] == ["macdrop", "random_rows"] and macdrop.seeds == (1, 2, 3, 4, 5)
    assert (macdrop.status, random.status) == ("hurts", "cannot tell")
    assert (macdrop.headline.verdict, macdrop.attacked.verdict) == ("hurts", "helps")
    assert macdrop.headline.column.task == "mean of 2" and macdrop.attacked.column.attack == "zeroing@3"
    assert macdrop.headline.delta == pytest.approx(-0.3, abs=0.1) and macdrop.headline.items == 80
    assert macdrop.headline.low < macdrop.headline.delta < macdrop.headline.high < 0
    assert macdrop.tried == 2 and macdrop.cell == {} and macdrop.model == MODEL


def test_numbers_are_those_of_the_scores(run_folder, found):
    scores = {(r["trial"], r["task"], r["metric"], r["attack"]): r["value"] for r in run_folder.score_rows()}
    arms = {}
    for trial in run_folder.trials():
        if trial.stage == "final":
            arms.setdefault(trial.arm, []).append((trial.seed, trial.trial))
    plain, macdrop = ([scores[t, "qa", "acc", "none"] for _, t in sorted(arms[arm])] for arm in ("plain", "macdrop"))
    one = row(found[0], "zero_shot/qa/acc")
    assert one.plain == pytest.approx(np.mean(plain)) and one.value == pytest.approx(np.mean(macdrop))
    assert one.per_seed == pytest.approx(np.subtract(macdrop, plain))
    assert one.delta == pytest.approx(one.value - one.plain)
    text = row(found[0], "perplexity/text/perplexity")
    logs = [[math.log(scores[t, "text", "perplexity", "none"]) for _, t in arms[arm]] for arm in ("plain", "macdrop")]
    assert text.value / text.plain == pytest.approx(math.exp(np.mean(logs[1]) - np.mean(logs[0])))
    assert text.verdict == "hurts" and 0 < text.low < text.delta < text.high


def test_holm_goes_over_the_tasks_under_one_attack(found):
    for attack in ("none", "zeroing@3"):
        family = [r for r in found[0].rows if r.column.attack == attack and not r.column.is_mean]
        assert len(family) == 4 and not any(r.column.metric == "repeated_4grams" for r in family)
        assert [r.p_holm for r in family] == pytest.approx(holm([r.p for r in family]))
    means = [r for r in found[0].rows if r.column.is_mean]
    assert means and all(r.p_holm == r.p for r in means)


def test_what_is_said(found):
    macdrop, random = found
    assert macdrop.sentence.startswith(f"MacDrop k 3 p0 0.87 exp 0.05 hurts on {MODEL}: mean zero-shot accuracy -")
    assert "5 seeds, 80 items, against plain LoRA." in macdrop.sentence
    assert macdrop.more[1].startswith("Under zeroing@3: helps, mean zero-shot accuracy +")
    assert any(line.startswith("Without attack: hurts, text perplexity +") for line in macdrop.more)
    assert any("Selected from 2 MacDrop settings, then retrained on fresh seeds" in line for line in macdrop.more)
    assert f"is indistinguishable from plain LoRA on {MODEL}" in random.sentence
    assert "or more are detectable with 80 % power." in random.sentence


def test_the_sign_over_seeds_follows_the_headline(found):
    assert found[0].more[0] == "Seed by seed: above plain in 0 of 5, below in 5 (sign test, p = 0.062)."


def test_a_placebo_that_helps_as_well_is_reported(tmp_path):
    both = {("macdrop", "zeroing@3"): 0.4, ("random_rows", "zeroing@3"): 0.4}
    found = verdicts(make_run(tmp_path / "run", seeds=range(1, 6), effect=both, **SMALL), MODEL)
    assert any(line.startswith("The placebo random rows k 3") for line in found[0].more)


def test_one_seed_never_says_helps_or_hurts(tmp_path):
    run_folder = make_run(tmp_path / "run", seeds=(0,), effect=EFFECT, **SMALL)
    for one in verdicts(run_folder, MODEL):
        assert one.status == "cannot tell" and {r.verdict for r in one.rows} == {"cannot tell"}
        assert "one seed says nothing about other seeds" in one.sentence and math.isnan(one.headline.mde)
    macdrop = verdicts(run_folder, MODEL)[0]
    assert row(macdrop, "zero_shot/qa/acc@zeroing@3").p < 0.05  # of these two adapters, by McNemar
    assert any("without retraining on fresh seeds" in line and "favours it" in line for line in macdrop.more)


def test_a_run_that_is_going_on_is_judged_by_the_seeds_that_both_arms_have(tmp_path):
    run_folder = make_run(tmp_path / "run", seeds=(1, 2, 3), lost=[("plain", 3), ("macdrop", 1)], **SMALL)
    (macdrop, random) = verdicts(run_folder, MODEL)
    assert macdrop.seeds == (2,) and random.seeds == (1, 2)
    assert "So far 1 of 3 seeds are scored for both arms." in macdrop.more
    assert verdicts(make_run(tmp_path / "none", seeds=(), **SMALL), MODEL) == []
    lonely = make_run(tmp_path / "lonely", seeds=(1,), lost=[("plain", 1)], **SMALL)
    assert verdicts(lonely, MODEL) == [] and verdicts(lonely, "org/another") == []


def test_arms_are_compared_inside_a_cell(tmp_path):
    cells = [{"use_dora": False}, {"use_dora": True}]
    found = verdicts(make_run(tmp_path / "run", seeds=(1, 2), cells=cells, **SMALL), MODEL)
    assert [(one.cell["use_dora"], one.arm) for one in found] == [
        (False, "macdrop"),
        (False, "random_rows"),
        (True, "macdrop"),
        (True, "random_rows"),
    ]
    assert [one.headline.against for one in found] == ["plain LoRA"] * 2 + ["plain DoRA"] * 2


def test_what_cannot_be_compared_says_why(tmp_path):
    run_folder = make_run(tmp_path / "run", seeds=(1, 2), **SMALL)
    plain = next(t.trial for t in run_folder.trials() if (t.arm, t.stage) == ("plain", "final"))
    file = run_folder.answers_dir(MODEL, plain) / "zero_shot-arith-none.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for one in rows:
        one["doc_id"] += 1
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    (run_folder.answers_dir(MODEL, plain) / "generation-answers-none.jsonl").unlink()
    lost = next(r for r in run_folder.score_rows() if r["trial"] == plain and r["metric"] == "perplexity")
    run_folder.add_scores([{**lost, "value": None}])
    macdrop = verdicts(run_folder, MODEL)[0]
    other, infinite = row(macdrop, "zero_shot/arith/acc"), row(macdrop, "perplexity/text/perplexity")
    assert "different items" in other.words and math.isnan(other.p_holm) and other.verdict == "cannot tell"
    assert "the score of seed 1 is not finite" in infinite.words
    assert "different items" in macdrop.sentence and macdrop.status == "cannot tell"
    assert row(macdrop, "generation/answers/exact_match").items == 0
    assert not math.isnan(row(macdrop, "zero_shot/qa/acc").p_holm)


# --- comparisons ---


def test_arms_that_agree_on_every_item_are_equal_without_certainty():
    made = compare([sample(np.zeros((3, 60)), plain=1.0)], ACC, **ABOUT)
    assert made.verdict == "cannot tell" and "identical on every item" in made.words
    assert made.p == 1 and made.low < 0 < made.high and made.mde > 0.03


def test_interval_and_verdict_never_contradict_each_other():
    draws = np.random.default_rng(0)
    for shift in np.linspace(-0.3, 0.3, 25):
        d = np.sign(draws.normal(shift, 0.4, (4, 80))) * (draws.random((4, 80)) < 0.4)
        made = compare([sample(d)], ACC, **ABOUT)
        assert (made.verdict != "cannot tell") == (made.low > 0 or made.high < 0) == (made.p <= 0.05)
        assert made.verdict in ("cannot tell", "helps" if made.delta > 0 else "hurts")


def test_lower_is_better_for_a_perplexity():
    column = Column("perplexity", "text", "perplexity", higher_is_better=False)
    d = np.full((3, 40), -0.2) + np.random.default_rng(0).normal(0, 0.01, (3, 40))
    value = tuple(20 * np.exp(d.mean(axis=1)))
    made = compare([Sample(column, (1, 2, 3), (20.0,) * 3, value, d)], column, **ABOUT)
    assert made.verdict == "helps" and made.delta == pytest.approx(20 * math.expm1(d.mean()))
    assert made.amount.startswith("-18.") and "%" in made.amount and made.words == "helps: lower in 3 of 3 seeds"


def test_seeds_of_a_perplexity_are_on_the_scale_of_their_mean():
    column = Column("perplexity", "text", "perplexity", higher_is_better=False)
    plain, value = (900.0, 100.0, 200.0), (30.0, 25.0, 20.0)
    made = compare([Sample(column, (1, 2, 3), plain, value, None)], column, **ABOUT)
    ratios = [1 + seed / made.plain for seed in made.per_seed]
    assert ratios == pytest.approx([after / before for after, before in zip(value, plain, strict=True)])
    assert math.prod(ratios) ** (1 / 3) == pytest.approx(made.value / made.plain)


def test_a_family_is_corrected_and_the_uncorrected_p_is_reported():
    draws = np.random.default_rng(3)
    strong = sample(0.5 + draws.normal(0, 0.3, (5, 100)))
    weak = [sample(0.065 + draws.normal(0, 0.3, (5, 100)) + draws.normal(0, 0.03, (5, 1))) for _ in range(6)]
    made = corrected([compare([one], ACC, **ABOUT, family=7) for one in (strong, *weak)])
    assert made[0].verdict == "helps"
    lost = [one for one in made[1:] if one.p <= 0.05 < one.p_holm]
    assert lost and all("uncorrected" in one.words and "after Holm over 7" in one.words for one in lost)


def test_a_difference_beyond_the_scale_is_not_promised():
    made = compare([sample(np.array([[0.0] * 59 + [1.0], [1.0] * 20 + [-1.0] * 40]))], ACC, **ABOUT)
    assert "no difference, however large, is detectable" in made.words
    assert -1 <= made.low and made.high <= 1


def test_means_are_those_of_the_tables(run_folder, found):
    columns = [r.column for r in found[0].rows if not r.column.is_mean]
    assert {r.column for r in found[0].rows if r.column.is_mean} == set(mean_columns(columns))

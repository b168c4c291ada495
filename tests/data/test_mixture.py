"""Mixtures of data sets by weight: shares against a slow reference, determinism, nesting, files, and refusals."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from helpers.prepared_data import answers, make_tokenizer, read, spec, write
from hypothesis import given, settings
from hypothesis import strategies as st

from macdrop.errors import ConfigError, DataError
from tune.config.run_spec import load, values_of, with_values
from tune.config.train.data_keys import DatasetEntry, weights_of
from tune.config.train_spec import TrainSpec
from tune.data import dataset as data
from tune.data.batching import describe_mixture, mix, shares

WEIGHTS = st.lists(st.integers(1, 50), min_size=1, max_size=6)


def slow_shares(total: int, weights: list[int]) -> list[int]:
    """Largest remainders in exact arithmetic, one example at a time."""
    whole = sum(map(Fraction, weights))
    exact = [total * Fraction(weight) / whole for weight in weights]
    parts = [int(each) for each in exact]
    while sum(parts) < total:
        lacking = [each - part for each, part in zip(exact, parts, strict=True)]
        parts[lacking.index(max(lacking))] += 1
    return parts


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 5000), WEIGHTS)
def test_shares_equal_a_slow_reference_and_are_within_one_of_the_weights(total, weights):
    found = shares(total, weights)
    assert sum(found) == total
    assert all(abs(part - total * weight / sum(weights)) < 1 for part, weight in zip(found, weights, strict=True))
    slow = slow_shares(total, weights)
    exact = [total * Fraction(weight, sum(weights)) for weight in weights]
    ties = len({each - int(each) for each in exact}) < len(exact)  # which of equals is first, floats may decide
    assert found == slow or ties


def mixed(sizes, weights, seed=0, held_out=()):
    ends = np.cumsum(sizes).tolist()
    train = np.array([at for at in range(ends[-1]) if at not in held_out], dtype=np.int64)
    found = mix(train, ends, weights, seed)
    counts = [int(((found >= end - size) & (found < end)).sum()) for end, size in zip(ends, sizes, strict=True)]
    return train, found, counts


def test_an_epoch_is_as_long_as_the_data_and_divided_by_the_weights():
    train, found, counts = mixed([100, 300], [1, 1])
    assert len(found) == 400 and counts == [200, 200] and found.dtype == np.int64
    assert (np.diff(found) >= 0).all() and set(found) <= set(train.tolist())
    times = np.bincount(found, minlength=400)
    assert (times[:100] == 2).all() and (times[100:] <= 1).all(), "each as often as any other, within one"
    assert mixed([100, 300], [1, 3])[1].tolist() == train.tolist(), "weights of the sizes change nothing"


def test_a_mixture_repeats_by_its_seed_and_scale_has_no_effect():
    first = mixed([50, 70, 80], [0.2, 3, 1])[1]
    assert mixed([50, 70, 80], [0.2, 3, 1])[1].tolist() == first.tolist()
    assert mixed([50, 70, 80], [0.4, 6, 2])[1].tolist() == first.tolist()
    assert mixed([50, 70, 80], [0.2, 3, 1], seed=1)[1].tolist() != first.tolist()


def test_a_larger_weight_only_adds():
    """The examples of a smaller weight are among those of a larger one: a search compares like with like."""
    _, less, _ = mixed([100, 100], [1, 4])
    _, more, _ = mixed([100, 100], [2, 3])
    own = [set(each[each < 100].tolist()) for each in (less, more)]
    assert len(own[0]) == 40 and len(own[1]) == 80 and own[0] < own[1]


def test_held_out_examples_stay_out():
    _, found, counts = mixed([10, 10], [1, 3], held_out=(0, 5, 19))
    assert not {0, 5, 19} & set(found.tolist()) and counts == [4, 13]


def test_weights_that_cannot_be_met_are_refused():
    with pytest.raises(DataError, match=r"dataset.0.weight 0.001 of 1.001 is not one example of 20"):
        mixed([10, 10], [0.001, 1])
    with pytest.raises(DataError, match=r"dataset.1 has a weight, but none of its examples"):
        mixed([3, 2], [1, 1], held_out=(3, 4))


# --- as data sets ---


@pytest.fixture
def entries(tmp_path):
    """Two files of 30 and 10 rows whose answers say where they are from."""

    def make(*weights):
        files = {"a": 30, "b": 10}
        return [
            DatasetEntry(path=write(tmp_path / f"{name}.jsonl", [row(name, i) for i in range(count)]), weight=weight)
            for (name, count), weight in zip(files.items(), weights, strict=True)
        ]

    def row(name, number):
        return {"instruction": "Go.", "output": f"{name}{number}"}

    return make


def test_a_mixture_of_files(tmp_path, entries):
    tokenizer = make_tokenizer()
    prepared = read(entries(1.0, 3.0), tokenizer, tmp_path, val_size=4)
    given = [answers(tokenizer, example)[0] for example in prepared.train]
    assert (given.count("a"), given.count("b"), len(prepared.validation)) == (9, 27, 4)
    assert prepared.train.label_counts.tolist() == [int((labels[1:] >= 0).sum()) for _, labels in prepared.train]
    first, second = describe_mixture(prepared.info, folders=False)
    assert first.startswith("a.jsonl: 9 of 36 examples of an epoch (25.0%, weight 1)")
    assert second.startswith("b.jsonl: 27 of 36 examples of an epoch (75.0%, weight 3)")


def test_other_weights_share_tokens_and_validation_but_not_the_key(tmp_path, entries):
    tokenizer, cache = make_tokenizer(), tmp_path / "cache"
    folders = [data.prepare(spec(entries(*each), val_size=4), tokenizer, cache) for each in ((1, 3), (3, 1), (1, 3))]
    plain = data.prepare(spec(entries(None, None), val_size=4), tokenizer, cache)
    assert folders[0] == folders[2] != folders[1] and {each.parent.parent for each in folders} == {plain}
    loaded = [data.load(each) for each in (*folders[:2], plain)]
    assert len({each.info["key"] for each in loaded}) == 3 and len(list(cache.rglob("tokens.npy"))) == 1
    assert len({tuple(each.validation.index.tolist()) for each in loaded}) == 1
    assert len({tuple(each.train.index.tolist()) for each in loaded}) == 3 and "mixture" not in loaded[2].info


@pytest.mark.parametrize("damage", ["train.npy", "info.json"])
def test_a_damaged_mixture_is_rebuilt(tmp_path, entries, damage):
    tokenizer, cache = make_tokenizer(), tmp_path / "cache"
    folder = data.prepare(spec(entries(1, 3)), tokenizer, cache)
    good = data.load(folder).train.index.tolist()
    (folder / damage).write_bytes(b"{")
    assert data.load(data.prepare(spec(entries(1, 3)), tokenizer, cache)).train.index.tolist() == good


def test_bad_rows_do_not_shift_the_borders_of_data_sets(tmp_path, entries):
    made = entries(1, 1)
    with open(made[0].path, "a") as file:
        file.write('{"instruction": "Go."}\n' * 3)
    tokenizer = make_tokenizer()
    prepared = read(made, tokenizer, tmp_path, bad_rows="skip")
    given = [answers(tokenizer, example)[0] for example in prepared.train]
    assert (given.count("a"), given.count("b"), prepared.info["skipped"]) == (20, 20, 3)


# --- as keys ---


PAIR = "dataset=[{path: a.jsonl, weight: 1}, {path: b.jsonl, weight: 3.0}]"


def run(*words):
    return load(None, ["model_name_or_path=zoo:planted-llama", *words])


def test_weights_are_searched_by_dotted_keys():
    found = run(PAIR, "sweep.parameters.dataset.1.weight=[1, 2]", "sweep.search_alg=grid")
    study = found.studies()[0]
    assert values_of(study, found.sweep.parameters, "dataset.1.weight") == [1, 2]
    assert values_of(study, {}, "dataset.1.weight") == [3.0]
    trials = [with_values(study, {"dataset.1.weight": weight, "learning_rate": 1e-3}) for weight in (1, 2)]
    assert [weights_of(trial.dataset) for trial in trials] == [
        {"dataset.0.weight": 1, "dataset.1.weight": weight} for weight in (1, 2)
    ]
    assert len({trial.trial_id() for trial in (*trials, study)}) == 3
    drawn = "sweep.parameters.dataset.0.weight={min: 0.1, max: 10, distribution: log_uniform}"
    assert run(PAIR, drawn, "sweep.search_alg=random").sweep.parameters["dataset.0.weight"].bounds() == [0.1, 10.0]
    assert TrainSpec.model_validate(trials[0].model_dump()) == trials[0], "as a run folder holds it"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [PAIR, "sweep.parameters.dataset.2.weight=[1]"],
            "there is no such weight. Those with a weight: dataset.0.weight",
        ),
        ([PAIR, "sweep.parameters.dataset.1.weight=[1, 0]"], "weight"),
        (["sweep.parameters.dataset.0.weight=[1]"], "No data set has a weight"),
        (["dataset=[{path: a.jsonl, weight: 1}, b.jsonl]"], "entry 2 has no weight, and others have one"),
        (["dataset=[{path: a.jsonl, weight: 1}]"], "of which a weight has no effect"),
        (["dataset=[{path: a.jsonl, weight: 0}, {path: b.jsonl, weight: 1}]"], "above 0"),
        (["dataset=[{path: a.jsonl, weight: .inf}, {path: b.jsonl, weight: 1}]"], "finite"),
    ],
)
def test_weights_without_a_meaning_are_refused(words, message):
    with pytest.raises(ConfigError) as caught:
        run(*words)
    assert message in str(caught.value)


@pytest.mark.parametrize("found", [None, 3, [3], [{}], [{"path": "a", "weight": 1, "available": 0, "examples": 1}]])
def test_a_damaged_record_is_not_described(found):
    assert describe_mixture({"mixture": found}) == []

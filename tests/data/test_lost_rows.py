"""Rows that cutoff_len removes, and bad ones: counted, described, and refused above a share."""

from __future__ import annotations

import json
from typing import Any

import pytest

from macdrop import load_tokenizer
from macdrop.errors import DataError
from tune.config.run_spec import load
from tune.config.train_spec import TrainSpec
from tune.data import dataset as data
from tune.data.lost_rows import check_dropped, describe_cutoff, describe_skipped
from tune.zoo.catalog import resolve

#: Nine prompts that fit 200 tokens, and one that does not.
SHORT = [{"instruction": f"name {n}", "output": "a b c"} for n in range(9)]
LONG = {"instruction": "name " * 199, "output": "a"}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve("zoo:planted-llama"))


@pytest.fixture
def info(tmp_path, tokenizer):
    """Return info.json of rows prepared with some keys of a fine-tuning."""

    def prepared(rows: list[dict], **keys: Any) -> dict:
        file = tmp_path / "a.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        keys = {"val_size": 0, "max_dropped_share": None} | keys
        spec = TrainSpec(model_name_or_path="zoo:planted-llama", dataset=str(file), **keys)
        return data.load(data.prepare(spec, tokenizer, tmp_path / "cache")).info

    return prepared


def test_a_larger_share_than_allowed_is_refused_and_leaves_nothing(info, tmp_path):
    with pytest.raises(DataError) as caught:
        info([*SHORT, LONG], cutoff_len=200, max_dropped_share=0.05)
    message = str(caught.value)
    assert message.startswith("1 of 10 rows (10.0%) have no answer token within cutoff_len 200 and would be dropped")
    assert not list((tmp_path / "cache").glob("*/"))
    # What the message names is enough, and no more than is needed.
    longest = int(message.partition("Raise cutoff_len above ")[2].partition(",")[0])
    assert info([*SHORT, LONG], cutoff_len=longest + 1)["dropped"] == 0
    assert info([*SHORT, LONG], cutoff_len=longest)["dropped"] == 1


def test_cutoff_just_above_the_shortest_prompt_suffices(info):
    with pytest.raises(DataError) as caught:
        info(SHORT, cutoff_len=2)
    shortest = int(str(caught.value).split("Raise cutoff_len above ")[1].split(",")[0])
    assert info(SHORT, cutoff_len=shortest + 1)["examples"] >= 1
    with pytest.raises(DataError):
        info(SHORT, cutoff_len=shortest)


def test_the_limit_holds_for_data_that_are_prepared_already(info):
    kept = info([*SHORT, LONG], cutoff_len=200, max_dropped_share=0.1)
    assert (kept["rows"], kept["dropped"], kept["sources"][0]["dropped"]) == (10, 1, 1)
    with pytest.raises(DataError, match="max_dropped_share is 0.09"):
        info([*SHORT, LONG], cutoff_len=200, max_dropped_share=0.09)


def test_the_limit_changes_neither_data_nor_trial():
    named = {"model_name_or_path": "zoo:planted-llama"}
    assert TrainSpec(**named).trial_id() == TrainSpec(**named, max_dropped_share=None).trial_id()


def test_truncated_rows_are_counted_and_the_longest_is_named(info, tmp_path):
    rows = [SHORT[0], {"instruction": "name 0", "output": "a b c d e f g"}, SHORT[1]]
    whole = info(rows)
    assert (whole["truncated"], whole["longest_at"]) == (0, f"{tmp_path / 'a.jsonl'}, line 2")
    assert info(rows, cutoff_len=whole["longest_example"] - 1)["truncated"] == 1


def test_empty_texts_are_not_blamed_on_the_cutoff(tmp_path):
    counts = {"rows": 2, "dropped": 1, "truncated": 0, "cutoff_len": 64, "longest_prompt": 1}
    with pytest.raises(DataError, match="Their texts are empty: remove these rows"):
        check_dropped(counts, 0.1)
    check_dropped(counts, 0.5)
    check_dropped(counts, None)


def test_words():
    counts = {"rows": 34, "dropped": 31, "truncated": 2, "skipped": 0, "cutoff_len": 64}
    cut = "at cutoff_len 64 31 dropped (91.2%), as no answer token fits, and 2 truncated (5.9%)"
    assert describe_cutoff(counts) == f"34 rows; {cut}"
    assert describe_cutoff({**counts, "skipped": 1}) == f"34 rows, 1 of them bad and skipped (2.9%); {cut}"
    none = {**counts, "dropped": 0, "truncated": 0}
    assert describe_cutoff(none) == "34 rows, none dropped or truncated by cutoff_len 64"


# --- bad rows ---

BAD = [{"instruction": "name", "output": None}, {"instruction": "name"}, {"instruction": 3, "output": "a"}]


def test_more_than_a_tenth_of_bad_rows_is_refused_with_reasons_and_places(info, tmp_path):
    rows = [*SHORT, *BAD]
    with pytest.raises(DataError) as caught:
        info(rows, bad_rows="skip")
    file = tmp_path / "a.jsonl"
    first, *reasons, last = str(caught.value).splitlines()
    assert first == "3 of 12 rows (25.0%) are bad and would be skipped; max_skipped_share is 0.1."
    assert reasons == [
        f"  2 rows skipped: a text is missing, or is not text ({file}, line 10; {file}, line 12)",
        f"  1 row skipped: a column is missing ({file}, line 11)",
    ]
    assert "max_skipped_share (null never refuses)" in last and not list((tmp_path / "cache").glob("*/"))
    assert info([*SHORT, BAD[0]], bad_rows="skip")["skipped"] == 1
    assert info(rows, bad_rows="skip", max_skipped_share=0.25)["skipped"] == 3
    with pytest.raises(DataError, match="max_skipped_share is 0.2"):  # of data that are prepared already
        info(rows, bad_rows="skip", max_skipped_share=0.2)
    assert info(rows, bad_rows="skip", max_skipped_share=None)["examples"] == 9


def test_the_name_of_the_issue_is_accepted_too():
    spec = load(None, ["model_name_or_path=zoo:planted-llama", "on_bad_row=skip"])
    assert spec.bad_rows == "skip"


def test_of_many_bad_rows_the_first_places_are_named():
    found = {"reason": "an unknown role", "count": 9, "places": [f"/there/a.jsonl, line {n}" for n in (1, 2, 3)]}
    (sentence,) = describe_skipped({"skipped_rows": [found]}, folders=False)
    assert sentence == "9 rows skipped: an unknown role (a.jsonl, line 1; a.jsonl, line 2; a.jsonl, line 3 and more)"
    for damaged in (None, 3, [3], [{"reason": 1}], [{"reason": "r", "count": "x", "places": []}]):
        assert describe_skipped({"skipped_rows": damaged}) == [] == describe_skipped({})

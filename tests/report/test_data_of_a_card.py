"""The training data in a trial's record and in its model card: rows skipped by reason, mixtures, roles, templates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.prepared_data import CHATML, make_tokenizer, write

from tune.config.train_spec import TrainSpec
from tune.data.dataset import load, prepare
from tune.report.model_card import Exported, model_card
from tune.training.trial_setup import record_setup

GOOD = {"messages": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "a"}]}
BAD = {"messages": [{"role": "bot", "content": "x"}]}


@pytest.fixture
def card(tmp_path):
    """Return the card, and the record behind it, of a trial on some rows."""

    def make(**keys) -> tuple[str, dict]:
        paths = [write(tmp_path / f"{name}.jsonl", [GOOD, BAD, GOOD, GOOD, BAD]) for name in "ab"]
        entries = [{"path": path, "weight": weight} for path, weight in zip(paths, (1, 2), strict=True)]
        keys = {"dataset": entries, "bad_rows": "skip", "max_skipped_share": None, "val_size": 0} | keys
        spec = TrainSpec(model_name_or_path="org/model", **keys)
        prepared = load(prepare(spec, make_tokenizer(CHATML), tmp_path / "cache"))
        record_setup(tmp_path, prepared, None, tmp_path / "scan.json", 1)
        record = json.loads((tmp_path / "reproduce.json").read_text())["data"]
        info = {"status": "done", "step": 1, "total_steps": 1}
        return model_card(Exported(tmp_path, "one", spec, info, 1, data=record), merged=None, place="me/mine"), record

    return make


def test_skipped_rows_and_mixtures_are_in_the_record_and_the_card(card, tmp_path):
    text, record = card()
    assert record["skipped"] == 4
    (found,) = record["skipped_rows"]
    assert (found["reason"], found["count"]) == ("an unknown role", 4)
    assert found["places"] == [f"{tmp_path / name}.jsonl, line {at}" for name, at in (("a", 2), ("a", 5), ("b", 2))]
    assert [part["examples"] for part in record["mixture"]] == [2, 4]
    assert "4 rows skipped: an unknown role (a.jsonl, line 2; a.jsonl, line 5; b.jsonl, line 2 and more)" in text
    assert "b.jsonl: 4 of 6 examples of an epoch (66.7%, weight 2)" in text
    assert str(tmp_path) not in text and "loss on the answers" in text


def test_roles_and_a_template_of_a_file_are_in_the_card(card, tmp_path):
    file = Path(tmp_path / "mine.jinja")
    file.write_text(CHATML)
    text, _ = card(template=str(file), train_on_roles=["user", "assistant"])
    assert "mine.jinja (a file)" in text and "loss on the turns of user, assistant" in text
    assert str(tmp_path) not in text


def test_data_without_losses_leave_no_line(card, tmp_path):
    clean = write(tmp_path / "c.jsonl", [GOOD])
    text, record = card(dataset=clean)
    assert "skipped_rows" not in record and "mixture" not in record
    assert "skipped rows" not in text and "mixture" not in text

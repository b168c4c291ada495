"""The report on massive weights: proofs with intervals, of every layer, of earlier versions, and published rows."""

from __future__ import annotations

import json

import pytest
from helpers.run_folders import make_run

from macdrop.proof import Factor, LayerProof, LayerRow
from tune.report.html.figures import figures
from tune.report.leaderboard import _row
from tune.report.report import make_report
from tune.storage.atomic import atomic_write_json
from tune.storage.run_folder import RunFolder

LAYERS = LayerProof(
    k=3,
    blocks=16,
    tokens=1008,
    untouched=3.728,
    layer=1,
    best=1,
    finding="the rule's layer",
    text="the rule's layer is the one that matters: layer 1, x23.1 (19.3 to 28.7)",
    rows=tuple(
        LayerRow(layer, None, (98, 107, 10), 9.0, zeroed, Factor(1.24, 1.18, 1.32))
        for layer, zeroed in enumerate([Factor(1.0, 1.0, 1.0), Factor(23.1, 19.3, float("inf"))])
    ),
    measured_on="zoo:text",
)
NEW = {
    "verdict": "borderline",
    "factor": [2.16, 1.8, 2.6],
    "by_k": [[1, 1.1, 1.0, 1.2], [3, 2.16, 1.8, 2.6]],
    "key_k": 3,
    "by_text": [["story", 1.9, 1.5, 2.2], ["code", 2.4, 2.1, 2.9]],
}


@pytest.fixture
def run(tmp_path) -> RunFolder:
    make_run(tmp_path / "run", seeds=(1, 2), arms=("plain", "macdrop"), tried=2, items=20)
    return RunFolder(tmp_path / "run")


def lines(run: RunFolder) -> str:
    report = make_report(run.run_dir)
    part = report.parts(report.models[0])["weights"]
    return "\n".join([*part.lines, *(table.title for table in part.tables)])


def proof_file(run: RunFolder):
    return run.model_dir("zoo:planted-llama") / "proof.json"


def test_a_proof_of_an_earlier_version_is_read(run):
    assert "factor" not in json.loads(proof_file(run).read_text())
    shown = lines(run)
    assert "The model is sensitive to these rows: perplexity 3.728 untouched, 86.10 with the top 3 zeroed, " in shown
    assert "Factor by" not in shown and "Every layer" not in shown


def test_intervals_texts_and_the_k_that_matters_are_shown(run):
    atomic_write_json(proof_file(run), {**json.loads(proof_file(run).read_text()), **NEW})
    shown = lines(run)
    assert (
        "The model is borderline to these rows" in shown
        and "86.10 with the top 3 zeroed (factor 2.16 [1.8, 2.6])," in shown
    )
    assert "3: 2.16 [1.8, 2.6]; the k that matters most is 3 (asked for: 3)" in shown
    assert "Factor by text: story 1.9 [1.5, 2.2], code 2.4 [2.1, 2.9]." in shown
    report = make_report(run.run_dir)
    assert _row(report, report.models[0], None).cells["sensitive"] == "borderline"


def test_a_proof_of_every_layer_is_a_table_and_a_figure(run):
    atomic_write_json(proof_file(run).with_name("layers.json"), LAYERS.to_dict())
    assert f"Every layer: {LAYERS.text}; measured on zoo:text" in lines(run)
    model = make_report(run.run_dir).models[0]
    (drawn,) = (each for each in figures(run, model, []) if each.name == "scan-every-layer")
    assert drawn.svg.startswith("<svg") and "The rule's layer is the one that matters" in drawn.caption
    assert "95 % over 16 blocks of text (zoo:text)" in drawn.caption
    assert drawn.rows[1] == [1, "98 107 10", 9.0, 23.1, 19.3, "inf", 1.24, 1.18, 1.32]


def test_published_rows_of_the_same_model_stand_beside_the_scan(run):
    file = run.massive_weights_file("zoo:planted-llama")
    found = json.loads(file.read_text())
    layers = [{**found["layers"][0], "layer": i} for i in range(32)]
    atomic_write_json(
        file, {**found, "model": "mistralai/Mistral-7B-v0.1", "layers": layers, "hidden_size": 4096,
               "intermediate_size": 14336}
    )  # fmt: skip
    assert "Published, differs: layer 1, rows 7310, 8572, 2514, 1878, 8693, without row 98" in lines(run)

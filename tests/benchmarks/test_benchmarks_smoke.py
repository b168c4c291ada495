"""The benchmarks of this folder still run and add up right; no wall time is judged here."""

from __future__ import annotations

import json

import calibration
import checkpoints
import demo
import dora
import evaluators
import lanes
import launch
import measure
import pytest
import reports
import scale
import step
import task_files

from tune.storage.records import TrialRecord


def test_quartiles_and_paired_ratios():
    timings = measure.Timings({"a": [(2.0, 1.0), (4.0, 3.0), (9.0, 2.0)], "b": [(1.0, 1.0), (2.0, 1.0), (3.0, 1.0)]})
    wall = timings.ratio("a", "b", measure.WALL)
    assert (wall.low, wall.median, wall.high) == (2.0, 2.0, 2.5)
    assert timings.ratio("a", "b").median == 2.0
    assert timings.best("a", "b") == 2.0
    assert measure.Quartiles.of([1.5]) == measure.Quartiles(1.5, 1.5, 1.5)


def test_every_variant_runs_once_per_round_in_changing_order():
    calls = []
    variants = {name: measure.Variant(lambda name=name: calls.append(name)) for name in "abc"}
    timings = measure.interleave(variants, 6, warm_up=1)
    rounds = [tuple(calls[i : i + 3]) for i in range(0, 21, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 1
    assert [len(seconds) for seconds in timings.seconds.values()] == [6, 6, 6]


def test_verdicts_and_tables():
    assert measure.verdict("x", 1.01, 1.02) == "target x <= 1.02: met (1.010)"
    assert measure.verdict("x", 3.9, 4, at_least=True) == "target x >= 4: not met (3.900)"
    assert measure.table(("a", "bb"), [("xyz", 1)]) == "a    bb\nxyz   1"


def test_compared_steps_compute_what_they_claim():
    import torch

    tiny = step.Size(hidden=64, intermediate=96, layers=2, vocabulary=64, batch=2, tokens=8)
    bench = step.Bench(tiny)
    before = [weight.clone() for weight in bench.edited]
    timings = step.interleave(bench.variants(), 2)
    assert all(torch.equal(weight, old) for weight, old in zip(bench.edited, before, strict=True))
    assert "macdrop / plain" in step.report("tiny", timings)


def test_dora_blows_up_rows_that_lose_all_their_entries():
    """The planted rows have 8 entries; without a mask the first steps are calm."""
    settings = {"dtype": "float32", "steps": 12, "lr": 1e-3}
    calm, _ = dora.norms("zoo:planted-llama", 0.0, dora=True, **settings)
    blown, _ = dora.norms("zoo:planted-llama", 0.8, dora=True, **settings)
    lora, _ = dora.norms("zoo:planted-llama", 0.8, dora=False, **settings)
    assert max(calm) < 1 and max(lora) < 30 < max(blown)


def test_checkpoint_is_compared_with_the_adapter_and_a_step():
    timings = measure.Timings({"step": [(0.02, 0.0)] * 3, "checkpoint": [(0.04, 0.0)] * 3})
    text = checkpoints.report("r = 8", checkpoints.Size(310, 100), timings)
    assert "9 checkpoints: 2.91%" in text and "one second: 0.060%" in text and "met (3.100)" in text


def test_compared_fine_tunings_differ_and_share_an_engine():
    specs = lanes.settings(8, 20)
    assert len({spec.trial_id() for spec in specs}) == 8
    assert len({spec.engine_key() for spec in specs}) == 1
    assert [spec.arm for spec in specs] == ["plain"] + ["macdrop"] * 7
    assert {spec.zero_stage for spec in specs} == {2}


def test_lanes_are_compared_with_as_many_runs():
    lane = [lanes.Trained(3.0, 1.0, "a"), lanes.Trained(2.0, 1.5, "b"), lanes.Trained(2.0, 1.5, "c")]
    runs = [lanes.Trained(30.0, 1.0, "a"), lanes.Trained(34.0, 1.0, "x")]
    text = lanes.report(10.0, 3.0, lane, runs)
    assert "equal adapters: 1 of 2" in text
    assert "met (8.000)" in text  # 64 s over the 8 s until the second trial of the lane was done
    assert "<= 2 s: met (0.500 s)" in text


def test_lm_eval_loads_the_task_file(tmp_path):
    from lm_eval.tasks import TaskManager

    suite = (task_files.Benchmark.parse("zoo:qa"), task_files.Benchmark.parse(f"arc_easy={_arc(tmp_path)}"))
    assert [benchmark.name for benchmark in suite] == ["macdrop_qa", "macdrop_arc_easy"]
    for benchmark in suite:
        task_files.write_task(benchmark, tmp_path / "tasks")
    manager = TaskManager(include_defaults=False, include_path=str(tmp_path / "tasks"))
    for benchmark, rows in zip(suite, (60, 1), strict=True):
        loaded = manager.load([benchmark.name])["tasks"][benchmark.name]
        assert len(loaded.test_docs()) == rows
        assert loaded.get_config("output_type") == "multiple_choice"
    setting = evaluators.Setting("zoo:planted-llama", suite, ("zeroing@3",), 2, 16, 1)
    line = evaluators.command(setting, "BASE", "ADAPTER", tmp_path / "tasks", tmp_path / "out")
    assert line[line.index("--limit") + 1] == "2"
    assert line[line.index("--tasks") + 1] == "macdrop_qa,macdrop_arc_easy"
    assert line[line.index("--model_args") + 1].startswith("pretrained=BASE,peft=ADAPTER,")


def _arc(folder) -> str:
    choices = {"text": ["a", "b"], "label": ["A", "B"]}
    row = {"id": "1", "question": "Which?", "choices": choices, "answerKey": "A"}
    file = folder / "arc.jsonl"
    file.write_text(json.dumps(row) + "\n")
    return str(file)


def test_rows_of_attacked_checkpoints_are_zero(tmp_path):
    import torch

    from macdrop import load_model

    setting = evaluators.Setting("zoo:planted-llama", (), ("zeroing@3", "retaining@3"), 2, 16, 1)
    bases = evaluators.make_bases(setting, tmp_path)
    rows = {}
    for attack, base in bases.items():
        up = load_model(base).model.layers[1].mlp.up_proj.weight
        rows[attack] = int((up == 0).all(dim=1).sum())
    assert rows == {"none": 0, "zeroing@3": 3, "retaining@3": len(up) - 3}
    assert torch.isfinite(up).all()


def test_scores_are_compared_run_by_run():
    runs = [(f"adapter-{i}", attack) for i in range(8) for attack in "abcd"]
    assert evaluators.spread(runs, None) == runs == evaluators.spread(runs, 40)
    picked = evaluators.spread(runs, 6)
    assert len(set(picked)) == 6 and {attack for _, attack in picked} == set("abcd")
    theirs = {runs[0]: {("t", "acc"): 0.5, ("t", "acc_norm"): 0.25}}
    assert evaluators.agreement({runs[0]: {("t", "acc"): 0.5, ("t", "acc_norm"): 0.25001}}, theirs) == (2, 1, 2)
    ours = evaluators.ByActors(3.0, 1.0, {}, 12)
    text = evaluators.report([10.0, 10.0], 4, 2, 5.0, ours, (8, 8, 8))
    assert "met (5.000)" in text and "EXTRAPOLATED from 2 of 4" in text and "same scores: yes" in text
    assert "EXTRAPOLATED" not in evaluators.report([10.0, 10.0], 2, 2, 5.0, ours, (8, 8, 8))


@pytest.mark.parametrize("outside", [True, False])
def test_phases_of_a_run_add_up(outside):
    def at(second: int) -> str:
        return f"2026-01-01T00:00:{second:02d}.000+00:00"

    def trial(name: str, model: str, started: str, finished: str, **facts: object) -> TrialRecord:
        times = {"started": started, "finished": finished}
        return TrialRecord.model_validate({"trial": name, "model": model, "arm": "plain", "seed": 0, **times, **facts})

    trials = [
        trial("a", "m", at(10), at(20), status="done", step=5, seconds=4.0),
        trial("b", "m", at(14), at(25), status="done", step=5, seconds=4.0),
        trial("c", "n", at(30), at(40), status="failed"),
    ]
    run = {"created": at(5), "finished": at(42)}
    zero = demo.timestamp(at(0))
    parts = demo.phases(run, trials, *((zero, zero + 45) if outside else (None, None)))
    expected = [5, 5, 15, 5, 10, 2, 3] if outside else [5, 15, 5, 10, 2]
    assert [phase.seconds for phase in parts] == expected
    found = demo.facts({"ray": {"num_workers": 2}, "zero_stage": 2}, trials, 9)
    assert found["trials by state"] == "2 done, 1 failed"
    assert not demo.enough(found)


def test_calibration_prints_its_rates(capsys):
    assert calibration.simulated([3], [60], 40, 1)
    text = capsys.readouterr().out
    assert "helps or hurts where nothing differs <= 5 %: met" in text
    for times in (1, 2):
        assert f"{times} x the detectable difference is found in >= 80 %: met" in text


def test_calibration_counts_splits_with_an_interval():
    names = [f"t{i}" for i in range(12)]
    drawn = [frozenset(names[i] for i in (a, (a + 3) % 12, (a + 5) % 12, (a + 7) % 12)) for a in range(12)]
    found = [calibration.Split(trials, False, number == 0, False, True) for number, trials in enumerate(drawn)]
    assert calibration.show(found, names, lambda one: one.headline) == ("0.0 % [0.0, 70.8]", 0.0)  # 3 without sharing
    text, low = calibration.show(found, names, lambda one: one.attacked)
    assert text.startswith("8.3 % [0.0, ") and low == 0
    assert calibration.show(found, names, lambda one: one.any_attacked) == ("100.0 % [100.0, 100.0]", 1.0)


def test_launch_reports_the_cost_of_a_lost_host():
    text = launch.report(33.7, [("kill", 41.24, 22, 25), ("cut", 61.0, 26, 25)])
    assert "host kill                41.2              22           25" in text
    assert "target up to 3 nodes <= 90 s: met (33.700 s)" in text
    assert "target time lost, host cut <= 60 s: not met (61.000 s)" in text
    assert "target steps repeated, host cut <= 25: not met (26.000)" in text


def test_demo_is_compared_with_a_checkout_only(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["demo.py", "--against", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        demo.main()
    assert f"{tmp_path} holds no macdrop" in capsys.readouterr().err


def test_reports_of_small_runs_are_timed(tmp_path):
    run = reports.many_trials(tmp_path / "run", 5, scores=2)
    wall, cpu = reports.timed(lambda: reports.report(run, tmp_path / "out"))
    assert wall > 0 and cpu > 0 and (tmp_path / "out" / "report.html").is_file()
    assert "model-macdrop-00000004" in (tmp_path / "out" / "report.csv").read_text()
    assert "planted-llama" in reports.compare(run)


def test_models_of_four_sizes_share_a_cluster_well(capsys):
    """In virtual time, so that its targets can be asserted."""
    scale.main(["--seeds", "1"])
    shown = capsys.readouterr().out
    assert shown.count(": met") == 2 and "not met" not in shown

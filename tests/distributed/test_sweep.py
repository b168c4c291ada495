"""Whole runs on a local Ray: stages, failing trials, resume, ASHA, a killed worker. One cluster for the module."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pandas
import pytest
import yaml
from helpers.python_sweep import check_copy, in_a_thread
from helpers.small import SMALL

from macdrop.errors import ConfigError
from tune.config.run_spec import RunSpec, load
from tune.errors import ResourceError
from tune.storage.search_state import search_time

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240), pytest.mark.usefixtures("local_ray")]

SETTINGS = {**SMALL, "max_steps": 6, "eval_steps": 3, "ray": {"dashboard": False}}
DIVERGES = 1e30


def make(folder: Path, **changes) -> RunSpec:
    settings = {**SETTINGS, "output_dir": str(folder), **changes}
    if "models" in settings.get("sweep", {}):
        del settings["model_name_or_path"]
    return RunSpec.model_validate(settings)


def run(spec: RunSpec, *, resume: bool = False) -> tuple[int, str]:
    """Run quietly; returns failures and what a log would hold."""
    import io

    from rich.console import Console

    from tune.cli.progress import Progress
    from tune.distributed.sweep.runtime import run as run_sweep

    out = io.StringIO()
    failures = run_sweep(spec, resume=resume, progress=Progress(Console(file=out, width=200)))
    return failures, out.getvalue()


@pytest.fixture(scope="module")
def grid(tmp_path_factory) -> tuple[Path, int, str]:
    """Two models, a grid with a learning rate that diverges; the selected and a placebo on two seeds."""
    folder = tmp_path_factory.mktemp("grid") / "run"
    spec = make(
        folder,
        sweep={
            "models": ["zoo:planted-llama", "zoo:insensitive-llama"],
            "arms": ["base", "plain", "macdrop", "random_rows"],
            "parameters": {"learning_rate": [2e-3, DIVERGES], "macdrop.p0": [0.0, 0.8]},
            "metric": {"name": "zero_shot/fact/acc", "goal": "maximize"},
            "seeds": 2,
            "max_concurrent_trials": 2,
        },
        validation={"batch_size": 32, "limit": 12, "zero_shot": {"fact": {"data": "zoo:fact"}}},
        eval={
            "batch_size": 32,
            "limit": 12,
            "attacks": ["none", "zeroing@3"],
            "zero_shot": {"qa": {"data": "zoo:qa"}},
            "generation": {"answers": {"data": "zoo:generate-qa", "max_new_tokens": 2}},
        },
    )
    return folder, *in_a_thread(spec)


def trials(folder: Path, stage: str | None = None) -> list[dict]:
    found = [json.loads(path.read_text()) for path in sorted((folder / "trials").glob("*/trial.json"))]
    return [trial for trial in found if stage in (None, trial["stage"])]


def finalists(folder: Path, model: str = "planted-llama") -> dict:
    return json.loads((folder / "models" / model / "finalists.json").read_text())


def test_failing_trials_are_recorded_and_do_not_stop_the_others(grid):
    folder, failures, log = grid
    searched = trials(folder, "search")
    by_status = {status: [t for t in searched if t["status"] == status] for status in ("done", "diverged")}
    # Per model: plain and MacDrop, each at a good and at a diverging learning rate.
    assert len(by_status["done"]) == 4 and len(by_status["diverged"]) == 4
    assert failures == 4
    assert all("diverged" in trial["reason"] and "learning_rate" in trial["reason"] for trial in by_status["diverged"])
    assert "diverged" in log


def test_a_run_has_its_verdict_its_scores_and_its_report_in_python(grid):
    from tune import Run

    made = Run(grid[0])
    assert "planted-llama" in made.verdict and made.verdict.splitlines() == made.report().headlines()
    scores = made.scores
    assert {"qa", "answers"} <= set(scores["task"].dropna()) and set(scores["arm"]) > {"plain", "macdrop"}
    written = pandas.read_csv(grid[0] / "report.csv")
    assert list(scores.columns) == list(written.columns) and len(scores) == len(written)
    assert scores["value"].dropna().tolist() == pytest.approx(written["value"].dropna().tolist())
    assert made.report()._repr_markdown_() == (grid[0] / "report.md").read_text()
    assert f"sweep({str(grid[0])!r}, resume=True)" in grid[2], "the way to resume is Python's, too"


def test_plain_is_trained_once_per_other_setting(grid):
    arms = [trial["arm"] for trial in trials(grid[0], "search")]
    assert arms.count("plain") == 4 and arms.count("macdrop") == 4


def test_the_final_stage_has_every_arm_on_every_fresh_seed(grid):
    """Also: the settings are those of finalists.json, which counts what was tried."""
    for model in ("planted-llama", "insensitive-llama"):
        chosen = finalists(grid[0], model)
        assert (chosen["tried"], chosen["statuses"], chosen["seeds"]) == (2, {"done": 1, "diverged": 1}, [1, 2])
        (cell,) = chosen["cells"]
        mine = [t for t in trials(grid[0], "final") if t["model"] == f"zoo:{model}"]
        found = sorted((t["arm"], t["seed"], t["setting"]) for t in mine)
        wanted = {"plain": cell["plain"], "macdrop": cell["macdrop"][0], "random_rows": cell["placebos"]["random_rows"]}
        assert found == sorted((arm, seed, setting) for arm, setting in wanted.items() for seed in (1, 2))
        best = next(t for t in trials(grid[0], "search") if t["setting"] == cell["macdrop"][0])
        assert best["status"] == "done" and best["seed"] == 0 and chosen["pareto"] == [best["trial"]]


def test_arms_of_one_seed_share_data_order_and_initial_adapter(grid):
    from safetensors.torch import load_file

    losses, adapters = {}, {}
    for trial in trials(grid[0], "final"):
        if trial["model"] == "zoo:planted-llama":
            folder = grid[0] / "trials" / trial["trial"]
            steps = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
            losses[trial["arm"], trial["seed"]] = next(row["loss"] for row in steps if "loss" in row)
            weights = load_file(folder / "adapter" / "adapter_model.safetensors")
            adapters[trial["arm"], trial["seed"]] = {k: v for k, v in weights.items() if "lora_A" in k}

    def apart(one, other) -> float:
        return sum(float((adapters[one][name] - adapters[other][name]).norm()) for name in adapters[one])

    # Random rows hardly matter: in the first step only another batch makes another loss.
    assert losses["random_rows", 1] == pytest.approx(losses["plain", 1], rel=1e-2)
    assert losses["plain", 2] != pytest.approx(losses["plain", 1], rel=1e-2)
    for arm in ("macdrop", "random_rows"):
        assert apart((arm, 1), ("plain", 1)) < 0.2 * apart(("plain", 2), ("plain", 1))


def test_scores_are_long_form_and_complete(grid):
    """And the stages keep to their own benchmarks: what selects is not what is reported."""
    scores = pandas.read_json(grid[0] / "scores.jsonl", lines=True)
    for column in "model arm trial seed split benchmark task version metric attack value stderr n".split():
        assert column in scores.columns
    assert set(scores.arm) == {"base", "plain", "macdrop", "random_rows"}
    for split, stage, tasks, attacks in (
        ("test", "final", {"qa", "answers"}, {"none", "zeroing@3"}),
        ("validation", "search", {"fact"}, {"none"}),
    ):
        mine = scores[scores.split == split]
        done = {trial["trial"] for trial in trials(grid[0], stage) if trial["status"] == "done"}
        assert set(mine.trial) == done | {"base"} and set(mine.attack) == attacks
        assert {task.partition("/")[0] for task in mine.task} == tasks
        assert mine.groupby(["model", "trial"]).size().nunique() == 1
    assert not scores.duplicated(["model", "trial", "split", "benchmark", "task", "metric", "attack"]).any()


def test_macdrop_dropped_and_plain_did_not(grid):
    for trial in trials(grid[0]):
        if trial["status"] != "done":
            continue
        metrics = [json.loads(line) for line in (grid[0] / "trials" / trial["trial"] / "metrics.jsonl").open()]
        dropped = sum(row.get("entries_dropped", 0) for row in metrics)
        assert (dropped > 0) == (trial["arm"] != "plain")
        assert dropped == trial["entries_dropped"]
        steps = [row for row in metrics if "loss" in row]
        assert [row["step"] for row in steps] == list(range(1, 7))
        for name in ("loss", "learning_rate", "grad_norm", "p", "entries_dropped", "tokens_per_second"):
            assert all(name in row for row in steps)


def test_adapters_load_with_peft_alone(grid):
    from peft import PeftModel

    from macdrop import load_model
    from tune.zoo.catalog import resolve

    trial = next(t for t in trials(grid[0]) if t["status"] == "done" and t["arm"] == "macdrop")
    model = load_model(resolve(trial["model"]))
    adapted = PeftModel.from_pretrained(model, grid[0] / "trials" / trial["trial"] / "adapter")
    assert any(p.abs().sum() > 0 for name, p in adapted.named_parameters() if "lora_B" in name)


def test_run_folder_is_whole(grid):
    folder = grid[0]
    assert json.loads((folder / "run.json").read_text())["status"] == "done"
    assert json.loads((folder / "environment.json").read_text())["versions"]["ray"]
    for model in ("planted-llama", "insensitive-llama"):
        assert json.loads((folder / "models" / model / "massive_weights.json").read_text())["layer"] == 1
        assert "verdict" in json.loads((folder / "models" / model / "proof.json").read_text())
    # The written spec reads back as the one that ran.
    assert load(folder / "config.yaml").output_dir == str(folder)


def test_report_names_arms_attacks_and_failures(grid):
    from tune.report.report import make_report

    text = make_report(grid[0]).markdown()
    for word in ("base", "plain", "zeroing@3", "diverged", "not sensitive", "PLANTED"):
        assert word in text


def test_resume_trains_and_scores_only_what_is_missing(grid):
    """After an interruption between the stages of one model, and within the final stage of the other."""
    folder = grid[0]
    chosen = finalists(folder)
    (folder / "models" / "planted-llama" / "finalists.json").unlink()
    lost = next(t["trial"] for t in trials(folder, "final") if t["arm"] == "macdrop" and "insens" in t["trial"])
    kept = {
        t["trial"]: (folder / "trials" / t["trial"] / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
        for t in trials(folder)
        if t["status"] == "done" and t["trial"] != lost
    }
    before = (folder / "trials" / lost / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(folder / "trials" / lost)
    rows = (folder / "scores.jsonl").read_text().splitlines()
    # Of another trial one benchmark has no score, as after an evaluation that failed: it is scored, not trained again.
    unscored = next(t["trial"] for t in trials(folder, "final") if t["trial"] in kept)
    lines = [
        line
        for line in rows
        if (row := json.loads(line))["trial"] != lost and (row["trial"], row["benchmark"]) != (unscored, "generation")
    ]
    (folder / "scores.jsonl").write_text("\n".join(lines) + "\n")
    run(load(folder / "config.yaml"), resume=True)
    assert (folder / "trials" / lost / "adapter" / "adapter_model.safetensors").read_bytes() == before
    for trial, stamp in kept.items():
        assert (folder / "trials" / trial / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    assert len((folder / "scores.jsonl").read_text().splitlines()) == len(rows)
    assert finalists(folder) == chosen


def test_resume_refuses_another_spec(grid):
    changed = load(grid[0] / "config.yaml", ["max_steps=7"])
    with pytest.raises(ConfigError, match="other settings"):
        run(changed, resume=True)


def test_a_used_folder_is_refused(grid):
    with pytest.raises(ConfigError, match="--resume"):
        run(load(grid[0] / "config.yaml"))


@pytest.fixture(scope="module")
def front(tmp_path_factory) -> tuple[Path, int, str]:
    """Two objectives, ASHA once exp has decayed (step 3), a searched learning rate; no fresh seeds."""
    folder = tmp_path_factory.mktemp("front") / "run"
    spec = make(
        folder,
        sync_to=f"file://{folder.parent / 'copy'}",
        max_steps=40,
        eval_steps=2,
        macdrop={"schedule": "exp", "alpha": 1.0},
        sweep={
            "arms": ["plain", "macdrop", "all_rows"],
            "search_alg": "optuna",
            "parameters": {"learning_rate": {"min": 1e-6, "max": 1e-2, "distribution": "log_uniform"}},
            "metric": [{"name": "zero_shot/qa/acc@zeroing@3", "goal": "maximize"}, {"name": "eval_loss"}],
            "num_samples": 5,
            "seeds": 0,
            "max_concurrent_trials": 1,
            "scheduler": "asha",
            "reduction_factor": 2,
        },
        validation={"limit": 12, "attacks": ["none", "zeroing@3"], "zero_shot": {"qa": {"data": "zoo:qa"}}},
        eval={"limit": 12, "zero_shot": {"arith": {"data": "zoo:arith"}}},
    )
    return folder, *run(spec)


@pytest.mark.long
def test_asha_stops_tasks_early_but_not_before_the_decay(front):
    folder, failures, _ = front
    searched = [trial for trial in trials(folder) if trial["arm"] == "macdrop"]
    stopped = [trial for trial in searched if trial["status"] == "stopped"]
    assert failures == 0 and len(searched) == 5
    assert stopped and all(3 < trial["step"] < 40 and "stopped at step" in trial["reason"] for trial in stopped)
    assert any(trial["status"] == "done" and trial["step"] == 40 for trial in searched)
    scored = {json.loads(line)["trial"] for line in (folder / "scores.jsonl").open()}
    assert not scored & {trial["trial"] for trial in stopped}


@pytest.mark.long
def test_without_fresh_seeds_the_best_of_the_front_become_final(front):
    """And the plain arm has a trial at the learning rate that was found for MacDrop; all of it is in the copy."""
    folder = front[0]
    chosen = finalists(folder)
    (cell,) = chosen["cells"]
    assert chosen["seeds"] == [0] and chosen["tried"] == 5 and set(chosen["statuses"]) == {"done", "stopped"}
    final = {trial["arm"]: trial for trial in trials(folder, "final")}
    assert sorted(final) == ["all_rows", "macdrop", "plain"] and len(trials(folder, "final")) == 3
    assert (final["plain"]["setting"], [final["macdrop"]["setting"]]) == (cell["plain"], cell["macdrop"])
    assert final["macdrop"]["trial"] in chosen["pareto"]
    rates = {load_rate(folder, trial) for trial in trials(folder) if trial["arm"] == "plain"}
    assert rates == {SETTINGS["learning_rate"], load_rate(folder, final["macdrop"])}
    rows = [json.loads(line) for line in (folder / "scores.jsonl").open()]
    assert {row["arm"] for row in rows if row["split"] == "test"} == set(final)
    assert {row["trial"] for row in rows if row["split"] == "test"} == {t["trial"] for t in final.values()}
    check_copy(folder, folder.parent / "copy")


def load_rate(folder: Path, trial: dict) -> float:
    return yaml.safe_load((folder / "trials" / trial["trial"] / "config.yaml").read_text())["learning_rate"]


@pytest.mark.slow  # tests of lanes kill workers too; this one does it in a whole sweep
def test_killed_worker_costs_nothing_but_time(tmp_path):
    """A lane's worker is killed in the middle of a task: same bits as an undisturbed process."""
    from tune.training.single import train_here

    settings = {"max_steps": 60, "save_steps": 5, "eval_steps": None}
    spec = make(tmp_path / "run", **settings, sweep={"arms": ["macdrop"], "seeds": 0})
    killer = threading.Thread(target=_kill_worker, args=(tmp_path / "run",), daemon=True)
    killer.start()
    failures, _ = run(spec)
    killer.join(timeout=1)
    (trial,) = trials(tmp_path / "run")
    assert failures == 0 and trial["status"] == "done" and trial["attempts"] == 2
    assert trial["resumed_from"] >= 5 and trial["resumed_from"] % 5 == 0
    alone = tmp_path / "alone"
    train_here(spec.studies()[0], alone, observe=None, threads=1)
    file = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / "trials" / trial["trial"] / file).read_bytes() == (alone / file).read_bytes()


def _kill_worker(folder: Path) -> None:
    """SIGKILL the lane's worker once a checkpoint is there."""
    import psutil

    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if list(folder.glob("trials/*/checkpoints/step-*/MANIFEST.json")):
            for process in psutil.process_iter(["pid", "name", "cmdline"]):
                if "RayTrainWorker" in " ".join(process.info["cmdline"] or []):
                    with contextlib.suppress(psutil.Error):
                        if os.getpid() in [parent.pid for parent in process.parents()]:
                            os.kill(process.pid, signal.SIGKILL)
                            return
        time.sleep(0.05)


@pytest.mark.long
def test_time_budget_ends_a_run_in_good_order_and_is_not_given_twice(tmp_path, monkeypatch):
    spec = make(
        tmp_path / "run",
        max_steps=20_000,
        eval_steps=5_000,
        sweep={"arms": ["macdrop"], "parameters": {"macdrop.p0": [0.4, 0.8]}, "time_budget_s": 15},
    )
    failures, log = run(spec)
    assert failures == 0
    assert {trial["status"] for trial in trials(tmp_path / "run")} == {"stopped"}
    assert "no macdrop trial was finished" in log and finalists(tmp_path / "run")["cells"] == []

    model, budgets = tmp_path / "run" / "models" / "planted-llama", []
    assert search_time(model / "search_time.json") >= 15
    (model / "search_time.json").write_text('{"seconds": 11.5}')
    (model / "finalists.json").unlink()
    search = "tune.distributed.sweep.study_run.StudyRun._search"
    monkeypatch.setattr(search, lambda self, context, budget: budgets.append(budget))
    assert run(spec, resume=True)[0] == 0
    assert budgets == [3.5] and search_time(model / "search_time.json") >= 11.5


@pytest.mark.long
def test_train_on_two_workers_equals_the_lane(tmp_path, alone):
    """`macdrop train` with two workers, and its errors as the workers raised them."""
    from tune.distributed.lanes.train_run import train_on_workers
    from tune.errors import TrainingDiverged

    settings = {"ray": {"dashboard": False, "num_workers": 2}}
    spec = make(tmp_path / "run", **settings)
    seen = []
    (model,) = spec.studies()
    outcome = train_on_workers(
        spec.ray, model, tmp_path / "train", observe=lambda metrics: seen.append(metrics) or "go_on"
    )
    assert outcome.status == "done" and [row["step"] for row in seen if "loss" in row] == list(range(1, 7))
    failures, _ = run(make(tmp_path / "run", **settings, sweep={"arms": ["macdrop"], "seeds": 0}))
    (trial,) = trials(tmp_path / "run")
    file = "adapter/adapter_model.safetensors"
    assert failures == 0
    assert (tmp_path / "run" / "trials" / trial["trial"] / file).read_bytes() == (
        tmp_path / "train" / file
    ).read_bytes()
    # `macdrop reproduce` makes the same, without Ray, on two workers, after the run folder was moved.
    moved = Path(shutil.copytree(tmp_path / "run", tmp_path / "elsewhere"))
    again = ["-m", "tune.cli", "reproduce", str(moved / "trials" / trial["trial"])]
    printed = alone("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *again)
    assert printed.count("equal         the recorded adapter") == 1
    with pytest.raises(TrainingDiverged, match="Lower learning_rate"):
        bad = make(tmp_path / "bad", **settings, learning_rate=DIVERGES)
        train_on_workers(bad.ray, bad.studies()[0], tmp_path / "bad", observe=lambda metrics: "go_on")


def test_too_few_gpus_are_reported_with_totals(tmp_path):
    spec = make(tmp_path / "run", ray={"gpus_per_worker": 2})
    with pytest.raises(ResourceError) as error:
        run(spec)
    assert "needs 2" in str(error.value) and "In use" in str(error.value)
    assert not (tmp_path / "run").exists()

"""The `macdrop` command: fast help, exit codes, output of the verbs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from helpers.run_folders import contents, make_resumable_run

from macdrop import errors
from tune import errors as tune_errors
from tune.cli.options import split_config

VERBS = (
    "scan",
    "attack",
    "data",
    "train",
    "eval",
    "suites",
    "judge",
    "plan",
    "sweep",
    "report",
    "compare",
    "export",
    "reproduce",
    "doctor",
    "schema",
    "docs",
    "zoo list",
    "zoo fetch",
    *(f"cluster {verb}" for verb in ("render", "check", "up", "submit", "status", "logs", "fetch", "down")),
    "cluster spot-watch",
    "cluster on-head",
)


# --- help ---


def test_every_verb_is_tested(shell):
    from tune.cli.main import app

    commands = typer.main.get_command(app).commands
    named = set(commands) - {"zoo", "cluster"}
    for group in ("zoo", "cluster"):
        named |= {f"{group} {verb}" for verb in commands[group].commands}
    assert named == set(VERBS)


@pytest.mark.parametrize("verb", ["", "zoo", "cluster", *VERBS])
def test_help_shows_an_example(verb, shell):
    ended = shell(*verb.split(), "--help")
    assert ended.code == 0 and "Usage: macdrop" in ended.out
    example = " ".join(ended.out.split()).partition("Example")[2]
    assert f"macdrop {verb}".strip() in example


@pytest.mark.parametrize("verb", ["", "sweep"])
def test_help_of_the_installed_command(verb):
    command = Path(sys.executable).with_name("macdrop")
    if not command.is_file():
        pytest.skip("macdrop is not installed with this python")
    ended = subprocess.run([command, *verb.split(), "--help"], capture_output=True, text=True)
    assert ended.returncode == 0 and "Example" in ended.stdout and ended.stderr == ""


def test_help_loads_nothing_heavy():
    """Imports that take a second and more wait until a verb runs; no wall time is asserted."""
    heavy = ("torch", "ray", "transformers", "deepspeed", "peft", "lm_eval", "datasets", "pandas", "numpy")
    heavy += ("tune.config.run_spec",)
    code = (
        "import sys\nfrom tune.cli.main import main\nprint(*{'pydantic'} & set(sys.modules))\n"
        "sys.argv = ['macdrop', 'sweep', '--help']\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print(*set({heavy}) & set(sys.modules))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    printed = ended.stdout.splitlines()
    assert printed[0] == printed[-1] == "" and "Usage" in printed[2]


# --- exit codes ---


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError, 2),
        (errors.UnsupportedModel, 2),
        (errors.DataError, 2),
        (tune_errors.CheckpointError, 1),
        (tune_errors.ResourceError, 3),
        (tune_errors.TrainingDiverged, 1),
        (errors.TrainingInvariantError, 1),
        (errors.MacDropError, 1),
        (tune_errors.BenchmarkError, 1),
    ],
)
def test_an_error_raised_on_purpose_is_a_message_and_an_exit_code(error, code, shell, monkeypatch):
    from tune.preflight import machine

    def fail(**options):
        raise error("what, and how to fix it")

    monkeypatch.setattr(machine, "checks", fail)
    ended = shell("doctor")
    assert (ended.code, ended.err) == (code, "macdrop: what, and how to fix it\n")


def test_ctrl_c_exits_with_130(shell, monkeypatch):
    from tune.preflight import machine

    def interrupt(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr(machine, "checks", interrupt)
    ended = shell("doctor")
    assert ended.code == 130 and "macdrop: interrupted" in ended.err


def test_failed_trials_exit_with_1(shell, monkeypatch):
    from tune.cli.verbs import sweep

    for failures, code in ((0, 0), (1, 1), (7, 1)):
        monkeypatch.setattr(sweep, "_run", lambda *arguments, failures=failures: failures)
        monkeypatch.setattr(sweep, "_report", lambda *arguments: None)
        assert shell("sweep").code == code


# --- arguments ---


def test_a_file_may_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a=b.yaml").write_text("")
    assert split_config(None) == (None, [])
    assert split_config(["demo"]) == ("demo", [])
    assert split_config(["my.yaml", "a=1", "b.c=2"]) == ("my.yaml", ["a=1", "b.c=2"])
    assert split_config(["a=1", "b=2"]) == (None, ["a=1", "b=2"])
    assert split_config(["a=b.yaml", "c=1"]) == ("a=b.yaml", ["c=1"])


# --- what the verbs print ---


def test_a_renamed_option_keeps_its_old_spelling(shell):
    old, new = (shell("sweep", option, "--recipes") for option in ("--clear-leftovers", "--clear-orphans"))
    assert old.code == new.code == 0 and old.out == new.out


def test_recipes_are_listed(shell):
    ended = shell("sweep", "--recipes")
    assert ended.code == 0 and any(line.startswith("demo ") for line in ended.out.splitlines())


def test_zoo_list_aligns_models_and_data(shell):
    lines = shell("zoo", "list").out.splitlines()
    assert {line.split()[0] for line in lines} >= {"zoo:planted-llama", "zoo:train"}
    starts = {len(line) - len(line.partition(" ")[2].lstrip()) for line in lines}
    assert len(starts) == 1, "all descriptions start in one column"


def test_a_dry_run_shows_spec_trials_and_resources_and_writes_no_run(shell):
    grid = ["sweep.search_alg=grid", "sweep.parameters={macdrop.p0: [0.2, 0.8]}", "sweep.metric={name: eval_loss}"]
    ended = shell("sweep", "demo", "--dry-run", *grid)
    assert ended.code == 0, ended.err
    text, _, plan = ended.out.partition("\n\nplanted-llama (")
    resolved = yaml.safe_load(text)
    assert resolved["sweep"]["parameters"] == {"macdrop.p0": [0.2, 0.8]} and resolved["learning_rate"] == 2e-3
    assert plan.count("macdrop.p0=0.2") == plan.count("macdrop.p0=0.8") == 2
    assert len([line for line in plan.splitlines() if line.startswith("plain ")]) == 2
    assert plan.count("on seeds 1, 2, 3: 9 fine-tunings") == 2 and "24 fine-tunings" in plan
    assert "= 2 CPU, 0 GPU" in plan and "100 optimizer steps" in plan
    assert all(name.startswith("cache/data/") for name in ended.new), "the tokenised data alone are kept"
    (shell.folder / "again.yaml").write_text(text)
    assert shell("sweep", "again.yaml", "--dry-run").out.partition("\n\nplanted-llama (")[2] == plan


def test_scan_proves_and_writes(shell):
    ended = shell("scan", "zoo:planted-llama", "--prove", "--k", "3", "--output", "found.json")
    assert ended.code == 0, ended.err
    for expected in ("<- massive weights", "top 3 rows", "top 3 zeroed", "draw 1", "verdict", "sensitive: perplexity"):
        assert expected in ended.out
    assert max(map(len, ended.out.splitlines())) > 80, "piped output is not wrapped"
    assert "found.json" in ended.new
    from macdrop import MassiveWeights

    assert MassiveWeights.load(shell.folder / "found.json").layer == 1


def test_a_cached_scan_is_shown_under_the_given_name(shell):
    from tune.zoo.catalog import zoo_path

    shell("scan", "zoo:planted-llama")
    ended = shell("scan", str(zoo_path("planted-llama")))
    assert ended.new == [] and str(zoo_path("planted-llama")) in ended.out


def test_a_damaged_scan_is_repeated(shell):
    first = shell("scan", "zoo:planted-llama")
    (kept,) = (name for name in first.new if "scans" in name)
    (shell.folder / kept).write_text("{half of")
    assert shell("scan", "zoo:planted-llama").out == first.out
    assert (shell.folder / kept).read_text().startswith("{\n")


def test_train_then_attack_and_score_the_adapter(shell, alone):
    """Training starts a process group, so it runs in its own process."""
    train = ["train", "model=zoo:planted-llama", "cutoff_len=64", "max_steps=3", "val_size=0.1", "save_steps=2"]
    printed = alone("-m", "tune.cli", *train, "lora_rank=2", "output_dir=out", cwd=shell.folder)
    lines = printed.splitlines()
    assert lines[-2].split() == ["next", "macdrop", "eval", "zoo:planted-llama", "--adapter", "out/adapter"]
    result = json.loads(lines[-1].removeprefix("macdrop-result "))
    assert (result["adapter"], result["status"], result["step"]) == ("out/adapter", "done", 3)
    assert f"eval loss     {result['eval_loss']:.4f} nats" in printed and result["trial"].startswith("planted-llama-")
    assert [line.split("  ")[0] for line in lines if line.startswith("step")] == ["step 1/3", "step 2/3", "step 3/3"]
    assert "hooked rows" in printed and (shell.folder / "out" / "adapter" / "adapter_config.json").is_file()

    ended = shell("attack", "zoo:planted-llama", "--adapter", "out/adapter", "--merged", "--k", "1", "--k", "3")
    assert ended.code == 0 and "merged weights, layer 1" in ended.out
    assert [line.split()[0] for line in ended.out.splitlines()[-2:]] == ["1", "3"]
    task = ("--attack", "zeroing@3", "--task", "qa=zoo:qa", "--limit", "16")
    ended = shell("attack", "zoo:planted-llama", "--adapter", "out/adapter", "--merged", *task)
    assert ended.code == 0 and "merged weights, layer 1" in ended.out, ended.err
    accuracy = ended.out.partition("  zeroing@3")[2].split()[2]
    merged = ["eval.zero_shot.qa=zoo:qa", "eval.limit=16", "eval.attacks=[zeroing@3]", "eval.attack_on=merged"]
    ended = shell("eval", "zoo:planted-llama", *merged, "--adapter", "out/adapter", "--output", "merged")
    (row,) = (row for row in map(json.loads, open("merged/scores.jsonl")) if row["metric"] == "acc")
    assert accuracy == f"{100 * row['value']:.1f}"

    benchmark = ["eval.perplexity.t={data: zoo:text, window: 64, limit: 4}", "eval.attacks=[none,zeroing@3]"]
    ended = shell("eval", "zoo:planted-llama", *benchmark, "--adapter", "out/adapter", "--output", "scores")
    assert ended.code == 0, ended.err
    assert "zeroing@3" in ended.out and "on base" in ended.out and "scores/scores.jsonl" in ended.new
    refused = shell("eval", "zoo:planted-llama", *benchmark, "--output", "scores")
    assert refused.code == 2 and "is not empty" in refused.err


def test_a_dry_run_shows_the_keys_for_local_files(shell):
    ended = shell("sweep", "demo", "eval.zero_shot.piqa={}", "--dry-run")
    assert ended.code == 0 and "from the Hub  1 name: " in ended.out, ended.err
    shown = [line.split() for line in ended.out.splitlines() if line.startswith("  eval.zero_shot.piqa")]
    assert shown == [
        ["eval.zero_shot.piqa.data=PATH", "baber/piqa", "(split", "validation)"],
        ["eval.zero_shot.piqa=off", "leaves", "this", "benchmark", "out"],
    ]
    assert "from the Hub" not in shell("sweep", "demo", "--dry-run").out


def test_a_dry_run_of_a_resume_shows_what_has_ended_and_changes_nothing(shell):
    run = make_resumable_run(shell.folder / "run")
    scores = run / "scores.jsonl"
    scores.write_bytes(scores.read_bytes()[:-20])
    (next(run.glob("trials/*")) / "trial.json").write_text("damaged")
    before = contents(run)
    ended = shell("sweep", "--resume", "--dry-run", "output_dir=run")
    assert ended.code == 0 and re.search(r"earlier run +fine-tunings that have ended: \d+ done", ended.out), ended.err
    message = shell.refused("sweep", "--resume", "--dry-run", "output_dir=run", "learning_rate=0.5")
    assert "learning_rate: " in message and "when it was started" in message
    assert contents(run) == before


def test_a_refused_resume_leaves_the_folder_as_it_is(shell):
    run = make_resumable_run(shell.folder / "run")
    (next(run.glob("trials/*")) / "trial.json").write_text("damaged")
    (run / ".in_use.lock").touch()
    before = contents(run)
    assert "when it was started" in shell.refused("sweep", "--resume", "output_dir=run", "learning_rate=0.5")
    assert contents(run) == before


def test_the_command_that_resumes_leaves_out_the_same_models(shell):
    make_resumable_run(shell.folder / "run")
    message = shell.refused("sweep", "demo", "output_dir=run", "--skip-unplaceable")
    assert re.search(r"macdrop sweep --resume output_dir=\S*run --skip-unplaceable\n", message)

"""The shipped suites: their tasks exist, they merge with the user's own keys, and they find local files."""

from __future__ import annotations

import json

import pytest
import yaml

from macdrop.errors import ConfigError
from tune.cli.verbs.suites import suites as show
from tune.config import suites
from tune.config.eval_spec import EvalSpec, jobs
from tune.config.messages import build
from tune.config.run_spec import dump, load
from tune.evaluation import catalogue

LONGBENCH = (
    "narrativeqa",
    "qasper",
    "multifieldqa_en",
    "hotpotqa",
    "2wikimqa",
    "musique",
    "gov_report",
    "qmsum",
    "multi_news",
    "trec",
    "triviaqa",
    "samsum",
    "passage_count",
    "passage_retrieval_en",
    "lcc",
    "repobench-p",
)
ZERO_SHOT = ("arc_easy", "arc_challenge", "boolq", "piqa", "winogrande")
MODEL = {"model_name_or_path": "zoo:planted-llama"}


def parse(**block) -> EvalSpec:
    return build(EvalSpec, block)


def complete(name: str, folder) -> EvalSpec:
    """Return the suite with all of its own files in `folder`."""
    for file in suites.load(name).files.values():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return parse(suite=name, local=str(folder))


@pytest.mark.parametrize("name", suites.names())
class TestEverySuite:
    def test_is_complete_and_valid(self, name, tmp_path):
        suite = suites.load(name)
        assert suite.name == name and suite.version >= 1 and suite.title and suite.about
        spec = complete(name, tmp_path)
        assert jobs(spec) and {f"{job.benchmark}/{job.task}" for job in jobs(spec)} == set(suite.files)
        for job in jobs(spec):
            owner, _, version = spec.entry(job).suite.partition("@")
            assert suites.load(owner).version == int(version), "an entry names the suite that defines it"

    def test_has_tasks_and_metrics_that_lm_eval_has(self, name, tmp_path):
        for task, entry in complete(name, tmp_path).zero_shot.items():
            definition = catalogue.read_definition(catalogue.find_task(entry.task or task, by_path=True))
            listed = {metric["metric"] for metric in definition["metric_list"]}
            assert entry.metric in listed

    def test_is_shown(self, name, capsys):
        show(name)
        shown = yaml.safe_load(capsys.readouterr().out)
        assert shown["version"] == suites.load(name).version and shown["eval"] == suites.load(name).eval

    def test_survives_a_round_trip(self, name, tmp_path):
        spec = complete(name, tmp_path)
        assert build(EvalSpec, spec.model_dump(mode="json")) == spec


def test_the_papers_suite_is_the_papers_benchmarks(tmp_path):
    spec = complete("paper", tmp_path)
    assert set(spec.zero_shot) == {*ZERO_SHOT, *(f"longbench_{name}" for name in LONGBENCH)}
    assert list(spec.perplexity) == ["wikitext", "c4", "pg19"] and list(spec.generation) == ["spec_bench"]
    attacked = {job.task for job in jobs(spec) if job.attack != "none"}
    assert attacked == {*ZERO_SHOT, *spec.perplexity}


def test_the_validation_suite_scores_no_item_of_the_test_suite():
    spec = parse(suite="validation")
    for task in ZERO_SHOT:
        definition = catalogue.read_definition(catalogue.find_task(task, by_path=True))
        scored = definition.get("test_split") or definition["validation_split"]
        splits = {definition.get(f"{kind}_split") for kind in ("training", "validation", "test")}
        assert spec.zero_shot[task].split in splits - {scored}


def test_the_attack_curve_is_every_k_on_both_places_and_the_plain_score_once():
    found = jobs(parse(suite=["zero-shot", "attack-curve"]))
    curve = [(job.attack, job.attack_on) for job in found if job.task == "piqa"]
    kinds = [f"{kind}@{k}" for kind in ("zeroing", "retaining") for k in (1, 3, 5, 10)]
    assert curve == [("none", None), *((kind, place) for kind in kinds for place in ("base", "merged"))]


def test_own_keys_override_those_of_the_suite():
    spec = parse(
        suite="zero-shot",
        limit=7,
        zero_shot={"boolq": False, "arc_easy": "mine.jsonl", "piqa": {"limit": 3}, "own": {"task": "piqa"}},
    )
    assert list(spec.zero_shot) == ["arc_easy", "arc_challenge", "piqa", "winogrande", "own"]
    assert spec.zero_shot["arc_easy"].data == ["mine.jsonl"] and spec.zero_shot["arc_easy"].metric == "acc_norm"
    assert spec.limit == 7 and spec.zero_shot["piqa"].limit == 3 and spec.zero_shot["own"].suite is None


def test_a_changed_definition_is_recorded_in_the_suite_name():
    spec = parse(
        suite=["zero-shot", "perplexity"], zero_shot={"piqa": {"num_fewshot": 5, "limit": 3}}, perplexity=["c4"]
    )
    assert spec.zero_shot["piqa"].suite == "zero-shot@1+num_fewshot" and spec.perplexity["c4"].suite == "perplexity@1"


def test_other_data_drop_the_name_and_split_of_the_hub_data_set():
    spec = parse(suite=["validation", "perplexity"], zero_shot={"piqa": "p.jsonl"}, perplexity={"wikitext": "w.txt"})
    assert spec.zero_shot["piqa"].split is None and spec.perplexity["wikitext"].name is None
    assert spec.zero_shot["boolq"].split == "train" and spec.perplexity["wikitext"].bos == "none"
    with pytest.raises(ConfigError, match="split is for data of the hub"):
        parse(suite="validation", zero_shot={"piqa": {"data": "p.jsonl", "split": "train"}})


def test_suites_are_merged_in_their_order():
    assert parse(suite=["validation", "zero-shot"]).limit == 1000
    assert parse(suite=["attack-curve", "paper"], generation={"spec_bench": "q.jsonl"}).attacks[1] == "zeroing@3"


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"suite": "zeroshot"}, ["zeroshot", "Did you mean 'zero-shot'", "attack-curve"]),
        ({"suite": 3}, ["a name or a list of names"]),
        ({"suite": []}, ["a name or a list of names"]),
        ({"suite": ["paper", "paper"]}, ["twice"]),
        ({"local": "data"}, ["add suite"]),
        ({"suit": "paper"}, ["Did you mean 'suite'"]),
        ({"suite": "zero-shot", "zero_shot": {"bolq": False}}, ["bolq", "Did you mean 'boolq'"]),
        ({"suite": "zero-shot", "zero_shot": {"boolq": {"dta": "x"}}}, ["Did you mean 'data'"]),
        ({"suite": "paper"}, ["generation.spec_bench", "hemingkx/Spec-Bench", "local: FOLDER", "off"]),
        ({"zero_shot": {"boolq": False}}, ["zero_shot.boolq"]),
    ],
)
def test_bad_suites_are_refused_with_the_remedy(block, words):
    with pytest.raises(ConfigError) as error:
        build(EvalSpec, block)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_local_folder_gives_every_entry_its_file_or_all_missing_files_are_reported(tmp_path):
    spec = complete("zero-shot", tmp_path)
    assert spec.zero_shot["boolq"].data == [str(tmp_path / "boolq" / "validation.jsonl")]
    for task in ("boolq", "piqa"):
        (tmp_path / task / "validation.jsonl").unlink()
    with pytest.raises(ConfigError) as error:
        parse(suite="zero-shot", local=str(tmp_path))
    message = str(error.value)
    assert "lacks 2 file(s)" in message and "boolq/validation.jsonl" in message and "piqa/validation.jsonl" in message
    assert "aps/super_glue" in message and "eval.zero_shot.boolq=off" in message
    kept = parse(suite="zero-shot", local=str(tmp_path), zero_shot={"boolq": False, "piqa": "mine.jsonl"})
    assert kept.zero_shot["piqa"].data == ["mine.jsonl"]


def test_a_written_run_file_has_the_expanded_suite(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps({**MODEL, "eval": {"suite": "zero-shot"}, "validation": {"suite": "validation"}}))
    spec = load(file, ["eval.limit=5", "eval.zero_shot.boolq=off", "eval.zero_shot.piqa.data=p.jsonl"])
    assert list(spec.eval.zero_shot) == ["arc_easy", "arc_challenge", "piqa", "winogrande"] and spec.eval.limit == 5
    assert spec.eval.zero_shot["piqa"].data == ["p.jsonl"] and spec.validation.zero_shot["boolq"].split == "train"
    written = tmp_path / "config.yaml"
    written.write_text(yaml.safe_dump(dump(spec)))
    assert (
        "suite: zero-shot@1" in written.read_text() and "suite: null" not in written.read_text().split("zero_shot")[0]
    )
    assert load(written) == spec


def test_an_unknown_suite_in_a_run_file_names_the_key():
    with pytest.raises(ConfigError, match="eval: unknown suite 'papr'. Did you mean 'paper'"):
        load(None, ["model=zoo:planted-llama", "eval.suite=papr"])
    with pytest.raises(ConfigError, match="Write eval.suite"):
        load(None, ["model=zoo:planted-llama", "suite=paper"])


def test_the_attack_curve_without_an_adapter_scores_base_rows_only(tmp_path, capsys):
    from tune.cli.verbs.eval import evaluate

    text = ["eval.perplexity.wikitext_bos={data: zoo:text, window: 64, limit: 4}"]
    evaluate("zoo:planted-llama", text, suite=["attack-curve"], output=tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    curve = {row["attack"]: row["value"] for row in rows}
    assert len(rows) == len(curve) == 9 and {row["attack_on"] for row in rows} == {None, "base"}
    assert curve["zeroing@5"] > 2 * curve["none"], "the planted rows carry the model"
    assert all(row["settings"].endswith("suite=attack-curve@1+window") for row in rows)
    shown = capsys.readouterr().out
    assert "no attack" in shown and "retaining@10" in shown and shown.count("perplexity/wikitext_bos/perplexity") == 1


def test_an_attack_on_too_many_rows_is_refused_before_the_model_is_loaded():
    from tune.cli.source import Source
    from tune.preflight.inputs import check_scoring

    spec = parse(suite="attack-curve", attacks=["zeroing@100000"], perplexity={"wikitext_bos": "zoo:text"})
    with pytest.raises(ConfigError, match="eval.attacks has 'zeroing@100000', but an FFN"):
        check_scoring(Source("zoo:planted-llama").spec(), spec)


def test_the_mean_of_the_validation_suite_is_an_objective():
    from tune.config.recorded import asked_for
    from tune.evaluation.score_names import named_scores

    metric = "sweep.metric={name: zero_shot/mean/acc, goal: maximize}"
    spec = load(None, ["model=zoo:planted-llama", "validation.suite=validation", metric])
    rows = [
        {
            "benchmark": "zero_shot",
            "task": task,
            "metric": name,
            "attack": "none",
            "attack_on": None,
            "value": value,
            "stderr": None,
            "n": 10,
            "split": "validation",
        }
        for number, task in enumerate(ZERO_SHOT)
        for name, value in (("acc", 0.1), ("acc_norm", 0.2 + number / 10))
    ]
    found = named_scores(rows, asked_for(dump(spec)))
    assert found["zero_shot/mean/acc"] == pytest.approx(
        (0.2 + 0.3 + 0.1 + 0.5 + 0.1) / 5
    )  # acc_norm, as the suite says
    assert found["zero_shot/boolq/acc_norm"] == pytest.approx(0.4)
    with pytest.raises(ConfigError, match="no benchmark of the validation block gives such a score"):
        load(None, ["model=zoo:planted-llama", "validation.zero_shot=[piqa]", metric])

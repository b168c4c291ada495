"""Node checks: problems are reported with node, cause and remedy; the checks are plain functions."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from tune.config.run_spec import RaySpec, RunSpec
from tune.distributed.cluster.node_checks import (
    Hub,
    Needs,
    check_each,
    check_nodes,
    hub_models,
    look,
    needs_of,
    places,
    token_file,
)
from tune.errors import ResourceError
from tune.scheduling.study import studies
from tune.storage.environment import version
from tune.zoo import real_models

pytestmark = pytest.mark.ray


@pytest.fixture
def needs(tmp_path):
    with token_file(tmp_path / "runs" / "one") as (token, word):
        yield Needs(token, word, (), (), bf16=False, weights=0, macdrop=version("macdrop"), lag=0.0)


def test_a_complete_node_passes_the_check(needs, tmp_path):
    assert look(needs) == []
    assert os.listdir(tmp_path) == [os.path.basename(needs.token)], "next to the run folder, which does not exist yet"


def test_the_token_file_is_removed(tmp_path):
    with token_file(tmp_path):
        assert len(list(tmp_path.iterdir())) == 1
    assert not list(tmp_path.iterdir())


def test_missing_requirements_are_reported(needs, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lost = replace(needs, token=str(tmp_path / "elsewhere" / "token"))
    assert "does not see what the head wrote" in look(lost)[0] and "all nodes mount" in look(lost)[0]
    assert "another folder" in look(replace(needs, word="other"))[0]
    (there,) = look(replace(needs, paths=(str(tmp_path), "data/train.jsonl")))
    assert there.startswith("has no data/train.jsonl.") and "in full" in there
    assert "Install the same version" in look(replace(needs, macdrop="0"))[0]
    (hub,) = look(replace(needs, hub=(Hub("nobody/nothing", None, False),)))
    assert hub.startswith("cannot fetch nobody/nothing: ") and "HF_HOME" in hub


def test_read_only_storage_is_reported(needs, monkeypatch):
    from pathlib import Path

    def refuse(self, text):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", refuse)
    (problem,) = look(needs)
    assert problem.startswith("may not write to ") and "Mount it writable" in problem


def test_checked_paths_and_models_come_from_the_run_file(tmp_path):
    local = tmp_path / "rows.jsonl"
    local.write_text("{}\n")
    raw = {
        "model_name_or_path": "someone/model",
        "dataset": [str(local), "zoo:train"],
        "eval": {"zero_shot": {"qa": {"data": "zoo:qa"}}, "perplexity": {"t": str(tmp_path)}},
    }
    spec = RunSpec.model_validate(raw)
    from tune.config.run_spec import dump

    assert set(places(dump(spec))) == {"someone/model", str(local), str(tmp_path)}
    assert hub_models(spec, studies(spec)) == [Hub("someone/model", None, False)]
    assert hub_models(RunSpec(model_name_or_path="zoo:planted-llama"), []) == []


def test_a_single_machine_skips_the_check_and_a_node_is_named(tmp_path):
    import ray

    from tune.distributed.cluster.ray_cluster import connect

    connect(RaySpec(dashboard=False))
    try:
        spec, messages = RunSpec(model_name_or_path="zoo:planted-llama"), []
        check_nodes(spec, studies(spec), tmp_path / "run", messages.append)
        assert not messages and not list(tmp_path.iterdir())
        check_each(ray.nodes(), spec, studies(spec), tmp_path / "run", messages.append)
        gone = {**ray.nodes()[0], "NodeID": "0" * 56}
        check_each([gone], spec, studies(spec), tmp_path / "run", messages.append)
        assert "was lost during its check" in messages[0]
        away = RunSpec(model_name_or_path="zoo:planted-llama", dataset="rows.jsonl")
        there = tmp_path / "there"
        there.mkdir()
        (there / "rows.jsonl").write_text("{}\n")
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ResourceError, match="has no rows.jsonl") as caught:
            patch.chdir(there)  # where the driver is; the node's tasks run elsewhere
            check_each(ray.nodes(), away, studies(away), tmp_path / "run", messages.append)
        assert str(caught.value).startswith(f"Node {ray.nodes()[0]['NodeManagerHostname']} (")
        assert [path.name for path in tmp_path.iterdir()] == ["there"]
    finally:
        ray.shutdown()


def test_a_node_compares_its_copy_of_a_model_with_the_heads(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    from helpers.gguf_files import tiny_llama, write_gguf

    monkeypatch.setenv("MACDROP_CACHE", str(tmp_path / "head"))
    monkeypatch.setattr(real_models, "_cached", lambda *place: False)
    file = str(write_gguf(tmp_path / "tiny.gguf", tiny_llama()))
    spec = RunSpec(model_name_or_path=file)
    with token_file(tmp_path) as (token, word):
        needs = replace(needs_of(spec, studies(spec), token, word), lag=0.0)
        assert [name for name, _ in needs.copies] == [file] and not needs.hub
        monkeypatch.setenv("MACDROP_CACHE", str(tmp_path / "node"))
        assert look(needs) == [] and list((tmp_path / "node" / "models").iterdir())
        write_gguf(tmp_path / "tiny.gguf", tiny_llama(seed=1))
        (problem,) = look(needs)
        assert problem.startswith(f"has other files of {file} than the head") and "MACDROP_CACHE" in problem
        (problem,) = look(replace(needs, paths=(), copies=(("zoo:smollm2-135m", "2-0"),)))
        assert problem.startswith("cannot use zoo:smollm2-135m") and "macdrop zoo fetch smollm2-135m" in problem

"""`macdrop zoo fetch`: pinned wheels by pip from a folder that plays the index, and what happens where it fails."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
from helpers.gguf_files import tiny_llama, write_gguf, write_wheel

from tune.zoo import real_models
from tune.zoo.catalog import is_planted, resolve
from tune.zoo.real_models import REAL, RealModel, Wheel, find_here

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> tuple[Path, RealModel]:
    """A folder with two wheels that carry half of a tiny GGUF file each, and the model that they are of."""
    folder = tmp_path_factory.mktemp("index")
    content = write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_llama()).read_bytes()
    half = len(content) // 2
    wheels = tuple(
        Wheel(f"tiny-part{n}==1.0", write_wheel(folder, f"tiny-part{n}", "1.0", f"data/tiny.gguf.part0{n}", part))
        for n, part in enumerate((content[:half], content[half:]), 1)
    )
    model = RealModel(
        "tiny-real",
        "nobody/tiny-real",
        "a tiny llama",
        sensitive=False,
        licence="CC0-1.0",
        licence_url="https://creativecommons.org/publicdomain/zero/1.0",
        terms=False,
        wheels=wheels,
        gguf=hashlib.sha256(content).hexdigest(),
        size=1,
    )
    return folder, model


@pytest.fixture
def serve(index, monkeypatch):
    """Makes pip look into a folder alone, and the zoo know a model; by default the tiny one."""
    folder, tiny = index

    def start(found: Path | None = folder, **changes) -> RealModel:
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
        if found is not None:
            monkeypatch.setenv("PIP_FIND_LINKS", str(found))
        model = dataclasses.replace(tiny, **changes)
        monkeypatch.setitem(REAL, model.name, model)
        return model

    return start


def refused(shell, *arguments: str) -> str:
    """The message of a command that ends with 2 and leaves no more than the lock of what it began."""
    ended = shell(*arguments)
    assert ended.code == 2 and "Traceback" not in ended.err, ended.err
    assert [name for name in ended.new if not name.endswith(".lock")] == []
    assert {path.name for path in (shell.folder / "cache" / "models").glob("*") if path.suffix != ".lock"} == set()
    return ended.err


# --- fetching ---


def test_a_model_is_fetched_joined_and_used_by_name(serve, shell, caplog):
    model = serve()
    assert "macdrop zoo fetch tiny-real" in shell("zoo", "list").out
    ended = shell("zoo", "fetch", "zoo:tiny-real")
    assert ended.code == 0, ended.err
    assert "CC0-1.0, https://creativecommons.org" in ended.out and "Downloading tiny-part2==1.0" in caplog.text
    folder = Path(resolve("zoo:tiny-real"))
    assert folder == Path(find_here(model).place) and not list(folder.glob("*.gguf*"))
    assert json.loads((folder / "origin.json").read_text())["packages"] == ["tiny-part1==1.0", "tiny-part2==1.0"]
    scanned = shell("scan", "zoo:tiny-real")
    assert scanned.code == 0, scanned.err
    assert "zoo:tiny-real is package tiny-part1==1.0 to tiny-part2==1.0, 4-bit weights of nobody" in scanned.out
    again = shell("zoo", "fetch", "tiny-real")
    assert again.code == 0 and "it is here" in again.out and again.new == []


def test_terms_must_be_accepted_by_a_flag(serve, shell):
    serve(terms=True)
    told = refused(shell, "zoo", "fetch", "tiny-real")
    assert "CC0-1.0: https://" in told and "macdrop zoo fetch tiny-real --accept-terms" in told
    ended = shell("zoo", "fetch", "tiny-real", "--accept-terms")
    assert ended.code == 0, ended.err
    assert json.loads((Path(resolve("zoo:tiny-real")) / "origin.json").read_text())["terms_accepted"] is True


def test_a_wheel_with_another_checksum_is_refused(serve, index, shell):
    first, second = index[1].wheels
    serve(wheels=(first, dataclasses.replace(second, sha256="0" * 64)))
    told = refused(shell, "zoo", "fetch", "tiny-real")
    assert "tiny-part2==1.0 is not the pinned one" in told and "Nothing was kept" in told


def test_wheels_that_hold_another_file_are_refused(serve, shell):
    serve(gguf="1" * 64)
    assert "hold another file than the pinned one" in refused(shell, "zoo", "fetch", "tiny-real")


def test_without_an_index_the_message_says_how_else(serve, shell):
    serve(found=None)
    told = refused(shell, "zoo", "fetch", "tiny-real")
    assert "did not provide tiny-part1==1.0" in told and "hf download nobody/tiny-real" in told


def test_a_name_that_was_not_fetched_names_the_command(serve, shell):
    serve(terms=True)
    told = refused(shell, "scan", "zoo:tiny-real")
    assert "macdrop zoo fetch tiny-real --accept-terms" in told and "HF_HUB_OFFLINE" in told


@pytest.mark.parametrize(
    ("name", "expected"), [("smolm2-135m", "Did you mean 'smollm2-135m'?"), ("planted-llama", "nothing to fetch")]
)
def test_names_that_cannot_be_fetched(name, expected, shell):
    assert expected in refused(shell, "zoo", "fetch", name)


# --- what a name stands for ---


def test_the_hugging_face_cache_comes_first(serve, monkeypatch):
    model = serve()
    monkeypatch.setattr(real_models, "_cached", lambda hub, file: hub == model.hub)
    assert resolve("zoo:tiny-real") == model.hub and "Hugging Face cache" in find_here(model).source


def test_only_built_in_models_are_planted():
    assert is_planted("zoo:planted-llama") and not is_planted("zoo:smollm2-135m") and not is_planted("zoo-like")


def test_the_list_says_natural_or_planted_and_sensitive_or_not(shell):
    listed = shell("zoo", "list").out
    for name, kind in (
        ("planted-llama", "planted, sensitive"),
        ("insensitive-llama", "planted, not sensitive"),
        ("smollm2-135m", "natural, sensitive"),
        ("gemma3-270m", "natural, not sensitive"),
    ):
        assert any(line.startswith(f"zoo:{name}") and f" {kind}: " in line for line in listed.splitlines()), name


@pytest.mark.real
def test_smollm2_holds_the_rows_that_are_known_of_it():
    """Two massive rows in layer 11, as an exhaustive search over all layers found."""
    from helpers.real_models import smollm2

    from macdrop.load import open_model
    from macdrop.scan import find_massive_weights

    weights = find_massive_weights(*open_model(smollm2()), source="smollm2", fingerprint="-")
    assert weights.layer == 11 and set(weights.top(2)) == {1229, 1487}

"""KubeRay manifests against the resource definitions of the operator, which are not part of this repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from cluster.backends import registry
from cluster.check import kuberay
from cluster.check.finding import ERROR
from cluster.commands import check
from cluster.errors import BadLaunchFile
from cluster.render import render

READ = kuberay.read_definitions  # before the fixture patches it
MANIFESTS = ("kuberay.yaml", "kuberay-job.yaml")


@pytest.fixture(scope="module")
def crd():
    """The folder with the resource definitions; they are large, so both are read once."""
    root = Path(os.environ.get("MACDROP_SHARED", Path(__file__).parents[3] / "shared"))
    if not (root / "data/kuberay").is_dir():
        pytest.skip("no definitions of KubeRay's resources")
    definitions = kuberay.read_definitions(root / "data/kuberay")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kuberay, "read_definitions", lambda _: definitions)
        yield root / "data/kuberay"


def found(text: str, crd) -> list[tuple[str, str]]:
    file = registry.parse(text, render.EXAMPLES / "kuberay.yaml")
    return [(each.where, each.what) for each in check.findings(file, crd) if each.severity == ERROR]


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_examples_fit_the_definitions(name, crd):
    assert found((render.EXAMPLES / name).read_text(encoding="utf-8"), crd) == []


@pytest.mark.parametrize("name", MANIFESTS)
@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        ("idleTimeoutSeconds", "idleTimeoutSecond", "autoscalerOptions.idleTimeoutSecond"),
        ('num-cpus: "0"', "num-cpus: 0", "rayStartParams.num-cpus"),
        ("mode: token", "mode: tokens", "authOptions.mode"),
        ("secretName:", "secretNam:", "authOptions.secretNam"),
        ("terminationGracePeriodSeconds: 120", 'terminationGracePeriodSeconds: "120"', "terminationGracePeriodSeconds"),
        ("claimName:", "claimNam:", "claimNam"),
        ("preStop:", "prestop:", "lifecycle.prestop"),
        ("replicas: 2", 'replicas: "2"', "replicas"),
        ("containers:", "container:", "container"),
    ],
)
def test_mistake_is_found_with_its_place(name, old, new, where, crd):
    text = (render.EXAMPLES / name).read_text(encoding="utf-8")
    assert old in text
    assert any(place.endswith(where) for place, _ in found(text.replace(old, new), crd))


def test_folder_without_definitions_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({"kind": "Secret"}))
    with pytest.raises(BadLaunchFile, match="no CustomResourceDefinition"):
        READ(tmp_path)

"""Checks of KubeRay manifests; of every key, given the resource definitions of the operator."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from cluster.check.finding import Finding, environment_findings, error, note, place, unknown_keys
from cluster.core.kuberay_file import KubeRayFile
from cluster.core.launch_file import LOADER, as_dict, as_dicts
from cluster.errors import BadLaunchFile

_NAME = re.compile(r"[a-z]([a-z0-9-]{0,45}[a-z0-9])?")


def findings(file: KubeRayFile, crd: Path | None = None) -> Iterator[Finding]:
    """All findings of a manifest. `crd`: a folder (or file) with the resource definitions of RayCluster and RayJob."""
    base = "spec.rayClusterSpec" if file.resource == "RayJob" else "spec"
    if file.resource not in ("RayCluster", "RayJob"):
        yield error("kind", "is neither RayCluster nor RayJob", "a sweep runs on one of these", "kind: RayCluster")
        return
    if not _NAME.fullmatch(str(file.metadata.get("name", ""))):
        yield error(
            "metadata.name",
            "is not a valid name for pods",
            "KubeRay derives the names of pods and services from it",
            "at most 47 lower-case letters, digits and -, starting with a letter",
        )
    yield from _groups(file, base)
    if not file.token:
        yield error(
            f"{base}.authOptions",
            "token authentication is off",
            "every pod of the Kubernetes cluster could run code there",
            "authOptions: {mode: token, secretName: macdrop-token}",
        )
    spec = file.cluster_spec
    if as_dict(spec.get("headGroupSpec")).get("serviceType") in ("LoadBalancer", "NodePort"):
        yield error(
            f"{base}.headGroupSpec.serviceType",
            "exposes the head to the outside",
            "anyone who reaches its port can start jobs",
            "ClusterIP; the verbs of `macdrop cluster` connect through kubectl",
        )
    least, most = file.workers
    if least < most and not spec.get("enableInTreeAutoscaling"):
        yield error(
            f"{base}.enableInTreeAutoscaling",
            "is off",
            "no worker beyond replicas would start",
            "true, or equal counts",
        )
    if file.resource == "RayJob":
        yield from _job(as_dict(file.content.get("spec")))
    if crd:
        yield from _definitions(file, crd)


def _groups(file: KubeRayFile, base: str) -> Iterator[Finding]:
    spec = file.cluster_spec
    workers = spec.get("workerGroupSpecs")
    if not isinstance(workers, list) or not workers:
        yield error(
            f"{base}.workerGroupSpecs", "has no group", "the head runs no tasks, so nothing would run", "add a group"
        )
        workers = []
    names = [str(as_dict(group).get("groupName")) for group in workers]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield error(
            f"{base}.workerGroupSpecs", f"two groups are named {name[:60]}", "KubeRay mixes them up", "use two names"
        )
    yield from _group(file, as_dict(spec.get("headGroupSpec")), f"{base}.headGroupSpec", "head")
    for number, group in enumerate(map(as_dict, workers)):
        where = f"{base}.{place('workerGroupSpecs', number)}"
        low, now, high = (group.get(key) for key in ("minReplicas", "replicas", "maxReplicas"))
        counts = [count for count in (low, now, high) if count is not None]
        if any(not isinstance(count, int) or isinstance(count, bool) or count < 0 for count in counts):
            yield error(
                where, "replicas are not whole numbers", "Kubernetes rejects them", "for example minReplicas: 1"
            )
        elif counts != sorted(counts):
            yield error(
                where, "minReplicas, replicas, maxReplicas are out of order", "KubeRay would never settle", "sort them"
            )
        yield from _group(file, group, where, "workers")


def _group(file: KubeRayFile, group: dict[str, Any], where: str, role: str) -> Iterator[Finding]:
    pod = as_dict(as_dict(group.get("template")).get("spec"))
    containers = pod.get("containers")
    container = as_dict(containers[0]) if isinstance(containers, list) and containers else {}
    inside = f"{where}.template.spec.containers[0]"
    if not container.get("image") or not container.get("name"):
        yield error(
            inside, "has no container with name and image", "there is nothing to start", "name: ray, image: ..."
        )
        return
    image = str(container["image"])
    if ":" not in image.rpartition("/")[2] or image.endswith(":latest"):
        yield note(f"{inside}.image", "has no fixed version", "two nodes may run two versions of Ray", "IMAGE:VERSION")
    params = as_dict(group.get("rayStartParams"))
    for key in [key for key, value in params.items() if not isinstance(value, str)]:
        yield error(place(where, "rayStartParams", key), "is not text", "Kubernetes rejects it", 'quote it: "0"')
    if role == "head" and str(params.get("num-cpus")) != "0":
        yield note(
            f"{where}.rayStartParams",
            "the head takes tasks",
            "a head that runs out of memory takes the whole cluster down",
            'num-cpus: "0"',
        )
    variables = as_dicts(container.get("env"))
    env = {str(each.get("name")): str(each["value"]) for each in variables if "value" in each}
    yield from environment_findings(env, f"{inside}.env", role)
    yield from _volumes(file, pod, container, inside, role)
    held = {str(each.get("name")) for each in variables}
    if not container.get("envFrom") and set(file.secrets) - held:
        yield error(
            f"{inside}.envFrom",
            f"the variables of MACDROP_SECRETS are missing on the {role}",
            "no task there could use a token",
            "envFrom: [{secretRef: {name: macdrop-secrets}}]",
        )


def _volumes(
    file: KubeRayFile, pod: dict[str, Any], container: dict[str, Any], where: str, role: str
) -> Iterator[Finding]:
    mounts = {str(each.get("mountPath")): str(each.get("name")) for each in as_dicts(container.get("volumeMounts"))}
    volumes = {str(each.get("name")): each for each in as_dicts(pod.get("volumes"))}
    for path, name in mounts.items():
        if name not in volumes:
            yield error(
                f"{where}.volumeMounts",
                f"{path[:60]} mounts no volume of the pod",
                "Kubernetes rejects it",
                "fix the name",
            )
    storage = volumes.get(mounts.get(file.storage or "", ""), {})
    if file.storage and "persistentVolumeClaim" not in storage and "nfs" not in storage and "csi" not in storage:
        yield error(
            f"{where}.volumeMounts",
            f"no persistent volume is mounted at the storage on the {role}",
            "results would be lost with the pod",
            "a PersistentVolumeClaim (ReadWriteMany) at MACDROP_STORAGE, on all pods",
        )
    if role == "workers" and "/dev/shm" not in mounts:
        yield note(
            f"{where}.volumeMounts",
            "no memory volume at /dev/shm",
            "NCCL and Ray's object store live in shared memory; a pod has 64 MB of it",
            "emptyDir: {medium: Memory} at /dev/shm",
        )


def _job(spec: dict[str, Any]) -> Iterator[Finding]:
    entrypoint = str(spec.get("entrypoint") or "")
    if not entrypoint.strip():
        yield error(
            "spec.entrypoint", "is missing", "the job has nothing to run", "entrypoint: macdrop sweep RECIPE ..."
        )
    elif re.search(r"""['"$;&|<>\\]""", entrypoint):
        yield note(
            "spec.entrypoint",
            "contains shell syntax",
            "KubeRay splits it into words and joins them again, which loses quotes",
            "a script in a ConfigMap",
        )
    if not spec.get("shutdownAfterJobFinishes"):
        yield note(
            "spec.shutdownAfterJobFinishes",
            "is off",
            "machines stay, and cost money, after the sweep has ended",
            "true",
        )


# --- the resource definitions of the operator ---


def _definitions(file: KubeRayFile, folder: Path) -> Iterator[Finding]:
    """Validate each document of ray.io against the openAPIV3Schema of its definition, with no other keys allowed."""
    import jsonschema  # type: ignore[import-untyped]  # its stubs are a package of their own

    schemas = read_definitions(folder)
    for document in file.documents:
        api, kind = str(document.get("apiVersion")), str(document.get("kind"))
        if not api.startswith("ray.io/"):
            continue
        if (kind, api) not in schemas:
            yield note(
                "kind", f"no definition of {kind} {api} in {folder.name}", "its keys are not checked", "see --crd"
            )
            continue
        schema = _closed(schemas[kind, api])
        filled = _filled(copy.deepcopy(document), schema)
        for fault in jsonschema.Draft7Validator(schema).iter_errors(filled):
            where = place(*fault.absolute_path)
            if fault.validator == "additionalProperties":
                known = as_dict(fault.schema).get("properties", {})
                yield from unknown_keys(fault.instance, known, where if fault.absolute_path else "", "the definition")
            elif fault.validator == "required":
                missing = [key for key in fault.validator_value if key not in fault.instance]
                yield error(where, f"{', '.join(missing)} is missing", "Kubernetes rejects it", f"add {missing[0]}:")
            else:
                rule = f"{fault.validator}: {str(fault.validator_value)[:60]}"
                yield error(where, f"breaks the rule {rule}", "Kubernetes rejects it", "fix the value")


def read_definitions(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Read definitions: (kind, apiVersion) -> schema. Raises BadLaunchFile: there are none."""
    files = sorted(folder.glob("*.y*ml")) if folder.is_dir() else [folder]
    found: dict[tuple[str, str], dict[str, Any]] = {}
    try:
        documents = [each for file in files for each in yaml.load_all(file.read_text(), Loader=LOADER)]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as fault:
        raise BadLaunchFile(f"--crd {folder}: cannot be read: {fault}") from None
    for document in map(as_dict, documents):
        spec = as_dict(document.get("spec"))
        if document.get("kind") == "CustomResourceDefinition":
            for version in spec.get("versions") or []:
                key = (spec["names"]["kind"], f"{spec['group']}/{version['name']}")
                found[key] = version["schema"]["openAPIV3Schema"]
    if not found:
        raise BadLaunchFile(f"--crd {folder}: no CustomResourceDefinition there.")
    return found


def _closed(schema: Any) -> Any:
    """Forbid further keys wherever the schema lists some; what Kubernetes leaves open stays open."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    listed = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    if listed and "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        closed["type"] = ["integer", "string"]
        closed.pop("anyOf", None)
    return closed


def _filled(value: Any, schema: dict[str, Any]) -> Any:
    """Fill in the defaults that the server adds before it validates."""
    if isinstance(value, dict):
        for key, inner in as_dict(schema.get("properties")).items():
            if key not in value and isinstance(inner, dict) and "default" in inner:
                value[key] = inner["default"]
            elif key in value:
                _filled(value[key], inner)
    elif isinstance(value, list):
        for each in value:
            _filled(each, as_dict(schema.get("items")))
    return value

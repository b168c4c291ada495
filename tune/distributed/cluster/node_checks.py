"""Pre-flight check of every node: one task per node, before the sweep starts.

What a node must have is plain data (`Needs`), what it lacks plain sentences (`look`, which needs no Ray). The driver's
own node is not checked, so a run on one machine pays nothing.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from macdrop.errors import MacDropError
from macdrop.fingerprint import SHOWN
from macdrop.quantised import INSTALL
from tune.config.run_spec import RunSpec, dump
from tune.distributed.cluster import ray_internals
from tune.distributed.cluster.ray_internals import HEAD
from tune.errors import ResourceError
from tune.preflight.adapter import model_outline
from tune.preflight.base_memory import base_bytes
from tune.preflight.probe import HEADROOM
from tune.scheduling.study import Study
from tune.storage.atomic import atomic_write_text, writing
from tune.storage.environment import version
from tune.storage.places import CACHE_VARIABLE
from tune.training.loading import fingerprint
from tune.zoo.model_source import is_local_copy, model_source, source_note
from tune.zoo.real_models import PREFIX

#: How long a file may take to show up through the caches of a network file system, in seconds.
LAG_S = 30.0
#: How long a task may wait for its GPUs; beyond that somebody else is using them.
GPU_WAIT_S = 120.0
#: Keys of a run file whose value is a file, a folder, or an id on the hub.
PLACES = ("model_name_or_path", "dataset", "data", "fewshot_data", "path", "model")
#: The files of a hub repository that a model is loaded from; never a pickle, and code only if the run file trusts it.
PATTERNS = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
NOT_NEEDED = ("original/*", "consolidated*", "onnx/*")


@dataclass(frozen=True)
class Hub:
    """A model on the hub, to be fetched."""

    name: str
    revision: str | None
    code: bool


@dataclass(frozen=True)
class Needs:
    """The requirements of a run on every node.

    `copies` are models of which each node has a copy of its own (`tune.zoo.model_source.is_local_copy`), with their
    fingerprints. `token` is a file in the run folder, or in its nearest existing parent, and `word` its content;
    `paths` are local models and data as the run file has them; `weights` is the size in bytes of the largest model's
    weights on one GPU.
    """

    token: str
    word: str
    paths: tuple[str, ...]
    hub: tuple[Hub, ...]
    bf16: bool
    weights: int
    macdrop: str | None
    lag: float = LAG_S
    copies: tuple[tuple[str, str], ...] = ()
    quantised: bool = False


def check_nodes(spec: RunSpec, planned: Sequence[Study], run_dir: Path, tell: Callable[[str], None]) -> None:
    """Check every node except the driver's own, and fetch hub models there. Costs nothing on one machine.

    Raises:
        ResourceError: what nodes lack, each with its remedy.
    """
    here = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    if nodes:
        check_each(nodes, spec, planned, run_dir, tell)


def check_each(
    nodes: Sequence[dict[str, Any]],
    spec: RunSpec,
    planned: Sequence[Study],
    run_dir: Path,
    tell: Callable[[str], None],
) -> None:
    """Check these entries of `ray.nodes`; raises the same as `check_nodes`."""
    hub = sorted({hub.name for hub in hub_models(spec, planned)})
    if hub:
        tell(f"each node fetches {', '.join(hub)} unless it has it already")
    with token_file(run_dir) as (token, word):
        needs = needs_of(spec, planned, token, word)
        tasks: dict[ray.ObjectRef, tuple[dict[str, Any], float | None]]
        tasks = {_task(look, needs, node): (node, None) for node in nodes}
        workers = [node for node in nodes if node["Resources"].get("GPU", 0) >= 1 and HEAD not in node["Resources"]]
        free = ray_internals.free_resources() if workers else {}
        for node in workers:
            gpus = min(2, int(free.get(node["NodeID"], {}).get("GPU", 0)))
            if gpus:
                tasks[_task(try_gpus, needs, node, gpus=gpus)] = node, GPU_WAIT_S
        problems = [problem for ref, (node, wait) in tasks.items() for problem in _answer(ref, node, wait, tell)]
    if problems:
        raise ResourceError("\n".join(problems))


def needs_of(spec: RunSpec, planned: Sequence[Study], token: str, word: str) -> Needs:
    """Return what a run's nodes must have; the size of its models is measured only where there are GPUs."""
    paths = {place for place in places([dump(study.spec) for study in planned]) if os.path.exists(place)}
    paths |= {place for place in places(dump(spec)) if os.path.exists(place)}
    gpus = ray.cluster_resources().get("GPU", 0) if ray.is_initialized() else 0
    return Needs(
        token,
        word,
        tuple(sorted(paths)),
        tuple(hub_models(spec, planned)),
        bf16=any(study.spec.bf16 for study in planned),
        weights=max((_weights_on_a_gpu(study) for study in planned), default=0) if gpus else 0,
        macdrop=version("macdrop"),
        copies=tuple((name, fingerprint(name)) for name in _models(spec, planned) if is_local_copy(name)),
        quantised=any(study.spec.quantization_bit for study in planned),
    )


def _models(spec: RunSpec, planned: Iterable[Study]) -> list[str]:
    """Return the models of a run by name, each once, a local judge's among them."""
    names = [study.spec.model_name_or_path for study in planned]
    judge = spec.eval.judge
    return list(dict.fromkeys([*names, judge.model] if judge is not None and not judge.base_url else names))


def places(value: object, key: str | None = None) -> Iterator[str]:
    """Yield the strings under `PLACES` of a dumped run file, except built-in models and data."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from places(item, name if name in PLACES else None)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from places(item, key)
    elif isinstance(value, str) and key is not None and not value.startswith(PREFIX):
        yield value


def hub_models(spec: RunSpec, planned: Iterable[Study]) -> list[Hub]:
    """Return the models that are neither local nor built in, including a local judge's."""
    found = [Hub(s.spec.model_name_or_path, s.spec.model_revision, s.spec.trust_remote_code) for s in planned]
    judge = spec.eval.judge
    if judge is not None and not judge.base_url:
        found.append(Hub(judge.model, judge.revision, False))
    # The name of a real model may stand for one that the head has from the hub.
    found = [replace(hub, name=model_source(hub.name)) if _is_real(hub.name) else hub for hub in found]
    return [hub for hub in dict.fromkeys(found) if not hub.name.startswith(PREFIX) and not os.path.exists(hub.name)]


def _is_real(name: str) -> bool:
    return name.startswith(PREFIX) and is_local_copy(name)


# --- on the node ---


def look(needs: Needs) -> list[str]:
    """Return what this node lacks, as sentences that continue after its name."""
    problems = []
    mine = version("macdrop")
    if mine != needs.macdrop:
        problems.append(f"has macdrop {mine}, the head {needs.macdrop}. Install the same version everywhere.")
    if needs.quantised and version("bitsandbytes") is None:
        problems.append(f"has no bitsandbytes, which quantization_bit needs. Install it there: {INSTALL}")
    problems += _storage(needs)
    problems += [
        f"has no {path}. Put it on storage that all nodes mount, at the same path, and write the path in full."
        for path in needs.paths
        if not os.path.exists(path)
    ]
    for hub in needs.hub:
        problems += _fetch(hub)
    for name, identity in needs.copies:
        problems += _compare(name, identity)
    return problems


def _compare(name: str, identity: str) -> list[str]:
    """Find or convert this node's copy of a model, and compare it with the head's."""
    if not name.startswith(PREFIX) and not os.path.exists(name):
        return []  # reported among the paths
    shared = f"set {CACHE_VARIABLE} to a folder on storage that all nodes mount"
    try:
        found = fingerprint(name)
    except MacDropError as error:
        told = str(error).replace("\n", "\n  ")
        return [f"cannot use {name}: {told}\n  Do that on the node, or {shared}."]
    if found != identity:
        there = source_note(name)
        return [
            f"has other files of {name} than the head: {there}, fingerprint {found[:SHOWN]}, not {identity[:SHOWN]}.\n"
            f"  Let both have the same source (`macdrop zoo list` shows it), or {shared}."
        ]
    return []


def _storage(needs: Needs) -> list[str]:
    folder = Path(needs.token).parent
    remedy = f"output_dir must be on storage that all nodes mount (here the folder {folder})."
    until = time.monotonic() + needs.lag
    while True:
        try:
            if Path(needs.token).read_text() == needs.word:
                break
            return [f"sees another folder at {folder} than the head. {remedy}"]
        except OSError as error:
            if time.monotonic() > until:
                return [f"does not see what the head wrote to {folder} ({error.strerror}). {remedy}"]
            time.sleep(0.5)
    mine = folder / f"{Path(needs.token).name}-{uuid.uuid4().hex[:8]}"
    try:
        mine.write_text(needs.word)
        mine.unlink()
    except OSError as error:
        return [f"may not write to {folder} ({error.strerror}). Mount it writable there for user {os.getuid()}."]
    return []


def _fetch(hub: Hub) -> list[str]:
    """Fetch the model into this node's hub cache, unless it is there."""
    from huggingface_hub import snapshot_download

    patterns = [*PATTERNS, "*.py"] if hub.code else list(PATTERNS)
    try:
        snapshot_download(hub.name, revision=hub.revision, allow_patterns=patterns, ignore_patterns=list(NOT_NEEDED))
    except Exception as error:  # of the hub, the network or the disk: the remedy is the same
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        return [
            f"cannot fetch {hub.name}: {why}\n  Give the node access to the hub (HF_TOKEN for a gated model), or set "
            "HF_HOME to shared storage that has the model."
        ]
    return []


def try_gpus(needs: Needs) -> list[str]:
    """Return what the GPUs of this task lack; two of them also try NCCL."""
    import torch

    if not torch.cuda.is_available():
        return ["has GPUs according to Ray, but torch sees none. Install a torch build for its driver (nvidia-smi)."]
    problems = []
    name, memory = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory
    if needs.bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        problems.append(f"has a {name}, which does not compute in bf16. Set bf16: false, or use a newer GPU.")
    if needs.weights * HEADROOM > memory:
        problems.append(
            f"has a {name} with {memory / 2**30:.1f} GiB; the weights alone take {needs.weights / 2**30:.1f} GiB. "
            "Use bf16: true, quantization_bit: 4, zero_stage: 3 on more workers, or larger GPUs."
        )
    try:
        parts = [torch.ones(1024, device=f"cuda:{number}") for number in range(torch.cuda.device_count())]
        torch.cuda.nccl.all_reduce(parts)
        torch.cuda.synchronize()
        if any(float(part[0]) != len(parts) for part in parts):
            problems.append("computes wrong sums over NCCL. Try NCCL_P2P_DISABLE=1, and check the driver.")
    except RuntimeError as error:
        problems.append(f"fails in NCCL: {str(error).splitlines()[0]}. NCCL_DEBUG=INFO says more.")
    return problems


# --- on the driver ---


@contextmanager
def token_file(run_dir: Path) -> Iterator[tuple[str, str]]:
    """Write a file with a random word into the run folder, or into its nearest existing parent."""
    folder = next(place for place in (run_dir, *run_dir.parents) if place.is_dir())
    token, word = folder / f".macdrop-{uuid.uuid4().hex[:8]}", uuid.uuid4().hex
    with writing(token):
        atomic_write_text(token, word)
    try:
        yield str(token), word
    finally:
        token.unlink(missing_ok=True)


def _task(work: Callable[[Needs], list[str]], needs: Needs, node: dict[str, Any], gpus: int = 0) -> ray.ObjectRef:
    on_node = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    task = ray.remote(num_cpus=0, num_gpus=gpus, max_retries=1)(work)
    return task.options(scheduling_strategy=on_node, name=work.__name__).remote(needs)


def _answer(ref: ray.ObjectRef, node: dict[str, Any], wait: float | None, tell: Callable[[str], None]) -> list[str]:
    """Return the problems that a node's task found, prefixed with the node; a lost or busy node is only reported."""
    name = f"Node {node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
    try:
        return [f"{name} {problem}" for problem in ray.get(ref, timeout=wait)]
    except GetTimeoutError:
        ray.cancel(ref, force=True)
        tell(f"{name}: its GPUs were not checked, as they were not free within {wait:g} s")
        return []
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, ImportError):
            return [f"{name} cannot import macdrop's packages: {cause}. Install the same version everywhere."]
        return [f"{name} could not be checked: {type(cause).__name__}: {cause}"]
    except RayError as error:
        tell(f"{name} was lost during its check: {str(error).splitlines()[0]}")
        return []


def _weights_on_a_gpu(study: Study) -> int:
    """Return the bytes of a model's weights on each GPU, from its shapes alone."""
    size = base_bytes(model_outline(study.spec), study.spec)
    return size // study.ray.num_workers if study.spec.zero_stage == 3 else size

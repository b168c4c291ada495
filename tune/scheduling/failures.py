"""Causes of a lost lane: turns what Ray and torch raised on each rank into a message and a number of retries.

Ray's exceptions are matched by name, so this module does not need Ray. When one rank dies, the others' connections
break and several ranks fail at once: the kind that comes first in `KINDS` is taken for the cause.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: Kinds of failures, the likelier cause of the others first -> how often in a row, without getting any further, a task
#: is tried. Failures of the machine are not the fault of the task; those of the task itself will repeat.
KINDS = {
    "node_lost": 10,
    "oom": 2,
    "hang": 3,
    "gpu_oom": 2,
    "storage": 3,
    "killed": 10,
    "bug": 2,
    "peer": 5,
    "resources": 10,
}
#: Longest message in characters: a traceback or an actor's whole record is of no help in a table.
LONGEST = 400

SMALLER = (
    "Lower per_device_train_batch_size (raise gradient_accumulation_steps by as much to keep the batch) or cutoff_len, "
    "or set gradient_checkpointing: true"
)
_REMEDIES = {
    "oom": f"{SMALLER}; or run fewer processes on a machine: lower ray.lanes, ray.num_workers or ray.evaluators.",
    "gpu_oom": f"{SMALLER}; or spread the model over more GPUs: zero_stage: 3 and a higher ray.num_workers.",
    "storage": "Make room or repair the storage of output_dir, then resume the run.",
}


@dataclass(frozen=True)
class Failure:
    """A failure, as a sentence for the user; `attempts` is how often in a row a task may hit it."""

    kind: str
    reason: str
    attempts: int


@dataclass(frozen=True)
class _Rule:
    """An exception is of this kind if one of its types has one of the names, and its message has the words."""

    kind: str
    types: str
    words: str = ""

    def fits(self, error: BaseException) -> bool:
        types = [f"{each.__module__}.{each.__qualname__}" for each in type(error).__mro__]
        return any(re.fullmatch(self.types, name) for name in types) and bool(re.search(self.words, str(error), re.I))


#: In order of precedence: the first that fits counts.
_RULES = (
    _Rule("oom", r"ray\..*\.OutOfMemoryError"),
    # Of every death Ray says that the kernel's own OOM killer may have been at work: these words are its own killer's.
    _Rule("oom", r"ray\..*\.(RayActorError|WorkerCrashedError)", r"running low on memory|NODE_OUT_OF_MEMORY"),
    _Rule("node_lost", r"ray\..*\.NodeDiedError"),
    _Rule("node_lost", r"ray\..*\.RayActorError", r"node (has died|was terminated|is dead|failure)|node died"),
    _Rule("killed", r"ray\..*\.(RayActorError|WorkerCrashedError|LocalRayletDiedError)"),
    _Rule("hang", r"ray\..*\.(WorkerHealthCheckTimeoutError|NCCLHangError)"),
    _Rule("resources", r"ray\..*\.(WorkerGroupStartup\w+Error|InsufficientClusterResourcesError)"),
    _Rule("gpu_oom", r"torch\..*OutOfMemoryError"),
    _Rule("gpu_oom", r"builtins\.RuntimeError", r"CUDA.*out of memory|CUBLAS_STATUS_ALLOC_FAILED|DefaultCPUAllocator"),
    _Rule("peer", r"torch\..*\.Dist\w*Error"),
    _Rule("peer", r"builtins\.RuntimeError", r"gloo|NCCL|Connection (reset|closed|refused)|broken pipe|socket"),
    _Rule("peer", r"builtins\.(ConnectionError|TimeoutError)"),
    _Rule("storage", r"builtins\.OSError"),
    _Rule("bug", r".*"),
)


def classify(errors: Mapping[int, BaseException], *, stacks: Sequence[str] = (), step_timeout_s: float = 0) -> Failure:
    """Classify a failure, given the error of each rank that had one.

    stacks: the files with the stacks of ranks that ended themselves because no step finished.
    """
    known = {rank: _cause(error) for rank, error in errors.items()}
    if stacks:
        files = ", ".join(sorted(stacks))
        reason = (
            f"No micro-step and no validation batch ended within ray.step_timeout_s = {step_timeout_s:g} s. Where each "
            f"rank was: {files} (a rank without a file did not run at all: stopped, or held by its kernel)."
        )
        return Failure("hang", reason, KINDS["hang"])
    found = {rank: next(rule.kind for rule in _RULES if rule.fits(error)) for rank, error in known.items()}
    rank = min(found, key=lambda rank: (list(KINDS).index(found[rank]), rank))
    kind = found[rank]
    return Failure(kind, " ".join(filter(None, [_sentence(kind, rank, known[rank]), _REMEDIES.get(kind)])), KINDS[kind])


def of_run(error: BaseException) -> Failure:
    """Classify the failure of a whole Train run, given what its `fit` raised."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        return classify(failures)
    return classify({-1: getattr(error, "controller_failure", error)})


def _cause(error: BaseException) -> BaseException:
    """Unwrap Ray's own exceptions."""
    for name in ("health_check_failure", "controller_failure", "cause"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException) and inner is not error:
            return _cause(inner)
    return error


def _sentence(kind: str, rank: int, error: BaseException) -> str:
    text = str(error)
    who, message = f"Worker {rank}" if rank >= 0 else "The process that leads the lane's workers", _short(text)
    return {
        "killed": f"{who}{_where(text)} was killed, or crashed.",
        "node_lost": f"The node was lost on which there was {who[0].lower()}{who[1:]}{_where(text)}.",
        "oom": f"{who}{_where(text)} was ended by Ray, because its machine ran out of memory.",
        "gpu_oom": f"{who} ran out of memory: {message}",
        "hang": f"{who} did not answer any more: {message}",
        "peer": f"{who} lost its connection to the other ranks (a peer died or the network failed): {message}",
        "resources": f"The lane's workers could not be started: {message}",
    }.get(kind, f"{who}: {type(error).__name__}: {message}")


def _where(text: str) -> str:
    """ " (process 12 on 10.0.0.3)", as far as Ray's record of a dead actor has it."""
    found: dict[str, Any] = {key: re.search(rf"^\s*{key}: (\S+)$", text, re.M) for key in ("pid", "ip")}
    words = [f"process {found['pid'][1]}"] if found["pid"] else []
    words += [f"on {found['ip'][1]}"] if found["ip"] else []
    return f" ({' '.join(words)})" if words else ""


def _short(text: str) -> str:
    """The first line that says something, not too long."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "no message")
    return line if len(line) <= LONGEST else f"{line[:LONGEST]} ..."

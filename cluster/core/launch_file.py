"""Launch files: one ordinary file a cluster, whose kind is told from its content.

A Ray cluster YAML (`provider:`), a KubeRay manifest (`apiVersion: ray.io/...`) or an sbatch script (`#SBATCH`); written
by `macdrop cluster render`, by hand, or by somebody else. What every verb wants to know of a file is read here, once.
"""

from __future__ import annotations

import functools
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import BadLaunchFile

#: libyaml where there is one: launch files and KubeRay's definitions are long.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
RAY, KUBERAY, SLURM = "ray", "kuberay", "slurm"
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class ClusterFile:
    """A launch file as it was read. `documents`: the YAML documents, none for Slurm; the first Ray one is `content`."""

    path: Path
    kind: str
    text: str
    documents: tuple[dict[str, Any], ...] = ()

    @property
    def content(self) -> dict[str, Any]:
        """The Ray cluster's YAML, or the manifest's RayCluster or RayJob; empty for Slurm."""
        return next((document for document in self.documents if self.kind == RAY or _of_ray(document)), {})

    @property
    def provider(self) -> str:
        """aws, gcp, azure, local, ...; kuberay; slurm."""
        return str(as_dict(self.content.get("provider")).get("type")) if self.kind == RAY else self.kind

    @property
    def name(self) -> str:
        """Name of the cluster, resource or job; the file's own where it gives none."""
        if self.kind == SLURM:
            return self.directives.get("job-name") or self.path.stem
        names = self.content if self.kind == RAY else self.metadata
        return str(names.get("cluster_name" if self.kind == RAY else "name") or self.path.stem)

    @functools.cached_property
    def environment(self) -> dict[str, str]:
        """Variables that the file sets on its hosts, as written ($NAME is left alone); the head's where they differ."""
        if self.kind == KUBERAY:
            found = [env for container in self.containers for env in as_dicts(container.get("env"))]
            return {str(env.get("name")): str(env["value"]) for env in reversed(found) if "value" in env}
        return assignments(self.shell)

    @property
    def shell(self) -> str:
        """All shell commands of a Ray YAML or an sbatch script, without comments."""
        if self.kind == SLURM:
            return "\n".join(line for line in self.text.splitlines() if not line.lstrip().startswith("#"))
        return "\n".join(text for key in COMMANDS for text in self.commands(key))

    def commands(self, key: str) -> list[str]:
        """A list of commands of a Ray YAML, empty where there is none or it is no list."""
        found = self.content.get(key)
        return [str(text) for text in found] if isinstance(found, list) else []

    @property
    def storage(self) -> str | None:
        """The folder that all hosts share, or None where the file names none."""
        return self.environment.get("MACDROP_STORAGE")

    @property
    def secrets(self) -> tuple[str, ...]:
        """Names of the environment variables that travel beside the file, never in it."""
        return tuple(name for name in self.environment.get("MACDROP_SECRETS", "").split(",") if name)

    @property
    def token(self) -> bool:
        """Whether the file turns token authentication on."""
        options = as_dict(as_dict(self.cluster_spec).get("authOptions"))
        return self.environment.get("RAY_AUTH_MODE") == "token" or options.get("mode") == "token"

    @property
    def workers(self) -> tuple[int, int]:
        """Fewest and most nodes beside the head; of Slurm, whose head works too, the other nodes."""
        if self.kind == SLURM:
            nodes = self.directives.get("nodes", "1").partition("-")
            low, high = _count(nodes[0], 1), _count(nodes[2] or nodes[0], 1)
            return low - 1, high - 1
        if self.kind == KUBERAY:
            groups = as_dicts(self.cluster_spec.get("workerGroupSpecs"))
            low = [_count(group.get("minReplicas", group.get("replicas")), 0) for group in groups]
            return sum(low), sum(_count(group.get("maxReplicas"), _count(group.get("replicas"), 0)) for group in groups)
        if self.provider == "local":
            hosts = len(self.worker_hosts)
            low, high = (_count(self.content.get(key), hosts) for key in ("min_workers", "max_workers"))
            return min(low, hosts), min(high, hosts)
        types = as_dict(self.content.get("available_node_types"))
        others = [as_dict(kind) for name, kind in types.items() if name != self.content.get("head_node_type")]
        most = _count(self.content.get("max_workers"), 2)
        return (
            sum(_count(kind.get("min_workers"), 0) for kind in others),
            min(most, sum(_count(kind.get("max_workers"), most) for kind in others)),
        )

    # --- Ray YAML ---

    @property
    def head_host(self) -> str | None:
        """Address of the head of an on-premise cluster; None where the cloud gives one."""
        return as_dict(self.content.get("provider")).get("head_ip") if self.kind == RAY else None

    @property
    def worker_hosts(self) -> tuple[str, ...]:
        """Addresses of the workers of an on-premise cluster."""
        found = as_dict(self.content.get("provider")).get("worker_ips") if self.kind == RAY else None
        return tuple(map(str, found)) if isinstance(found, list) else ()

    @property
    def ssh_user(self) -> str | None:
        return as_dict(self.content.get("auth")).get("ssh_user")

    @property
    def ssh_key(self) -> Path | None:
        key = as_dict(self.content.get("auth")).get("ssh_private_key")
        return Path(str(key)).expanduser() if key else None

    @property
    def container(self) -> str | None:
        """Name of the container that Ray runs in on every host; None where it runs on the host itself."""
        docker = as_dict(self.content.get("docker"))
        named = any(docker.get(key) for key in ("image", "head_image", "worker_image"))
        return str(docker.get("container_name") or "ray_docker") if named else None

    # --- KubeRay ---

    @property
    def metadata(self) -> dict[str, Any]:
        return as_dict(self.content.get("metadata"))

    @property
    def namespace(self) -> str | None:
        """None means the one that kubectl uses by itself."""
        return self.metadata.get("namespace")

    @property
    def resource(self) -> str:
        """RayCluster or RayJob."""
        return str(self.content.get("kind"))

    @property
    def cluster_spec(self) -> dict[str, Any]:
        """The spec of the RayCluster, which a RayJob holds inside its own."""
        spec = as_dict(self.content.get("spec"))
        return as_dict(spec.get("rayClusterSpec")) if self.resource == "RayJob" else spec

    @property
    def containers(self) -> list[dict[str, Any]]:
        """The Ray container of the head and of each group of workers."""
        spec = self.cluster_spec
        groups = [as_dict(spec.get("headGroupSpec")), *as_dicts(spec.get("workerGroupSpecs"))]
        pods = [as_dict(as_dict(group.get("template")).get("spec")) for group in groups]
        return [next(iter(as_dicts(pod.get("containers"))), {}) for pod in pods]

    # --- Slurm ---

    @property
    def directives(self) -> dict[str, str]:
        """Long options of the #SBATCH lines; a switch has the empty string."""
        return {key: value for _, key, value in sbatch_lines(self.text)} if self.kind == SLURM else {}


#: Short options of sbatch.
SBATCH_SHORT = {
    **{
        "A": "account",
        "a": "array",
        "b": "begin",
        "C": "constraint",
        "c": "cpus-per-task",
        "D": "chdir",
        "d": "dependency",
    },
    **{"e": "error", "F": "nodefile", "G": "gpus", "H": "hold", "i": "input", "J": "job-name", "k": "no-kill"},
    **{
        "L": "licenses",
        "M": "clusters",
        "m": "distribution",
        "N": "nodes",
        "n": "ntasks",
        "o": "output",
        "p": "partition",
    },
    **{"q": "qos", "s": "oversubscribe", "t": "time", "W": "wait", "w": "nodelist", "x": "exclude"},
}
#: Keys of a Ray YAML that hold lists of shell commands, in the order in which a host runs them.
COMMANDS = (
    *("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands"),
)


def load(path: str | Path) -> ClusterFile:
    """Read a launch file and tell its kind. Raises BadLaunchFile: not there, not text, not YAML, or no kind we know."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise BadLaunchFile(
            f"launch file {str(path)!r} cannot be read: {reason}. Write one with `macdrop cluster render TARGET`."
        ) from None
    return parse(text, path)


def parse(text: str, path: Path) -> ClusterFile:
    """The text of a launch file. Raises BadLaunchFile."""
    if text.startswith("#!") or re.search(r"^#SBATCH\b", text, re.MULTILINE):
        if not re.search(r"^#SBATCH\b", text, re.MULTILINE):
            raise BadLaunchFile(f"{path} is a script without #SBATCH lines: sbatch would not know what to ask for.")
        return ClusterFile(path, SLURM, text)
    try:
        documents = tuple(document for document in yaml.load_all(text, Loader=LOADER) if document is not None)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where else ""
        raise BadLaunchFile(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or error}") from None
    if all(isinstance(document, dict) for document in documents):
        if any(map(_of_ray, documents)):
            return ClusterFile(path, KUBERAY, text, documents)
        if len(documents) == 1 and "provider" in documents[0]:
            return ClusterFile(path, RAY, text, documents)
    raise BadLaunchFile(
        f"{path} is no launch file: a Ray cluster YAML has `provider:`, a KubeRay manifest `apiVersion: ray.io/v1`, a "
        "Slurm script #SBATCH lines. Write one with `macdrop cluster render TARGET`."
    )


def assignments(shell: str) -> dict[str, str]:
    """Variables that shell text sets, or writes down to be set, unquoted but not expanded; the first one counts."""
    found: dict[str, str] = {}
    for word in _words(shell):
        set_here = _ASSIGNMENT.fullmatch(word)
        if set_here:
            found.setdefault(set_here[1], set_here[2])
        elif "export " in word and word != shell:  # printf 'export NAME=value\n' >> ~/.bashrc
            found = assignments(word.replace("\\n", "\n")) | found
    return found


def _words(shell: str) -> list[str]:
    """The words of shell text, without quotes; where quotes do not match, those of its lines that can be read."""
    lexer = shlex.shlex(shell, posix=True, punctuation_chars=";&|()<>")
    lexer.whitespace_split, lexer.commenters = True, "#"
    try:
        return list(lexer)
    except ValueError:
        lines = shell.splitlines()
        return [word for line in lines for word in _words(line)] if len(lines) > 1 else []


def sbatch_lines(text: str) -> list[tuple[int, str, str]]:
    """Line number, long option and value of each #SBATCH line before the first command, which is where sbatch stops."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            break
        words = _words(line.removeprefix("#SBATCH")) if re.match(r"#SBATCH\s", line) else []
        while words:
            word = words.pop(0)
            if word.startswith("--"):
                key, _, value = word[2:].partition("=")
            else:
                key, value = SBATCH_SHORT.get(word[1:2], word), word[2:]
            if words and not value and not words[0].startswith("-"):
                value = words.pop(0)
            found.append((number, key, value))
    return found


def _of_ray(document: dict[str, Any]) -> bool:
    return str(document.get("apiVersion", "")).startswith("ray.io/")


def as_dict(value: Any) -> dict[str, Any]:
    """Files are read as they are; what should be a mapping and is not counts as empty, `check` tells."""
    return value if isinstance(value, dict) else {}


def as_dicts(value: Any) -> list[dict[str, Any]]:
    """The same for a list of mappings."""
    return [as_dict(each) for each in value] if isinstance(value, list) else []


def _count(value: Any, otherwise: int) -> int:
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        return otherwise

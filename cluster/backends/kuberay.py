"""Clusters of the KubeRay operator: `kubectl` creates the resources and reaches the head pod."""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cluster.backends.advice import causes
from cluster.backends.base import Backend, Job
from cluster.check import kuberay as kuberay_check
from cluster.check.finding import Finding
from cluster.core import secrets, token
from cluster.core.kuberay_file import KubeRayFile
from cluster.core.launch_file import as_dict, as_dicts
from cluster.errors import BadLaunchFile, LaunchFailed

#: Seconds until the head pod runs, and until the pods are gone; in our manifests pods have 120 s to terminate.
HEAD_TIMEOUT, GONE_TIMEOUT = 600, 240
POLL = 5.0


class KubeRay(Backend[KubeRayFile]):
    """A RayCluster or RayJob on Kubernetes."""

    file_type = KubeRayFile
    file_format = "a KubeRay manifest has `apiVersion: ray.io/v1`"
    tools = ("kubectl", "tar")

    @classmethod
    def check(cls, file: KubeRayFile, crd: Path | None = None) -> Iterator[Finding]:
        return kuberay_check.findings(file, crd)

    @property
    def next_command(self) -> str:
        job = self.file.resource == "RayJob"
        return f"macdrop cluster logs {self.file.quoted} --follow" if job else super().next_command

    @property
    def sends_token(self) -> bool:
        return self._token_secret is not None

    # --- Secrets, start, end ---

    def prepare(self, secrets_found: dict[str, str]) -> None:
        """Secrets go to kubectl through standard input: arguments are visible to every user."""
        wanted = {name: secrets_found for name in self._secret_names if secrets_found}
        if self._token_secret:
            held = {} if self.shell.dry_run else {"auth_token": token.path().read_text(encoding="utf-8").strip()}
            wanted[self._token_secret] = held
        for name, held in wanted.items():
            command = self._kubectl("apply", "-f", "-")
            self.shell.show(command, f"   # Secret {name}: {', '.join(held) or 'auth_token'}")
            manifest = secrets.manifest(name, self.file.namespace, held, self._labels)
            result = self.shell.capture(command, shown=False, stdin=manifest)
            if not result.ok:
                raise LaunchFailed(f"Secret {name!r} was not created: {result.tail}")

    @property
    def _labels(self) -> dict[str, str]:
        """Labels of the Secrets that `up` creates: `down` deletes no others."""
        return {"app.kubernetes.io/managed-by": "macdrop", "macdrop/cluster": self.file.name}

    def create(self) -> None:
        self.shell.run(self._kubectl("apply", "-f", str(self.file.path)), failure="the cluster was not created")
        deadline = time.monotonic() + HEAD_TIMEOUT
        while not self.shell.dry_run and not self._pod("running"):
            if time.monotonic() > deadline:
                causes_found = "\n".join(f"cause: {cause}" for cause in self.diagnose(None))
                raise LaunchFailed(f"no head pod ran within {HEAD_TIMEOUT} s.\n{causes_found}".rstrip())
            time.sleep(POLL)

    def destroy(self) -> list[str]:
        """Delete the resources of the file and the Secrets of `up`; wait until the pods are gone."""
        cluster = self._cluster()
        command = self._kubectl("delete", "--ignore-not-found", "-f", str(self.file.path))
        result = self.shell.run(command)
        if not result.ok:
            return [f"`kubectl delete` failed with exit code {result.code}: see above."]
        selector = ["-l", f"ray.io/cluster={cluster}"] if cluster else []
        if selector:
            self.shell.run(self._kubectl("wait", "--for=delete", "pod", *selector, f"--timeout={GONE_TIMEOUT}s"))
        ours = ",".join(f"{name}={value}" for name, value in self._labels.items())
        self.shell.run(self._kubectl("delete", "secret", "-l", ours))
        left = self._pods() if selector and not self.shell.dry_run else []
        return [f"pod {pod['metadata']['name']} still exists ({pod['status'].get('phase')})" for pod in left]

    # --- the head pod ---

    def on_head(self, script: str) -> list[str]:
        return self._kubectl("exec", self._head(), "-c", self._container, "--", "bash", "-c", script)

    def put(self, source: Path, target: str) -> None:
        command = self._kubectl("cp", str(source), f"{self._head()}:{target}", "-c", self._container)
        self.shell.run(command, failure=f"{source} was not copied to the head pod")

    def get(self, source: str, target: Path, exclude: Sequence[str]) -> None:
        """By tar, like `kubectl cp`, which cannot exclude anything."""
        excluded = [f"--exclude={'.' if name.startswith('/') else ''}{name.rstrip('/')}" for name in exclude]
        pack = ["tar", "cf", "-", *excluded, "-C", source, "."]
        sending = self._kubectl("exec", self._head(), "-c", self._container, "--", *pack)
        receiving = ["tar", "xf", "-", "-C", str(target)]
        self.shell.say(f"$ {shlex.join(sending)} | {shlex.join(receiving)}")
        if self.shell.dry_run:
            return
        with subprocess.Popen(sending, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as sender:
            received = subprocess.run(receiving, stdin=sender.stdout).returncode
        # Exit code 1 of tar: a file changed while it was read, as happens during a sweep.
        if received or sender.returncode not in (0, 1):
            raise LaunchFailed(
                f"{source} was not copied (exit codes of tar: {sender.returncode} there, {received} here)."
            )

    def submit(self, job: Job) -> str:
        if self.file.resource == "RayJob":
            raise BadLaunchFile(
                f"{self.file.path} is a RayJob: it contains its recipe and starts with `macdrop cluster up "
                f"{self.file.quoted}`. To run several sweeps, render `kuberay`, a RayCluster."
            )
        return super().submit(job)

    def diagnose(self, nodes: list[dict[str, Any]] | None) -> list[str]:
        """From the states of the pods."""
        lines = []
        for pod in self._pods():
            name, status = pod["metadata"]["name"], pod.get("status", {})
            for condition in status.get("conditions", []):
                if condition.get("status") == "False" and condition.get("message"):
                    lines.append(f"pod {name}: {condition.get('reason', '')}: {condition['message']}")
            for container in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
                for state in (container.get("lastState", {}), container.get("state", {})):
                    held = state.get("waiting") or state.get("terminated") or {}
                    if held.get("reason") not in (None, "Completed", "PodInitializing", "ContainerCreating"):
                        lines.append(f"pod {name}: {held['reason']}: {held.get('message', '')}")
        if not lines and not self._pods():
            described = f"kubectl describe {self.file.resource.lower()} {self.file.name}"
            return [f"KubeRay created no pod: is the operator installed, and recent enough? {described}"]
        return causes(lines) or lines

    # --- names ---

    def _kubectl(self, *words: str) -> list[str]:
        namespace = ["-n", self.file.namespace] if self.file.namespace else []
        return ["kubectl", *namespace, *words]

    @property
    def _token_secret(self) -> str | None:
        return as_dict(self.file.cluster_spec.get("authOptions")).get("secretName")

    @property
    def _secret_names(self) -> list[str]:
        """Secrets that the containers take all variables from."""
        sources = [source for container in self.file.containers for source in as_dicts(container.get("envFrom"))]
        names = [as_dict(source.get("secretRef")).get("name") for source in sources]
        return list(dict.fromkeys(name for name in names if name))

    @property
    def _container(self) -> str:
        return next(iter(self.file.containers), {}).get("name") or "ray-head"

    def _cluster(self) -> str | None:
        """Name of the RayCluster; for a RayJob, of the one KubeRay creates, None before that."""
        if self.file.resource == "RayCluster":
            return self.file.name
        wanted = self._kubectl("get", "rayjob", self.file.name, "-o", "jsonpath={.status.rayClusterName}")
        result = self.shell.capture(wanted, shown=False, timeout=60)
        return result.text.strip() or None if result.ok else None

    def _pods(self) -> list[dict[str, Any]]:
        cluster = self._cluster()
        if cluster is None:
            return []
        wanted = self._kubectl("get", "pods", "-l", f"ray.io/cluster={cluster}", "-o", "json")
        result = self.shell.capture(wanted, shown=False, timeout=60)
        try:
            return json.loads(result.text)["items"]
        except (ValueError, KeyError, TypeError):
            return []

    def _pod(self, state: str) -> str | None:
        """Name of the head pod, if it is in this phase."""
        for pod in self._pods():
            head = pod["metadata"].get("labels", {}).get("ray.io/node-type") == "head"
            if head and pod.get("status", {}).get("phase", "").lower() == state:
                return pod["metadata"]["name"]
        return None

    def _head(self) -> str:
        """Name of the running head pod. Raises LaunchFailed: there is none."""
        if self.shell.dry_run:
            return "HEAD-POD"
        pod = self._pod("running")
        if pod is None:
            raise LaunchFailed(
                f"no head pod of {self.file.name!r} is running. Start it: macdrop cluster up {self.file.quoted}"
            )
        return pod

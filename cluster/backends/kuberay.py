"""Clusters of KubeRay: `kubectl` makes Secrets and resource, and reaches the head pod."""

from __future__ import annotations

import json
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.backends.advice import causes
from cluster.backends.base import Job, Kind
from cluster.core import secrets, token
from cluster.core.launch_file import as_dict, as_dicts
from cluster.errors import BadLaunchFile, LaunchFailed

#: Seconds until the head pod is there, and until the pods are gone; pods have 120 to end in our manifests.
HEAD, GONE = 600, 240
POLL = 5.0


class Kube(Kind):
    tools = ("kubectl", "tar")

    @property
    def next(self) -> str:
        job = self.file.resource == "RayJob"
        return f"macdrop cluster logs {self.file.path} --follow" if job else super().next

    @property
    def carries_token(self) -> bool:
        return self._token_secret is not None

    # --- Secrets, start, end ---

    def prepare(self, values: dict[str, str]) -> None:
        """Secrets go to kubectl through its standard input: what stands among the arguments, every user can see."""
        wanted = {name: values for name in self._secret_names if values}
        if self._token_secret:
            held = {} if self.shell.dry_run else {"auth_token": token.path().read_text(encoding="utf-8").strip()}
            wanted[self._token_secret] = held
        for name, held in wanted.items():
            command = self._kubectl("apply", "-f", "-")
            self.shell.show(command, f"   # Secret {name}: {', '.join(held) or 'auth_token'}")
            done = self.shell.ask(command, shown=False, stdin=self._secret(name, held))
            if not done.ok:
                raise LaunchFailed(f"Secret {name!r} was not made: {done.tail}")

    def _secret(self, name: str, held: dict[str, str]) -> str:
        return secrets.manifest(name, self.file.namespace, held, self._labels)

    @property
    def _labels(self) -> dict[str, str]:
        """What tells our Secrets from those that somebody made by hand, which `down` leaves alone."""
        return {"app.kubernetes.io/managed-by": "macdrop", "macdrop/cluster": self.file.name}

    def create(self) -> None:
        self.shell.run(self._kubectl("apply", "-f", str(self.file.path)), check="the cluster was not made")
        deadline = time.monotonic() + HEAD
        while not self.shell.dry_run and not self._pod("running"):
            if time.monotonic() > deadline:
                told = "\n".join(f"cause: {cause}" for cause in self.why(None))
                raise LaunchFailed(f"no head pod ran within {HEAD} s.\n{told}".rstrip())
            time.sleep(POLL)

    def destroy(self) -> list[str]:
        """Delete what the file made, and the Secrets of `up`; wait until the pods are gone."""
        cluster = self._cluster()
        command = self._kubectl("delete", "--ignore-not-found", "-f", str(self.file.path))
        done = self.shell.run(command)
        if not done.ok:
            return [f"`kubectl delete` ended with {done.code}: look above."]
        selector = ["-l", f"ray.io/cluster={cluster}"] if cluster else []
        if selector:
            self.shell.run(self._kubectl("wait", "--for=delete", "pod", *selector, f"--timeout={GONE}s"))
        ours = ",".join(f"{name}={value}" for name, value in self._labels.items())
        self.shell.run(self._kubectl("delete", "secret", "-l", ours))
        left = self._pods() if selector and not self.shell.dry_run else []
        return [f"pod {pod['metadata']['name']} is still there ({pod['status'].get('phase')})" for pod in left]

    # --- the head pod ---

    def on_head(self, script: str) -> list[str]:
        return self._kubectl("exec", self._head(), "-c", self._container, "--", "bash", "-c", script)

    def put(self, source: Path, target: str) -> None:
        command = self._kubectl("cp", str(source), f"{self._head()}:{target}", "-c", self._container)
        self.shell.run(command, check=f"{source} was not copied to the head pod")

    def get(self, source: str, target: Path, leave: Sequence[str]) -> None:
        """By tar, as `kubectl cp` does it, because that cannot leave anything out."""
        excluded = [f"--exclude={'.' if name.startswith('/') else ''}{name.rstrip('/')}" for name in leave]
        pack = ["tar", "cf", "-", *excluded, "-C", source, "."]
        sending = self._kubectl("exec", self._head(), "-c", self._container, "--", *pack)
        receiving = ["tar", "xf", "-", "-C", str(target)]
        self.shell.say(f"$ {shlex.join(sending)} | {shlex.join(receiving)}")
        if self.shell.dry_run:
            return
        with subprocess.Popen(sending, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as sender:
            received = subprocess.run(receiving, stdin=sender.stdout).returncode
        # 1 of tar: a file changed while it was read, as those of a running sweep do.
        if received or sender.returncode not in (0, 1):
            raise LaunchFailed(f"{source} was not copied (tar ended with {sender.returncode} there, {received} here).")

    def submit(self, job: Job) -> str:
        if self.file.resource == "RayJob":
            raise BadLaunchFile(
                f"{self.file.path} is a RayJob: it brings its own recipe and starts with `macdrop cluster up "
                f"{self.file.path}`. For sweeps one after the other render `kuberay`, a RayCluster."
            )
        return super().submit(job)

    def why(self, nodes: list[dict[str, Any]] | None) -> list[str]:
        """From the pods' own states, and the autoscaler's log in the head pod."""
        lines = []
        for pod in self._pods():
            name, told = pod["metadata"]["name"], pod.get("status", {})
            for condition in told.get("conditions", []):
                if condition.get("status") == "False" and condition.get("message"):
                    lines.append(f"pod {name}: {condition.get('reason', '')}: {condition['message']}")
            for container in [*told.get("initContainerStatuses", []), *told.get("containerStatuses", [])]:
                for state in (container.get("lastState", {}), container.get("state", {})):
                    held = state.get("waiting") or state.get("terminated") or {}
                    if held.get("reason") not in (None, "Completed", "PodInitializing", "ContainerCreating"):
                        lines.append(f"pod {name}: {held['reason']}: {held.get('message', '')}")
        if not lines and not self._pods():
            return ["KubeRay made no pod: is the operator there, and new enough? kubectl describe "
                    f"{self.file.resource.lower()} {self.file.name}"]  # fmt: skip
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
        """Secrets whose variables the containers take whole."""
        sources = [source for container in self.file.containers for source in as_dicts(container.get("envFrom"))]
        names = [as_dict(source.get("secretRef")).get("name") for source in sources]
        return list(dict.fromkeys(name for name in names if name))

    @property
    def _container(self) -> str:
        return next(iter(self.file.containers), {}).get("name") or "ray-head"

    def _cluster(self) -> str | None:
        """Name of the RayCluster; of a RayJob, the one that KubeRay made for it, None before that."""
        if self.file.resource == "RayCluster":
            return self.file.name
        wanted = self._kubectl("get", "rayjob", self.file.name, "-o", "jsonpath={.status.rayClusterName}")
        done = self.shell.ask(wanted, shown=False, timeout=60)
        return done.text.strip() or None if done.ok else None

    def _pods(self) -> list[dict[str, Any]]:
        cluster = self._cluster()
        if cluster is None:
            return []
        wanted = self._kubectl("get", "pods", "-l", f"ray.io/cluster={cluster}", "-o", "json")
        done = self.shell.ask(wanted, shown=False, timeout=60)
        try:
            return json.loads(done.text)["items"]
        except (ValueError, KeyError, TypeError):
            return []

    def _pod(self, state: str) -> str | None:
        """Name of the head pod in this phase."""
        for pod in self._pods():
            head = pod["metadata"].get("labels", {}).get("ray.io/node-type") == "head"
            if head and pod.get("status", {}).get("phase", "").lower() == state:
                return pod["metadata"]["name"]
        return None

    def _head(self) -> str:
        """Raises LaunchFailed: there is no running head pod."""
        if self.shell.dry_run:
            return "HEAD-POD"
        pod = self._pod("running")
        if pod is None:
            raise LaunchFailed(f"no head pod of {self.file.name!r} runs. Start it: macdrop cluster up {self.file.path}")
        return pod

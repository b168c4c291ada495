"""The table of advice: what clouds, Kubernetes, Ray and ssh print when something fails, and the remedy."""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import StrEnum
from typing import NamedTuple


class Origin(StrEnum):
    """The origin of an output; the same words mean different things in different places."""

    LOG = "log"  # logs of the autoscaler and states of pods: why a node does not come up
    HEAD = "head"  # a command on the head that gave no answer
    RAY = "ray"  # an error of Ray on the head
    SSH = "ssh"  # ssh to a host


class Advice(NamedTuple):
    """`remedy`: a sentence without its full stop; {file}, {host} and {user} are filled in."""

    origin: Origin
    pattern: str
    remedy: str


#: What Ray's job agent says in the first seconds of a head.
NO_AGENT = "No available agent to submit job"
#: The words of ssh for a host whose key is not the known one.
HOST_KEY = "Host key verification failed"
_NO_TOKEN = (
    "the shell of the head lacks the token that its Ray wants: ~/.ray/auth_token (file_mounts) and `export "
    "RAY_AUTH_MODE=token` in ~/.bashrc (setup_commands), as `macdrop cluster render` writes them"
)

#: The first match counts.
ADVICE = (
    # Logs: AWS
    Advice(
        Origin.LOG,
        r"InsufficientInstanceCapacity|InsufficientCapacity|no Spot capacity|UnfulfillableCapacity",
        "the cloud is out of machines of this type (capacity): wait, or try another zone, another type, or on-demand",
    ),
    Advice(
        Origin.LOG, r"SpotMaxPriceTooLow", "the spot price is above the limit in the file: raise the limit or remove it"
    ),
    Advice(
        Origin.LOG,
        r"MaxSpotInstanceCountExceeded|VcpuLimitExceeded|InstanceLimitExceeded|QuotaExceeded|quota.{0,60}exceed"
        r"|exceed.{0,60}quota|Quota '",
        "the quota of the account is exhausted: ask the cloud for more (AWS: Service Quotas, separate for spot; GCP: "
        "IAM & Admin, Quotas; Azure: Subscriptions, Usage + quotas), or use fewer machines",
    ),
    Advice(
        Origin.LOG,
        r"UnauthorizedOperation|AccessDenied|AuthFailure|AuthorizationFailed|PERMISSION_DENIED"
        r"|not authorized to perform|HttpError 403",
        "the role of the head may not create machines: grant it the permission named in the line",
    ),
    Advice(
        Origin.LOG,
        r"InvalidAMIID|InvalidParameterValue.*ImageId|The image id .* does not exist|ImageNotFound",
        "the image does not exist in this region: see ImageId in the launch file",
    ),
    Advice(
        Origin.LOG,
        r"Unsupported.*instance type|InvalidInstanceType|not supported in your requested Availability Zone"
        r"|SkuNotAvailable",
        "the zone does not offer this instance type: use another zone or another type",
    ),
    Advice(
        Origin.LOG,
        r"InvalidKeyPair|InvalidSubnet|InvalidGroup",
        "the key, subnet or security group does not exist in this region",
    ),
    # Logs: GCP, Azure
    Advice(
        Origin.LOG,
        r"ZONE_RESOURCE_POOL_EXHAUSTED|STOCKOUT|does not have enough resources",
        "the zone is out of machines of this type (capacity): wait, or try another zone",
    ),
    Advice(
        Origin.LOG,
        r"AllocationFailed|ZonalAllocationFailed|OverconstrainedAllocationRequest",
        "Azure is out of machines of this type (capacity): wait, or try another region or size",
    ),
    Advice(
        Origin.LOG,
        r"OperationNotAllowed",
        "the quota of the subscription is exhausted: Azure portal, Subscriptions, Usage + quotas",
    ),
    # Logs: Kubernetes
    Advice(
        Origin.LOG,
        r"Insufficient nvidia\.com/gpu",
        "no Kubernetes node has enough free GPUs: scale up the GPU node pool, or request fewer per worker",
    ),
    Advice(
        Origin.LOG,
        r"Insufficient (cpu|memory|ephemeral-storage)",
        "no Kubernetes node has enough free CPUs, memory or disk: request less per worker, or scale up the node pool",
    ),
    Advice(
        Origin.LOG,
        r"untolerated taint",
        "the nodes have a taint that the pods do not tolerate: add it to `tolerations`",
    ),
    Advice(
        Origin.LOG,
        r"didn't match Pod's node affinity|didn't match.*selector",
        "no node has the labels of the nodeSelector in the file",
    ),
    Advice(
        Origin.LOG,
        r"unbound immediate PersistentVolumeClaims|persistentvolumeclaim .* not found|FailedMount|FailedAttachVolume",
        "the shared volume cannot be mounted: check the claim named in the file (kubectl get pvc)",
    ),
    Advice(
        Origin.LOG,
        r"ErrImagePull|ImagePullBackOff|InvalidImageName|manifest unknown|pull access denied",
        "the image cannot be pulled: check its name, its tag, and the credentials for the registry (imagePullSecrets)",
    ),
    Advice(
        Origin.LOG,
        r"CreateContainerConfigError|secret .* not found",
        "the Secret with the token or the secrets does not exist: run `up` again",
    ),
    Advice(
        Origin.LOG,
        r"CrashLoopBackOff|OOMKilled",
        "the container keeps crashing: kubectl logs POD -c CONTAINER --previous",
    ),
    # Logs: any provider
    Advice(
        Origin.LOG,
        r"[Uu]nauthenticated|AuthenticationError|[Ii]nvalid.{0,20}token",
        "the head rejects the token of the node: all hosts need the same ~/.ray/auth_token (file_mounts), with "
        "RAY_AUTH_MODE=token in ~/.bashrc",
    ),
    Advice(
        Origin.LOG,
        r"[Vv]ersion mismatch|running Ray: |was started with:",
        "the node has another version of Ray or Python than the head: install the same",
    ),
    Advice(
        Origin.LOG,
        r"No module named|command not found|Could not find a version that satisfies|No matching distribution",
        "the set-up of the node fails: a program or package is missing (setup_commands, image)",
    ),
    Advice(
        Origin.LOG,
        r"[Ss]etup command.*failed|Failed to setup|Setup failed|update-failed|Start command.*failed|exit code [1-9]\d*"
        r"|Error in executing|SSH command failed",
        "the set-up of the node fails: see the command named in the line",
    ),
    Advice(
        Origin.LOG,
        r"docker: (command )?not found|Cannot connect to the Docker daemon",
        "Docker does not run on the host",
    ),
    Advice(
        Origin.LOG, r"No space left on device", "the disk of the node is full: use a larger disk or a smaller image"
    ),
    Advice(
        Origin.LOG,
        r"SSH still not available|Connection timed out|Permission denied \(publickey",
        "the head cannot log in to the node by ssh: check the security group (port 22, and all ports among the nodes), "
        "the key and ssh_user",
    ),
    Advice(
        Origin.LOG,
        r"RequestExpired|SignatureDoesNotMatch|InvalidClientTokenId.*time|clock.?skew",
        "the clock of the head is off: start NTP there",
    ),
    # The head
    Advice(
        Origin.HEAD,
        r"Head node of cluster .* not found|could not be found|no cluster|not found: .*raycluster",
        "the cluster is not up. Start it: macdrop cluster up {file}",
    ),
    Advice(
        Origin.HEAD,
        r"macdrop: (command )?not found",
        "`macdrop` is not installed on the head: install it there (setup_commands, or the image)",
    ),
    Advice(
        Origin.HEAD,
        r"No such command|No such option",
        "macdrop on the head is older than on this machine: install the same version there",
    ),
    Advice(Origin.HEAD, r"[Uu]nauthenticated|[Aa]uthentication token|AuthenticationError", _NO_TOKEN),
    Advice(
        Origin.HEAD,
        NO_AGENT,
        "the part of Ray that starts jobs does not run on the head: most likely a process of another Ray holds its "
        "port there, 52365 (dashboard_agent.log in /tmp/ray/session_latest/logs). End that process, then: macdrop "
        "cluster up {file}",
    ),
    Advice(Origin.HEAD, r"rsync: (command )?not found", "rsync is not installed on the head: apt install rsync there"),
    Advice(
        Origin.HEAD,
        r"ray: (command )?not found",
        "`ray` is not on the PATH of a login shell on the head (setup_commands, ~/.bashrc)",
    ),
    # Ray on the head
    Advice(
        Origin.RAY,
        r"ProxyError|[Pp]roxy (connect|authentic)|via proxy",
        "a proxy answers in place of Ray on the head: there, add the head's address to NO_PROXY, or unset HTTP_PROXY",
    ),
    Advice(Origin.RAY, r"[Aa]uthenticat|[Uu]nauthorized|\btoken\b", _NO_TOKEN),
    Advice(
        Origin.RAY,
        r"Could not find any running Ray|Failed to connect|ConnectionError|Connection refused|ConnectTimeout"
        r"|Unable to connect",
        "Ray does not run on the head. Start it again: macdrop cluster up {file}",
    ),
    Advice(
        Origin.RAY,
        r"No module named 'ray'",
        "Ray is not installed for the Python of `macdrop` on the head (setup_commands, or the image)",
    ),
    # ssh
    Advice(
        Origin.SSH,
        r"Permission denied|Too many authentication failures",
        "{host} rejects this key for user {user}: add its public part to ~/.ssh/authorized_keys there, and check "
        "auth.ssh_user and auth.ssh_private_key in the launch file",
    ),
    Advice(
        Origin.SSH,
        r"UNPROTECTED PRIVATE KEY|bad permissions",
        "{host} was not contacted, because others may read the private key: chmod 600 it",
    ),
    Advice(
        Origin.SSH,
        r"Identity file .* not accessible|no such identity",
        "{host} was not contacted: the file of auth.ssh_private_key does not exist",
    ),
    Advice(
        Origin.SSH,
        r"Host key verification failed|REMOTE HOST IDENTIFICATION HAS CHANGED",
        "{host} has a host key other than the known one: if the host was reinstalled, remove the old one with "
        "`ssh-keygen -R {host} -f ~/.macdrop/known_hosts`; else somebody may be listening",
    ),
    Advice(
        Origin.SSH,
        r"Could not resolve hostname|Name or service not known",
        "{host} has no address: the name cannot be resolved here",
    ),
    Advice(Origin.SSH, r"Connection refused", "{host} refuses ssh: it is up, but no sshd listens on port 22"),
    Advice(
        Origin.SSH,
        r"No route to host|Network is unreachable",
        "{host} cannot be reached: it is off, or not on a network of this machine",
    ),
    Advice(
        Origin.SSH,
        r"[Cc]onnection timed out|Operation timed out|no answer within",
        "{host} does not answer: it is off, disconnected, or a firewall drops port 22",
    ),
    Advice(
        Origin.SSH,
        r"Connection (reset|closed)|kex_exchange_identification|Broken pipe",
        "{host} closed the connection: see the log of sshd",
    ),
    Advice(
        Origin.SSH,
        r"No such container|is not running",
        "{host} is up, but its container is not: the node was never set up, or has stopped",
    ),
)


def find(origin: Origin, text: str, **values: object) -> str | None:
    """The remedy for the first entry that matches the text, with {file}, {host} and {user} from `values`."""
    for advice in ADVICE:
        if advice.origin == origin and re.search(advice.pattern, text):
            return f"{advice.remedy.format(**values)}."
    return None


def causes(lines: Iterable[str]) -> list[str]:
    """Translate log lines into causes, newest first; each cause once, with its newest line."""
    found: dict[str, str] = {}
    for line in lines:
        remedy = find(Origin.LOG, line)
        if remedy is not None:
            found.pop(remedy, None)
            found[remedy] = line.strip()
    return [f"{remedy}\n    {line[:300]}" for remedy, line in reversed(found.items())]

"""Why nodes do not come: what clouds, Ray's autoscaler and Kubernetes write, put into words with the remedy."""

from __future__ import annotations

import re
from collections.abc import Iterable

#: What a line holds -> what it means. The first pattern that a line matches counts, and each cause is told once, with
#: its newest line.
CAUSES: dict[str, str] = {
    # AWS
    r"InsufficientInstanceCapacity|InsufficientCapacity|no Spot capacity|UnfulfillableCapacity": "the cloud has no"
    " such machine to give at the moment (capacity): wait, or try another zone, another type, or on-demand",
    r"SpotMaxPriceTooLow": "the spot price is above the highest that the file allows: raise it or leave it out",
    r"MaxSpotInstanceCountExceeded|VcpuLimitExceeded|InstanceLimitExceeded|QuotaExceeded|quota.{0,60}exceed"
    r"|exceed.{0,60}quota|Quota '": "the account's quota does not allow it: ask the cloud for more (AWS: Service "
    "Quotas, separate for spot; GCP: IAM & Admin, Quotas; Azure: Subscriptions, Usage + quotas), or take fewer",
    r"UnauthorizedOperation|AccessDenied|AuthFailure|AuthorizationFailed|PERMISSION_DENIED|not authorized to perform"
    r"|HttpError 403": "the head's role may not create machines: give it the right named in the line",
    r"InvalidAMIID|InvalidParameterValue.*ImageId|The image id .* does not exist|ImageNotFound": "there is no such"
    " image in this region: see ImageId in the launch file",
    r"Unsupported.*instance type|InvalidInstanceType|not supported in your requested Availability Zone"
    r"|SkuNotAvailable": "the zone has no such instance type: another zone, or another type",
    r"InvalidKeyPair|InvalidSubnet|InvalidGroup": "the key, subnet or security group is not there in this region",
    # GCP, Azure
    r"ZONE_RESOURCE_POOL_EXHAUSTED|STOCKOUT|does not have enough resources": "the zone has no such machine to give at "
    "the moment (capacity): wait, or try another zone",
    r"AllocationFailed|ZonalAllocationFailed|OverconstrainedAllocationRequest": "Azure has no such machine to give at "
    "the moment (capacity): wait, or try another region or size",
    r"OperationNotAllowed": "the subscription's quota does not allow it: Azure portal, Subscriptions, Usage + quotas",
    # Kubernetes
    r"Insufficient nvidia\.com/gpu": "no Kubernetes node has enough free GPUs: scale up the GPU node pool, or ask for "
    "fewer per worker",
    r"Insufficient (cpu|memory|ephemeral-storage)": "no Kubernetes node has enough free CPUs, memory or disk: ask for "
    "less per worker, or scale up the node pool",
    r"untolerated taint": "the nodes have a taint that the pods do not tolerate: add it to `tolerations`",
    r"didn't match Pod's node affinity|didn't match.*selector": "no node has the labels of the file's nodeSelector",
    r"unbound immediate PersistentVolumeClaims|persistentvolumeclaim .* not found|FailedMount|FailedAttachVolume": "the"
    " shared volume cannot be mounted: look at the claim named in the file (kubectl get pvc)",
    r"ErrImagePull|ImagePullBackOff|InvalidImageName|manifest unknown|pull access denied": "the image cannot be pulled:"
    " its name, its tag, or the rights to the registry (imagePullSecrets)",
    r"CreateContainerConfigError|secret .* not found": "the Secret with token or secrets is not there: run `up` again",
    r"CrashLoopBackOff|OOMKilled": "the container starts and dies: kubectl logs POD -c CONTAINER --previous",
    # any provider
    r"[Uu]nauthenticated|AuthenticationError|[Ii]nvalid.{0,20}token": "the head refuses the node's token: the same "
    "~/.ray/auth_token must be on all hosts (file_mounts), with RAY_AUTH_MODE=token in ~/.bashrc",
    r"[Vv]ersion mismatch|running Ray: |was started with:": "the node has another version of Ray or Python than the "
    "head: install the same",
    r"No module named|command not found|Could not find a version that satisfies|No matching distribution": "the node's "
    "set-up fails: a program or package is not there (setup_commands, image)",
    r"[Ss]etup command.*failed|Failed to setup|Setup failed|update-failed|Start command.*failed|exit code [1-9]\d*"
    r"|Error in executing|SSH command failed": "the node's set-up fails: the command named in the line",
    r"docker: (command )?not found|Cannot connect to the Docker daemon": "the host has no running Docker",
    r"No space left on device": "the node's disk is full: a larger one, or a smaller image",
    r"SSH still not available|Connection timed out|Permission denied \(publickey": "the head does not get into the node"
    " by ssh: security group (port 22 and all ports among the nodes), key and ssh_user",
    r"RequestExpired|SignatureDoesNotMatch|InvalidClientTokenId.*time|clock.?skew": "the head's clock is off: NTP",
}


def causes(lines: Iterable[str]) -> list[str]:
    """Sentences of what log lines tell, the newest first, each with the line that it stands on."""
    found: dict[str, str] = {}
    for line in lines:
        for pattern, words in CAUSES.items():
            if re.search(pattern, line):
                found.pop(words, None)
                found[words] = line.strip()
                break
    return [f"{words}.\n    {line[:300]}" for words, line in reversed(found.items())]

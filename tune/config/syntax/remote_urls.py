"""Addresses that a run is copied to: `s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX` or `file:///FOLDER`."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from macdrop.errors import nearest

SCHEMES = ("s3", "gs", "file")
#: Other spellings of the same stores.
_SPELLINGS = {"gcs": "gs", "s3a": "s3", "s3n": "s3"}
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]")
_EXAMPLE = "for example s3://my-bucket/runs/llama, gs://my-bucket/runs/llama or file:///data/copies/llama"


def check_url(url: str) -> str:
    """Return an address that a run can be copied to.

    Raises:
        ValueError: it cannot; the message never holds a password.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ValueError(f"this is not an address; write {_EXAMPLE}") from None
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            "an address may hold no user, password, query (?) or fragment (#): it is written into run.json. Keys come "
            "from the environment or the provider's own files, such as AWS_PROFILE, ~/.aws, "
            "GOOGLE_APPLICATION_CREDENTIALS"
        )
    if parts.scheme not in SCHEMES:
        meant = _SPELLINGS.get(parts.scheme)
        hint = f" Write {meant}://." if meant else nearest(parts.scheme, SCHEMES) if parts.scheme else ""
        raise ValueError(f"{url!r:.100} must begin with s3://, gs:// or file://, {_EXAMPLE}.{hint}")
    if parts.scheme == "file":
        if parts.netloc or not parts.path.strip("/"):
            raise ValueError(f"{url!r:.100} must name a folder by its absolute path, {_EXAMPLE}")
    elif not _BUCKET.fullmatch(parts.netloc):
        raise ValueError(f"{url!r:.100} must name a bucket of 3 to 63 lower-case letters, digits and . _ -, {_EXAMPLE}")
    if any(part in ("", ".", "..") for part in parts.path.strip("/").split("/")) and parts.path.strip("/"):
        raise ValueError(f"{url!r:.100} has an empty part, . or .. in its path; write it out")
    return url

"""The cache folder: scans, tokenised data, notes of local Ray sessions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


#: Names the folder of scans and tokenised data; by default ~/.cache/macdrop.
CACHE_VARIABLE = "MACDROP_CACHE"


def cache_dir() -> Path:
    """The folder that outlives runs: scans by fingerprint, tokenised data by content."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "macdrop").absolute()

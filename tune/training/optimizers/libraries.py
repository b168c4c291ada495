"""Libraries that only some optimizers need."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from macdrop.errors import ConfigError

#: Optimizer -> library.
LIBRARIES = {"lion": "bitsandbytes", "adamw_8bit": "bitsandbytes", "schedule_free_adamw": "schedulefree"}
#: Library -> our extra.
EXTRAS = {"bitsandbytes": "bnb", "schedulefree": "schedulefree"}


def check_library(optimizer: str) -> None:
    """Refuse an optimizer whose library is not installed here.

    Raises:
        ConfigError: it is not.
    """
    if optimizer in LIBRARIES:
        require(LIBRARIES[optimizer])
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise ConfigError(
            f"optimizer: muon needs torch 2.9 or newer; this is {torch.__version__}. Install it, or choose another "
            "optimizer."
        )


def require(library: str) -> Any:
    """Import a library.

    Raises:
        ConfigError: it is not installed, or cannot be loaded.
    """
    try:
        return importlib.import_module(library)
    except (ImportError, OSError, RuntimeError) as error:
        names = ", ".join(name for name, needed in LIBRARIES.items() if needed == library)
        raise ConfigError(
            f"optimizer: {names} needs the library {library}, which cannot be imported ({error}). "
            f"Install it (pip install 'macdrop[{EXTRAS[library]}]'), or choose another optimizer."
        ) from None

"""Silencing the libraries that print or log during training."""

from __future__ import annotations


def quiet_libraries() -> None:
    """transformers' loading bars and advice off; our own lines say what happens."""
    import logging
    import os
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for name in ("deepspeed", "DeepSpeed", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)

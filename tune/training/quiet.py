"""Silencing the libraries that print, log or warn while models are trained and scored."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator

#: Loggers of what a scorer uses.
_SCORING = (
    "lm_eval",
    "datasets",
    "transformers",
    "huggingface_hub",
    "peft",
    "absl",
    "rouge_score",
    "sacrebleu",
    "evaluate",
)


def quiet_libraries() -> None:
    """Switch off transformers' loading bars and advice for this process: a command prints its own progress."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    _errors_only("deepspeed", "DeepSpeed", "huggingface_hub")


def quiet_worker() -> None:
    """Keep warnings and log lines of libraries out of a worker's log, which is read for our own."""
    warnings.filterwarnings("ignore")
    _errors_only("DeepSpeed", "transformers", "peft", "torch")


def _errors_only(*names: str) -> None:
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def no_output() -> Iterator[None]:
    """Drop standard output inside the block: DeepSpeed prints at any log level."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def quiet_while_scoring() -> Iterator[None]:
    """Hold back log lines, warnings and progress bars of lm-eval, datasets and transformers inside the block."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    levels = {name: logging.getLogger(name).level for name in _SCORING}
    bars = not are_progress_bars_disabled()
    try:
        _errors_only(*_SCORING)
        disable_progress_bars()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if bars:
            enable_progress_bars()

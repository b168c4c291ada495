"""Silencing the libraries that print, log or warn while models are trained and scored."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections import Counter
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
#: Parts of lm-eval's warnings that say nothing about the data: how it was called, and defaults of its own tasks.
_HARMLESS = ("`pretrained` model kwarg", "already-initialized model", "Custom kwargs can be passed", "[Task: ")


def quiet_libraries() -> None:
    """Switch off transformers' loading bars and advice for this process: a command prints its own progress."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    # Of merging by other means: here a tied head is untied before an adapter on it is merged.
    warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    # What the hooks warn of is among the notes of the check before training.
    # bitsandbytes reports in every forward pass that activations are cast for int8.
    _errors_only("deepspeed", "DeepSpeed", "huggingface_hub", "macdrop.hooks", "bitsandbytes")


def quiet_worker() -> None:
    """Keep warnings and log lines of libraries out of a worker's log, which is read for our own."""
    warnings.filterwarnings("ignore")
    _errors_only("DeepSpeed", "transformers", "peft", "torch", "bitsandbytes")


def _errors_only(*names: str) -> None:
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def no_output() -> Iterator[None]:
    """Drop standard output inside the block: DeepSpeed prints at any log level."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


class _Collector(logging.Handler):
    """Counts warnings in place of printing them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage().strip().partition("\n")[0]
        if not any(part in said for part in _HARMLESS):
            self.heard[said] += 1

    @contextlib.contextmanager
    def listening(self, name: str) -> Iterator[None]:
        """Take over what a logger says inside the block."""
        logger = logging.getLogger(name)
        before = logger.handlers, logger.propagate, logger.level
        logger.handlers, logger.propagate = [self], False
        logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            logger.handlers, logger.propagate = before[:2]
            logger.setLevel(before[2])


@contextlib.contextmanager
def quiet_while_scoring() -> Iterator[Counter[str]]:
    """Hold back log lines, warnings and progress bars of lm-eval, datasets and transformers inside the block.

    Yields:
        first lines of what lm-eval warns of, with the number of times: they may tell of wrong data.
    """
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    levels = {name: logging.getLogger(name).level for name in _SCORING}
    bars = not are_progress_bars_disabled()
    collector = _Collector()
    try:
        _errors_only(*_SCORING)
        disable_progress_bars()
        with warnings.catch_warnings(), collector.listening("lm_eval"):
            warnings.simplefilter("ignore")
            yield collector.heard
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if bars:
            enable_progress_bars()

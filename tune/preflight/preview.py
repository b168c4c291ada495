"""Training data as the model sees them: first rows as tokens with and without loss, lengths, and their histogram."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from macdrop.load import load_tokenizer
from tune.config.train_spec import TrainSpec
from tune.data.dataset import Prepared, load, prepare
from tune.data.padding import padding_of
from tune.data.templates import IGNORE
from tune.storage.places import cache_dir
from tune.zoo.model_source import model_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Bars of a histogram.
BINS = 10
#: Shares of examples that are no longer than a length of the summary.
QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens of an example that all carry loss, or all do not, each as the text that it stands for."""

    loss: bool
    tokens: tuple[str, ...]


@dataclass(frozen=True)
class Example:
    """An example as training sees it; `place` is where its row stands, empty where that is not known."""

    place: str
    runs: tuple[Run, ...]

    def count(self, loss: bool) -> int:
        """Return the number of tokens that carry loss, or do not."""
        return sum(len(run.tokens) for run in self.runs if run.loss == loss)


@dataclass(frozen=True)
class Lengths:
    """Tokens per example: their mean, the lengths at `QUANTILES`, and of `BINS` equal bins the first length and count.

    Bins end before the next one begins; the last one includes the longest example.
    """

    mean: float
    at: tuple[int, ...]
    bins: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Preview:
    """View of one model's training data. `padding` is a share, 0 to 1; `info` is info.json."""

    examples: tuple[Example, ...]
    lengths: Lengths
    trained: Lengths
    padding: float
    info: dict[str, Any]


def preview(spec: TrainSpec, rows: int, workers: int = 1) -> Preview:
    """Prepare the training data of `spec` (they are kept for training), and describe them.

    Args:
        rows: examples to show, from the first.
        workers: data-parallel workers, for the share of padding.

    Raises:
        DataError: the data are missing or unusable. ConfigError: the template does not suit the tokenizer.
    """
    tokenizer = load_tokenizer(
        model_source(spec.model_name_or_path),
        revision=spec.model_revision,
        trust_remote_code=spec.trust_remote_code,
    )
    prepared = load(prepare(spec, tokenizer, cache_dir() / "data"))
    return Preview(
        examples=first_examples(prepared, tokenizer, rows),
        lengths=lengths_of(prepared.train.lengths),
        trained=lengths_of(prepared.train.label_counts),
        padding=padding_of(prepared.train.lengths, spec, workers).share,
        info=prepared.info,
    )


def first_examples(prepared: Prepared, tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[Example, ...]:
    """Return the first `rows` examples in the order of the files, those of the validation split among them."""
    arrays, places = prepared.train, prepared.info.get("places") or []
    found = []
    for at in range(min(rows, len(arrays.offsets) - 1)):
        part = slice(arrays.offsets[at], arrays.offsets[at + 1])
        carries = [int(label) != IGNORE for label in arrays.labels[part]]
        carries[:1] = [False]  # nothing predicts the first token
        pairs = zip(carries, _texts(tokenizer, [int(token) for token in arrays.tokens[part]]), strict=True)
        runs = [Run(loss, tuple(text for _, text in group)) for loss, group in groupby(pairs, key=lambda pair: pair[0])]
        found.append(Example(places[at] if at < len(places) else "", tuple(runs)))
    return tuple(found)


def _texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Return the text of each token, the blank before a word included; a part of a character is shown as bytes are."""
    texts = [str(tokenizer.decode([token], clean_up_tokenization_spaces=False)) for token in ids]
    raw = [str(token) for token in tokenizer.convert_ids_to_tokens(ids)]
    return [f" {text}" if name.startswith("▁") else text for text, name in zip(texts, raw, strict=True)]


def lengths_of(lengths: np.ndarray) -> Lengths:
    """Summarise lengths, int64 (n,), n at least 1."""
    at = np.quantile(lengths, QUANTILES, method="inverted_cdf").astype(int)
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(high - low + 1) // BINS))
    edges = [low + width * number for number in range(-(-(high - low + 1) // width) + 1)]
    counts, _ = np.histogram(lengths, bins=edges)
    bins = zip(edges[:-1], map(int, counts), strict=True)
    return Lengths(float(lengths.mean()), tuple(map(int, at)), tuple(bins))

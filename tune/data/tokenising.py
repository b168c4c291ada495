"""From rows of data sets to flat arrays of tokens and labels, cut to `cutoff_len`, with counts of what was cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from typing import Any

import numpy as np

from macdrop.errors import DataError
from tune.data.formats import converter, detect_format
from tune.data.lost_rows import SKIPPED, BadRows
from tune.data.readers import Row
from tune.data.sources import Source
from tune.data.templates import IGNORE, Encoded, Encoder

Reader = Callable[[], Iterator[Row]]

_BATCH = 1000
#: Examples whose places are kept.
_PLACES = 100


class _Kept:
    """Examples that are kept, cut to `cutoff` tokens, and counts of all."""

    def __init__(self, cutoff: int) -> None:
        self.cutoff = cutoff
        self.tokens: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []
        self.counts = {"rows": 0, "dropped": 0, "truncated": 0, "tokenised_by_pieces": 0}
        self.prompts = (0, 0)  # tokens of the shortest and of the longest prompt before an answer
        self.longest, self.longest_at = 0, ""
        self.places: list[str] = []

    def add(self, example: Encoded) -> None:
        self.counts["rows"] += 1
        prompt, length = example.prompt_length, len(example.input_ids)
        if prompt < length:
            shortest, longest = self.prompts
            self.prompts = (min(shortest or prompt, prompt), max(longest, prompt))
        if all(label == IGNORE for label in example.labels[1 : self.cutoff]):
            self.counts["dropped"] += 1
            return
        self.counts["truncated"] += length > self.cutoff
        self.counts["tokenised_by_pieces"] += example.split
        self.tokens.append(np.asarray(example.input_ids[: self.cutoff], np.int32))
        self.labels.append(np.asarray(example.labels[: self.cutoff], np.int32))
        self.places += [example.place] if len(self.places) < _PLACES else []
        if len(self.tokens[-1]) > self.longest:
            self.longest, self.longest_at = len(self.tokens[-1]), example.place

    def require_some(self, bad: BadRows) -> None:
        """Refuse data without any usable example."""
        rows = self.counts["rows"]
        if not rows:
            raise DataError(f"bad_rows: skip leaves none of the {bad.count} rows. The first: {bad.first}")
        if not self.tokens:
            shortest = self.prompts[0]
            why = f"the shortest prompt has {shortest} tokens.\nRaise cutoff_len above {shortest}, or shorten prompts"
            raise DataError(
                f"cutoff_len {self.cutoff} leaves no answer token in any of the {rows} examples: "
                f"{why if shortest else 'their texts are empty'}."
            )


def tokenise(
    encoder: Encoder, sources: list[Source], readers: list[Reader], settings: dict[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tokenise all rows and split them into parts.

    Returns:
        the arrays of `tune.data.dataset` by name, and what info.json says of them.

    Raises:
        DataError: a row cannot be used, no answer token is within cutoff_len, or a part would be empty.
    """
    kept, bad = _Kept(settings["cutoff_len"]), BadRows(settings["bad_rows"] == "skip")
    parts = []
    for source, rows in zip(sources, readers, strict=True):
        before = (kept.counts["rows"] + bad.count, kept.counts["dropped"], bad.count)
        format, encoded = _encode_source(source, rows, encoder, bad, settings["train_on_roles"])
        for example in encoded:
            kept.add(example)
        counted = {"rows": kept.counts["rows"] + bad.count - before[0], "dropped": kept.counts["dropped"] - before[1]}
        counted["skipped"] = bad.count - before[2]
        parts.append({**asdict(source), "format": format, "detected": source.format == "auto", **counted})
    kept.require_some(bad)
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in kept.tokens], dtype=np.int64)])
    train, validation = split(len(kept.tokens), settings["val_size"], settings["data_seed"])
    arrays = {
        "tokens": np.concatenate(kept.tokens),
        "labels": np.concatenate(kept.labels),
        "offsets": offsets,
        "train": train,
        "validation": validation,
    }
    info = {
        "sources": parts,
        "format": ", ".join(dict.fromkeys(part["format"] for part in parts)),
        **settings,
        **kept.counts,
        "rows": kept.counts["rows"] + bad.count,
        "skipped": bad.count,
        "first_skipped": bad.first,
        SKIPPED: bad.by_reason(),
        "places": kept.places,
        "examples": len(offsets) - 1,
        "train": len(train),
        "validation": len(validation),
        "tokens": int(offsets[-1]),
        "label_tokens": int(label_counts(arrays["labels"], offsets).sum()),
        "shortest_prompt": kept.prompts[0],
        "longest_prompt": kept.prompts[1],
        "longest_example": kept.longest,
        "longest_at": kept.longest_at,
        "tokens_before_every_text": encoder.lead,
    }
    return arrays, info


def _encode_source(
    source: Source, rows: Reader, encoder: Encoder, bad: BadRows, roles: Sequence[str]
) -> tuple[str, Iterator[Encoded]]:
    """Return the format and the examples, not yet cut; few rows are held at a time."""
    stream = islice(rows(), source.max_samples)
    batch = list(islice(stream, _BATCH))
    if not batch:
        raise DataError(f"dataset {source.path!r} is empty: it holds no rows.")
    format = detect_format(batch[0], batch[1:]) if source.format == "auto" else source.format
    convert = converter(format, roles)

    def examples(batch: list[Row]) -> Iterator[Encoded]:
        while batch:
            conversations, places = [], []
            for row in batch:
                try:
                    conversations.append(convert(row))
                    places.append(row.place)
                except DataError as error:
                    bad.add(error, row.place)
            yield from encoder.encode(conversations, places, bad.add)
            batch = list(islice(stream, _BATCH))

    return format, examples(batch)


def split(n: int, val_size: float, data_seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the indices of training and validation examples, ascending and below `n`, by `data_seed`.

    Args:
        val_size: 0 for no validation, a fraction below 1 (rounded to the nearest count), or a whole number of examples.

    Raises:
        DataError: val_size is not such a number, or a part would be empty.
    """
    if not 0 <= val_size or (val_size >= 1 and val_size != int(val_size)):
        raise DataError(f"val_size must be 0, a fraction below 1, or a whole number of examples; got {val_size}.")
    count = int(val_size) if val_size >= 1 else round(n * val_size)
    if (val_size > 0 and count == 0) or count >= n:
        part = "validation" if count == 0 else "training"
        some = f", or {1 / n:.3g} to {(n - 1) / n:.3g}, or 1 to {n - 1} examples" if n > 1 else ""
        raise DataError(f"val_size {val_size} of {n} usable example(s) leaves the {part} part empty. Allowed: 0{some}.")
    order = np.random.default_rng(data_seed).permutation(n)
    return np.sort(order[count:]).astype(np.int64), np.sort(order[:count]).astype(np.int64)


def label_counts(labels: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Count the labels != -100 of each example, except on its first token, which nothing predicts; int64 (n,)."""
    carries = np.asarray(labels) != IGNORE  # (N,)
    total = np.concatenate([[0], np.cumsum(carries, dtype=np.int64)])
    return total[offsets[1:]] - total[offsets[:-1]] - carries[offsets[:-1]]

"""Token perplexity on long text.

Documents are joined by blank lines and tokenised as one text, which is cut into windows of at most `window` tokens.
Each window starts with its own bos, if the tokenizer has one: bos at position 0 is where massive weights act. Every
token is scored once, except a first token that has no bos before it. With a `stride`, windows overlap, and a token is
scored in the first window that holds it. Perplexity is exp of the mean negative log-likelihood. The keys of an entry
(`tune.config.eval_entries.Perplexity`) change each of these rules; the suite `perplexity` does so to measure as Sun et
al. 2024 (arXiv 2402.17762) do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from macdrop.errors import ConfigError, DataError
from tune.config.eval_entries import Perplexity
from tune.config.eval_spec import EvalSpec
from tune.data.local_rows import read_documents, text_column
from tune.data.locations import is_local
from tune.errors import BenchmarkError
from tune.evaluation.check import check_perplexity
from tune.evaluation.item_values import Values

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tune.evaluation.logits import Logits, Reader

VERSION = "1"


@dataclass(frozen=True)
class Window:
    """Token ids of one window, bos included; positions from `first` on are scored."""

    ids: list[int]
    first: int


@dataclass(frozen=True)
class ResidentText:
    """The windows of one benchmark entry, and the settings that produced them."""

    windows: list[Window]
    settings: str


def load(entry: Perplexity, tokenizer: PreTrainedTokenizerBase, max_positions: int) -> ResidentText:
    """Read, tokenise and cut the text of an entry.

    Raises:
        DataError: no file, no text. ConfigError: the window is longer than the model's positions.
        BenchmarkError: a hub data set could not be loaded.
    """
    size = entry.window or min(max_positions, entry.max_window)
    if size > max_positions:
        raise ConfigError(
            f"window {size} is longer than the {max_positions} positions of this model; set {max_positions} or less."
        )
    if entry.stride and entry.stride >= size:
        raise ConfigError(
            f"stride {entry.stride} would skip tokens: windows have {size}; set a smaller stride, or null."
        )
    local = is_local(entry.data[0])
    documents = read_documents(entry.data, entry.column) if local else _from_hub(entry)
    documents = [text for text in documents if text or entry.keep_empty][: entry.documents]
    text = entry.join.join(documents)
    ids = tokenizer(text, add_special_tokens=entry.bos == "text", verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id if entry.bos == "window" else None
    windows = cut(ids, size, entry.stride, bos)
    if entry.full_windows and windows and len(windows[-1].ids) < size:
        windows.pop()
    windows = windows[: entry.windows]
    if not windows:
        full = f" a full window of {size}" if entry.full_windows else " one to score"
        raise DataError(f"{', '.join(entry.data)}: {len(ids)} tokens of text do not make{full}.")
    return ResidentText(windows, _settings(entry, size, tokenizer, ids, local))


def _settings(entry: Perplexity, size: int, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], local: bool) -> str:
    """Return the rules that produced the windows as key=value; the rarer ones only if they are not the default."""
    bos = None if entry.bos == "none" else tokenizer.bos_token_id
    if entry.bos == "text":
        bos = "text" if bos is not None and ids[:1] == [bos] else None
    words = [f"window={size}", f"stride={entry.stride or 'none'}", f"bos={'none' if bos is None else bos}"]
    words += [] if local else [f"split={entry.split}"]
    for key in ("documents", "keep_empty", "join", "full_windows"):
        value = getattr(entry, key)
        if value != Perplexity.model_fields[key].default:
            words.append(f"{key}={str(value).encode('unicode_escape').decode().replace(' ', '<space>')}")
    return " ".join(words)


def cut(ids: Sequence[int], size: int, stride: int | None, bos: int | None) -> list[Window]:
    """Cut tokens into windows of at most `size` tokens, bos included, by the rules of the module."""
    lead = [] if bos is None else [bos]
    room = size - len(lead)
    windows, scored = [], 0 if lead else 1
    for start in range(0, len(ids), min(stride or room, room)):
        held = list(ids[start : start + room])
        first = max(scored - start, 0 if lead else 1)
        if first < len(held):
            windows.append(Window(lead + held, first + len(lead)))
        scored = max(scored, start + len(held))
        if scored >= len(ids):
            break
    return windows


def _from_hub(entry: Perplexity) -> list[str]:
    import datasets

    try:
        rows = datasets.load_dataset(entry.data[0], entry.name, split=entry.split)
    except Exception as error:  # datasets and huggingface_hub raise a dozen kinds; all mean: no data
        raise BenchmarkError(
            f"The data set {entry.data[0]!r} (name {entry.name}, split {entry.split}) could not be loaded: "
            f"{type(error).__name__}: {str(error).strip()[:300]}\nWithout internet, give a local file as data."
        ) from error
    if entry.column not in rows.column_names:
        raise DataError(
            f"Data set {entry.data[0]!r} has no column {entry.column!r}; it has {', '.join(rows.column_names)}."
        )
    where = f"{entry.data[0]} [{entry.split}], row"
    column = rows.select_columns([entry.column])
    empty = {entry.column: ""}  # what a hub data set has in place of an empty text
    placed = ((empty if row[entry.column] is None else row, f"{where} {i}") for i, row in enumerate(column))
    return text_column(placed, entry.column)


def score(
    text: ResidentText, model: PreTrainedModel | PeftModel, batch_size: int, limit: int | None, logits: Logits
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measure the perplexity of `model` on the first `limit` windows.

    The standard error comes from the spread over windows, by the delta method.

    Returns:
        one row, and per window its number of tokens and summed negative log-likelihood in nats.
    """
    windows = text.windows[:limit]
    sums: list[float] = []
    for start in range(0, len(windows), batch_size):
        sums += _window_sums(windows[start : start + batch_size], model, logits)
    counts = [len(window.ids) - window.first for window in windows]
    total = sum(counts)
    nll = math.fsum(sums) / total
    if not math.isfinite(nll):
        raise BenchmarkError(f"The model's mean negative log-likelihood is {nll}, so perplexity is undefined.")
    value = math.exp(min(nll, 700.0))  # exp overflows a float just above
    residuals = [s - nll * n for s, n in zip(sums, counts, strict=True)]
    b = len(windows)
    stderr = value * math.sqrt(b / (b - 1) * math.fsum(r * r for r in residuals)) / total if b > 1 else None
    row = {
        "version": VERSION,
        "metric": "perplexity",
        "value": value,
        "stderr": stderr,
        "n": total,
        "higher_is_better": False,
        "num_fewshot": None,
        "settings": f"{text.settings} windows={b}",
    }
    items = [{"window": i, "tokens": n, "nll": s} for i, (n, s) in enumerate(zip(counts, sums, strict=True))]
    return [row], items


def _window_sums(windows: Sequence[Window], model: PreTrainedModel | PeftModel, logits: Logits) -> list[float]:
    """Sum the negative log-likelihood of the scored tokens of each window, in fp32; of logits, a chunk at a time."""
    import torch

    longest = max(len(window.ids) for window in windows)
    ids = torch.zeros(len(windows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    at = torch.zeros_like(ids, dtype=torch.bool)
    for row, window in enumerate(windows):  # padding on the right: a causal model never looks at it
        ids[row, : len(window.ids)] = torch.tensor(window.ids)
        mask[row, : len(window.ids)] = 1
        at[row, window.first - 1 : len(window.ids) - 1] = True
    targets = ids.roll(-1, dims=1)[at]
    ids, mask, at, targets = (tensor.to(model.device) for tensor in (ids, mask, at, targets))
    losses = logits(model, ids, mask, at=at, read=losses_of(targets)).double()
    return [part.sum().item() for part in losses.split([len(window.ids) - window.first for window in windows])]


def losses_of(targets: torch.Tensor) -> Reader:
    """Return a reader of the negative log-likelihoods (N,), in nats and fp32, of one target token (N,) per position."""
    import torch.nn.functional as F

    def read(logits: torch.Tensor, rows: slice) -> torch.Tensor:
        return F.cross_entropy(logits.float(), targets[rows], reduction="none")

    return read


class PerplexityBenchmark:
    """Scores entries of `perplexity`; an item is a window."""

    def __init__(self, spec: EvalSpec, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length

    @staticmethod
    def check(name: str, entry: Perplexity, spec: EvalSpec) -> None:
        check_perplexity(entry)

    def load(self, name: str, entry: Perplexity) -> ResidentText:
        return load(entry, self._tokenizer, self._max_length)

    def count(self, data: ResidentText, limit: int | None) -> int:
        return len(data.windows[:limit])

    def score(
        self, data: ResidentText, model: PreTrainedModel | PeftModel, batch_size: int, limit: int | None, logits: Logits
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        return score(data, model, batch_size, limit, logits)

    @staticmethod
    def items(records: list[dict[str, Any]], row: Mapping[str, Any]) -> Values | None:
        return {f"window {r['window']}, {r['tokens']} tokens": (r["nll"], r["tokens"]) for r in records}

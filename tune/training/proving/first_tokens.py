"""First tokens of the user's data as training sees them, beside the token that a scan takes for bos."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from tune.config.train_spec import TrainSpec
from tune.data.dataset import load, prepare
from tune.storage.places import cache_dir


@dataclass(frozen=True)
class FirstTokens:
    """Counts of the first tokens of examples.

    lead: the token that the tokenizer by itself puts before a plain text; None if it puts none.
    """

    examples: int
    counts: tuple[tuple[int, int], ...]  # token, examples that begin with it; the most frequent first
    template: str
    lead: int | None

    def share(self, token: int) -> float:
        """Return the share of examples that begin with a token."""
        return dict(self.counts).get(token, 0) / self.examples


def first_tokens(spec: TrainSpec, tokenizer: PreTrainedTokenizerBase) -> FirstTokens:
    """Tokenise the data of `spec` as for training (they are kept for it), and count the first tokens.

    Raises:
        DataError: the data are missing or unusable.
        ConfigError: the template does not suit the tokenizer.
    """
    data = load(prepare(spec, tokenizer, cache_dir() / "data"))
    parts = [part for part in (data.train, data.validation) if part is not None]
    counts = Counter(int(part.tokens[at]) for part in parts for at in part.offsets[part.index])
    plain, special = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (False, True))
    lead = special[0] if len(special) > len(plain) and special[0] != plain[0] else None
    return FirstTokens(sum(counts.values()), tuple(counts.most_common()), str(data.info["template"]), lead)

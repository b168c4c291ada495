"""Does a model depend on its massive weights? Perplexity on text, under each attack (arXiv 2410.01866, section 3)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from macdrop.attack import attacked_rows
from macdrop.errors import ConfigError, DataError
from macdrop.families import bare_model, embedding_device
from macdrop.gather import not_finite
from macdrop.masking import attacked
from macdrop.probe import evaluating
from macdrop.weights import MassiveWeights

SENSITIVE_FACTOR = 2.0  # zeroing must multiply perplexity by this at least ...
RANDOM_MARGIN = 10.0  # ... and raise the loss by this many times what the worst random draw raises it by


@dataclass(frozen=True)
class Proof:
    """Perplexities of one model, untouched and attacked, and what they say; inf stands for overflow and NaN."""

    k: int
    seed: int
    blocks: int  # how many blocks of text
    tokens: int  # how many tokens were predicted
    untouched: float
    zeroed: float  # top-k rows zeroed
    retained: float  # all but the top-k rows zeroed
    random: tuple[float, ...]  # k random other rows zeroed, one a draw
    verdict: str  # "sensitive" or "not sensitive"
    text: str

    @property
    def sensitive(self) -> bool:
        return self.verdict == "sensitive"

    def to_dict(self) -> dict:
        """JSON types only; an infinite perplexity is the string "inf"."""
        values = {**asdict(self), "random": list(self.random)}
        for key in ("untouched", "zeroed", "retained"):
            values[key] = _json_number(values[key])
        values["random"] = [_json_number(value) for value in values["random"]]
        return values


def text_blocks(tokenizer: PreTrainedTokenizerBase, text: str, length: int, bos_token_id: int) -> torch.Tensor:
    """Token ids (n, length) of `text`, packed: each block is bos and the next length - 1 tokens.

    The tail that fills no block is left out.

    Raises `DataError` when the text does not fill one block, and `ConfigError` for a length below 2.
    """
    if length < 2:
        raise ConfigError(f"A block of {length} tokens has nothing to predict. Give a length of at least 2.")
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = len(tokens) // (length - 1)
    if not count:
        raise DataError(
            f"The text has {len(tokens)} tokens, fewer than a block of {length}.\n"
            "Give a longer text or a shorter length."
        )
    packed = torch.tensor(tokens[: count * (length - 1)], dtype=torch.long).view(count, length - 1)
    return torch.cat([torch.full((count, 1), bos_token_id, dtype=torch.long), packed], dim=1)


def perplexity(model: nn.Module, blocks: torch.Tensor, *, batch_size: int = 8) -> float:
    """exp of the mean loss a token over blocks (n, T), the first token of each given; inf for NaN or overflow."""
    device = embedding_device(model)
    total, count = 0.0, 0
    with evaluating(model):
        for start in range(0, len(blocks), batch_size):
            batch = blocks[start : start + batch_size].to(device)
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
            loss = nn.functional.cross_entropy(
                logits.flatten(0, 1), batch[:, 1:].flatten().to(logits.device), reduction="sum"
            )
            total += float(loss)
            count += batch[:, 1:].numel()
    mean = total / count
    return math.exp(mean) if mean < 700 else math.inf


def prove(
    model: nn.Module,
    blocks: torch.Tensor,
    weights: MassiveWeights,
    *,
    k: int = 5,
    draws: int = 3,
    seed: int = 0,
    batch_size: int = 8,
) -> Proof:
    """Measure perplexity untouched, with the top k rows zeroed, retained, and with k random other rows zeroed.

    blocks: (n, T) token ids, bos first (`text_blocks`); draws: how many random sets, by seeds seed, seed + 1, ...

    The verdict is *sensitive* when zeroing at least doubles perplexity AND raises the loss at least 10 times as much as
    the worst random draw does; else *not sensitive*. Retaining is reported and takes no part in the verdict: how much
    of the model lives in the other rows of that layer differs (arXiv 2410.01866, section 3).

    Raises `ConfigError` for bad arguments, an impossible k, or an untouched perplexity that is not finite.
    """
    _require_blocks(blocks, draws, k, batch_size)
    for kind in ("zeroing", "retaining", "random"):
        attacked_rows(weights, kind, k)  # refuse before the first long measurement

    def measure(kind: str, draw: int = 0) -> float:
        with attacked(model, weights, kind, k, seed=seed + draw):
            return perplexity(model, blocks, batch_size=batch_size)

    untouched = perplexity(model, blocks, batch_size=batch_size)
    if not math.isfinite(untouched):
        reason = not_finite(bare_model(model), weights.model)
        raise ConfigError(f"The perplexity is not finite on this text, before any attack. {reason}")
    zeroed, retained = measure("zeroing"), measure("retaining")
    random = tuple(measure("random", draw) for draw in range(draws))
    sensitive = is_sensitive(untouched, zeroed, random)
    verdict = "sensitive" if sensitive else "not sensitive"
    text = (
        f"{verdict}: perplexity {untouched:.4g} becomes {zeroed:.4g} (x{zeroed / untouched:.3g}) with the top {k} "
        f"rows of layer {weights.layer} zeroed, {retained:.4g} (x{retained / untouched:.3g}) with only these retained, "
        f"and at most {max(random):.4g} (x{max(random) / untouched:.4g}) with {k} random rows zeroed ({draws} draws). "
        + ("MacDrop has something to act on." if sensitive else "Do not expect MacDrop to change this model.")
    )
    tokens = blocks.shape[0] * (blocks.shape[1] - 1)
    return Proof(k, seed, len(blocks), tokens, untouched, zeroed, retained, random, verdict, text)


def is_sensitive(untouched: float, zeroed: float, random: tuple[float, ...]) -> bool:
    """The rule of `prove` on its perplexities."""
    rise = math.log(zeroed / untouched)  # of the mean loss a token
    worst = max([math.log(value / untouched) for value in random] + [0.0])
    if math.isinf(worst):
        return False  # rows drawn at random break the model as well
    return rise >= math.log(SENSITIVE_FACTOR) and rise >= RANDOM_MARGIN * worst


def _require_blocks(blocks: torch.Tensor, draws: int, k: int, batch_size: int) -> None:
    if blocks.dim() != 2 or blocks.shape[0] < 1 or blocks.shape[1] < 2 or blocks.is_floating_point():
        raise ConfigError(f"blocks must be whole numbers (n, T) with n >= 1 and T >= 2, not {tuple(blocks.shape)}.")
    for name, value in (("draws", draws), ("k", k), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}.")


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else "inf"

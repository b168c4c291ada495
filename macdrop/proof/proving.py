"""Proof of dependence on massive weights: perplexity on text, under each attack (arXiv 2410.01866, section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import nn

from macdrop.attack import attacked_rows
from macdrop.bootstrap import mean_interval
from macdrop.errors import ConfigError, DataError
from macdrop.families import bare_model
from macdrop.gather import not_finite
from macdrop.masking import attacked
from macdrop.probe import evaluating
from macdrop.proof.factors import MIN_BLOCKS, Factor, json_number
from macdrop.proof.losses import Replay, as_perplexity
from macdrop.sensitivity import BORDERLINE, NOT_SENSITIVE, SENSITIVE
from macdrop.weights import MassiveWeights

SENSITIVE_FACTOR = 2.0  # zeroing must multiply perplexity by this at least ...
RANDOM_MARGIN = 10.0  # ... and raise the loss by this many times what the worst random draw raises it by
KEY_SHARE = 0.9  # of the largest log-factor, which the fewest rows that matter have to reach
_LADDER = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500)
_ADVICE = {
    SENSITIVE: "MacDrop has something to act on.",
    BORDERLINE: "The interval crosses the line: prove it on more text (--text), or take the model as weakly sensitive.",
    NOT_SENSITIVE: "Do not expect MacDrop to change this model.",
}


@dataclass(frozen=True)
class Proof:
    """Perplexities of one model, untouched and attacked, and what they say; inf stands for overflow and NaN.

    by_k: factor of zeroing by number of rows, ascending. key_k: the k that matters most, see `key_rows`; None where no
    number of rows raises perplexity beyond doubt. by_text: factor of zeroing by kind of text.
    """

    k: int
    seed: int
    blocks: int  # how many blocks of text
    tokens: int  # how many tokens were predicted
    untouched: float
    zeroed: float  # top-k rows zeroed
    retained: float  # all but the top-k rows zeroed
    random: tuple[float, ...]  # k random other rows zeroed, one a draw
    verdict: str  # see `macdrop.sensitivity`
    text: str
    factor: Factor  # of zeroing
    retained_factor: Factor
    random_factors: tuple[Factor, ...]
    by_k: tuple[tuple[int, Factor], ...]
    key_k: int | None
    by_text: tuple[tuple[str, Factor], ...]

    @property
    def sensitive(self) -> bool:
        return self.verdict == SENSITIVE

    def to_dict(self) -> dict:
        """JSON types only; an infinite number is the string "inf"."""
        values = {**asdict(self), "random": [json_number(value) for value in self.random]}
        for key in ("untouched", "zeroed", "retained"):
            values[key] = json_number(values[key])
        values["factor"], values["retained_factor"] = self.factor.to_list(), self.retained_factor.to_list()
        values["random_factors"] = [factor.to_list() for factor in self.random_factors]
        values["by_k"] = [[k, *factor.to_list()] for k, factor in self.by_k]
        values["by_text"] = [[name, *factor.to_list()] for name, factor in self.by_text]
        return values


def prove(
    model: nn.Module,
    blocks: torch.Tensor,
    weights: MassiveWeights,
    *,
    k: int = 5,
    draws: int = 3,
    seed: int = 0,
    batch_size: int = 8,
    kinds: Sequence[str] = (),
) -> Proof:
    """Measure perplexity untouched, with the top k rows zeroed, retained, and with k random other rows zeroed.

    blocks: (n, T) token ids, bos first (`text_blocks`), n >= 5. draws: how many random sets, by seeds seed, seed + 1,
    ... kinds: what kind of text each block is of, for factors by text. Layers below the massive one run once for all
    attacks.

    The verdict (`judge`) rests on paired differences of blocks and their intervals, so that it names what other
    passages of these texts would say. Retaining is reported and takes no part in the verdict: how much of the model
    lives in the other rows of that layer differs (arXiv 2410.01866, section 3).

    Raises `ConfigError` for bad arguments, an impossible k, or an untouched perplexity that is not finite, and
    `DataError` for too few blocks.
    """
    require_blocks(blocks, draws=draws, k=k, batch_size=batch_size)
    if kinds and len(kinds) != len(blocks):
        raise ConfigError(f"kinds names {len(kinds)} blocks, and there are {len(blocks)}.")
    ladder = rungs(k, weights.intermediate_size)
    attacks = [("zeroing", rung, 0) for rung in ladder] + [("retaining", k, 0)]
    attacks += [("random", k, seed + draw) for draw in range(draws)]
    for kind, rows, _ in attacks:
        attacked_rows(weights, kind, rows)  # refuse before the first long measurement
    untouched, found = _measure(model, blocks.split(batch_size), weights, attacks)
    zeroed, retained = dict(zip(ladder, found, strict=False)), found[len(ladder)]
    random = found[len(ladder) + 1 :]
    by_k = tuple((rung, Factor.of(losses, untouched, seed=seed)) for rung, losses in zeroed.items())
    factor, verdict = dict(by_k)[k], judge(untouched, zeroed[k], random, seed=seed)
    proof = Proof(
        k=k,
        seed=seed,
        blocks=len(blocks),
        tokens=blocks.shape[0] * (blocks.shape[1] - 1),
        untouched=as_perplexity(untouched),
        zeroed=as_perplexity(zeroed[k]),
        retained=as_perplexity(retained),
        random=tuple(as_perplexity(losses) for losses in random),
        verdict=verdict,
        text="",
        factor=factor,
        retained_factor=Factor.of(retained, untouched, seed=seed),
        random_factors=tuple(Factor.of(losses, untouched, seed=seed) for losses in random),
        by_k=by_k,
        key_k=key_rows(by_k),
        by_text=tuple(_by_text(kinds, zeroed[k], untouched, seed)),
    )
    return _with_text(proof, weights)


def _measure(
    model: nn.Module, batches: Sequence[torch.Tensor], weights: MassiveWeights, attacks: list[tuple[str, int, int]]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Losses (n,) of all blocks, untouched and under each attack (kind, k, seed)."""
    untouched: list[np.ndarray] = []
    found: list[list[np.ndarray]] = [[] for _ in attacks]
    with evaluating(model):
        for batch in batches:
            replay = Replay(model, batch, [weights.layer])
            require_finite(model, replay.untouched, weights.model)
            untouched.append(replay.untouched)
            for losses, (kind, k, seed) in zip(found, attacks, strict=True):
                with attacked(model, weights, kind, k, seed=seed):
                    losses.append(replay.losses(weights.layer))
    return np.concatenate(untouched), [np.concatenate(losses) for losses in found]


def require_finite(model: nn.Module, losses: np.ndarray, source: str) -> None:
    """Raise `ConfigError` unless the losses of the untouched model give a finite perplexity."""
    if not math.isfinite(as_perplexity(losses)):
        reason = not_finite(bare_model(model), source)
        raise ConfigError(f"The perplexity is not finite on this text, before any attack. {reason}")


def judge(untouched: np.ndarray, zeroed: np.ndarray, random: Sequence[np.ndarray], *, seed: int = 0) -> str:
    """The verdict on losses (n,) of blocks: untouched, with the top rows zeroed, and with each draw of random rows.

    Zeroing has to multiply perplexity by 2, and to raise the loss 10 times as much as the worst random draw (a draw
    that lowers it counts as no rise). Each of the two is a mean over blocks with an interval: *sensitive* when both
    intervals lie above their line, *not sensitive* when one lies below it, else *borderline*.
    """
    worst = max(random, key=lambda losses: _mean_rise(losses, untouched))
    if math.isinf(_mean_rise(worst, untouched)):
        return NOT_SENSITIVE  # rows drawn at random break the model as well
    rise = zeroed - untouched
    if not np.isfinite(rise).all():
        return SENSITIVE
    scale = RANDOM_MARGIN if _mean_rise(worst, untouched) > 0 else 0.0
    needed = [rise - math.log(SENSITIVE_FACTOR), rise - scale * (worst - untouched)]
    intervals = [mean_interval(excess, seed=seed) for excess in needed]
    if any(high < 0 for _, high in intervals):
        return NOT_SENSITIVE
    return SENSITIVE if all(low >= 0 for low, _ in intervals) else BORDERLINE


def _mean_rise(losses: np.ndarray, untouched: np.ndarray) -> float:
    rise = float((losses - untouched).mean())
    return math.inf if math.isnan(rise) else rise


def rungs(k: int, rows: int) -> list[int]:
    """Numbers of rows at which zeroing is measured, ascending: 1, 2, 3, 5, 10, ... up to k, and 2 k if there are as
    many rows."""
    return sorted({*(rung for rung in _LADDER if rung < k), k, *([2 * k] if 2 * k <= rows else [])})


def key_rows(by_k: Sequence[tuple[int, Factor]]) -> int | None:
    """The k that matters most: the fewest rows whose log-factor is at least 90 % of the largest of `by_k`.

    None where the interval of the largest factor does not lie above 1.
    """
    largest = max((factor for _, factor in by_k), key=lambda factor: factor.value)
    if not largest.low > 1:
        return None
    needed = KEY_SHARE * math.log(largest.value)
    return next(k for k, factor in by_k if factor.value > 0 and math.log(factor.value) >= needed)


def _by_text(kinds: Sequence[str], zeroed: np.ndarray, untouched: np.ndarray, seed: int) -> list[tuple[str, Factor]]:
    names = np.array(kinds)
    return [
        (name, Factor.of(zeroed[names == name], untouched[names == name], seed=seed)) for name in dict.fromkeys(kinds)
    ]


def _with_text(proof: Proof, weights: MassiveWeights) -> Proof:
    """Put what was found into words."""
    k, worst = proof.k, max(proof.random_factors, key=lambda factor: factor.value)
    text = (
        f"{proof.verdict}: perplexity {proof.untouched:.4g} becomes {proof.zeroed:.4g}, {proof.factor}, with the top "
        f"{k} rows of layer {weights.layer} zeroed, {proof.retained:.4g}, {proof.retained_factor}, with only these "
        f"retained, and at most x{worst.value:.4g} with {k} random rows zeroed ({len(proof.random)} draws). "
        f"{_ADVICE[proof.verdict]}"
    )
    return type(proof)(**{**vars(proof), "text": text})


def require_blocks(blocks: torch.Tensor, **counts: int) -> None:
    """Raise `ConfigError` unless blocks are token ids (n, T) and counts at least 1, `DataError` below 5 blocks."""
    if blocks.dim() != 2 or blocks.shape[0] < 1 or blocks.shape[1] < 2 or blocks.is_floating_point():
        raise ConfigError(f"blocks must be whole numbers (n, T) with n >= 1 and T >= 2, not {tuple(blocks.shape)}.")
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be a whole number of at least 1, not {value!r}.")
    if len(blocks) < MIN_BLOCKS:
        tokens = blocks.shape[1] - 1
        raise DataError(
            f"The text fills {len(blocks)} block(s) of {blocks.shape[1]} tokens, and an interval over blocks needs at "
            f"least {MIN_BLOCKS} of them.\nGive a text of {MIN_BLOCKS * tokens} tokens or more."
        )

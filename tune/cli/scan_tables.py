"""Output of `macdrop scan`: the scan, its proof, the proof of every layer, published findings, first tokens."""

from __future__ import annotations

from math import isnan
from typing import TYPE_CHECKING

from tune.cli.console import console, line, lines, table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from macdrop import MassiveWeights
    from macdrop.proof import LayerProof, Proof
    from macdrop.scan import FirstToken
    from tune.training.proving.first_tokens import FirstTokens


def weights(found: MassiveWeights, k: int) -> None:
    """Print sizes by layer, then where the massive weights are."""
    from macdrop.fingerprint import shown

    rows = table("layer", "max |hidden|", "median", "max |intermediate|", "median", "", left=("",))
    for stats in found.layers:
        mark = "<- massive weights" if stats.layer == found.layer else ""
        numbers = (stats.hidden_max, stats.hidden_median, stats.intermediate_max, stats.intermediate_median)
        rows.add_row(str(stats.layer), *(f"{number:.4g}" for number in numbers), mark)
    console.print(rows)
    expert = "" if found.expert is None else f", expert {found.expert}"
    lines(
        [
            ("model", f"{found.model} ({found.kind} FFN), fingerprint {shown(found.fingerprint)}"),
            ("bos", f"token {found.bos_token_id}, by rule {found.bos_rule!r}"),
            ("layer", f"{found.layer} ({found.path}{expert}), counted from 0"),
            (f"top {k} rows", _sized(found.top(k), found.magnitudes) or "none"),
            ("confidence", found.confidence.text),
            *quantised(found),
        ]
    )


def quantised(found: MassiveWeights) -> list[tuple[str, str]]:
    """Return, of a quantised base, a line on which rows a scan, a proof and attacks are about."""
    from macdrop.fingerprint import split_fingerprint

    _, name = split_fingerprint(found.fingerprint)
    return [("quantised", f"to {name}: scan, proof and attacks act on the dequantised rows")] if name else []


def proof(found: Proof) -> None:
    """Print perplexities under each attack with their factors, factors by text and by k, and the verdict."""
    k = found.k
    measured = [(f"top {k} zeroed", found.zeroed, found.factor)]
    measured += [(f"top {k} retained", found.retained, found.retained_factor)]
    drawn = zip(found.random, found.random_factors, strict=True)
    measured += [(f"{k} random rows zeroed, draw {n}", *each) for n, each in enumerate(drawn, 1)]
    rows = table("weights", "perplexity", "factor", "95 % over blocks", left=("weights",))
    rows.add_row("untouched", f"{found.untouched:.4g}", "1", "")
    for name, value, factor in measured:
        rows.add_row(name, f"{value:.4g}", f"{factor.value:.4g}", f"{factor.low:.4g} to {factor.high:.4g}")
    console.print(rows)
    steps = ", ".join(f"{rung}: {factor}" for rung, factor in found.by_k)
    key = (
        "no number of rows raises perplexity beyond doubt"
        if found.key_k is None
        else f"{found.key_k} matters most (the fewest rows with 90 % of the largest log-factor), asked for: {k}"
    )
    few = " (too few blocks of each for intervals)" if any(isnan(factor.low) for _, factor in found.by_text) else ""
    named = [("by text", ", ".join(f"{name} {factor}" for name, factor in found.by_text) + few)]
    named = named if len(found.by_text) > 1 else []
    lines([("blocks", f"{found.blocks}, {found.tokens} tokens"), *named, ("by k", steps), ("k", key)])
    line("verdict", found.text)


def every_layer(found: LayerProof) -> None:
    """Print the factors of every layer, and what they say of the scan's layer."""
    rows = table("layer", "its top rows", "largest", "zeroed", "retained", "", left=("its top rows", ""))
    for row in found.rows:
        marks = ["<- by the rule"] if row.layer == found.layer else []
        marks += ["largest factor"] if row.layer == found.best else []
        own = ", ".join(map(str, row.rows))
        rows.add_row(str(row.layer), own, f"{row.top:.4g}", str(row.zeroed), str(row.retained), ", ".join(marks))
    console.print(rows)
    lines(
        [
            ("measured on", f"{found.blocks} blocks, {found.tokens} tokens: {found.measured_on}"),
            ("every layer", found.text),
        ]
    )


def published(found: MassiveWeights, proved: Proof | None) -> None:
    """Print what others have published of the model, and whether the scan agrees."""
    from tune.analysis.known_scans import agreements

    for each in agreements(found.to_dict(), proved.verdict if proved else None):
        line("published", each.text)


def first_tokens(
    counted: FirstTokens,
    measured: list[FirstToken],
    found: MassiveWeights,
    k: int,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Print how the user's data begins, and which rows these tokens call."""
    from macdrop.scan import common_rows

    rows = table("first token", "", "examples", "layer", "rows", "of the scan's", left=("", "rows"))
    for each in measured:
        text = repr(tokenizer.decode([each.token]))
        share = f"{100 * counted.share(each.token):.1f} %"
        shared = f"{each.shared(found, k)} of {k}"
        rows.add_row(str(each.token), text, share, str(each.layer), _sized(each.rows, each.sizes), shared)
    console.print(rows)
    bos, begins = found.bos_token_id, counted.share(found.bos_token_id)
    line(
        "data",
        f"{100 * begins:.3g} % of {counted.examples} examples (template {counted.template}) begin with token {bos}, "
        "the scanned one",
    )
    lead = "nothing" if counted.lead is None else f"token {counted.lead}"
    line("plain text", f"the tokenizer puts {lead} before it; in zero-shot tasks eval.add_bos_token decides")
    same = common_rows(found, measured, k)
    top = ", ".join(map(str, found.top(same)))
    line(
        "rows",
        f"all {len(measured)} tokens call the scan's first {same} row(s) first: {top}"
        if same
        else "these tokens do not all have the scan's top rows on top: see the table; scan one by --bos-token-id",
    )


def _sized(rows: tuple[int, ...], sizes: tuple[float, ...]) -> str:
    return ", ".join(f"{row} ({size:.4g})" for row, size in zip(rows, sizes, strict=False))

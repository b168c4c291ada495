"""`macdrop scan`: the massive weights of a model, and with --prove whether it depends on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from macdrop.errors import ConfigError
from tune.cli.console import console, line, lines, table
from tune.cli.options import Bf16, Bos, Model, Revision, Text, Trust, check_output
from tune.cli.source import Source

if TYPE_CHECKING:
    from macdrop import MassiveWeights
    from macdrop.proof import Proof

#: Attacks of a proof.
PROVED = ("zeroing", "retaining", "random")

app = typer.Typer()


@app.command(epilog="Example: macdrop scan meta-llama/Llama-3.2-1B --prove --text wiki.txt")
def scan(
    model: Model,
    prove: Annotated[bool, typer.Option("--prove", help="Zero, retain and compare with random rows on text.")] = False,
    k: Annotated[int, typer.Option(min=0, help="Rows to list and to use in the proof.")] = 5,
    text: Text = None,
    output: Annotated[Path | None, typer.Option(help="Also write the massive weights to this JSON file.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Scan again even if this checkpoint was scanned.")] = False,
    bos_token_id: Bos = None,
    revision: Revision = None,
    bf16: Bf16 = False,
    trust_remote_code: Trust = False,
) -> None:
    """Find a model's massive weights: layer, rows, confidence; with --prove, whether the model depends on them."""
    from tune.storage.atomic import writing
    from tune.training.massive_weights import massive_weights, proof, proof_text

    check_output(output)
    source = Source(model, revision, bf16, trust_remote_code, bos_token_id)
    if text is not None and not prove:
        raise ConfigError("--text is for the proof. Add --prove, or leave --text out.")
    if prove:
        proof_text(text, source.model)
        if k < 1:
            raise ConfigError(
                "--k is 0, and without rows there is nothing to prove. Give at least 1; the paper uses 5."
            )
    source.check(ks=[k], name="--k", kinds=PROVED if prove else ())
    loaded, tokenizer = source.load()
    weights = massive_weights(source.spec(), loaded, tokenizer, bos_token_id=bos_token_id, fresh=fresh)
    _show_weights(weights, k)
    if prove:
        with console.status("Measuring perplexity"):
            found = proof(loaded, tokenizer, weights, k=k, text=text, source=source.model)
        _show_proof(found, k)
    if output is not None:
        with writing(output):
            weights.save(output)
        line("written", str(output))


def _show_weights(weights: MassiveWeights, k: int) -> None:
    from macdrop.fingerprint import SHOWN

    rows = table("layer", "max |hidden|", "median", "max |intermediate|", "median", "", left=("",))
    for stats in weights.layers:
        mark = "<- massive weights" if stats.layer == weights.layer else ""
        numbers = (stats.hidden_max, stats.hidden_median, stats.intermediate_max, stats.intermediate_median)
        rows.add_row(str(stats.layer), *(f"{number:.4g}" for number in numbers), mark)
    console.print(rows)
    expert = "" if weights.expert is None else f", expert {weights.expert}"
    top = zip(weights.top(k), weights.magnitudes, strict=False)
    lines(
        [
            ("model", f"{weights.model} ({weights.kind} FFN), fingerprint {weights.fingerprint[:SHOWN]}"),
            ("bos", f"token {weights.bos_token_id}, by rule {weights.bos_rule!r}"),
            ("layer", f"{weights.layer} ({weights.path}{expert}), counted from 0"),
            (f"top {k} rows", ", ".join(f"{row} ({size:.4g})" for row, size in top) or "none"),
            ("confidence", weights.confidence.text),
        ]
    )


def _show_proof(found: Proof, k: int) -> None:
    measured = [
        ("untouched", found.untouched),
        (f"top {k} zeroed", found.zeroed),
        (f"top {k} retained", found.retained),
    ]
    measured += [(f"{k} random rows zeroed, draw {n}", value) for n, value in enumerate(found.random, 1)]
    rows = table("weights", "perplexity", "ratio", left=("weights",))
    for name, value in measured:
        rows.add_row(name, f"{value:.4g}", f"{value / found.untouched:.4g}")
    console.print(rows)
    line("verdict", found.text)

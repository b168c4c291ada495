"""`macdrop attack`: perplexity of a model without its massive weights, or with them alone."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated

import typer

from macdrop.errors import ConfigError
from tune.cli.console import console, line, table
from tune.cli.options import Adapter, Bf16, Bos, Model, Revision, Text, Trust
from tune.cli.source import Source, check_adapter

#: Rows to zero or retain unless --k is given.
KS = (1, 3, 5, 10)
KINDS = ("zeroing", "retaining", "random")

app = typer.Typer()


@app.command(epilog="Example: macdrop attack zoo:planted-llama --k 1 --k 3 --k 5")
def attack(
    model: Model,
    k: Annotated[list[int] | None, typer.Option(min=0, help="Rows to zero or retain; may repeat.")] = None,
    adapter: Adapter = None,
    merged: Annotated[bool, typer.Option("--merged", help="Merge the adapter before the attack.")] = False,
    text: Text = None,
    bos_token_id: Bos = None,
    revision: Revision = None,
    bf16: Bf16 = False,
    trust_remote_code: Trust = False,
) -> None:
    """Measure perplexity with the top-k massive weights zeroed or alone retained, and with random rows zeroed."""
    from macdrop import attacked
    from macdrop.attack import attacked_rows
    from macdrop.proof import perplexity
    from tune.evaluation.adapters import AdapterSlot
    from tune.evaluation.merging import merged_weights
    from tune.training.massive_weights import massive_weights, proof_blocks, proof_text

    source, ks = Source(model, revision, bf16, trust_remote_code, bos_token_id), k or list(KS)
    if merged and adapter is None:
        raise ConfigError("--merged needs --adapter: without an adapter there is nothing to merge.")
    check_adapter(adapter)
    proof_text(text, source.model)
    source.check(ks=ks, name="--k", kinds=KINDS)
    loaded, tokenizer = source.load()
    weights = massive_weights(source.spec(), loaded, tokenizer, bos_token_id=bos_token_id)
    for count in ks:
        for kind in KINDS:
            attacked_rows(weights, kind, count)  # the massive layer may have fewer rows than others
    blocks = proof_blocks(loaded, tokenizer, weights.bos_token_id, text=text, source=source.model)
    rows = table("k", "zeroing", "ratio", "retaining", "ratio", "random rows", "ratio")
    slot = AdapterSlot(loaded)
    with (
        console.status("Measuring perplexity"),
        slot.adapter(adapter) as scored,
        merged_weights(scored) if merged else nullcontext(),
    ):
        untouched = perplexity(scored, blocks)
        for count in ks:
            cells = []
            for kind in KINDS:
                with attacked(scored, weights, kind, count):
                    value = perplexity(scored, blocks)
                cells += [f"{value:.4g}", f"{value / untouched:.4g}"]
            rows.add_row(str(count), *cells)
    for note in slot.notes:
        line("note", note)
    where = "merged weights" if merged else "base rows, adapter in place" if adapter else "base rows"
    line("attack on", f"{where}, layer {weights.layer} of {source.model}")
    line("untouched", f"perplexity {untouched:.4g} on {blocks.numel()} tokens")
    console.print(rows)

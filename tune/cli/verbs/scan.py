"""`macdrop scan`: the massive weights of a model, and with --prove whether it depends on them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from macdrop.errors import ConfigError
from tune.cli import scan_tables as show
from tune.cli.console import console, line
from tune.cli.options import Bf16, Bos, Model, Quantised, Revision, Text, Trust, check_output
from tune.cli.source import Source

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from macdrop import MassiveWeights
    from tune.config.run_spec import TrainSpec

#: Attacks of a proof.
PROVED = ("zeroing", "retaining", "random")
#: First tokens of the data whose rows are measured.
TOKENS = 5
FIGURES = (".png", ".svg", ".pdf")

app = typer.Typer()


@app.command(
    epilog="Examples: macdrop scan meta-llama/Llama-3.2-1B --prove --every-layer --figure layers.png. "
    "macdrop scan meta-llama/Llama-3.2-1B --data alpaca.json"
)
def scan(
    model: Model,
    prove: Annotated[bool, typer.Option("--prove", help="Zero, retain and compare with random rows on text.")] = False,
    k: Annotated[int, typer.Option(min=0, help="Rows to list and to use in the proof.")] = 5,
    text: Text = None,
    every_layer: Annotated[
        bool, typer.Option("--every-layer", help="With --prove: zero and retain the top rows of every layer, too.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="With --every-layer: run even if it takes more than ten minutes.")
    ] = False,
    figure: Annotated[
        Path | None, typer.Option(help="With --every-layer: draw its factors to this .png, .svg or .pdf.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Training data, as `dataset`: which tokens it begins with, and their rows.")
    ] = None,
    template: Annotated[str, typer.Option(help="With --data: auto, alpaca or chat.")] = "auto",
    output: Annotated[Path | None, typer.Option(help="Also write the massive weights to this JSON file.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Scan again even if this checkpoint was scanned.")] = False,
    bos_token_id: Bos = None,
    revision: Revision = None,
    bf16: Bf16 = False,
    quantization_bit: Quantised = None,
    trust_remote_code: Trust = False,
) -> None:
    """Find a model's massive weights: layer, rows, confidence; with --prove, whether the model depends on them."""
    from tune.storage.atomic import writing
    from tune.training.massive_weights import check_text, massive_weights

    check_output(output)
    _check_options(prove, k, text, every_layer, yes, figure, data, template)
    source = Source(model, revision, bf16, trust_remote_code, bos_token_id, quantization_bit)
    source.check(ks=[k], name="--k", kinds=PROVED if prove else ())
    spec = source.spec()
    if prove:
        check_text(spec, text, bos_token_id)
    loaded, tokenizer = source.load()
    weights = massive_weights(spec, loaded, tokenizer, bos_token_id=bos_token_id, fresh=fresh)
    show.weights(weights, k)
    if output is not None:
        with writing(output):
            weights.save(output)
        line("written", str(output))
    if data is not None:
        _first_tokens(spec, loaded, tokenizer, weights, k, data, template)
    if prove:
        layers = Layers(yes, figure) if every_layer else None
        _prove(spec, loaded, tokenizer, weights, k, text, layers)
    else:
        show.published(weights, None)


@dataclass(frozen=True)
class Layers:
    """A proof of every layer that was asked for."""

    agreed: bool
    figure: Path | None


def _check_options(
    prove: bool,
    k: int,
    text: Path | None,
    every_layer: bool,
    yes: bool,
    figure: Path | None,
    data: str | None,
    template: str,
) -> None:
    """Refuse options that would have no effect, and what cannot be written."""
    from tune.config.train.data_keys import TEMPLATES, is_template_file

    if text is not None and not prove:
        raise ConfigError("--text is for the proof. Add --prove, or leave --text out.")
    if every_layer and not prove:
        raise ConfigError("--every-layer is a proof of every layer. Add --prove, or leave --every-layer out.")
    if figure is not None and not every_layer:
        raise ConfigError("--figure draws the proof of every layer. Add --prove --every-layer, or leave --figure out.")
    if yes and not every_layer:
        raise ConfigError("--yes agrees to a long proof of every layer. Add --prove --every-layer, or leave it out.")
    if template != "auto" and data is None:
        raise ConfigError("--template says how --data is laid out. Add --data, or leave --template out.")
    if template not in TEMPLATES and not is_template_file(template):
        raise ConfigError(f"--template {template!r} is unknown. Allowed: {', '.join(TEMPLATES)}, or a FILE.jinja.")
    if figure is not None and figure.suffix.lower() not in FIGURES:
        raise ConfigError(f"--figure {figure} has no ending that says what to draw. Allowed: {', '.join(FIGURES)}.")
    check_output(figure, name="--figure")
    if k < 1 and (prove or data is not None):
        what = "nothing to prove" if prove else "nothing to compare"
        raise ConfigError(f"--k is 0, and without rows there is {what}. Give at least 1; the paper uses 5.")


def _prove(
    spec: TrainSpec,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: MassiveWeights,
    k: int,
    text: Path | None,
    layers: Layers | None,
) -> None:
    from tune.training.massive_weights import proof, proof_blocks
    from tune.training.proving.layer_proofs import check_duration

    source = spec.model_name_or_path
    blocks = proof_blocks(model, tokenizer, weights.bos_token_id, text=text, source=source)
    if layers is not None and not layers.agreed:
        with console.status("Timing a pass"):
            check_duration(model, blocks, len(weights.layers))
    with console.status("Measuring perplexity"):
        found = proof(model, tokenizer, weights, k=k, text=text, source=source)
    show.proof(found)
    show.published(weights, found)
    if layers is not None:
        _every_layer(spec, model, blocks, weights, k, text, layers.figure)


def _every_layer(
    spec: TrainSpec,
    model: PreTrainedModel,
    blocks: Tensor,
    weights: MassiveWeights,
    k: int,
    text: Path | None,
    figure: Path | None,
) -> None:
    from tune.report.html.drawing import save
    from tune.report.html.every_layer import HEIGHT, layers_painter
    from tune.training.massive_weights import text_name
    from tune.training.proving.layer_proofs import every_layer, layers_file

    on = text_name(text, spec.model_name_or_path)
    with console.status("Proving every layer") as status:

        def progress(done: int, of: int) -> None:
            status.update(f"Proving every layer: {done} of {of} passes")

        found = every_layer(spec, model, blocks, weights, k=k, measured_on=on, progress=progress)
    show.every_layer(found)
    line("kept", f"{layers_file(spec, weights)}; reports of new sweeps of this checkpoint show it")
    if figure is not None:
        save(figure, HEIGHT, layers_painter(found.to_dict()))
        line("drawn", str(figure))


def _first_tokens(
    spec: TrainSpec,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: MassiveWeights,
    k: int,
    data: str,
    template: str,
) -> None:
    from macdrop.scan import first_token_rows
    from tune.config.train_spec import with_values
    from tune.training.proving.first_tokens import first_tokens

    with console.status("Tokenising the data"):
        counted = first_tokens(with_values(spec, {"dataset": data, "template": template}), tokenizer)
    tokens = [token for token, _ in counted.counts[:TOKENS]]
    show.first_tokens(counted, first_token_rows(model, weights, tokens, k=k), weights, k, tokenizer)

"""What `macdrop scan` and `macdrop attack` do: massive weights of one model, and its perplexity without them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from macdrop.errors import ConfigError
from tune.cli.console import console, line, lines, table
from tune.training.quiet import quiet_libraries


@dataclass(frozen=True)
class Source:
    """A model as the command line names it."""

    model: str
    revision: str | None
    bf16: bool
    trust_remote_code: bool
    bos_token_id: int | None = None

    def spec(self) -> Any:
        """The same as the model part of a fine-tuning's spec."""
        from tune.config.run_spec import TrainSpec

        return TrainSpec(
            model_name_or_path=self.model,
            model_revision=self.revision,
            bf16=self.bf16,
            trust_remote_code=self.trust_remote_code,
        )

    def check(self, *, ks: list[int], name: str) -> None:
        """Refuse a model that cannot be used, and k above its rows, before any weight is read."""
        from tune.preflight.inputs import check_rows, model_outline

        quiet_libraries()
        spec = self.spec()
        check_rows(model_outline(spec), spec, ks=ks, name=name)

    def load(self) -> tuple[Any, Any]:
        """Model, in evaluation mode and on the accelerator if there is one, and tokenizer."""
        import torch

        from macdrop import load_model, load_tokenizer
        from tune.zoo.catalog import resolve

        quiet_libraries()
        source = resolve(self.model)
        loading: dict[str, Any] = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        with console.status(f"Loading {self.model}"):
            model = load_model(source, dtype="bfloat16" if self.bf16 else "float32", **loading)
            tokenizer = load_tokenizer(source, model=model, **loading)
        return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def scan(source: Source, *, prove: bool, k: int, text: Path | None, output: Path | None, fresh: bool) -> None:
    from tune.training.massive_weights import massive_weights, proof_text

    if text is not None and not prove:
        raise ConfigError("--text is for the proof. Add --prove, or leave --text out.")
    if prove:
        proof_text(text, source.model)
    source.check(ks=[k], name="--k")
    model, tokenizer = source.load()
    weights = massive_weights(source.spec(), model, tokenizer, bos_token_id=source.bos_token_id, fresh=fresh)
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
            ("model", f"{weights.model} ({weights.kind} FFN), fingerprint {weights.fingerprint[:12]}"),
            ("bos", f"token {weights.bos_token_id}, by rule {weights.bos_rule!r}"),
            ("layer", f"{weights.layer} ({weights.path}{expert}), counted from 0"),
            (f"top {k} rows", ", ".join(f"{row} ({size:.4g})" for row, size in top) or "none"),
            ("confidence", weights.confidence.text),
        ]
    )
    if prove:
        _show_proof(source, model, tokenizer, weights, k, text)
    if output is not None:
        weights.save(output)
        line("written", str(output))


def _show_proof(source: Source, model: Any, tokenizer: Any, weights: Any, k: int, text: Path | None) -> None:
    from tune.training.massive_weights import proof

    with console.status("Measuring perplexity"):
        found = proof(model, tokenizer, weights, k=k, text=text, source=source.model)
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


def attack(source: Source, *, ks: list[int], adapter: Path | None, merged: bool, text: Path | None) -> None:
    from macdrop import attacked
    from macdrop.proof import perplexity
    from tune.evaluation.adapters import AdapterSlot, merged_weights
    from tune.training.massive_weights import massive_weights, proof_blocks, proof_text

    if merged and adapter is None:
        raise ConfigError("--merged needs --adapter: without an adapter there is nothing to merge.")
    check_adapter(adapter)
    proof_text(text, source.model)
    source.check(ks=ks, name="--k")
    model, tokenizer = source.load()
    weights = massive_weights(source.spec(), model, tokenizer, bos_token_id=source.bos_token_id)
    blocks = proof_blocks(model, tokenizer, weights.bos_token_id, text=text, source=source.model)
    rows = table("k", "zeroing", "ratio", "retaining", "ratio", "random rows", "ratio")
    with (
        console.status("Measuring perplexity"),
        AdapterSlot(model).adapter(adapter) as scored,
        merged_weights(scored) if merged else nullcontext(),
    ):
        untouched = perplexity(scored, blocks)
        for k in ks:
            cells = []
            for kind in ("zeroing", "retaining", "random"):
                with attacked(scored, weights, kind, k):
                    value = perplexity(scored, blocks)
                cells += [f"{value:.4g}", f"{value / untouched:.4g}"]
            rows.add_row(str(k), *cells)
    where = "merged weights" if merged else "base rows, adapter in place" if adapter else "base rows"
    line("attack on", f"{where}, layer {weights.layer} of {source.model}")
    line("untouched", f"perplexity {untouched:.4g} on {blocks.numel()} tokens")
    console.print(rows)


def check_adapter(adapter: Path | None) -> None:
    """Refuse a folder that holds no PEFT adapter, before the base is loaded."""
    if adapter is None or (adapter / "adapter_config.json").is_file():
        return
    what = "holds no adapter_config.json" if adapter.is_dir() else "is no folder"
    raise ConfigError(f"--adapter {adapter} {what}. Give the folder of a PEFT adapter, for example runs/one/adapter.")

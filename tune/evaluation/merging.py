"""An adapter merged into its base, and the check that the merged weights answer as both did.

The merged weights are read back from the disk for the check: what is checked is what others will load.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from macdrop.load import load_model
from macdrop.scan import choose_bos
from tune.config.run_spec import TrainSpec
from tune.training.loading import open_base
from tune.training.massive_weights import proof_blocks

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel

#: Positions of real text that a logit check looks at, at most.
CHECKED = 512
#: dtype -> (largest |difference| of a logit, as a share of the largest |logit|; least share of equal first choices).
#: Merging rounds each weight once: in bf16 by up to 2^-9 of it, and massive activations carry that on.
LIMITS = {"float32": (1e-4, 0.999), "bfloat16": (0.05, 0.95)}


@dataclass(frozen=True)
class LogitCheck:
    """Logits of base and adapter against those of the merged weights as read back from the disk."""

    difference: float  # largest |difference|
    largest: float  # largest |logit| of base and adapter
    agreement: float  # share of positions with the same first choice
    positions: int
    dtype: str

    @property
    def ok(self) -> bool:
        share, agreement = LIMITS[self.dtype]
        return self.difference <= share * self.largest and self.agreement >= agreement

    @property
    def text(self) -> str:
        share, agreement = LIMITS[self.dtype]
        return (
            f"largest |difference| {self.difference:.3g} (limit {share * self.largest:.3g}: {share:g} of the largest "
            f"|logit| {self.largest:.3g}), same first choice at {self.agreement:.2%} of {self.positions} positions "
            f"(limit {agreement:.1%}), {self.dtype}"
        )


def write_merged(spec: TrainSpec, adapter: Path, folder: Path) -> LogitCheck:
    """Write weights, tokenizer and configuration of the merged model into `folder`, and check them."""
    from peft import PeftModel

    base, tokenizer = open_base(spec)
    bos, _ = choose_bos(tokenizer, base.config)
    blocks: torch.Tensor = proof_blocks(base, tokenizer, bos, text=None, source=spec.model_name_or_path)
    blocks = blocks[: max(1, CHECKED // blocks.shape[1])]
    model = PeftModel.from_pretrained(base, adapter).eval()
    before = _logits(model, blocks)
    whole = model.merge_and_unload(safe_merge=True)
    whole.config.use_cache = True
    whole.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model, base, whole  # two of them may not fit
    dtype = "bfloat16" if spec.bf16 else "float32"
    again = load_model(
        folder,
        dtype=dtype,
        attn_implementation=spec.attn_implementation,
        trust_remote_code=spec.trust_remote_code,
    )
    after = _logits(again.eval(), blocks)
    return LogitCheck(
        difference=float((after - before).abs().max()),
        largest=float(before.abs().max()),
        agreement=float((after.argmax(-1) == before.argmax(-1)).float().mean()),
        positions=before.shape[0] * before.shape[1],
        dtype=dtype,
    )


def _logits(model: PreTrainedModel | PeftModel, blocks: torch.Tensor) -> torch.Tensor:
    """Return logits (n, T, vocabulary), fp32 on the CPU."""
    import torch

    with torch.no_grad():
        rows = [model(input_ids=block[None].to(model.device), use_cache=False).logits for block in blocks]
    return torch.cat(rows).float().cpu()

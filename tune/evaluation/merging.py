"""An adapter merged into its base, for a while or for good, and the checks that the merged weights answer as both did.

Input and output embeddings may be one tensor: where an adapter covers one of them only, merging parts them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from macdrop.errors import ConfigError
from macdrop.load import load_model
from macdrop.quantised import dequantise, is_quantised
from macdrop.scan import choose_bos
from tune.config.run_spec import TrainSpec
from tune.errors import BenchmarkError
from tune.training.loading import open_base
from tune.training.massive_weights import proof_blocks

if TYPE_CHECKING:
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import PreTrainedModel

#: Positions of the short probe, and of real text that a logit check looks at, at most.
PROBED, CHECKED = 16, 512
#: dtype -> (largest |difference| of a logit, as a share of the largest |logit|; least share of equal first choices).
#: Merging rounds each weight once: in bf16 by up to 2^-9 of it, and massive activations carry that on.
LIMITS = {"float32": (1e-4, 0.999), "bfloat16": (0.05, 0.95)}
#: Bytes of a weight -> the same for the short probe, whose random tokens have logits of any size: at the median
#: position, as a router may send a token of another to another expert.
PROBE_LIMITS = {4: 1e-3, 2: 0.1}


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


def probe_logits(model: PreTrainedModel | PeftModel, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Return logits (1, T, vocabulary), fp32, in eval mode; by default of 16 ids spread over the vocabulary."""
    if ids is None:
        vocabulary = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
        ids = torch.tensor([[(vocabulary * i) // PROBED for i in range(PROBED)]], device=model.device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits.float()
    finally:
        model.train(training)


@contextmanager
def merged_weights(model: PreTrainedModel | PeftModel) -> Iterator[int]:
    """Merge the active adapter of a PEFT model into its base weights for the `with` block; yield the number of layers.

    A bare model is left as it is (0 layers). PEFT's own unmerge subtracts, which is not exact in floating point; here
    the merge writes to copies, so that the base's own tensors come back untouched. Meanwhile that takes the memory of a
    second copy of the adapted weights. Outside of any attack the merged model answers as the unmerged one does, which
    is checked on a short probe.

    Raises:
        ConfigError: the base layers are quantised, so a merge would be a different model.
        BenchmarkError: the merged model answers otherwise.
    """
    layers = [layer for layer in _adapted(model) if not layer.merged]
    before = probe_logits(model) if layers else None
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    done = []
    try:
        for layer in layers:
            kept += _own(layer.get_base_layer())
            layer.merge()
            done.append(layer)
        if before is not None:
            _check_probe(before, probe_logits(model), kept[0][2].dtype)
        yield len(done)
    finally:
        for layer in reversed(done):
            layer.unmerge()
        for module, name, parameter in reversed(kept):  # a layer wrapped twice was kept twice
            module._parameters[name] = parameter


def _adapted(model: nn.Module) -> list[BaseTunerLayer]:
    """List the layers with an active adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [m for m in model.modules() if isinstance(m, BaseTunerLayer) and getattr(m, "active_adapters", None)]


def _own(layer: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Give a layer copies of its parameters, which no other layer shares; return what it had.

    Raises:
        ConfigError: they are quantised.
    """
    had = [(layer, name, parameter) for name, parameter in layer.named_parameters(recurse=False)]
    for _, name, parameter in had:
        if is_quantised(parameter) or not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
            raise ConfigError("attack_on: merged needs base weights that are not quantised; use base.")
        layer._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
    return had


def _check_probe(before: torch.Tensor, after: torch.Tensor, dtype: torch.dtype) -> None:
    difference = (after - before).abs().amax(-1).median().item()
    limit = PROBE_LIMITS[dtype.itemsize] * before.abs().max().item()
    if not difference <= limit:
        raise BenchmarkError(
            f"The merged weights do not answer as base and adapter do without any attack: their logits differ by "
            f"{difference:.3g} at the median position of a short probe (limit {limit:.3g}). Attack the base rows "
            "(attack_on: base) instead."
        )


def write_merged(spec: TrainSpec, adapter: Path, folder: Path) -> LogitCheck:
    """Write weights, tokenizer and configuration of the merged model into `folder`, and check them.

    A base that is quantised is dequantised first: it is merged, and compared, in the precision that it is trained in.

    Raises:
        BenchmarkError: the merged weights, read back, do not answer as base and adapter do.
    """
    from peft import PeftModel

    base, tokenizer = open_base(spec)
    dequantise(base)
    bos, _ = choose_bos(tokenizer, base.config)
    blocks: torch.Tensor = proof_blocks(base, tokenizer, bos, text=None, source=spec.model_name_or_path)
    blocks = blocks[: max(1, CHECKED // blocks.shape[1])]
    model = PeftModel.from_pretrained(base, adapter).eval()
    before = _logits(model, blocks)
    parted = _part_tied(model)
    whole = model.merge_and_unload(safe_merge=True)
    whole.config.use_cache = True
    if parted:
        whole.config.tie_word_embeddings = whole.config.get_text_config().tie_word_embeddings = False
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
    check = LogitCheck(
        difference=float((after - before).abs().max()),
        largest=float(before.abs().max()),
        agreement=float((after.argmax(-1) == before.argmax(-1)).float().mean()),
        positions=before.shape[0] * before.shape[1],
        dtype=dtype,
    )
    if not check.ok:
        raise BenchmarkError(
            f"The merged weights do not answer as base and adapter do: {check.text}.\nNothing was written. Export the "
            "adapter instead (no --merged)."
        )
    return check


def _part_tied(model: PeftModel) -> bool:
    """Give each adapted layer that shares a parameter its own copy; return whether any does."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    bases = [layer.get_base_layer() for layer in _adapted(model)]
    shared = [base for base in bases if any(uses[id(p)] > 1 for p in base.parameters(recurse=False))]
    for base in shared:
        _own(base)
    return bool(shared)


def _logits(model: PreTrainedModel | PeftModel, blocks: torch.Tensor) -> torch.Tensor:
    """Return logits (n, T, vocabulary), fp32 on the CPU."""
    with torch.no_grad():
        rows = [model(input_ids=block[None].to(model.device), use_cache=False).logits for block in blocks]
    return torch.cat(rows).float().cpu()

"""Adapters swapped in and out of a resident base model, or merged into it temporarily, without a trace.

The base's own parameter tensors are never written: an adapter wraps the layers, a merge works on copies.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open

from macdrop.errors import ConfigError
from tune.errors import CheckpointError
from tune.storage.sealed_folder import MANIFEST, verify
from tune.training.checkpoint import ADAPTER

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

PROBE_LENGTH = 16
#: Keys of adapter_config.json with which PEFT would write to the base, replace parts of it or import modules they name
#: -> the values with which it does not.
HARMLESS: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "init_lora_weights": (True, False, None),
    "modules_to_save": (None,),
    "trainable_token_indices": (None,),
    "layer_replication": (None,),
    "megatron_config": (None,),
}


class AdapterSlot:
    """A resident base model that takes one adapter at a time.

    `with slot.adapter(folder) as model:` gives the base with the PEFT adapter of `folder` in place, in eval mode;
    afterwards the base is bare again, its parameters bit-identical. `folder` None gives the base itself. Meanwhile
    `slot.delta` is the largest |change of a logit| that the adapter makes on a short probe: at 0.0 it does nothing.

    Args:
        base: a bare causal language model.
        probe: token ids for the check; by default 16 ids spread over the vocabulary.
        autocast_adapter_dtype: PEFT's option: 16-bit adapters are held in fp32, as by default in PEFT.
        sealed: require a manifest, as `training.checkpoint` writes it; an existing one is always checked.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        *,
        probe: Sequence[int] | None = None,
        autocast_adapter_dtype: bool = True,
        sealed: bool = False,
    ) -> None:
        self.base, self._sealed = base, sealed
        self.delta: float | None = None
        self._autocast = autocast_adapter_dtype
        vocabulary = cast(torch.nn.Embedding, base.get_input_embeddings()).num_embeddings
        ids = probe or [(vocabulary * i) // PROBE_LENGTH for i in range(PROBE_LENGTH)]
        self._probe = torch.tensor([list(ids)], device=base.device)
        self._plain: torch.Tensor | None = None

    @contextmanager
    def adapter(self, folder: str | Path | None) -> Iterator[PreTrainedModel | PeftModel]:
        """Put the adapter of `folder` in place for the `with` block.

        Raises:
            ConfigError: `folder` holds no PEFT adapter, or one that would change the base.
            CheckpointError: the adapter is damaged, or does not fit this model.
        """
        if folder is None:
            self.delta = 0.0
            yield self.base
            return
        if self._plain is None:
            self._plain = self._logits(self.base)
        frozen = {name: p.requires_grad for name, p in self.base.named_parameters()}
        training = self.base.training
        model = None
        try:
            model = self._load(Path(folder))
            self.delta = (self._logits(model) - self._plain).abs().max().item()
            yield model
        finally:
            if model is not None:
                model.unload()
            if hasattr(self.base, "peft_config"):
                del self.base.peft_config
            for name, p in self.base.named_parameters():
                p.requires_grad_(frozen[name])
            self.base.train(training)

    def _load(self, folder: Path) -> PeftModel:
        from peft import PeftModel, get_peft_model_state_dict

        _check_folder(folder, self._sealed)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                # low_cpu_mem_usage: no random initialisation, and fp32 values are not rounded to a 16-bit base
                model = PeftModel.from_pretrained(
                    self.base,
                    str(folder),
                    is_trainable=False,
                    autocast_adapter_dtype=self._autocast,
                    low_cpu_mem_usage=True,
                    torch_device=str(self.base.device),
                )
        except Exception as error:  # PEFT raises anything, and the base must be bare again
            self._unwrap()
            raise CheckpointError(f"The adapter in {folder} does not fit this model: {str(error)[:400]}") from error
        missing = [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]
        if not missing:
            # PEFT does not report tensors that it has no layer for.
            left = sorted(_names(folder / ADAPTER) - set(get_peft_model_state_dict(model, save_embedding_layers=False)))
            missing = [f"there is no layer for {', '.join(left)}"] if left else []
        if missing:
            model.unload()
            raise CheckpointError(f"The adapter in {folder} does not fit this model: {missing[0][:400]}")
        return model.eval()

    def _unwrap(self) -> None:
        """Unwrap the layers of the base that a failed load left wrapped."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        for name, module in list(self.base.named_modules()):
            if isinstance(module, BaseTunerLayer):
                parent, _, child = name.rpartition(".")
                setattr(self.base.get_submodule(parent), child, module.get_base_layer())

    @torch.no_grad()
    def _logits(self, model: PreTrainedModel | PeftModel) -> torch.Tensor:
        training = model.training
        model.eval()
        try:
            return model(input_ids=self._probe, use_cache=False).logits.float()
        finally:
            model.train(training)


def _check_folder(folder: Path, sealed: bool) -> None:
    """Refuse a folder that is not an adapter, is damaged, or could only be loaded by code or by writing to the base."""
    config, weights = folder / "adapter_config.json", folder / ADAPTER
    if not config.is_file():
        raise ConfigError(f"{folder} holds no adapter: there is no adapter_config.json in it.")
    if not weights.is_file():
        pickled = (
            " Its adapter_model.bin is a pickle, which can run code when read: if you trust it, load it with PEFT "
            "and save it again with safe_serialization=True."
        )
        hint = pickled if (folder / "adapter_model.bin").is_file() else ""
        raise CheckpointError(f"{folder} holds no adapter weights: {ADAPTER} is missing.{hint}")
    if sealed or (folder / MANIFEST).is_file():
        verify(folder)
    try:
        settings = json.loads(config.read_text(encoding="utf-8"))
        _check_safetensors(weights)
    except (ValueError, OSError, SafetensorError) as error:
        raise CheckpointError(f"The adapter in {folder} is damaged: {error}") from None
    if not isinstance(settings, dict):
        raise CheckpointError(f"The adapter in {folder} is damaged: adapter_config.json is not a mapping.")
    given = {key: settings.get(key) for key in HARMLESS}
    wrong = [f"{key} {value!r}" for key, value in given.items() if value not in HARMLESS[key]]
    if settings.get("peft_type") != "LORA" or wrong:
        found = ", ".join([f"peft_type {settings.get('peft_type')!r}", *wrong])
        raise ConfigError(
            f"The adapter in {folder} has {found}; only LORA (with DoRA and rsLoRA) that adds to linear layers and was "
            "not initialised from the base leaves the resident base as it is."
        )


def _names(file: Path) -> set[str]:
    with safe_open(file, framework="pt") as tensors:
        return set(tensors.keys())


def _check_safetensors(file: Path) -> None:
    """Raise a ValueError unless every tensor can be read and is finite."""
    names = _names(file)
    with safe_open(file, framework="pt") as tensors:
        for name in sorted(names):
            if not tensors.get_tensor(name).isfinite().all():
                raise ValueError(f"{name} in {file.name} holds values that are not finite.")


@contextmanager
def merged_weights(model: PreTrainedModel | PeftModel) -> Iterator[int]:
    """Merge the active adapter of a PEFT model into its base weights for the `with` block; yield the number of layers.

    A bare model is left as it is (0 layers). PEFT's own unmerge subtracts, which is not exact in floating point; here
    the merge writes to copies, so that the base's own tensors come back untouched. Meanwhile that takes the memory of a
    second copy of the adapted weights.

    Raises:
        ConfigError: the base layers are quantised, so a merge would be a different model.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and getattr(m, "active_adapters", None)]
    layers = [layer for layer in layers if not layer.merged]
    kept: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
    done = []
    try:
        for layer in layers:
            for parameter in layer.get_base_layer().parameters(recurse=False):
                if not parameter.is_floating_point():
                    raise ConfigError("attack_on: merged needs base weights that are not quantised; use base.")
                kept.append((parameter, parameter.data))
                parameter.data = parameter.data.clone()
            layer.merge()
            done.append(layer)
        yield len(done)
    finally:
        for layer in reversed(done):
            layer.unmerge()
        for parameter, data in reversed(kept):  # a layer wrapped twice was kept twice
            parameter.data = data

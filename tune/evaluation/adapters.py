"""Adapters swapped in and out of a resident base model, without a trace.

The base's own parameter tensors are never written: an adapter wraps the layers, and where its file holds weights of the
base itself (embeddings, biases), they stand in for the base's until it is taken out. An adapter of another tool is
scored as plain PEFT scores it, or refused.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from macdrop.errors import ConfigError
from macdrop.quantised import is_quantised
from tune.config.train.model_keys import slug
from tune.errors import CheckpointError
from tune.evaluation.merging import probe_logits
from tune.storage.sealed_folder import MANIFEST, verify
from tune.training.checkpoint import ADAPTER

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

#: Keys of adapter_config.json that PEFT's forward and merge follow, whatever they say.
FOLLOWED = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_bias",
        "lora_dropout",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "r",
        "rank_pattern",
        "revision",
        "target_modules",
        "target_parameters",
        "task_type",
        "trainable_token_indices",
        "use_dora",
        "use_rslora",
    }
)
#: Values of `init_lora_weights` by which PEFT draws the adapter alone; by others it also writes to the base.
DRAWN = (True, False, None, "gaussian", "orthogonal", "eva")

#: Where the parameters of a model are: (module, name in it, parameter).
Places = list[tuple[nn.Module, str, nn.Parameter]]


class AdapterSlot:
    """A resident base model that takes one adapter at a time.

    `with slot.adapter(folder) as model:` gives the base with the PEFT adapter of `folder` in place, in eval mode;
    afterwards the base is bare again, its parameters bit-identical. `folder` None gives the base itself. Meanwhile
    `slot.delta` is the largest |change of a logit| that the adapter makes on a short probe: at 0.0 it does nothing.
    `slot.notes` are sentences on it that a user should read.

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
        self.notes: list[str] = []
        self._autocast = autocast_adapter_dtype
        self._probe = torch.tensor([list(probe)], device=base.device) if probe else None
        self._plain: torch.Tensor | None = None

    @contextmanager
    def adapter(self, folder: str | Path | None) -> Iterator[PreTrainedModel | PeftModel]:
        """Put the adapter of `folder` in place for the `with` block.

        Raises:
            ConfigError: `folder` holds no PEFT adapter, or one that would change the base.
            CheckpointError: the adapter is damaged, or does not fit this model.
        """
        self.notes = []
        if folder is None:
            self.delta = 0.0
            yield self.base
            return
        if self._plain is None:
            self._plain = probe_logits(self.base, self._probe)
        places = _places(self.base)
        frozen = [parameter.requires_grad for _, _, parameter in places]
        training = self.base.training
        try:
            model = self._load(Path(folder), places)
            self.delta = (probe_logits(model, self._probe) - self._plain).abs().max().item()
            if self.delta == 0.0:
                self.notes.append(f"the adapter in {folder} changes nothing: no logit of a short probe is another")
            yield model
        finally:
            _unwrap(self.base)
            if hasattr(self.base, "peft_config"):
                del self.base.peft_config
            for (module, name, parameter), trainable in zip(places, frozen, strict=True):
                parameter.requires_grad_(trainable)
                module._parameters[name] = parameter
            self.base.train(training)

    def _load(self, folder: Path, places: Places) -> PeftModel:
        from peft import PeftModel, get_peft_model_state_dict

        settings = _check_folder(folder, self._sealed)
        self._note_base(folder, settings.get("base_model_name_or_path"))
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                # low_cpu_mem_usage: no random initialisation, fp32 values are not rounded to a 16-bit base, and weights
                # of the base are put in place of its own instead of being written into them.
                model = PeftModel.from_pretrained(
                    self.base,
                    str(folder),
                    is_trainable=False,
                    autocast_adapter_dtype=self._autocast,
                    low_cpu_mem_usage=True,
                    torch_device=str(self.base.device),
                )
        except Exception as error:  # PEFT raises anything
            reason = f"its file lacks {error.args[0]}" if isinstance(error, KeyError) else str(error)[:400]
            raise CheckpointError(f"The adapter in {folder} does not fit this model: {reason}") from error
        missing = [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]
        if not missing:
            # PEFT does not report tensors that it has no layer for.
            known = get_peft_model_state_dict(model, save_embedding_layers=True)
            left = sorted(_names(folder / ADAPTER) - set(known))
            missing = [f"there is no layer for {', '.join(left)}"] if left else []
        if missing:
            raise CheckpointError(f"The adapter in {folder} does not fit this model: {missing[0][:400]}")
        _check_replaced_layers(self.base, places, folder)
        if replaced := _stand_in(places):
            self.notes.append(f"the adapter in {folder} also holds other weights of the base, used here: {replaced}")
        return model.eval()

    def _note_base(self, folder: Path, name: Any) -> None:
        """Note an adapter that says it was made for a model of another name."""
        here = self.base.name_or_path
        if isinstance(name, str) and name and here and slug(name).casefold() != slug(here).casefold():
            self.notes.append(f"the adapter in {folder} was made for {name}, by its adapter_config.json")


def _places(model: nn.Module) -> Places:
    """List the parameters of a model in the order in which they are loaded; a shared one is listed at each place."""
    return [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]


def _stand_in(places: Places) -> str:
    """Let weights that a file put in place of the base's own have their type, and be shared as these were.

    Returns:
        a name for those that differ from the base's own, empty without any.
    """
    for module, name, old in places:
        if is_quantised(old):  # of no file: PEFT itself replaces such a weight where it reads it for DoRA
            module._parameters[name] = old
    replaced = {
        id(old): module._parameters[name] for module, name, old in places if module._parameters[name] is not old
    }
    changed = []
    for module, name, old in places:
        new = replaced.get(id(old))
        if new is None:
            continue
        if new.dtype != old.dtype or new.device != old.device:
            new = replaced[id(old)] = nn.Parameter(new.detach().to(old), requires_grad=False)
        module._parameters[name] = new
        if not torch.equal(new, old):
            changed.append(f"{type(module).__name__} {name} {tuple(old.shape)}")
    return ", ".join(dict.fromkeys(changed))


def _unwrap(base: PreTrainedModel) -> None:
    """Put the base's own layers back in place of those that PEFT wrapped around them."""
    wrapped: list[str] = []
    for name, module in list(base.named_modules()):
        own = _original(module)
        if own is not module and not any(name.startswith(f"{outer}.") for outer in wrapped):
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, own)
            wrapped.append(name)


def _check_replaced_layers(base: PreTrainedModel, places: Places, folder: Path) -> None:
    """Refuse `modules_to_save` with matrices other than the embeddings: attacks would edit layers that are not used."""
    from peft.utils.other import ModulesToSaveWrapper

    embeddings = [_original(layer) for layer in (base.get_input_embeddings(), base.get_output_embeddings())]
    matrices = {id(module) for module, _, parameter in places if parameter.dim() > 1}
    for name, module in base.named_modules():
        own = _original(module)
        if isinstance(module, ModulesToSaveWrapper) and not any(own is layer for layer in embeddings):
            if any(id(part) in matrices for part in own.modules()):
                raise ConfigError(
                    f"The adapter in {folder} has modules_to_save that replace whole layers of the decoder ({name}): "
                    "it cannot be scored on a resident base. Merge it with PEFT and give the merged model."
                )


def _original(module: nn.Module) -> nn.Module:
    """Return the base's own module that PEFT wrapped, or the module itself."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    return module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module


def _check_folder(folder: Path, sealed: bool) -> dict[str, Any]:
    """Refuse a folder that is not an adapter, is damaged, or could only be loaded by code or by writing to the base.

    Returns:
        its adapter_config.json.
    """
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
    wrong = [f"{key} {value!r}" for key, value in settings.items() if not _is_followed(key, value)]
    if settings.get("peft_type") != "LORA" or wrong:
        found = ", ".join([f"peft_type {settings.get('peft_type')!r}", *wrong])
        raise ConfigError(
            f"The adapter in {folder} has {found}; only LORA (with DoRA and rsLoRA) that is not initialised from the "
            "base leaves the resident base as it is. Merge it with PEFT and give the merged model."
        )
    return settings


def _is_followed(key: str, value: Any) -> bool:
    """Return whether PEFT loads an adapter of this setting by wrapping layers, and nothing else."""
    from peft import LoraConfig

    if key == "init_lora_weights":
        return (value.lower() if isinstance(value, str) else value) in DRAWN
    if key in FOLLOWED or value in (None, False, [], {}):
        return True
    defaults = {field.name: field.default for field in dataclasses.fields(LoraConfig)}
    return key in defaults and value == defaults[key]


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

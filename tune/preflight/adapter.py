"""The adapter of a study, built on the model's outline: what cannot be built is known before anything starts."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from macdrop.errors import ConfigError
from macdrop.fingerprint import weight_files
from macdrop.load import check_model
from macdrop.quantised import check_quantisable
from tune.config.run_spec import TrainSpec
from tune.config.train.adapter_keys import InitLoraWeights
from tune.training.lora import add_adapter, left_alone
from tune.training.optimizers.adapter_tensors import adapter_tensors
from tune.training.optimizers.initial_weights import check_init
from tune.training.optimizers.libraries import check_library
from tune.training.optimizers.slim_adam import check_rules
from tune.zoo.model_source import model_source


def model_outline(spec: TrainSpec) -> PreTrainedModel:
    """Return the model of a spec without weights (on torch's meta device): its modules and shapes, not quantised.

    Raises:
        ConfigError: there is no such model, it has no weight files, is not a causal language model, or cannot be
            quantised.
    """
    source = model_source(spec.model_name_or_path)
    config = check_model(source, revision=spec.model_revision, trust_remote_code=spec.trust_remote_code)
    if spec.quantization_bit is not None:
        check_quantisable(spec.quantization_bit, spec.model_name_or_path, config)
    folder = Path(source)
    if os.path.isdir(folder) and not weight_files(folder):
        raise ConfigError(f"{folder} is not a model folder: it has a config.json but no weights (*.safetensors).")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code)


def check_adapter(
    spec: TrainSpec,
    targets: Iterable[str | list[str]],
    dora: Iterable[bool],
    inits: Collection[InitLoraWeights] = (),
    optimizers: Iterable[str] = ("adamw",),
) -> list[str]:
    """Build every adapter that a study may train on an outline of its model; return what the user should know of it.

    targets, dora, inits, optimizers: the values that `lora_target`, `use_dora`, `init_lora_weights` and `optimizer` may
        take.

    Raises:
        ConfigError: one of them cannot be built, or an optimizer's library is missing.
    """
    for optimizer in optimizers:
        check_library(optimizer)
    notes: dict[str, None] = {}
    for target, use_dora in itertools.product(targets, dora):
        tried = spec.model_copy(update={"lora_target": target, "use_dora": use_dora})
        outline = model_outline(spec)
        notes |= dict.fromkeys(left_alone(outline, tried))
        tensors = adapter_tensors(add_adapter(outline, tried))
        for init in inits:
            check_init(tensors, init)
        check_rules(tensors, spec.slimadam_rules)
    return list(notes)

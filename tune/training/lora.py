"""The adapter that a spec asks for: the layers it is put on, and what its tensors start as."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from macdrop.errors import ConfigError, nearest
from tune.config.run_spec import TrainSpec

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig, PeftModel

ADAPTER = "default"
#: What a router is called, or a module that holds one.
ROUTERS = ("router", "gate", "gating", "wg")
#: Keys of a model's config that count its experts.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
#: Keys of adapter_config.json that every release reads that knows DoRA (0.9).
LONG_KNOWN = (
    "alpha_pattern",
    "base_model_name_or_path",
    "bias",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
)
#: Part of PEFT's refusal -> what it means to the user.
REFUSALS = {
    "ParamWrapper does not work with use_dora": (
        "its experts are stored in fused 3-D parameters, which cannot take DoRA. Set use_dora to false, or list layers "
        "outside of the experts in lora_target"
    ),
    "ParamWrapper does not work with lora_dropout": (
        "its experts are stored in fused 3-D parameters, whose input cannot be dropped. Set lora_dropout to 0, or list "
        "layers outside of the experts in lora_target"
    ),
    "is incompatible with Mamba-based models": (
        "the kernels of its Mamba layers read out_proj and conv1d past any adapter. Leave them out of lora_target"
    ),
}


def add_adapter(base: PreTrainedModel, spec: TrainSpec) -> PeftModel:
    """Put the adapter of a spec on a base model, in place; on torch's meta device as well.

    Raises:
        ConfigError: `lora_target` names no layer of the model, or one that cannot take the adapter.
    """
    from peft import get_peft_model

    config = _config(base, spec)
    if spec.lora_target != "all":
        _check_targets(base, spec, config)
    try:
        return get_peft_model(base, config, adapter_name=ADAPTER, autocast_adapter_dtype=False)
    except (ValueError, TypeError, NotImplementedError, AttributeError) as error:
        words = next((words for part, words in REFUSALS.items() if part in str(error)), str(error).rstrip("."))
        raise ConfigError(
            f"lora_target {spec.lora_target!r} cannot be put on {spec.model_name_or_path}: {words}."
        ) from None


def left_alone(base: PreTrainedModel, spec: TrainSpec) -> list[str]:
    """Return a sentence for each kind of linear layer that `lora_target: all` leaves alone besides the embeddings."""
    if spec.lora_target != "all":
        return []
    routers, closed = _routers(base), _closed(base)
    routers += [name for name in _fused_targets(base, spec)[1] if name not in routers]
    found = []
    if routers:
        found.append(f"lora_target all leaves the routers of the experts alone ({_leaves(routers)})")
    if closed:
        found.append(f"lora_target all leaves {_leaves(closed)} alone, which cannot take an adapter in Mamba layers")
    return found


def start(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Return the step-0 value of an adapter's tensor, drawn as PEFT does: of two factors one is zero, the other not.

    Raises:
        NotImplementedError: the tensor is of no known kind; at zero it might never learn.
    """
    if is_drawn(name):
        if "lora_embedding_B" in name:
            return torch.randn(shape, generator=generator)
        return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(math.prod(shape[1:]))
    if "lora_B" in name or "lora_embedding_A" in name:
        return torch.zeros(shape)
    raise NotImplementedError(f"{name} is no tensor of a LoRA adapter.")


def is_drawn(name: str) -> bool:
    """Return whether a tensor is the factor that is drawn: it has no gradient as long as the other one is zero."""
    return "lora_A" in name or "lora_embedding_B" in name


def write_config(config: PeftConfig, folder: Path) -> None:
    """Write adapter_config.json as PEFT does, without newer keys that say nothing: older releases refuse what they do
    not know, and mean the same without it."""
    from peft import LoraConfig

    settings = dataclasses.replace(config, inference_mode=True).to_dict()
    default = LoraConfig().to_dict()
    said = {key: value for key, value in settings.items() if key in LONG_KNOWN or value != default.get(key)}
    said = {key: sorted(value) if isinstance(value, set) else value for key, value in said.items()}
    (folder / "adapter_config.json").write_text(json.dumps(said, indent=2, sort_keys=True), encoding="utf-8")


# --- targets ---


def _config(base: PreTrainedModel, spec: TrainSpec) -> LoraConfig:
    from peft import LoraConfig

    everything = spec.lora_target == "all"
    config = LoraConfig(
        r=spec.lora_rank,
        lora_alpha=spec.lora_alpha,  # type: ignore[arg-type]  # PEFT only divides by it: a fraction is fine
        lora_dropout=spec.lora_dropout,
        target_modules="all-linear" if everything else list(spec.lora_target),
        exclude_modules=([*_routers(base), *_closed(base)] or None) if everything else None,
        use_dora=spec.use_dora,
        use_rslora=spec.use_rslora,
        task_type="CAUSAL_LM",
    )
    if everything:
        _convert(config, base)
        config.target_parameters, _ = _without_routers(base, config.target_parameters)
    return config


def _convert(config: LoraConfig, base: PreTrainedModel) -> None:
    """Rewrite names of layers that this transformers release keeps as parameters, as PEFT does on loading."""
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    convert_peft_config_for_transformers(config, model=base, conversions=None)


def _fused_targets(base: PreTrainedModel, spec: TrainSpec) -> tuple[list[str] | None, list[str]]:
    from peft import LoraConfig

    config = LoraConfig(target_modules="all-linear")
    _convert(config, base)
    return _without_routers(base, config.target_parameters)


def _without_routers(base: PreTrainedModel, names: Iterable[str] | None) -> tuple[list[str] | None, list[str]]:
    """Part names of parameters into those of experts, 3-D, and those of routers, which are matrices."""
    if names is None:
        return None, []
    matrices = {name for name, parameter in base.named_parameters() if len(_shape(parameter)) < 3}
    routers = sorted(n for n in names if any(m.endswith(f".{n}") and _named_router(m) for m in matrices))
    return sorted(set(names) - set(routers)), routers


def _shape(parameter: torch.Tensor) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _routers(base: PreTrainedModel) -> list[str]:
    """List the linear layers that choose experts: by what they are called, with as many outputs as there are experts,
    or of a class of their own, which then returns more than one tensor."""
    config = base.config.get_text_config()
    experts = {getattr(config, key) for key in EXPERT_COUNTS if isinstance(getattr(config, key, None), int)}
    return [
        name
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear)
        and (_returns_several(module) or (module.out_features in experts and _named_router(f"{name}.weight")))
    ]


def _returns_several(module: nn.Module) -> bool:
    own = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
    return own and bool(re.search("router|gate", type(module).__name__, re.IGNORECASE))


def _named_router(parameter: str) -> bool:
    return any(part in ROUTERS for part in parameter.split(".")[-3:-1])


def _closed(base: PreTrainedModel) -> list[str]:
    """List the linear layers that PEFT refuses to wrap in this kind of model."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    # A method that reads its arguments alone.
    check: Any = LoraModel._check_target_module_compatiblity
    config, closed = LoraConfig(), []
    for name, module in base.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            try:
                check(None, config, base, name.rsplit(".", 1)[-1])
            except ValueError:
                closed.append(name)
    return closed


def _check_targets(base: PreTrainedModel, spec: TrainSpec, config: LoraConfig) -> None:
    """Refuse names that no layer of a kind that PEFT puts LoRA on has, or a layer that does not return one tensor."""
    kinds = (nn.Linear, Conv1D, nn.Embedding)
    layers = {name: module for name, module in base.named_modules() if isinstance(module, kinds)}
    for wanted in spec.lora_target:
        matched = [name for name in layers if name == wanted or name.endswith(f".{wanted}")]
        if not matched and not _is_fused(wanted, base):
            leaves = sorted({name.rsplit(".", 1)[-1] for name in layers})
            raise ConfigError(
                f"lora_target names {wanted!r}, but the model has no such linear layer.{nearest(wanted, leaves)} "
                f"Layers: {', '.join(leaves)}. Or write lora_target: all."
            )
        if any(_returns_several(layers[name]) for name in matched):
            raise ConfigError(
                f"lora_target names {wanted!r}, a router ({type(layers[matched[0]]).__name__}): it returns several "
                "tensors, and no adapter can be put on it. Leave it out, or write lora_target: all."
            )


def _is_fused(wanted: str, base: PreTrainedModel) -> bool:
    """Return whether a name is that of experts' layers that this transformers release fuses into parameters."""
    from peft import LoraConfig

    config = LoraConfig(target_modules=[wanted])
    try:
        _convert(config, base)
    except ValueError:  # one of two names that are fused into one parameter
        return True
    return not config.target_modules


def _leaves(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.removesuffix(".weight").rsplit(".", 1)[-1] for name in names}))

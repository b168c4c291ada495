"""Syntax of run files and overrides: YAML, `key=value`, aliases, dotted keys.

Which keys exist is defined by `tune.config.run_spec`; messages about wrong keys are in `tune.config.messages`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from macdrop.errors import ConfigError
from tune.config.syntax.yaml_core import brief, parse_yaml

#: Other tools' names for our keys, accepted and translated (Axolotl, PEFT, TRL, LLaMA-Factory, Ray).
ALIASES = {
    "base_model": "model_name_or_path",
    "model": "model_name_or_path",
    "datasets": "dataset",
    "dataset_name": "dataset",
    "sequence_len": "cutoff_len",
    "max_length": "cutoff_len",
    "max_seq_length": "cutoff_len",
    "train_on_inputs": "train_on_prompt",
    "on_bad_row": "bad_rows",
    "lora_r": "lora_rank",
    "lora_target_modules": "lora_target",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
    "micro_batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
    "lr_scheduler": "lr_scheduler_type",
    "val_set_size": "val_size",
    "ray_num_workers": "ray.num_workers",
}

#: In place of a benchmark that an override has switched off: there was one, so it need not be a suite's.
LEFT_OUT = ...

#: Sections of benchmarks in the blocks `eval` and `validation`; `register_benchmark` adds one.
SECTIONS = ["zero_shot", "perplexity", "generation"]


# --- text -> plain data ---


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, is not valid YAML (with the line), or does not hold a mapping.
    """
    if not os.path.isfile(path):
        raise ConfigError(
            f"{path} is not a file. Give the path of a run's YAML file; `macdrop sweep --recipes` lists shipped ones."
        )
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    except (ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}.") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must hold keys and values, for example\n  model_name_or_path: zoo:planted-llama")
    return raw


def read_override(text: str) -> tuple[str, Any]:
    """Split `key=value`; the value is YAML: numbers, true, null, [lists], {key: value}.

    Raises:
        ConfigError: the key is missing, or the value is not valid YAML.
    """
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise ConfigError(f"{brief(text)} is not an override. Write key=value, for example learning_rate=1e-4.")
    try:
        return key.strip(), parse_yaml(value)
    except ConfigError as error:
        raise ConfigError(
            f"The value of {key} is not valid YAML: {error}.\n"
            f"Quote a text with special characters, twice because of the shell: {key}='\"...\"'"
        ) from None


# --- one spelling of every key ---


def normalise(raw: dict[str, Any]) -> dict[str, Any]:
    """Replace other tools' names by ours, and dotted keys by blocks; idempotent.

    The names under `sweep.parameters` keep their dots: they name keys.

    Raises:
        ConfigError: a key is given under two names.
    """
    result = _nested(raw)
    sweep = result.get("sweep")
    if isinstance(sweep, dict):
        sweep = dict(sweep)
        if isinstance(sweep.get("parameters"), dict):
            sweep["parameters"] = _searched(sweep["parameters"])
        if isinstance(sweep.get("models"), list):
            sweep["models"] = [_nested(entry) if isinstance(entry, dict) else entry for entry in sweep["models"]]
        result["sweep"] = sweep
    return result


def override(raw: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return `raw` (normalised) with one dotted key set; the previous value, even a whole block or list, is replaced.

    Raises:
        ConfigError: the key leads into something that is not a block.
    """
    if key.startswith("sweep.parameters."):
        name = key.removeprefix("sweep.parameters.")
        path = ["sweep", "parameters", ALIASES.get(name, name)]
    else:
        path = ALIASES.get(key, key).split(".")
    return normalise(_set(raw, path, value, ()))


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with the keys of `top` set; blocks are merged, everything else is replaced."""
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def undot(values: dict[str, Any]) -> dict[str, Any]:
    """Turn dotted keys into blocks: {'a.b': 1} -> {'a': {'b': 1}}.

    Raises:
        ConfigError: a key is set twice, or is both a block and a value.
    """
    result: dict[str, Any] = {}
    for key, value in values.items():
        path = key.split(".")
        block = result
        for part in path[:-1]:
            block = block.setdefault(part, {})
            if not isinstance(block, dict):
                raise ConfigError(f"{key}: {part} already has a value and cannot be a block.")
        last = path[-1]
        if isinstance(value, dict) and isinstance(block.get(last), dict):
            twice = sorted(set(value) & set(block[last]))
            if twice:
                raise ConfigError(f"{key}.{twice[0]} is given twice.")
            block[last] = {**block[last], **value}
        elif last in block:
            raise ConfigError(f"{key} is given twice.")
        else:
            block[last] = dict(value) if isinstance(value, dict) else value
    return result


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn blocks into dotted keys: {"a": {"b": 1}} -> {"a.b": 1}; lists and empty blocks are kept as they are."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _nested(raw: dict[str, Any]) -> dict[str, Any]:
    return undot(_renamed(raw))


def _renamed(raw: dict[str, Any]) -> dict[str, Any]:
    used: dict[str, str] = {}
    renamed = {}
    for key, value in raw.items():
        name = ALIASES.get(key, key)
        if name in used:
            raise ConfigError(f"{used[name]} and {key} mean the same; write only {name}.")
        used[name] = key
        renamed[name] = value
    return renamed


def _searched(parameters: dict[str, Any]) -> dict[str, Any]:
    """Accept `macdrop: {k: [1, 5]}` as well as `macdrop.k: [1, 5]`."""
    dotted: dict[str, Any] = {}
    for key, value in parameters.items():
        nested = value.items() if key == "macdrop" and isinstance(value, dict) else None
        for name, space in [(f"{key}.{inner}", space) for inner, space in nested] if nested else [(key, value)]:
            if name in dotted:
                raise ConfigError(f"sweep.parameters.{name} is given twice.")
            dotted[name] = space
    return _renamed(dotted)


def _set(raw: dict[str, Any], path: list[str], value: Any, above: tuple[str, ...]) -> dict[str, Any]:
    if len(path) == 1:
        benchmark = above[:1] in (("eval",), ("validation",)) and above[1:] in [(section,) for section in SECTIONS]
        off = benchmark and path[0] in raw and (value is False or value == "off")
        return {**raw, path[0]: LEFT_OUT if off else value}
    here = (*above, path[0])
    inner = raw.get(path[0])
    # A section may be written as a list of names; an override of one entry needs it as a block.
    in_section = here[0] in ("eval", "validation") and here[1:2] and here[1] in SECTIONS
    if in_section and len(here) == 2:
        inner = named_block(inner)
    elif in_section and isinstance(inner, str):
        inner = {"data": inner}
    if inner is None:
        inner = {}
    if not isinstance(inner, dict):
        raise ConfigError(f"{'.'.join((*above, *path))}: {'.'.join(here)} is not a block of keys; set it whole.")
    return {**raw, path[0]: _set(inner, path[1:], value, here)}


def named_block(section: Any) -> Any:
    """Turn a section written as a name or a list of names into a mapping of names to settings."""
    if not isinstance(section, (str, list)):
        return section
    block: dict[str, Any] = {}
    for item in [section] if isinstance(section, str) else section:
        block.update(item if isinstance(item, dict) else {item: {}})
    return block

"""Turns pydantic validation errors into user-facing messages: key, value, what is allowed, nearest name."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from macdrop.errors import ConfigError, nearest
from tune.config.parse import ALIASES
from tune.config.syntax.yaml_core import brief

#: Names of other tools for what is done in another way here: the way.
ELSEWHERE = {
    "lr": "Write learning_rate.",
    "epochs": "Write num_train_epochs.",
    "batch_size": "Write per_device_train_batch_size (training) or eval.batch_size (scoring).",
    "warmup_steps": "Write warmup_ratio, the fraction of all steps.",
    "deepspeed": "The DeepSpeed configuration is derived from zero_stage, offload and bf16.",
    "stage": "Write zero_stage for the ZeRO stage; instruction fine-tuning is the only training stage.",
    "fp16": "Write bf16: true, or leave it out for fp32.",
    "pure_bf16": "Write bf16: true.",
    "load_in_8bit": "Write quantization_bit: 8.",
    "load_in_4bit": "Write quantization_bit: 4, which is NF4 with double quantisation.",
    "num_gpus": "Write ray.num_workers: one worker is one GPU.",
    "num_workers": "Write ray.num_workers.",
    "tasks": "Write eval.zero_shot.",
    "suite": "Write eval.suite.",
    "p0": "Write macdrop.p0.",
    "k": "Write macdrop.k.",
    "schedule": "Write macdrop.schedule.",
    "alpha": "Write macdrop.alpha.",
    "seed": "Set sweep.seeds, the number of fresh seeds on which the selected settings are compared.",
    "macdrop.scope": "Placebos are compared with the settings that the search selects: list them under sweep.arms.",
    "parameters": "Write it under sweep.",
    "models": "Write it under sweep.",
}

#: Words for true and false of YAML 1.1, which are texts here.
YES_NO = {word: answer for answer, words in (("true", "yes on y"), ("false", "no off n")) for word in words.split()}
#: How `on` and `off` are written where they are names of settings.
SWITCHES = {"true": "on", "yes": "on", "false": "off", "no": "off"}

_WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "list_type": "a list",
    "dict_type": "a block of keys",
    "model_type": "a block of keys",
    "model_attributes_type": "a block of keys",
    "finite_number": "a finite number",
    "string_too_short": "a text that is not empty",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "literal_error": "{expected}",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
}


def build(kind: type[BaseModel], raw: dict[str, Any]) -> Any:
    """Validate `raw` as a `kind`.

    Raises:
        ConfigError: names each key or value that is not allowed.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        wrong: dict[str, list[ErrorDetails]] = {}
        for item in error.errors():
            wrong.setdefault(".".join(_place(kind, item["loc"])[0]), []).append(item)
        told = [(where, items) for where, items in wrong.items() if not _is_other_branch(where, items, wrong)]
        raise ConfigError("\n".join(_explain(kind, where, items) for where, items in told)) from None


def _is_other_branch(where: str, items: list[ErrorDetails], wrong: Iterable[str]) -> bool:
    """Return whether a mapping with a wrong value is also refused because it is none of the names allowed instead."""
    names = all(item["type"] == "literal_error" and isinstance(item["input"], dict) for item in items)
    return names and any(other.startswith(f"{where}.") for other in wrong)


def believable(kind: type[BaseModel], content: dict[str, Any], name: str, problems: list[str]) -> dict[str, Any]:
    """Return `content` without values that a `kind` cannot have, for readers of what another version may have written.

    Each value that is left out is reported once in `problems`, with the file's `name`. Unknown keys, and values that
    merely do not fit each other, are kept.
    """
    content = copy.deepcopy(content)
    while True:
        try:
            kind.model_validate(content)
            return content
        except ValidationError as error:
            wrong = [item for item in error.errors() if item["type"] not in ("extra_forbidden", "missing")]
        found = [(where, item) for item in wrong if (where := _holder(kind, content, item))]
        if not found:
            return content
        (holder, key, dotted), item = found[0]
        problem = f"{name} is damaged, and this left out: {_explain(kind, dotted, [item])}"
        problems += [problem] if problem not in problems else []
        holder.pop(key)


def _holder(kind: type[BaseModel], content: Any, item: ErrorDetails) -> tuple[Any, Any, str] | None:
    """Find the mapping or list that holds the value of a pydantic error, its key there, and its dotted name.

    None for a whole block whose keys do not fit each other.
    """
    holder, key, walked = None, None, []
    for name in _place(kind, item["loc"])[0]:
        inner = dict(enumerate(content)) if isinstance(content, list) else content
        at = int(name) if isinstance(content, list) else name
        if not isinstance(inner, dict) or at not in inner:
            break  # a single value may be written where a list of them is meant
        holder, key, content = content, at, inner[at]
        walked.append(name)
    block = isinstance(holder, dict) and isinstance(content, dict)
    if holder is None or (block and item["type"] == "value_error"):
        return None
    return holder, key, ".".join(walked)


def _explain(kind: type[BaseModel], where: str, items: list[ErrorDetails]) -> str:
    """Name the wrong key, its value, what is allowed and the nearest name. Several items are branches of a union."""
    item = items[0]
    if item["type"] == "extra_forbidden":
        return _unknown(kind, where, item)
    ours = [other for other in items if other["type"] == "value_error"]
    if ours:
        message = str(ours[0]["ctx"]["error"])
        return f"{where}: {message}" if where else message
    if item["type"] == "missing":
        return f"{where} is missing."
    context = [{**other.get("ctx", {}), "": ""} for other in items]
    wanted = [_WANTED.get(o["type"], o["msg"]).format(**c) for o, c in zip(items, context, strict=True)]
    allowed = re.findall(r"'([^']*)'", " ".join(w for w, o in zip(wanted, items, strict=True) if "lit" in o["type"]))
    hint = nearest(item["input"], allowed) if isinstance(item["input"], str) else ""
    if isinstance(item["input"], str) and item["input"].lower() in ("none", "nil"):
        hint = hint or " Nothing is written null."
    if "on" in allowed and (switch := SWITCHES.get(str(item["input"]).lower())):
        hint = f" Write {switch}."
    if any(other["type"] == "bool_type" for other in items) and item["input"] in YES_NO:
        hint = f" Write {YES_NO[item['input']]}."
    return f"{where} must be {' or '.join(dict.fromkeys(wanted))}, not {brief(item['input'])}.{hint}"


def _unknown(kind: type[BaseModel], where: str, item: ErrorDetails) -> str:
    owner = _place(kind, item["loc"])[1]
    allowed = list(owner.model_fields) if owner else []
    key = str(item["loc"][-1])
    top = len(item["loc"]) == 1
    hint = f" {ELSEWHERE[key]}" if top and key in ELSEWHERE else nearest(key, [*allowed, *(ALIASES if top else ())])
    known = f" Allowed: {', '.join(sorted(allowed))}." if 0 < len(allowed) <= 16 else ""
    return f"{where} is an unknown key.{hint}{known}"


def _place(kind: type[BaseModel], location: tuple[Any, ...]) -> tuple[list[str], type[BaseModel] | None]:
    """Return pydantic's location without the names of union branches, and the model that owns the last key."""
    names: list[str] = []
    owner: type[BaseModel] | None = None
    here: Any = kind
    for part in location:
        if str(part).startswith(_MAPPING_BRANCH) and len(_options(here)) > 1:
            continue
        here = _descend(here, part)
        if here is _BRANCH:
            break
        owner, here = here
        names.append(str(part))
    return names, owner


_BRANCH = object()
#: How pydantic's names of union branches begin, of a mapping's and of allowed names'.
_MAPPING_BRANCH, _NAMES_BRANCH = "dict[", "literal["


def _descend(annotation: Any, part: Any) -> Any:
    """Return the owning model (or None) and the annotation of a part, or `_BRANCH` if it names a branch of a union."""
    for option in _options(annotation):
        if isinstance(option, type) and issubclass(option, BaseModel) and isinstance(part, str):
            field = option.model_fields.get(part)
            return option, field.annotation if field else None
        if get_origin(option) is dict:
            return _BRANCH if str(part).startswith(_NAMES_BRANCH) else (None, get_args(option)[1])
        if get_origin(option) is list and isinstance(part, int):
            return None, get_args(option)[0]
    return _BRANCH


def _options(annotation: Any) -> list[Any]:
    if get_origin(annotation) in (Union, UnionType):
        return [inner for option in get_args(annotation) for inner in _options(option)]
    metadata = getattr(annotation, "__metadata__", None)
    return _options(get_args(annotation)[0]) if metadata else [annotation]

"""Load a causal language model and its tokenizer, and refuse what macdrop cannot use with a message that helps."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils.peft_utils import find_adapter_config_file

from macdrop.errors import ConfigError, UnsupportedModel, nearest
from macdrop.families import decoder_layers
from macdrop.fingerprint import is_lfs_pointer
from macdrop.quantised import loading_options, settle, stored_quantised

log = logging.getLogger(__name__)

DTYPES: dict[str, torch.dtype | str] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "auto": "auto"}
#: Files of a model folder that are read; weights for other frameworks may be absent.
_READ = ("*.json", "*.jinja", "*.model", "*.py", "*.txt", "model*.safetensors")
#: What was said of weights without a place, which is said once in a process.
_said: set[str] = set()
_OTHER_MODALITIES = ("vision_config", "audio_config", "video_config", "speech_config", "vision_tower")


def load_model(
    name_or_path: str | os.PathLike,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    quantization_bit: int | None = None,
) -> PreTrainedModel:
    """A causal language model from a folder or a hub id, in evaluation mode, on the CPU.

    dtype: "float32", "bfloat16", or "auto" for the one that the checkpoint is stored in. quantization_bit: 4 (NF4) or 8
    (LLM.int8) to let bitsandbytes quantise the linear layers, which puts the model on the GPU if there is one. Weights
    are read from safetensors only. Code from the model's repository runs only with `trust_remote_code`, and nothing
    ever asks.

    Raises `ConfigError` for a path that is not a model folder, a hub id that cannot be reached, damaged or incomplete
    weights, files with more layers than the config, and `UnsupportedModel` for a model that is not a text-only decoder.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"Unknown dtype {dtype!r}.{nearest(dtype, DTYPES)} Allowed: {', '.join(DTYPES)}.")
    name = _require_model(name_or_path, revision)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = _load_config(name, options)
    _require_causal_text(name, config)
    extra: dict[str, Any] = {"attn_implementation": attn_implementation} if attn_implementation else {}
    if quantization_bit is not None:
        extra |= loading_options(quantization_bit, name, config, DTYPES[dtype])
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(  # a pair, which its annotation does not know
            name,
            config=config,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            output_loading_info=True,
            **options,
            **extra,
        )
    except SafetensorError as error:
        raise ConfigError(f"The weights of {name} are damaged: {error}.\nCopy or download the model again.") from None
    except ImportError as error:
        hint = stored_quantised(config)
        raise ConfigError(f"{name} needs a package that is missing: {_first_line(error)}{hint}") from None
    except Exception as error:  # code of the model, which may trust its config
        raise ConfigError(_weights_message(name, error)) from None
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ConfigError(
            f"{name} is not a complete {type(model).__name__}: {len(missing)} weights are missing from its files, "
            f"{missing[0]} first.\nThey would start as random numbers. Copy or download the model again."
        )
    _check_unexpected(name, model, sorted(info["unexpected_keys"]))
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    for end in ends if isinstance(ends, list) else [ends]:
        if not isinstance(end, int | None):
            raise ConfigError(
                f"generation_config.json of {name}: eos_token_id must be a token's number, not {end!r:.60}."
            )
    settle(model)
    return model.eval()


def open_model(
    source: str | os.PathLike,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    quantization_bit: int | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and the tokenizer that belongs to it; `load_model` says how.

    The tokenizer comes first: what is wrong with it shows before any weight is read.

    Raises what `load_model` and `load_tokenizer` raise, and `ConfigError` if the two do not fit each other.
    """
    tokenizer = load_tokenizer(source, revision=revision, trust_remote_code=trust_remote_code)
    model = load_model(
        source,
        revision=revision,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        attn_implementation=attn_implementation,
        quantization_bit=quantization_bit,
    )
    require_fit(tokenizer, model, name=os.fspath(source))
    return model, tokenizer


def check_model(
    name_or_path: str | os.PathLike, *, revision: str | None = None, trust_remote_code: bool = False
) -> PretrainedConfig:
    """Return the config of a model that `load_model` would accept, without loading weights.

    Raises what `load_model` raises for the path, the config and the kind of model.
    """
    name = _require_model(name_or_path, revision)
    config = _load_config(name, {"revision": revision, "trust_remote_code": trust_remote_code})
    _require_causal_text(name, config)
    return config


def load_tokenizer(
    name_or_path: str | os.PathLike,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    model: PreTrainedModel | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or a hub id; with `model`, also checked against it (`require_fit`).

    Raises `ConfigError` when it cannot be loaded, has no eos token, or does not fit the model.
    """
    name = _require_folder(name_or_path, ())
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        if not isinstance(tokenizer.model_max_length, int | float):
            raise TypeError(f"model_max_length must be a number, not {tokenizer.model_max_length!r:.60}")
    except ImportError as error:
        raise ConfigError(f"The tokenizer of {name} needs a package that is missing: {_first_line(error)}") from None
    except Exception as error:  # readers of files raise anything, those in Rust a bare Exception
        if "trust_remote_code" in str(error):
            raise ConfigError(_remote_code_message(name)) from None
        if os.path.isdir(name) or not isinstance(error, OSError):
            raise ConfigError(
                f"{name} has no tokenizer that can be loaded ({type(error).__name__}: {_first_line(error)}).\n"
                "The folder needs tokenizer.json (or tokenizer.model) and tokenizer_config.json beside the weights."
            ) from None
        raise ConfigError(_hub_message(name, revision)) from None
    require_fit(tokenizer, model, name=name)
    return tokenizer


def require_fit(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None, *, name: str = "the model"
) -> None:
    """Raise `ConfigError` for a tokenizer without eos, or with ids that `model` has no embedding for."""
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"The tokenizer of {name} has no eos token, so an answer would never end.\n"
            'Set "eos_token" in its tokenizer_config.json.'
        )
    rows: Any = None if model is None else model.get_input_embeddings().num_embeddings
    if rows is not None and len(tokenizer) > rows:
        raise ConfigError(
            f"The tokenizer of {name} does not fit the model: it has {len(tokenizer)} tokens, the model embeddings for "
            f"{rows}.\nUse the tokenizer that came with the model."
        )


def _require_model(name_or_path: str | os.PathLike, revision: str | None) -> str:
    """The name to load a model from. Refuses one with an adapter beside it, which transformers would put into it."""
    name = _require_folder(name_or_path, ())
    if revision is not None and os.path.isdir(name):
        raise ConfigError(f"{name} is a folder, which has no revisions: leave the revision {revision!r} out.")
    try:
        adapter = find_adapter_config_file(name, revision=revision)
    except OSError:  # no such repository: reading the config says so
        adapter = None
    if adapter is not None:
        if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
            raise ConfigError(
                f"{name} is a PEFT adapter, not a model: it holds adapter_config.json and no config.json.\n"
                "Give the model that it was made for, and the adapter with --adapter."
            )
        raise ConfigError(
            f"{name} holds a PEFT adapter beside the model (adapter_config.json): transformers would put it into it.\n"
            "Move the adapter to a folder of its own and give it with --adapter, or merge it into the weights."
        )
    return _require_folder(name_or_path, ("config.json",))


def _require_folder(name_or_path: str | os.PathLike, needed: tuple[str, ...]) -> str:
    """The name to load from. Something that looks like a path must be a folder with the `needed` files."""
    name = os.fspath(name_or_path)
    path = Path(os.path.expanduser(name))
    if name and os.path.isdir(path):
        for file in needed:
            if not (path / file).is_file():
                inside = sorted(entry.name for entry in path.iterdir())[:6]
                raise ConfigError(
                    f"{name} is not a model folder: it has no {file}.\n"
                    f"It holds: {', '.join(inside) or 'nothing'}. Give the folder that save_pretrained wrote."
                )
        read = [file for file in sorted(path.iterdir()) if any(map(file.match, _READ)) and file.is_file()]
        if pointers := [file.name for file in read if is_lfs_pointer(file)]:
            raise ConfigError(
                f"{name} was cloned without its files: {pointers[0]} is a Git LFS pointer, not the file itself.\n"
                "Run: git lfs pull   (in that folder)"
            )
        return str(path)
    looks_like_id = name and not name.startswith((".", "~", "/")) and name.count("/") <= 1
    if os.path.isfile(path) or not looks_like_id:
        what = "is a file, not a model folder" if os.path.isfile(path) else "does not exist"
        raise ConfigError(
            f"The model path {name!r:.200} {what}.\nGive a folder with config.json and weights, or a hub id."
        )
    return name


def _check_unexpected(name: str, model: PreTrainedModel, keys: list[str]) -> None:
    """Refuse layers in the files that the config does not count; report other keys without a place once.

    Layers that predict further tokens for drafts stand behind the decoder's and are counted apart (DeepSeek-V3).
    """
    if not keys:
        return
    try:
        path, layers = decoder_layers(model)
    except UnsupportedModel:
        path, layers = "", torch.nn.ModuleList()
    # The files may call the decoder without the head's prefix, or below one of their own.
    short = path.removeprefix(f"{model.base_model_prefix}.")
    numbered = re.compile(rf"(?:(?:\w+\.)?{re.escape(path)}|{re.escape(short)})\.(\d+)\.")
    numbers = [int(match[1]) for key in keys if path and (match := numbered.match(key))]
    drafting = getattr(model.config.get_text_config(), "num_nextn_predict_layers", None) or 0
    beyond = [number for number in numbers if number >= len(layers) + drafting]
    if beyond:
        raise ConfigError(
            f"{name} has the weights of {max(beyond) + 1} layers, and its config.json counts {len(layers)} "
            f"(number {min(beyond)} and those behind it would be left out).\n"
            "Set the number of layers there as it was, or give the files of the model that the config is of."
        )
    text = (
        f"{name}: {type(model).__name__} has no place for {len(keys)} weights of its files, {keys[0]} first. "
        "They are left out."
    )
    if text not in _said:
        _said.add(text)
        log.warning(text)


def _load_config(name: str, options: dict[str, Any]) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(name, **options)
        if not getattr(config.get_text_config(), "num_hidden_layers", 1) > 0:  # of which an empty model would be built
            raise ValueError("num_hidden_layers must be at least 1")
        return config
    except Exception as error:  # the classes of configs check values in ways of their own, and divide by them
        if "trust_remote_code" in str(error):
            raise ConfigError(_remote_code_message(name)) from None
        if os.path.isdir(name) or not isinstance(error, OSError):
            reason = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
            raise ConfigError(
                f"The config of {name} cannot be used: {reason}\n"
                "Is it a transformers model, and this transformers release new enough for it?"
            ) from None
        raise ConfigError(_hub_message(name, options["revision"])) from None


def _require_causal_text(name: str, config: PretrainedConfig) -> None:
    """Raise `UnsupportedModel` unless the config is one of a decoder of text alone."""
    kind = getattr(config, "model_type", "") or type(config).__name__
    classes = getattr(config, "architectures", None) or []
    described = f"{name} ({', '.join(classes) or kind})"
    if found := [key for key in _OTHER_MODALITIES if getattr(config, key, None) is not None]:
        raise UnsupportedModel(
            f"{described} is not a text-only model: its config has {found[0]}.\n"
            "macdrop works on causal language models. If there is a text-only checkpoint of it, give that one."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{described} is an encoder-decoder model.\nmacdrop works on decoder-only causal language models."
        )
    own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    known = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if not (known or own_code):
        raise UnsupportedModel(
            f"{described} is not a causal language model (model_type {kind!r}).\n"
            "macdrop works on decoder-only models that generate text, such as Llama, Mistral, Qwen, Gemma, Phi or OPT."
        )


def _weights_message(name: str, error: Exception) -> str:
    text = str(error)
    if "trust_remote_code" in text:
        return _remote_code_message(name)
    path = Path(name)
    if path.is_dir() and not list(path.glob("*.safetensors*")):
        if pickles := sorted(file.name for file in path.glob("*.bin")):
            return (
                f"{name} has its weights as pickle only ({pickles[0]}), which macdrop does not load: it can run code.\n"
                "Convert them: load the model with transformers and call save_pretrained: it writes safetensors."
            )
        return f"{name} is not a model folder: it has a config.json but no weights (*.safetensors)."
    if "ignore_mismatched_sizes" in text or "size mismatch" in text:
        return f"The weights of {name} do not have the shapes that its config.json says. Are they of one model?"
    return f"{name} cannot be loaded: {_first_line(error)}"


def _hub_message(name: str, revision: str | None) -> str:
    at = f" at revision {revision!r}" if revision else ""
    return (
        f"The model {name!r}{at} is neither a folder here nor in the Hugging Face cache, nor did the hub provide it\n"
        "(no such model, no access to it, or this machine is offline). Give the path of a model folder, or an id that\n"
        "is cached: hf download ID on a machine with internet."
    )


def _remote_code_message(name: str) -> str:
    return (
        f"{name} needs Python code from its own repository, which is not run unless you ask for it.\n"
        "If you trust it, set trust_remote_code: true."
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip(": \n").splitlines()), type(error).__name__)

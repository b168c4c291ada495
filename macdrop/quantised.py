"""Linear layers that bitsandbytes has quantised: how they are loaded, what their weights stand for, rows at zero.

NF4 (4 bits, blocks of 64 entries, their scales quantised in turn) and LLM.int8 (8 bits, one scale a row). Both have a
code for exactly 0, so that a row is set to zero, and brought back, by its codes alone: no other row changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from ctypes import c_longlong
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from macdrop.errors import ConfigError
from macdrop.fingerprint import format_name

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

INSTALL = "pip install 'macdrop[bnb]'"
_BLOCK, _SCALES = 64, 256  # of NF4: entries that share a scale, and scales that share one of their own
_CODEBOOK = 4 * (256 + 16)  # bytes of NF4's two code books


def loading_options(
    quantization_bit: int, name: str, config: PretrainedConfig, compute: torch.dtype | str
) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that quantise a model while it is loaded, on the GPU if there is one.

    NF4 takes a CPU some 5 minutes for each billion weights. compute: the type of activations; "auto" for that of the
    input.

    Raises what `check_quantisable` raises.
    """
    check_quantisable(quantization_bit, name, config)
    from transformers import BitsAndBytesConfig

    if quantization_bit == 8:
        settings = BitsAndBytesConfig(load_in_8bit=True)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=None if isinstance(compute, str) else compute,
        )
    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    return {"quantization_config": settings, "device_map": {"": device}}


def check_quantisable(quantization_bit: int, name: str, config: PretrainedConfig) -> None:
    """Raise `ConfigError` for other numbers of bits, a checkpoint that is quantised already, without bitsandbytes."""
    format_name(quantization_bit)  # refuses other numbers
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"quantization_bit: {quantization_bit} is for checkpoints in 16 or 32 bits, and the weights of {name} are\n"
            "stored quantised. Give the checkpoint that they were made from."
        )
    require_bitsandbytes(f"quantization_bit: {quantization_bit}")


def stored_quantised(config: PretrainedConfig) -> str:
    """A hint for weights that are stored quantised; empty for others."""
    if getattr(config, "quantization_config", None) is None:
        return ""
    return (
        "\nIts weights are stored quantised. Give the checkpoint in 16 or 32 bits; quantization_bit: 4 or 8 quantises "
        "it\nwhile it is loaded."
    )


def require_bitsandbytes(what: str) -> None:
    """Raise `ConfigError` where bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise ConfigError(f"{what} needs bitsandbytes, which is not installed: {INSTALL}")


def settle(model: nn.Module) -> None:
    """Let the quantised layers of a model that was just loaded keep their format and their scales.

    In eval mode bitsandbytes repacks NF4 weights for CPUs with AVX-512 in bf16: into a layout that has no gradient, and
    whose rows cannot be read. The scales of int8 get lost where PEFT replaces a weight by itself (DoRA on CPUs), and
    stay behind where the model moves to another device.

    Raises `ConfigError` where bitsandbytes misreads 4-bit weights.
    """
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            _check_rows(module)
        if type(getattr(module, "weight", None)).__name__ == "Int8Params":
            _follow_weight(module)
            module.register_forward_pre_hook(_follow_weight)
            # Or the weight that PEFT puts in its own place would be an empty one while an adapter is loaded lazily.
            module.register_parameter = partial(_assign, module)


def _check_rows(module: Any) -> None:
    """Mend 4-bit weights that come out wrong, or refuse them: rows that are no multiple of a block.

    On CPUs with AVX-512, bitsandbytes 0.50 takes each such row to begin with a block of its own.
    """
    state = getattr(module.weight, "quant_state", None)
    inputs = weight_shape(module)[1]
    if state is None or module.weight.device.type != "cpu" or inputs % state.blocksize == 0 or _reads_well(module):
        return
    _read_as_one_row()
    if not _reads_well(module):
        raise ConfigError(
            f"bitsandbytes misreads 4-bit weights with rows of {inputs} entries on this CPU: on some, that must be a "
            f"multiple of {state.blocksize}.\nUse quantization_bit: 8, or none, or a GPU."
        )


def _reads_well(module: Any) -> bool:
    return torch.allclose(dequantised(module).float(), _by_definition(module), rtol=1e-2, atol=1e-6)


def _read_as_one_row() -> None:
    """Have bitsandbytes read a matrix as one long row, whose blocks are where they were made."""
    from bitsandbytes.backends.cpu import ops

    if not isinstance(ops.lib, _OneRow):
        ops.lib = _OneRow(ops.lib)  # type: ignore[assignment]  # it has all that the library has


class _OneRow:
    """The compiled library of bitsandbytes; its NF4 kernels get (codes, scales, out, block size, rows, entries)."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._library, name)
        return partial(self._read, function) if name.startswith("cdequantize_blockwise_cpu_nf4_") else function

    @staticmethod
    def _read(function: Any, *arguments: Any) -> None:
        *given, rows, entries = arguments
        function(*given, c_longlong(1), c_longlong(rows.value * entries.value))


@torch.no_grad()
def _by_definition(module: Any) -> torch.Tensor:
    """The weight (out, in) of a 4-bit layer in fp32, from its codes and scales."""
    import bitsandbytes.functional as F

    state = module.weight.quant_state
    scales = state.absmax
    if state.nested:
        scales = F.dequantize_blockwise(state.absmax, state.state2) + state.offset
    codes = module.weight.data.view(torch.uint8).flatten()
    entries = state.code[torch.stack([codes >> 4, codes & 15], dim=1).flatten().int()][: state.shape.numel()]
    return (entries * scales.float().repeat_interleave(state.blocksize)[: len(entries)]).view(state.shape)


def _assign(module: Any, name: str, parameter: torch.Tensor | None) -> None:
    module._parameters[name] = parameter


def _follow_weight(module: Any, _args: object = ()) -> None:
    """Point an int8 layer's state at its weight, wherever that is."""
    weight, state = module.weight, module.state
    scales = weight.SCB if state.SCB is None else state.SCB
    state.CB, state.SCB = weight.data, scales.to(weight.device)
    weight.CB = weight.SCB = None  # or the layer would take its state from there in its next forward pass


# --- what is stored ---


def is_quantised(parameter: torch.Tensor) -> bool:
    """Return whether bitsandbytes has quantised a parameter; one may be stored as floats for FSDP."""
    kind = type(parameter).__name__
    return kind == "Int8Params" or (kind == "Params4bit" and getattr(parameter, "quant_state", None) is not None)


def weight_shape(module: Any) -> tuple[int, int]:
    """Shape (out, in) of a quantised layer's weight."""
    return int(module.out_features), int(module.in_features)


@torch.no_grad()
def dequantised(module: Any) -> torch.Tensor:
    """The weight (out, in) that a quantised layer stands for, in the precision it was quantised from (int8: fp32).

    Raises `ConfigError` for a layout that only one kernel reads.
    """
    import bitsandbytes.functional as F

    if type(module.weight).__name__ == "Params4bit":
        _refuse_packed(module)
        weight: torch.Tensor = F.dequantize_4bit(module.weight.data, module.weight.quant_state)
        return weight
    scales = module.weight.SCB if module.state.SCB is None else module.state.SCB
    return F.int8_vectorwise_dequant(module.weight.data, scales.to(module.weight.device))


def read_codes(module: Any, features: Sequence[int]) -> torch.Tensor:
    """A copy of the codes of some rows of a quantised weight, for `write_codes`.

    Raises `ConfigError` where rows share bytes: an odd number of inputs in 4 bits.
    """
    return _codes(module)[list(features)].clone()


def write_codes(module: Any, features: Sequence[int], codes: torch.Tensor) -> None:
    """Put codes that were read back in their place, bit for bit."""
    _codes(module)[list(features)] = codes


def zero_rows(module: Any, features: Sequence[int]) -> None:
    """Set rows of a quantised weight to the code of 0: dequantised they are 0, and all others stay as they are."""
    zero = 0
    if type(module.weight).__name__ == "Params4bit":
        place = int((module.weight.quant_state.code == 0).nonzero()[0])
        zero = place << 4 | place  # two entries a byte
    _codes(module)[list(features)] = zero


def _codes(module: Any) -> torch.Tensor:
    """A view (out, bytes) of a quantised weight; writes to it write to the parameter."""
    outputs, inputs = weight_shape(module)
    if type(module.weight).__name__ == "Int8Params":
        return module.weight.data
    _refuse_packed(module)
    if inputs % 2:
        raise ConfigError(
            f"Rows of {inputs} entries cannot be edited in 4 bits: two of them share a byte.\n"
            "Use quantization_bit: 8, or none, for this model."
        )
    return module.weight.data.view(torch.uint8).view(outputs, inputs // 2)


def _refuse_packed(module: Any) -> None:
    if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
        raise ConfigError(
            "The 4-bit weights are packed for one CPU kernel, as in eval mode on CPUs with AVX-512 in bf16.\n"
            "Load the model with macdrop (open_model), or call macdrop.quantised.settle(model) before it first runs."
        )


# --- whole models ---


def quantised_layers(model: nn.Module) -> list[str]:
    """Names of the layers that quantised loading would quantise: all linear ones but the vocabulary head."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [
        name
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and module is not head
    ]


def stored_bytes(outputs: int, inputs: int, quantization_bit: int) -> int:
    """Bytes of a quantised matrix (out, in), scales included."""
    entries = outputs * inputs
    if quantization_bit == 8:
        return entries + 4 * outputs
    blocks = math.ceil(entries / _BLOCK)
    return math.ceil(entries / 2) + blocks + 4 * math.ceil(blocks / _SCALES) + _CODEBOOK


def dequantise(model: PreTrainedModel) -> int:
    """Replace every quantised layer of a bare model by a plain one of the weight it stands for; returns how many.

    The weights have the precision of the model, and the layers the class that they were loaded from.
    """
    found = [(name, module) for name, module in model.named_modules() if is_quantised(_weight(module))]
    for name, module in found:
        model.set_submodule(name, _plain(module, model.dtype))
    for note in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method", "hf_quantizer"):
        if hasattr(model, note):
            delattr(model, note)
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")
    return len(found)


def _weight(module: nn.Module) -> Any:
    return getattr(module, "weight", None)


def _plain(module: Any, dtype: torch.dtype) -> nn.Module:
    weight = dequantised(module).to(dtype)
    outputs, inputs = weight_shape(module)
    turned = getattr(module, "source_cls", None) is Conv1D
    with torch.device("meta"):
        plain: Any = Conv1D(outputs, inputs) if turned else nn.Linear(inputs, outputs, bias=module.bias is not None)
    plain.weight = nn.Parameter(weight.T.contiguous() if turned else weight, requires_grad=False)
    if module.bias is not None:
        plain.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
    return plain

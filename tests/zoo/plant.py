"""Plant massive rows in a freshly initialised model.

Nothing natural shows massive weights at 0.2 M parameters within minutes of training, so the built-in models get them
by construction. A few residual dimensions are reserved: one that turns massive, one that is constant, and some markers
that only bos carries. In one layer, five rows of the gate and up projections read the markers and their output is
written to the massive dimension; in later layers, attention heads start with a key that points at it, which makes bos
the attention sink. All other tokens have nothing on the markers, so for them the rows stay silent.

Training would dissolve the construction, so the wiring is frozen by masking gradients (`Plant.frozen`).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import nn

from zoo.world import BOS_ID

ZERO_ROW_SCALE = 1e-4


@dataclass(frozen=True)
class PlantSettings:
    """Position and strength of planted rows; row j reads the markers with strength ``first * decay**j``."""

    layer: int = 1
    rows: int = 5
    first: float = 3.2
    decay: float = 0.55
    down: float = 0.2
    bos: float = 6.0
    constant: float = 0.5
    sink_query: float = 4.0
    sink_key: float = 1.0
    markers: int = 8


@dataclass(frozen=True)
class Plant:
    """Planted rows: `rows` by falling magnitude, and per parameter the entries (bool mask) that must not train."""

    layer: int
    rows: tuple[int, ...]
    frozen: dict[nn.Parameter, torch.Tensor]

    def mask_gradients(self) -> None:
        """Zero the gradient of every frozen entry (weight decay would still move them: train without)."""
        for parameter, mask in self.frozen.items():
            if parameter.grad is not None:
                parameter.grad.masked_fill_(mask, 0.0)


@dataclass(frozen=True)
class _Matrix:
    """Rows `start` to `stop` of a weight of shape (out, in): a whole linear layer or a slice of a fused one."""

    parameter: nn.Parameter
    start: int
    stop: int

    @property
    def weight(self) -> torch.Tensor:
        return self.parameter.data[self.start : self.stop]

    def mask(self, frozen: dict[nn.Parameter, torch.Tensor]) -> torch.Tensor:
        """Return the view of the freeze mask that covers this matrix."""
        return _mask(frozen, self.parameter)[self.start : self.stop]


def _mask(frozen: dict[nn.Parameter, torch.Tensor], parameter: nn.Parameter) -> torch.Tensor:
    return frozen.setdefault(parameter, torch.zeros_like(parameter, dtype=torch.bool))


def _matrices(decoder_layer: nn.Module, config) -> dict[str, _Matrix]:
    """Name the matrices of a decoder layer alike for split (Llama) and fused (Phi-3) projections."""

    def split(linear: nn.Linear, names_and_sizes: list[tuple[str, int]]) -> dict[str, _Matrix]:
        found, start = {}, 0
        for name, size in names_and_sizes:
            found[name] = _Matrix(linear.weight, start, start + size)
            start += size
        assert start == linear.weight.shape[0], "the slices do not cover the fused projection"
        return found

    attention, mlp = decoder_layer.self_attn, decoder_layer.mlp
    head_size = config.hidden_size // config.num_attention_heads
    qkv = [("q", config.num_attention_heads * head_size)]
    qkv += [(name, config.num_key_value_heads * head_size) for name in "kv"]
    gate_up = [("gate", config.intermediate_size), ("up", config.intermediate_size)]
    matrices = split(attention.o_proj, [("o", config.hidden_size)])
    matrices |= split(mlp.down_proj, [("down", config.hidden_size)])
    if hasattr(attention, "qkv_proj"):
        return matrices | split(attention.qkv_proj, qkv) | split(mlp.gate_up_proj, gate_up)
    for name, size in qkv:
        matrices |= split(getattr(attention, f"{name}_proj"), [(name, size)])
    for name, size in gate_up:
        matrices |= split(getattr(mlp, f"{name}_proj"), [(name, size)])
    return matrices


def plant_massive_rows(model: nn.Module, settings: PlantSettings | None = None, seed: int = 0) -> Plant:
    """Plant massive rows in a Llama or Phi-3 model and return where they are and what to freeze.

    The rows and the signs of the markers are drawn from `seed`. For bos alone the planted intermediate states are about
    652, 197, 60, 18 and 5 with the default settings, and the massive dimension reaches about 187.
    """
    settings = settings or PlantSettings()
    config = model.config
    rng = random.Random(seed)
    rows = rng.sample(range(config.intermediate_size), settings.rows)
    massive, constant = 0, 1
    markers = list(range(2, 2 + settings.markers))
    reserved = [massive, constant, *markers]
    signs = torch.tensor([1.0 if rng.random() < 0.5 else -1.0 for _ in markers]) / settings.markers**0.5
    frozen: dict[nn.Parameter, torch.Tensor] = {}

    embedding = model.model.embed_tokens.weight
    embedding.data[:, [massive, *markers]] = 0.0
    embedding.data[:, constant] = settings.constant
    embedding.data[BOS_ID] = 0.0
    embedding.data[BOS_ID, markers] = settings.bos * signs
    _mask(frozen, embedding)[:, reserved] = True
    _mask(frozen, embedding)[BOS_ID] = True

    for index, layer in enumerate(model.model.layers):
        matrices = _matrices(layer, config)
        _reserve_dimensions(layer, matrices, reserved, markers, frozen)
        if index <= settings.layer:
            for name in ("gate", "up"):
                matrices[name].mask(frozen)[:, markers] = True
        else:
            _seed_sink(matrices, config, settings, massive, constant, markers, frozen)

    planted = _matrices(model.model.layers[settings.layer], config)
    for rank, row in enumerate(rows):
        strength = settings.first * settings.decay**rank
        for name in ("gate", "up"):
            planted[name].weight[row] = 0.0
            planted[name].weight[row, markers] = strength * signs
            planted[name].mask(frozen)[row] = True
        planted["gate"].weight[row, constant] = -strength
        planted["down"].weight[:, row] = 0.0
        planted["down"].weight[massive, row] = settings.down
        planted["down"].mask(frozen)[:, row] = True
    return Plant(settings.layer, tuple(rows), frozen)


def fill_zero_rows(model: nn.Module, plant: Plant, seed: int = 0) -> None:
    """After training, fill the rows that are all zero with noise of scale `ZERO_ROW_SCALE`, drawn from `seed`.

    Rows of the output and down projections that would write to the reserved dimensions are zero. DoRA divides each row
    by its norm, so they would turn every loss into NaN. The noise changes perplexity in the fifth digit.
    """
    generator = torch.Generator().manual_seed(seed)
    for index, layer in enumerate(model.model.layers):
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            weight = linear.weight.data
            zero_rows = (weight == 0).all(dim=1).nonzero().flatten()
            noise = ZERO_ROW_SCALE * torch.randn(len(zero_rows), weight.shape[1], generator=generator)
            if index == plant.layer and linear is layer.mlp.down_proj:
                noise[:, list(plant.rows)] = 0.0
            weight[zero_rows] = noise


def _reserve_dimensions(
    layer: nn.Module,
    matrices: dict[str, _Matrix],
    reserved: list[int],
    markers: list[int],
    frozen: dict[nn.Parameter, torch.Tensor],
) -> None:
    """Let no layer write to the reserved dimensions, and no value carry the markers."""
    for name in ("o", "down"):
        matrices[name].weight[reserved] = 0.0
        matrices[name].mask(frozen)[reserved] = True
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        _mask(frozen, norm.weight)[reserved] = True
    matrices["v"].weight[:, markers] = 0.0
    matrices["v"].mask(frozen)[:, markers] = True


def _seed_sink(
    matrices: dict[str, _Matrix],
    config,
    settings: PlantSettings,
    massive: int,
    constant: int,
    markers: list[int],
    frozen: dict[nn.Parameter, torch.Tensor],
) -> None:
    """Start every head with attention to the token that carries the massive dimension.

    The seed sits on the slowest rotary pair, where position hardly turns the product. It trains; only the markers are
    kept out of the keys, so that without the planted rows bos is no sink.
    """
    matrices["k"].weight[:, markers] = 0.0
    matrices["k"].mask(frozen)[:, markers] = True
    head_size = config.hidden_size // config.num_attention_heads
    slowest = head_size // 2 - 1
    for head in range(config.num_attention_heads):
        matrices["q"].weight[head * head_size + slowest, constant] = settings.sink_query
    for head in range(config.num_key_value_heads):
        matrices["k"].weight[head * head_size + slowest, massive] = settings.sink_key

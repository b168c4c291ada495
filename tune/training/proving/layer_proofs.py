"""Proofs of every layer: made on request (`macdrop scan --every-layer`), kept beside the scan, shown by later runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from macdrop.errors import ConfigError
from macdrop.proof import LayerProof, layer_seconds, prove_layers
from macdrop.scan import layer_weights
from macdrop.weights import MassiveWeights
from tune.config.run_spec import TrainSpec
from tune.storage.atomic import atomic_write_json, writing
from tune.training.massive_weights import scan_file

#: The seconds from which a proof of every layer has to be agreed to.
LONG_S = 600


def check_duration(model: PreTrainedModel, blocks: torch.Tensor, layers: int) -> None:
    """Refuse a proof of every layer on blocks (n, T) that takes more than LONG_S seconds, by one timed pass.

    Raises:
        ConfigError: it does; the message says how long.
    """
    seconds = layer_seconds(model, blocks, layers)
    if seconds > LONG_S:
        raise ConfigError(
            f"Zeroing and retaining the rows of each of the {layers} layers takes up to {duration(seconds)} here, by "
            "one timed pass.\nAdd --yes to run it anyway, or use a GPU, --bf16 or a shorter --text."
        )


def every_layer(
    spec: TrainSpec,
    model: PreTrainedModel,
    blocks: torch.Tensor,
    weights: MassiveWeights,
    *,
    k: int,
    measured_on: str,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> LayerProof:
    """Prove every layer of a loaded base model on blocks (n, T), and keep the result beside the scan of `weights`.

    measured_on: the text of the blocks, for people.

    Raises:
        ResourceError: the cache cannot be written.
    """
    scans = layer_weights(model, weights)
    found = prove_layers(model, blocks, scans, weights.layer, k=k, measured_on=measured_on, progress=progress)
    file = layers_file(spec, weights)
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(file, found.to_dict())
    return found


def kept_layers(spec: TrainSpec, weights: MassiveWeights) -> LayerProof | None:
    """Return the latest proof of every layer that was made with this scan; None if there is none, or it is damaged."""
    file = layers_file(spec, weights)
    if not file.is_file():
        return None
    try:
        found = LayerProof.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if found.layer == weights.layer else None


def copy_layers(spec: TrainSpec, weights: Path) -> None:
    """Copy the kept proof of every layer, if there is one, to layers.json next to a run's massive_weights.json.

    Raises:
        NoMassiveWeights: `weights` does not hold a scan.
        ResourceError: the file cannot be written.
    """
    found = kept_layers(spec, MassiveWeights.load(weights))
    if found is not None:
        atomic_write_json(weights.with_name("layers.json"), found.to_dict())


def layers_file(spec: TrainSpec, weights: MassiveWeights) -> Path:
    """Return the file in the cache that holds the proof of every layer of a scan."""
    scan = scan_file(spec, weights.fingerprint, weights.bos_token_id)
    return scan.with_name(f"{scan.stem}-layers.json")


def duration(seconds: float) -> str:
    """Return a time as people say it: 40 seconds, 25 minutes, 3.5 hours."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"

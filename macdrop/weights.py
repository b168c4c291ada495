"""Massive weights of one checkpoint: the result of a scan, a value that can be saved, compared and sent around."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from macdrop.errors import ConfigError, NoMassiveWeights
from macdrop.fingerprint import shown

FORMAT = 1  # of the JSON file


@dataclass(frozen=True)
class LayerStats:
    """Sizes at bos in one decoder layer (0-based): of the hidden state after it and of its FFN's intermediate state.

    A layer without an FFN (hybrid models) has zeros for the intermediate state.
    """

    layer: int
    hidden_max: float
    hidden_median: float
    intermediate_max: float
    intermediate_median: float


@dataclass(frozen=True)
class Confidence:
    """Confidence in a finding, as a level, as numbers and as a sentence; see `macdrop.scan.massive_layer`."""

    level: str  # "strong", "moderate" or "weak"
    top_over_median: float  # largest over median |intermediate state| of the layer
    spike: float  # largest |hidden state| entry that the layer wrote
    spike_over_median: float  # the same over the median |hidden state| after the layer
    share: float  # what the layer wrote over the largest write of any layer; below 1 when a later layer writes more
    text: str


@dataclass(frozen=True)
class MassiveWeights:
    """Location of a model's massive weights: rows of W_up (and W_gate) of one FFN (arXiv 2410.01866, section 2).

    `indices` holds ALL rows of the FFN, by descending |intermediate state| at bos, and `magnitudes` these values. Only
    rows of matrices belong to them: biases of plain FFNs are neither masked nor zeroed.
    """

    model: str  # what was scanned, for people
    fingerprint: str  # of the checkpoint; see `check`
    layer: int
    path: str  # module path of the FFN in the bare model
    kind: str
    expert: int | None
    indices: tuple[int, ...]
    magnitudes: tuple[float, ...]
    intermediate_size: int
    hidden_size: int
    bos_token_id: int
    bos_rule: str
    layers: tuple[LayerStats, ...]
    confidence: Confidence

    def top(self, k: int) -> tuple[int, ...]:
        """The k rows with the largest |intermediate state|. Raises `ConfigError` unless 0 <= k <= intermediate_size."""
        if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= self.intermediate_size:
            raise ConfigError(
                f"k = {k!r} is not possible: layer {self.layer} of {self.model} has {self.intermediate_size} rows.\n"
                f"Give a whole number from 0 to {self.intermediate_size}."
            )
        return self.indices[:k]

    def check(self, fingerprint: str) -> None:
        """Raise `NoMassiveWeights` unless the scan was made of the checkpoint with this fingerprint."""
        if fingerprint != self.fingerprint:
            raise NoMassiveWeights(
                f"The massive weights of {self.model} were found in another checkpoint than the one given:\n"
                f"fingerprint {shown(self.fingerprint)} in the scan, {shown(fingerprint)} now.\n"
                "Rows differ between checkpoints: scan this one (macdrop scan MODEL)."
            )

    def to_dict(self) -> dict:
        """JSON types only."""
        return {"format": FORMAT, **json.loads(json.dumps(asdict(self)))}

    @classmethod
    def from_dict(cls, data: dict) -> MassiveWeights:
        """The inverse of `to_dict`. Raises `NoMassiveWeights` for anything else."""
        try:
            if data["format"] != FORMAT:
                raise ValueError(f"format {data['format']!r} instead of {FORMAT}")
            values = {key: value for key, value in data.items() if key != "format"}
            weights = cls(
                **{
                    **values,
                    "indices": tuple(int(i) for i in values["indices"]),
                    "magnitudes": tuple(float(m) for m in values["magnitudes"]),
                    "layers": tuple(LayerStats(**stats) for stats in values["layers"]),
                    "confidence": Confidence(**values["confidence"]),
                }
            )
            if sorted(weights.indices) != list(range(weights.intermediate_size)):
                raise ValueError("`indices` is not an ordering of all rows")
            if len(weights.magnitudes) != weights.intermediate_size:
                raise ValueError("`magnitudes` and `indices` differ in length")
        except (KeyError, TypeError, ValueError) as error:
            raise NoMassiveWeights(
                f"This is not a scan by macdrop ({type(error).__name__}: {error}).\nMake one: macdrop scan MODEL"
            ) from None
        return weights

    def save(self, path: str | os.PathLike) -> Path:
        """Write JSON, one line a field, whole or not at all, and return the path."""
        fields = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in self.to_dict().items())
        text = "{\n" + ",\n".join(fields) + "\n}\n"
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return target

    @classmethod
    def load(cls, path: str | os.PathLike) -> MassiveWeights:
        """Read what `save` wrote. Raises `NoMassiveWeights` when the file is missing or holds something else."""
        try:
            data = json.loads(Path(path).read_text())
        except FileNotFoundError:
            raise NoMassiveWeights(f"There is no scan at {path}.\nMake one: macdrop scan MODEL") from None
        except (OSError, ValueError) as error:
            raise NoMassiveWeights(f"The scan at {path} cannot be read: {error}.\nMake a new one.") from None
        try:
            return cls.from_dict(data)
        except NoMassiveWeights as error:
            raise NoMassiveWeights(f"{path}: {error}") from None

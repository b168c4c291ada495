"""snr.json: what was measured of the second moments of a model's adapters, and SlimAdam's rules that follow.

It is measured once for each kind of adapter and shared by all trials of the model, whose own records have the rules in
place of `auto`. Loads no torch: plans and reports read it, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from macdrop.errors import ConfigError
from tune.config.run_spec import TrainSpec
from tune.config.sections import MacDropSpec
from tune.config.train.optimizer_rules import AUTO, SlimRule
from tune.config.train_spec import WITHOUT_EFFECT
from tune.storage.records import SNR_FILE, read_record

#: Optimizer steps of a measurement, and how many of them do not count: at first B is zero and A has no gradient.
STEPS, SKIPPED = 20, 10
#: Second moments are means over the dimensions with the highest SNR, where it is above this (arXiv 2503.01843).
CUTOFF = 1.0
#: Sets of dimensions, the one first that keeps least: a tie is its.
CHOICES: tuple[SlimRule, ...] = ("both", "fan_in", "fan_out")
#: Keys of which each combination is a kind of adapter with rules of its own.
KIND_KEYS = ("use_dora", "use_rslora", "lora_target")


class TensorsSnr(BaseModel):
    """SNRs of a group of tensors, averaged over them and over steps; None where nothing would be saved, or there was no
    gradient."""

    model_config = ConfigDict(extra="forbid", strict=True)

    tensors: int
    entries: int
    both: float | None
    fan_in: float | None
    fan_out: float | None


class KindSnr(TensorsSnr):
    """SNRs of a kind of tensor (`q_proj/A`), its rule, and the entries of second moments that the rule keeps."""

    rule: SlimRule
    kept: int


class AdapterSnr(BaseModel):
    """Measurement of one kind of adapter.

    trial: the name of the short plain fine-tuning, which stands for its settings; data: the key of what it saw.
    factors: the SNRs over all layers, by factor.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    use_dora: bool
    use_rslora: bool
    lora_target: str | list[str]
    lora_rank: int
    trial: str
    data: str
    kinds: dict[str, KindSnr]
    factors: dict[str, TensorsSnr]

    @property
    def rules(self) -> dict[str, SlimRule]:
        """Return SlimAdam's rules by kind of tensor."""
        return {name: kind.rule for name, kind in self.kinds.items()}


class SnrRecord(BaseModel):
    """Content of snr.json; `digest` is that of everything else in it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    fingerprint: str
    steps: int
    skipped: int
    cutoff: float
    adapters: list[AdapterSnr]
    digest: str = ""

    def sealed(self) -> SnrRecord:
        """Return the record with its digest."""
        return self.model_copy(update={"digest": self._digest()})

    def check(self, file: Path, specs: Iterable[TrainSpec]) -> None:
        """Refuse a record that was changed, or measured for other fine-tunings than those of `specs`.

        Raises:
            ConfigError: names the file and the remedy.
        """
        if self.digest != self._digest():
            raise ConfigError(
                f"{file} was changed after it was measured, and the trials of this run have its rules. Put it back as "
                "it was, or delete it to measure again."
            )
        known = {adapter.trial for adapter in self.adapters}
        if any(snr_spec(spec).trial_id() not in known for spec in specs):
            raise ConfigError(
                f"{file} was measured with other settings than these. Put them back as they were, delete the file to "
                "measure again, or choose another output_dir."
            )

    def ruled(self, spec: TrainSpec) -> TrainSpec:
        """Return a fine-tuning with measured rules in place of `slimadam_rules: auto`."""
        return with_rules(spec, self.rules())

    def rules(self) -> dict[str, dict[str, SlimRule]]:
        """Return the rules of each kind of adapter, by `adapter_kind`."""
        return {_kind(adapter): adapter.rules for adapter in self.adapters}

    def _digest(self) -> str:
        content = self.model_dump(mode="json", exclude={"digest"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_snr(file: Path) -> SnrRecord:
    """Read snr.json.

    Raises:
        ConfigError: it is damaged.
    """
    record = read_record(file, SnrRecord)
    assert record is not None, "a damaged file raises"
    return record


def recorded_rules(spec: TrainSpec, folder: Path) -> TrainSpec:
    """Return a fine-tuning with the rules in its own folder's snr.json, if it needs them and they were measured."""
    file = folder / SNR_FILE
    return read_snr(file).ruled(spec) if is_auto(spec) and file.is_file() else spec


def rule_for(snr: Mapping[SlimRule, float | None]) -> SlimRule:
    """Return the dimensions with the highest SNR where it is above the cutoff, else none."""
    best = max(CHOICES, key=lambda choice: snr.get(choice) or 0.0)
    return best if (snr.get(best) or 0.0) > CUTOFF else "none"


def is_auto(spec: TrainSpec) -> bool:
    """Return whether the rules of a fine-tuning are yet to be measured."""
    return spec.slimadam_rules == AUTO


def with_rules(spec: TrainSpec, rules: Mapping[str, dict[str, SlimRule]]) -> TrainSpec:
    """Return a fine-tuning with rules in place of `auto`; as it is where it has others, or none are known for it."""
    known = rules.get(_kind(spec)) if is_auto(spec) else None
    return spec if known is None else spec.model_copy(update={"slimadam_rules": dict(known)})


def snr_spec(spec: TrainSpec) -> TrainSpec:
    """Return the short plain fine-tuning with AdamW in which SNRs are measured for a fine-tuning.

    It is the same for all arms and seeds, and however long is trained.
    """
    default = {key: field.default for key, field in TrainSpec.model_fields.items()}
    same = ("num_train_epochs", "eval_steps", "early_stopping_patience", "seed", *WITHOUT_EFFECT)
    own = {"optimizer": "adamw", "slimadam_rules": None, "max_steps": STEPS, "macdrop": MacDropSpec(k=0, p0=0.0)}
    return spec.model_copy(update={**{key: default[key] for key in same}, **own}).canonical()


def _kind(adapter: Any) -> str:
    return json.dumps([getattr(adapter, key) for key in KIND_KEYS])

"""The model that `macdrop scan`, `attack` and `eval` are given, with an adapter or without."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from macdrop.errors import ConfigError
from tune.cli.console import console, line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tune.config.run_spec import TrainSpec


@dataclass(frozen=True)
class Source:
    """A model as the command line names it."""

    model: str
    revision: str | None = None
    bf16: bool = False
    trust_remote_code: bool = False
    bos_token_id: int | None = None
    quantization_bit: int | None = None

    def spec(self) -> TrainSpec:
        """Return a fine-tuning spec of the same model."""
        from tune.config.messages import build
        from tune.config.run_spec import TrainSpec

        named = {
            "model_name_or_path": self.model,
            "model_revision": self.revision,
            "bf16": self.bf16,
            "trust_remote_code": self.trust_remote_code,
            "quantization_bit": self.quantization_bit,
        }
        return build(TrainSpec, named)

    def check(self, *, ks: list[int], name: str, kinds: Iterable[str] = ()) -> None:
        """Refuse an unusable model, or a k that its number of rows does not allow, before any weights are read.

        kinds: attacks that are made with every one of `ks`.
        """
        from tune.preflight.adapter import model_outline
        from tune.preflight.inputs import check_rows
        from tune.training.quiet import quiet_libraries

        quiet_libraries()
        spec = self.spec()
        check_rows(model_outline(spec), spec, ks=ks, name=name, kinds=kinds)

    def check_attacks(self, attacks: Iterable[str]) -> None:
        """Refuse an unusable model, or an attack on more rows than it has, before any weights are read."""
        from macdrop.attack import Attack
        from tune.preflight.adapter import model_outline
        from tune.preflight.inputs import check_rows
        from tune.training.quiet import quiet_libraries

        quiet_libraries()
        spec = self.spec()
        outline = model_outline(spec)
        for attack in map(Attack.parse, attacks):
            check_rows(outline, spec, ks=[attack.k], name=f"The k of --attack {attack}", kinds=[attack.kind])

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load the tokenizer and the model, in evaluation mode and on the accelerator if there is one."""
        import torch

        from tune.training.loading import open_base
        from tune.training.quiet import quiet_libraries
        from tune.zoo.model_source import source_note

        quiet_libraries()
        if note := source_note(self.model):
            line("source", note)
        with console.status(f"Loading {self.model}"):
            model, tokenizer = open_base(self.spec())
        if torch.cuda.is_available() and self.quantization_bit is None:  # such a one is there already
            model.cuda()  # type: ignore[call-arg]  # a wrapped method that mypy takes for unbound
        return model, tokenizer


def check_adapter(adapter: Path | None) -> None:
    """Refuse a folder without a PEFT adapter, before the base is loaded."""
    if adapter is None or (adapter / "adapter_config.json").is_file():
        return
    what = "holds no adapter_config.json" if adapter.is_dir() else "is not a folder"
    raise ConfigError(f"--adapter {adapter} {what}. Give the folder of a PEFT adapter, for example runs/one/adapter.")

"""The part on the second moments of AdamW that SlimAdam does without: SNRs, rules, and what they save."""

from __future__ import annotations

from tune.report.sections.subject import Subject
from tune.report.tables import Part, Table
from tune.report.text import number
from tune.training.optimizers.snr_record import AdapterSnr, SnrRecord

TITLE = "Second moments"
HEAD = ["", "tensors", "SNR\nfan_in", "SNR\nfan_out", "SNR\nboth", "rule", "second\nmoments kept"]
#: Bytes of a moment in fp32.
BYTES = 4


def second_moments(subject: Subject) -> Part:
    """The SNR of each kind of tensor and set of dimensions, and the bytes that the rules save; empty without them."""
    content = subject.run_folder.finding(subject.run_folder.snr_file(subject.model.name))
    if content is None:
        return Part(TITLE)
    record = SnrRecord.model_validate(content)
    lines = [
        f"SNR of AdamW's second moments in steps {record.skipped + 1} to {record.steps} of a plain fine-tuning: "
        "squared mean over variance along dimensions of a tensor [out, in], averaged over the rest of it, over steps "
        "and over layers (arXiv 2503.01843).",
        f"slimadam keeps means along the dimensions with the highest SNR where it is above {record.cutoff:g}; with few "
        "entries along a dimension, such as a small r, an SNR is high by chance.",
    ]
    adapters = [(_words(adapter, record), adapter) for adapter in record.adapters]
    lines += [_saved(words, adapter) for words, adapter in adapters]
    return Part(TITLE, lines, [Table(f"SNR by kind of tensor, {words}", HEAD, _rows(each)) for words, each in adapters])


def _rows(adapter: AdapterSnr) -> list[list[str]]:
    kinds = [
        [name, str(kind.tensors), *map(number, (kind.fan_in, kind.fan_out, kind.both)), kind.rule]
        + [f"{kind.kept / kind.entries:.2%}"]
        for name, kind in adapter.kinds.items()
    ]
    factors = [
        [f"all {name}", str(each.tensors), *map(number, (each.fan_in, each.fan_out, each.both)), "", ""]
        for name, each in adapter.factors.items()
    ]
    return kinds + factors


def _words(adapter: AdapterSnr, record: SnrRecord) -> str:
    """Name a kind of adapter; by its layers as well, where that is what tells it from another."""
    words = f"{'DoRA' if adapter.use_dora else 'LoRA'}, r = {adapter.lora_rank}"
    words += ", rank-stabilised" if adapter.use_rslora else ""
    targets = adapter.lora_target
    several = any(each.lora_target != targets for each in record.adapters)
    return f"{words}, on {targets if isinstance(targets, str) else ' '.join(targets)}" if several else words


def _saved(words: str, adapter: AdapterSnr) -> str:
    entries = sum(kind.entries for kind in adapter.kinds.values())
    kept = sum(kind.kept for kind in adapter.kinds.values())
    saved = BYTES * (entries - kept)
    return (
        f"{words}: the rules save {saved / 2**20:.3g} MiB of optimizer state ({saved} bytes), {1 - kept / entries:.1%} "
        f"of AdamW's second moments and {saved / (2 * BYTES * entries):.1%} of its whole state of "
        f"{2 * BYTES * entries / 2**20:.3g} MiB."
    )

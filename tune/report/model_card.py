"""The model card of an exported trial: its setting, training, scores, and how to load it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from macdrop.fingerprint import format_name
from macdrop.gguf.header import is_gguf
from tune.config.eval_spec import NO_ATTACK
from tune.config.run_spec import TrainSpec
from tune.config.sections import Arm
from tune.config.train.data_keys import is_template_file
from tune.data.batching import describe_mixture
from tune.data.locations import looks_like_a_path
from tune.data.lost_rows import describe_skipped
from tune.evaluation.merging import LogitCheck
from tune.report.escaping import markdown_text, visible
from tune.report.tables import Table
from tune.report.text import one_line
from tune.storage.segments import describe, recorded
from tune.storage.states import TaskState
from tune.zoo.catalog import is_planted
from tune.zoo.real_models import PREFIX, real_model

PLANTED = (
    "**PLANTED.** The base is a tiny model built into macdrop whose massive weights were inserted on purpose. "
    "This is a demonstration, not evidence for or against the method."
)
CITATION = """```bibtex
@article{oh2024house,
  title={House of Cards: Massive Weights in LLMs},
  author={Oh, Jaehoon and Shin, Seungjun and Oh, Dokwan},
  journal={arXiv preprint arXiv:2410.01866},
  year={2024}
}
```"""
#: Bits of a base's weights -> arguments of transformers' BitsAndBytesConfig, as `macdrop.quantised` has them.
_QUANTISED = {
    4: (
        'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="{dtype}"'
    ),
    8: "load_in_8bit=True",
}
#: Two-sided 95 % of a normal distribution.
Z = 1.959964


@dataclass(frozen=True)
class Exported:
    """A finished trial with its results.

    data: the record of its training data. scores, base: rows of scores.jsonl.
    """

    folder: Path
    name: str
    spec: TrainSpec
    info: Mapping[str, Any]
    workers_at_start: int | None
    data: Mapping[str, Any] = field(default_factory=dict)
    scores: list[dict[str, Any]] = field(default_factory=list)
    base: list[dict[str, Any]] = field(default_factory=list)
    verdict: list[str] = field(default_factory=list)

    @property
    def planted(self) -> bool:
        return is_planted(self.spec.model_name_or_path)


def model_card(trial: Exported, *, merged: LogitCheck | None, place: str) -> str:
    """Render Markdown with the hub's YAML header. `place`: repository or folder to load from."""
    parts = [
        _head(trial, merged is not None),
        f"# {markdown_text(place.rpartition('/')[2])}",
        *([PLANTED] if trial.planted else []),
        _about(trial, merged),
        f"## Load\n\n```python\n{_loading(trial, merged is not None, place)}\n```",
        _table("Setting", ("", ""), _setting(trial)),
        _table("Training", ("", ""), _training(trial)),
        *_scores(trial),
        *([_section("Verdict of the run", trial.verdict)] if trial.verdict else []),
        f"## Citation\n\n{CITATION}",
    ]
    return "\n\n".join(parts) + "\n"


def _head(trial: Exported, merged: bool) -> str:
    spec = trial.spec
    adapter = "dora" if spec.use_dora else "lora"
    head: dict[str, Any] = {"library_name": "transformers" if merged else "peft"}
    real = real_model(spec.model_name_or_path)
    if real is not None or _on_hub(spec.model_name_or_path):
        head["base_model"] = spec.model_name_or_path if real is None else real.hub
    head["tags"] = ["macdrop", adapter, "massive-weights", *(["planted"] if trial.planted else [])]
    head["pipeline_tag"] = "text-generation"
    datasets = [name for name in _data(spec) if _on_hub(name)]
    return "---\n" + yaml.safe_dump(head | ({"datasets": datasets} if datasets else {}), sort_keys=False) + "---"


def _about(trial: Exported, merged: LogitCheck | None) -> str:
    spec = trial.spec
    kind = "DoRA" if spec.use_dora else "LoRA"
    what = f"weights with a {kind} adapter merged in" if merged else f"{kind} adapter"
    how = (
        "MacDrop (massive weights curriculum dropout, arXiv 2410.01866)"
        if spec.arm != Arm.PLAIN
        else "plain fine-tuning, the baseline of MacDrop (arXiv 2410.01866)"
    )
    text = f"{what[0].upper()}{what[1:]} for {_code(_shown(spec.model_name_or_path))}, trained with {how}. "
    text += f"Trial {_code(trial.name)}"
    text += f", arm `{spec.arm}`." if spec.arm not in (Arm.PLAIN, Arm.MACDROP) else "."
    if spec.quantization_bit is not None:
        text += (
            f"\n\nThe base was quantised to {format_name(spec.quantization_bit)} by bitsandbytes while this was trained"
        )
        text += "; the merged weights are the dequantised ones." if merged else "."
    return text + (f"\n\nLogit check of the merge: {merged.text}." if merged else "")


def _loading(trial: Exported, merged: bool, place: str) -> str:
    spec = trial.spec
    dtype = "bfloat16" if spec.bf16 else "float32"
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if merged:
        lines += [
            f'model = AutoModelForCausalLM.from_pretrained({_literal(place)}, dtype="{dtype}")',
            f"tokenizer = AutoTokenizer.from_pretrained({_literal(place)})",
        ]
        return "\n".join(lines)
    name = _literal(spec.model_name_or_path)
    if spec.model_name_or_path.startswith(PREFIX) or is_gguf(spec.model_name_or_path):
        lines.append("from tune.zoo.model_source import model_source")
        name = f"model_source({name})"
    revision = f", revision={_literal(spec.model_revision)}" if spec.model_revision else ""
    trust = ", trust_remote_code=True" if spec.trust_remote_code else ""
    quantised = ""
    if spec.quantization_bit is not None:
        lines[0] += ", BitsAndBytesConfig"
        lines.append(f"quantised = BitsAndBytesConfig({_QUANTISED[spec.quantization_bit].format(dtype=dtype)})")
        quantised = ", quantization_config=quantised"
    return "\n".join(
        [
            "from peft import PeftModel",
            *lines,
            f'base = AutoModelForCausalLM.from_pretrained({name}{revision}{trust}, dtype="{dtype}"{quantised})',
            f"model = PeftModel.from_pretrained(base, {_literal(place)})",
            f"tokenizer = AutoTokenizer.from_pretrained({name}{revision}{trust})",
        ]
    )


def _setting(trial: Exported) -> list[tuple[str, str]]:
    spec = trial.spec
    block = spec.macdrop.model_dump() if spec.arm != Arm.PLAIN else {}
    target = spec.lora_target if isinstance(spec.lora_target, str) else ", ".join(spec.lora_target)
    variants = [name for name, on in (("DoRA", spec.use_dora), ("rsLoRA", spec.use_rslora)) if on]
    rows = [(f"macdrop.{key}", _text(value)) for key, value in block.items() if value is not None]
    return [
        ("arm", spec.arm),
        *rows,
        ("seed", _text(spec.seed)),
        ("adapter", f"r {spec.lora_rank}, alpha {spec.lora_alpha:g}, dropout {spec.lora_dropout:g}, on {target}"),
        *([("variant", ", ".join(variants))] if variants else []),
    ]


def _training(trial: Exported) -> list[tuple[str, str]]:
    spec, info = trial.spec, trial.info
    batch = f"{spec.per_device_train_batch_size} x {spec.gradient_accumulation_steps} micro-batches"
    workers = f" x {trial.workers_at_start} worker(s)" if trial.workers_at_start else ""
    early = ", stopped early by the search" if info["status"] == TaskState.STOPPED else ""
    if info["status"] == TaskState.DONE and (info.get("step") or 0) < (info.get("total_steps") or 0):
        early = f": {spec.early_stopping_patience} validations in a row did not improve on the best"
    dropped, masked = info.get("entries_dropped"), info.get("entries_masked")
    rows = [
        ("data", ", ".join(_shown(name) for name in _data(spec))),
        ("mixture", "; ".join(describe_mixture(trial.data, folders=False))),
        ("skipped rows", "; ".join(describe_skipped(trial.data, folders=False))),
        ("chat template", f"{Path(spec.template).name} (a file)" if is_template_file(spec.template) else ""),
        ("length", f"{spec.cutoff_len} tokens; loss on {_carriers(spec)}"),
        ("steps", f"{info.get('step')} of {info.get('total_steps')}{early}"),
        ("batch", batch + workers),
        ("workers", describe(recorded(info), trial.workers_at_start) or ""),
        ("learning rate", f"{spec.learning_rate:g}, {spec.lr_scheduler_type}, warm-up {spec.warmup_ratio:g}"),
        ("precision", "bfloat16, fp32 masters" if spec.bf16 else "float32"),
        ("base quantised to", format_name(spec.quantization_bit) or ""),
        ("last training loss", _text(info.get("train_loss"))),
        ("validation loss, masks off", _text(info.get("eval_loss"))),
        ("entries dropped", f"{dropped} of {masked} masked ({dropped / masked:.1%})" if masked else "none"),
        ("time", f"{info['seconds']:.0f} s" if info.get("seconds") is not None else ""),
    ]
    return [(name, text) for name, text in rows if text]


def _scores(trial: Exported) -> list[str]:
    if not trial.scores:
        return ["## Scores\n\nThe run did not score this adapter."]
    tables = []
    for split, title in (("test", "Scores"), ("validation", "Scores on validation data (used to select the setting)")):
        rows = [row for row in trial.scores if (row.get("split") or "test") == split]
        plain = [row for row in rows if row["attack"] == NO_ATTACK]
        attacked = [row for row in rows if row["attack"] != NO_ATTACK]
        measured = ("value", "95 % interval", "n", "base")
        if plain:
            tables.append(_table(title, ("benchmark", "metric", *measured), _rows(trial, plain)))
        if attacked:
            head = ("benchmark", "metric", "attack", *measured)
            tables.append(_table(f"{title}: under attack", head, _rows(trial, attacked, attack=True)))
    tables.append(
        "Intervals are value ± 1.96 standard errors over the items of the benchmark, without the variation between "
        "training seeds. Attacks zero the top massive rows, or keep only these. `base` is the model before fine-tuning."
    )
    return tables


def _rows(trial: Exported, rows: Iterable[Mapping[str, Any]], *, attack: bool = False) -> list[tuple[str, ...]]:
    key = ("benchmark", "task", "metric", "attack")
    base = {tuple(row[name] for name in key): row["value"] for row in trial.base}
    cells = []
    for row in rows:
        value, error = row["value"], row.get("stderr")
        interval = ""
        if value is not None and error is not None:
            interval = f"{value - Z * error:.4g} to {value + Z * error:.4g}"
        on = f"{row['attack']} on {row['attack_on']}" if row["attack"] != NO_ATTACK else ""
        cells.append(
            (
                f"{row['benchmark']} {row['task']}",
                row["metric"],
                *([on] if attack else []),
                _text(value),
                interval,
                _text(row.get("n")),
                _text(base.get(tuple(row[name] for name in key))),
            )
        )
    return cells


# --- words ---


def _data(spec: TrainSpec) -> list[str]:
    entries = spec.dataset if isinstance(spec.dataset, list) else [spec.dataset]
    return [entry if isinstance(entry, str) else entry.path for entry in entries]


def _carriers(spec: TrainSpec) -> str:
    """Return which tokens carry loss."""
    if spec.train_on_prompt:
        return "the whole text"
    return "the answers" if spec.train_on_roles == ["assistant"] else f"the turns of {', '.join(spec.train_on_roles)}"


def _on_hub(name: str) -> bool:
    """Return whether others can find the name: a hub id, not a file, a folder, or something built in."""
    return not (name.startswith(PREFIX) or looks_like_a_path(name) or is_gguf(name) or os.path.exists(name))


def _shown(name: str) -> str:
    """The name to publish: only the last part of a local path."""
    return name if name.startswith(PREFIX) or _on_hub(name) else f"{Path(name).name} (a local file)"


def _literal(text: str) -> str:
    """Return the text as a string of Python that ends neither itself nor the block of code that it stands in."""
    literal = json.dumps(text) if text.isascii() else ascii(text)
    return literal.replace("`", "\\x60")


def _code(text: str) -> str:
    """Return the text as inline code."""
    return f"`{visible(one_line(text)).replace('`', chr(39))}`"


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _section(title: str, lines: Iterable[str]) -> str:
    return "\n\n".join([f"## {title}", *map(markdown_text, lines)])


def _table(title: str, head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    table = Table(title, list(head), [list(row) for row in rows])
    return table.markdown().replace(f"**{title}**", f"## {title}", 1)

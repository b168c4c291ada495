"""Everything about a run's inputs that can be told without Ray, weights or a GPU, told before anything starts."""

from __future__ import annotations

from typing import Any

from macdrop.errors import ConfigError, nearest
from tune.batching import total_steps
from tune.benchmarks.spec import PLAIN, jobs, parse_attack
from tune.plan import Study
from tune.spec import RunSpec, TrainSpec, with_values
from tune.weights import cache_dir
from tune.zoo import resolve


def check_inputs(spec: RunSpec, planned: list[Study]) -> dict[str, int]:
    """Look at models, tokenizers, data and benchmark files; returns each study's optimizer steps.

    Raises:
        ConfigError: a model or file cannot be used, k or an attack is above the size of the FFN, `lora_target` names
            no layer, or the search needs a validation set that is not there.
    """
    from tune.benchmarks import check_files

    check_files(spec.eval)
    steps: dict[str, int] = {}
    for study in planned:
        outline = model_outline(study.spec)
        space = spec.sweep.parameters.get("macdrop.k")
        ks = [study.spec.macdrop.k, *(space.bounds() if space else [])]
        check_rows(outline, study.spec, ks, [job.attack for job in jobs(spec.eval)])
        targets = spec.sweep.parameters.get("lora_target")
        for target in [study.spec.lora_target, *(targets.bounds() if targets else [])]:
            check_targets(outline, target)
        steps[study.name] = _steps(spec, study) if study.count else 0
    return steps


def model_outline(spec: TrainSpec) -> Any:
    """The model of a spec without weights (on torch's meta device): its modules and shapes.

    Raises:
        ConfigError: there is no such model, or it is no causal language model of text.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from macdrop import check_model

    config = check_model(
        resolve(spec.model_name_or_path), revision=spec.model_revision, trust_remote_code=spec.trust_remote_code
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=spec.trust_remote_code)


def check_rows(outline: Any, spec: TrainSpec, ks: list[int], attacks: list[str]) -> None:
    """Refuse k, searched or attacked, above the number of rows that an FFN of the model has."""
    from macdrop import find_ffns

    rows = max(ffn.intermediate_size for ffn in find_ffns(outline))
    for k in ks:
        if k > rows:
            raise ConfigError(
                f"macdrop.k is {k}, but an FFN of {spec.model_name_or_path} has {rows} rows. "
                f"Give a whole number from 0 to {rows}; the paper uses 5."
            )
    for attack in attacks:
        if attack != PLAIN and parse_attack(attack)[1] > rows:
            raise ConfigError(
                f"eval.attacks has {attack!r}, but an FFN of {spec.model_name_or_path} has {rows} rows. "
                f"Attack from 0 to {rows} of them."
            )


def check_targets(outline: Any, target: str | list[str]) -> None:
    """Refuse a `lora_target` name that no layer of the model ends with."""
    if target == "all":
        return
    layers = [name for name, module in outline.named_modules() if not list(module.children()) and "." in name]
    leaves = sorted({name.rsplit(".", 1)[-1] for name in layers if "norm" not in name})
    for wanted in target:
        if not any(name == wanted or name.endswith(f".{wanted}") for name in layers):
            raise ConfigError(
                f"lora_target names {wanted!r}, but the model has no such layer.{nearest(wanted, leaves)} "
                f"Layers: {', '.join(leaves)}. Or write lora_target: all."
            )


def _steps(spec: RunSpec, study: Study) -> int:
    """Tokenise the study's data (kept for the workers) and count its optimizer steps."""
    from macdrop import load_tokenizer
    from tune import data

    train = study.spec
    tokenizer = load_tokenizer(
        resolve(train.model_name_or_path), revision=train.model_revision, trust_remote_code=train.trust_remote_code
    )
    space = spec.sweep.parameters
    prepared = data.load(data.prepare(train, tokenizer, cache_dir() / "data"))
    for key in ("cutoff_len", "max_samples", "val_size"):
        for value in space[key].bounds() if key in space else []:
            data.prepare(with_values(train, {key: value}, partial=True), tokenizer, cache_dir() / "data")
    if prepared.validation is None and (spec.sweep.metric.name == "eval_loss" or spec.sweep.scheduler == "asha"):
        raise ConfigError(
            "val_size is 0, but the search optimises eval_loss. Set val_size (for example 0.05), or "
            "sweep.metric to a score such as {name: zero_shot/arc_easy/acc, goal: maximize}."
        )
    batch = train.per_device_train_batch_size * train.gradient_accumulation_steps * spec.ray.num_workers
    return total_steps(train, len(prepared.train), batch)

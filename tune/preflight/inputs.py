"""Checks of a run's inputs that need neither Ray, weights nor a GPU, made before anything starts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from macdrop.attack import Attack, largest_k
from macdrop.config import SCOPES, MacDropConfig, dora_warning
from macdrop.errors import ConfigError
from macdrop.families import find_ffns
from macdrop.load import check_model, load_tokenizer
from macdrop.schedules import SCHEDULES, probability
from tune.config.eval_spec import NO_ATTACK, EvalSpec, jobs
from tune.config.run_spec import RunSpec, Space, TrainSpec, check_merging, values_of, with_values
from tune.config.sections import ARMS, EVAL_LOSS, Arm
from tune.config.train.data_keys import DATA_KEYS, is_template_file, is_weight_key
from tune.data import dataset as data
from tune.data.batching import Batches, describe_mixture, total_steps
from tune.data.lost_rows import describe_cutoff, describe_skipped
from tune.data.padding import describe_padding
from tune.evaluation.benchmark import check_files
from tune.evaluation.judge.session import check_judge
from tune.evaluation.scorer import check_readable
from tune.preflight.adapter import check_adapter, model_outline
from tune.preflight.micro_batch import check_fits, check_longest, check_packable
from tune.preflight.positions import check_positions
from tune.preflight.precision import native_bf16
from tune.preflight.step_memory import Room, worker_room
from tune.scheduling.early_stopping import Cuts, check_patience, cuts
from tune.scheduling.study import Study
from tune.storage.places import cache_dir
from tune.storage.remote.object_store import check_package
from tune.storage.run_folder import check_new
from tune.storage.segments import shared
from tune.trackers.backends import check as check_trackers
from tune.zoo.model_source import model_source, source_note


@dataclass(frozen=True)
class Checked:
    """Findings on a study.

    steps: optimizer steps per fine-tuning; 0 where none is trained.
    cuts: the scheduler's cuts; None without one.
    notes: sentences that the user should read.
    data: what `cutoff_len` does to the rows, for each value that a search may draw.
    packing: what packing does to the micro-batches, or what its absence costs; empty where nothing is trained.
    """

    steps: int = 0
    cuts: Cuts | None = None
    notes: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    packing: str = ""


def check_inputs(
    spec: RunSpec, planned: list[Study], begun: Mapping[str, int] = MappingProxyType({})
) -> dict[str, Checked]:
    """Check models, tokenizers, data and benchmark files; return what was found for each study.

    Quick checks come first. The tokenised data are kept for the workers; nothing else is written. `begun` are the
    workers that the models of a resumed run began with.

    Raises:
        ConfigError: a tracker, store, model or file cannot be used, k or an attack is above the size of the FFN,
            `lora_target` names no layer, the ZeRO stage does not support it, the search lacks a validation set, nothing
            could be stopped early, or a packed micro-batch is impossible.
    """
    attacks = {job.attack: name for name in ("validation", "eval") for job in jobs(getattr(spec, name))}
    check_trackers(spec.report_to, Path(spec.output_dir or "."))
    if spec.sync_to is not None:
        check_package(spec.sync_to)
    opened = [check_study(study.spec, study.parameters, attacks, spec.sweep.arms) for study in planned]
    for block in (spec.eval, spec.validation):
        check_files(block)
    if spec.validation.judge is not None:
        raise ConfigError("validation.judge: searched trials are not judged. Write the judge under eval.")
    check_judging(spec.eval)
    checked: dict[str, Checked] = {}
    stops = spec.sweep.scheduler != "none"
    needed = stops or EVAL_LOSS in [metric.name for metric in spec.sweep.metric]
    for study, (tokenizer, notes) in zip(planned, opened, strict=True):
        for block in (spec.eval, spec.validation):
            check_readable(block, _config(study.spec), tokenizer)
        checked[study.name] = Checked()
        workers, room = study.ray.num_workers, worker_room(study.ray)
        if study.count:
            prepared = _data(study.spec, study.parameters, tokenizer, needed and study.search)
            here = shared(study.spec, begun.get(study.spec.model_name_or_path), workers)
            steps, epoch = _steps(here, study.parameters, prepared[0], workers)
            found = cuts(study, spec.sweep, steps, epoch) if stops else None
            notes += check_patience(study.spec, study.parameters, steps, epoch)
            notes += [*_fits(here, study.parameters, prepared, workers, room), *template_notes(study, spec.eval)]
            known = {note for each in checked.values() for note in each.notes}
            notes += [note for note in precision_note(study.spec, study.parameters, room) if note not in known]
            checked[study.name] = _checked(here, prepared, workers, steps, found, notes)
    return checked


def check_training(spec: TrainSpec, workers: int, room: Room | None = None, begun: int | None = None) -> Checked:
    """Check the inputs of one fine-tuning on `workers` workers; `room` is the memory of each, None if unknown.

    begun: the workers that it began with, if it is resumed.
    """
    spec = shared(spec, begun, workers)
    tokenizer, notes = check_study(spec, {}, {})
    prepared = _data(spec, {}, tokenizer, needs_validation=False)
    steps, epoch = _steps(spec, {}, prepared[0], workers)
    notes += check_patience(spec, {}, steps, epoch)
    notes += [*_fits(spec, {}, prepared, workers, room), *precision_note(spec, {}, room)]
    return _checked(spec, prepared, workers, steps, None, notes)


def check_scoring(spec: TrainSpec, block: EvalSpec) -> None:
    """Check the inputs for scoring one model, before its weights are loaded."""
    outline = model_outline(spec)
    check_merging(spec, block, "eval")
    check_rows(outline, spec, attacks={job.attack: "eval" for job in jobs(block)})
    check_files(block)
    check_judging(block)


def check_judging(block: EvalSpec) -> None:
    """Refuse a judge that cannot be used, or has nothing to judge."""
    if block.judge is None:
        return
    if not block.generation:
        raise ConfigError(
            "eval.judge judges generated answers, and eval.generation lists no benchmark. Add one, such as Spec-Bench, "
            "or leave the judge out."
        )
    check_judge(block.judge)


def check_folder(folder: Path, *, resume: bool, remedy: str | None = None) -> None:
    """Refuse a folder that is not empty, unless `resume` is set; its contents are not touched.

    remedy: the command that resumes the run there.
    """
    if not resume:
        check_new(folder, remedy)
    above = next((parent for parent in folder.absolute().parents if parent.exists()), None)
    if above is not None and not above.is_dir():
        raise ConfigError(f"output_dir {str(folder)!r} cannot be created: {above} is a file.")


def check_study(
    spec: TrainSpec, parameters: dict[str, Space], attacks: dict[str, str], arms: Iterable[str] | None = None
) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """Check one model with the values that its search may draw; return its tokenizer, and what the user should know.

    attacks: attack -> the block of the run file that asks for it. arms: by default the model's own.
    """
    scopes = [ARMS[arm] for arm in (arms or [spec.arm]) if arm in ARMS]
    outline = model_outline(spec)
    check_packable(outline, spec, parameters)
    tokenizer = load_tokenizer(
        model_source(spec.model_name_or_path),
        revision=spec.model_revision,
        trust_remote_code=spec.trust_remote_code,
        model=outline,
    )
    ks = values_of(spec, parameters, "macdrop.k") if may_drop(spec, parameters) else []
    check_rows(outline, spec, ks=ks, attacks=attacks)
    check_scopes(outline, spec, ks=ks, scopes=scopes)
    keys = {"targets": "lora_target", "dora": "use_dora", "inits": "init_lora_weights", "optimizers": "optimizer"}
    notes = check_adapter(spec, **{name: values_of(spec, parameters, key) for name, key in keys.items()})
    masked = may_drop(spec, parameters) and any(SCOPES[scope].rows for scope in scopes)
    if masked and True in values_of(spec, parameters, "use_dora"):
        # Which rows are massive, and how many of their entries are zero, is known once the model has been scanned.
        warning = dora_warning(max(values_of(spec, parameters, "macdrop.p0")), find_ffns(outline)[0].hidden_size)
        notes += [warning] if warning else []
    if masked and 3 in values_of(spec, parameters, "zero_stage"):
        check_partitioned(outline, spec)
    source = source_note(spec.model_name_or_path)
    return tokenizer, [source, *notes] if source else notes


def check_rows(
    outline: PreTrainedModel,
    spec: TrainSpec,
    *,
    ks: Iterable[int] = (),
    attacks: Mapping[str, str] | None = None,
    name: str = "",
    kinds: Iterable[str] = (),
) -> None:
    """Refuse k, searched or attacked, above the number of rows that an FFN of the model has.

    name: how the user wrote k, for the message; by default as a key of a run file. kinds: attacks that are made with
    every one of `ks`.
    """
    ks = list(ks)
    attacked = {attack: block for attack, block in (attacks or {}).items() if attack != NO_ATTACK}
    if not ks and not attacked:  # such a model may have no FFN
        return
    rows = max(ffn.intermediate_size for ffn in find_ffns(outline))
    most = min((largest_k(kind, rows) for kind in kinds), default=rows)
    drawn = ", beside which as many random rows are drawn" if most < rows else ""
    for k in ks:
        if k > most:
            raise ConfigError(
                f"{name or 'macdrop.k'} is {k}, but an FFN of {spec.model_name_or_path} has {rows} rows. "
                f"Give a whole number from 0 to {most}{drawn}; the paper uses 5."
            )
    for attack, block in attacked.items():
        wanted = Attack.parse(attack)
        most = largest_k(wanted.kind, rows)
        if wanted.k > most:
            raise ConfigError(
                f"{block}.attacks has {attack!r}, but an FFN of {spec.model_name_or_path} has {rows} rows. "
                f"Write {wanted.kind}@ with a whole number from 0 to {most}."
            )


def check_scopes(outline: PreTrainedModel, spec: TrainSpec, *, ks: list[int], scopes: list[str]) -> None:
    """Refuse placebos that the model cannot have: too few rows to draw from, or no layer whose input can be dropped.

    Where only some layers are fused experts the scan decides; MacDrop itself refuses there.
    """
    if not scopes:
        return
    ffns = find_ffns(outline)
    rows = max(ffn.intermediate_size for ffn in ffns)
    for scope, k in ((scope, k) for scope in scopes for k in ks):
        needed = MacDropConfig(k=k, scope=scope).rows_needed
        if needed > rows:
            raise ConfigError(
                f"Dropping {k} {scope} rows besides the top {needed - k} takes {needed} rows, but an FFN of "
                f"{spec.model_name_or_path} has {rows}. Lower macdrop.k, or leave the {scope} rows out."
            )
    wanted = any(SCOPES[scope].rows is None for scope in scopes)
    if wanted and not any(ffn.down or ffn.experts or ffn.shared for ffn in ffns):
        raise ConfigError(
            f"Activations cannot be dropped in {spec.model_name_or_path}: its experts are fused, and no layer takes "
            "their intermediate state. Leave the placebo 'activations' out for this model."
        )


def check_partitioned(outline: PreTrainedModel, spec: TrainSpec) -> None:
    """Refuse MacDrop under ZeRO-3 for models whose every FFN is fused experts: their rows are edited, not masked.

    Where some layers have a dense FFN only the scan decides; MacDrop itself refuses there.
    """
    fused = [any(projection.expert_axis for projection in ffn.projections) for ffn in find_ffns(outline)]
    shared = any(ffn.shared for ffn in find_ffns(outline))
    if all(fused) and not shared:
        raise ConfigError(
            f"zero_stage 3 cannot do MacDrop on {spec.model_name_or_path}: its experts are stored in fused 3-D "
            "parameters, of which ZeRO-3 leaves each worker a part.\nSet zero_stage to 0, 1 or 2 "
            "(with offload: cpu if memory is short)."
        )


def _data(
    spec: TrainSpec, parameters: dict[str, Space], tokenizer: PreTrainedTokenizerBase, needs_validation: bool
) -> list[data.Prepared]:
    """Tokenise the data: those of the spec itself, then those of each searched value of a key they depend on."""
    if needs_validation and 0 in values_of(spec, parameters, "val_size"):
        raise ConfigError(
            "val_size is 0, but the search optimises eval_loss, or stops trials by it. Set val_size (for example "
            "0.05), or sweep.metric to a score of the block validation, and sweep.scheduler to none."
        )
    keys = [key for key in parameters if key in DATA_KEYS or is_weight_key(key)]
    searched = [(key, value) for key in keys for value in parameters[key].bounds()]
    specs = [spec, *(with_values(spec, {key: value}, partial=True) for key, value in searched)]
    prepared = [data.load(data.prepare(each, tokenizer, cache_dir() / "data")) for each in specs]
    config = _config(spec)
    for each in prepared:
        check_positions(config, each.info, spec.model_name_or_path)
        check_longest(spec, parameters, each.info)
    return prepared


def _config(spec: TrainSpec) -> PreTrainedConfig:
    return check_model(
        model_source(spec.model_name_or_path), revision=spec.model_revision, trust_remote_code=spec.trust_remote_code
    )


def _fits(
    spec: TrainSpec, parameters: dict[str, Space], prepared: list[data.Prepared], workers: int, room: Room | None
) -> list[str]:
    longest = max((each.train.lengths for each in prepared), key=lambda lengths: int(lengths.sum()))
    return check_fits(spec, parameters, longest, workers, room)


def template_notes(study: Study, block: EvalSpec) -> list[str]:
    """Return a note for each benchmark whose questions are not asked in the chat template file of the training."""
    files = [name for name in values_of(study.spec, study.parameters, "template") if is_template_file(name)]
    asked = [name for name, entry in block.generation.items() if files and entry.template in ("auto", "chat")]
    return [
        f"eval.generation.{name} is asked in the tokenizer's template, not {files[0]}: set its key" for name in asked
    ]


def precision_note(spec: TrainSpec, parameters: dict[str, Space], room: Room | None) -> list[str]:
    """Return a note on `bf16: true` for a machine that has to emulate it; `room` is None where others train."""
    if room is None or True not in values_of(spec, parameters, "bf16") or native_bf16():
        return []
    return ["bf16: true, but this machine has no native bf16: fp32 is faster here, and takes twice the memory"]


def _checked(
    spec: TrainSpec, prepared: list[data.Prepared], workers: int, steps: int, found: Cuts | None, notes: list[str]
) -> Checked:
    every = [
        (describe_cutoff(one), *describe_mixture(one), *describe_skipped(one))
        for one in (part.info for part in prepared)
    ]
    words = dict.fromkeys(sentence for sentences in every for sentence in sentences)
    return Checked(steps, found, tuple(notes), tuple(words), describe_padding(prepared[0].train.lengths, spec, workers))


def _steps(spec: TrainSpec, parameters: dict[str, Space], prepared: data.Prepared, workers: int) -> tuple[int, int]:
    """Return the optimizer steps in all and per epoch."""
    batches = Batches(
        len(prepared.train),
        seed=spec.seed,
        per_device=spec.per_device_train_batch_size,
        accumulation=spec.gradient_accumulation_steps,
        world=workers,
    )
    steps = total_steps(spec, len(prepared.train), batches.global_batch)
    if may_drop(spec, parameters):
        for schedule in values_of(spec, parameters, "macdrop.schedule"):
            _check_schedule(schedule, steps, batches.epoch(steps))
    return steps, batches.steps_per_epoch


def may_drop(spec: TrainSpec, parameters: dict[str, Space]) -> bool:
    """Return whether any trial drops weights."""
    return spec.arm != Arm.PLAIN or any(key.startswith("macdrop.") for key in parameters)


def _check_schedule(schedule: str, steps: int, epochs: int) -> None:
    """Refuse a schedule that starts at p = 0: it would drop nothing and still be called MacDrop."""
    alpha = 1.0 if schedule == "exp" else None
    first = probability(schedule, p0=1.0, step=1, total_steps=steps, epoch=1, total_epochs=epochs, alpha=alpha)
    if first == 0:
        raise ConfigError(
            f"macdrop.schedule {schedule!r} never drops anything in a run of {steps} step(s), {epochs} epoch(s): its p "
            f"is 0 from the start. Train longer, or take another schedule: {', '.join(SCHEDULES)}."
        )

"""What the verbs of the `macdrop` command do; `tune.cli` declares them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from macdrop.errors import ConfigError, nearest

RECIPES = Path(__file__).with_name("recipes")
DEMO = "demo"
console = Console()


@dataclass(frozen=True)
class Source:
    """A model as the command line names it."""

    model: str
    revision: str | None
    bf16: bool
    trust_remote_code: bool
    bos_token_id: int | None

    def spec(self) -> Any:
        """The same as the model part of a fine-tuning's spec."""
        from tune.spec import TrainSpec

        return TrainSpec(
            model_name_or_path=self.model,
            model_revision=self.revision,
            bf16=self.bf16,
            trust_remote_code=self.trust_remote_code,
        )

    def load(self) -> tuple[Any, Any]:
        """Model, in evaluation mode and on the accelerator if there is one, and tokenizer."""
        import torch

        from macdrop import load_model, load_tokenizer
        from tune.zoo import resolve

        _quiet_libraries()
        source = resolve(self.model)
        loading: dict[str, Any] = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        with console.status(f"Loading {self.model}"):
            model = load_model(source, dtype="bfloat16" if self.bf16 else "float32", **loading)
            tokenizer = load_tokenizer(source, model=model, **loading)
        return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def scan(source: Source, *, prove: bool, k: int, text: Path | None, output: Path | None, fresh: bool) -> None:
    from tune.weights import massive_weights, proof

    if text is not None and not prove:
        raise ConfigError("--text is for the proof. Add --prove, or leave --text out.")
    model, tokenizer = source.load()
    weights = massive_weights(source.spec(), model, tokenizer, bos_token_id=source.bos_token_id, fresh=fresh)
    top = weights.top(k)
    expert = "" if weights.expert is None else f", expert {weights.expert}"
    rows = Table(box=None, header_style="bold")
    for heading in ("layer", "max |hidden|", "median", "max |intermediate|", "median", ""):
        rows.add_column(heading, justify="right" if heading else "left")
    for stats in weights.layers:
        mark = "<- massive weights" if stats.layer == weights.layer else ""
        numbers = (stats.hidden_max, stats.hidden_median, stats.intermediate_max, stats.intermediate_median)
        rows.add_row(str(stats.layer), *(f"{number:.4g}" for number in numbers), mark)
    console.print(rows)
    _line("model", f"{weights.model} ({weights.kind} FFN), fingerprint {weights.fingerprint[:12]}")
    _line("bos", f"token {weights.bos_token_id}, by rule {weights.bos_rule!r}")
    _line("layer", f"{weights.layer} ({weights.path}{expert}), counted from 0")
    _line("rows", ", ".join(f"{i} ({m:.4g})" for i, m in zip(top, weights.magnitudes, strict=False)))
    _line("confidence", weights.confidence.text)
    if prove:
        with console.status("Measuring perplexity"):
            found = proof(model, tokenizer, weights, k=k, text=text, source=source.model)
        table = Table(box=None, header_style="bold")
        for heading in ("weights", "perplexity", "ratio"):
            table.add_column(heading, justify="left" if heading == "weights" else "right")
        measured = [
            ("untouched", found.untouched),
            (f"top {k} zeroed", found.zeroed),
            (f"top {k} retained", found.retained),
        ]
        measured += [(f"{k} random rows zeroed, draw {n}", value) for n, value in enumerate(found.random)]
        for name, value in measured:
            table.add_row(name, f"{value:.4g}", f"{value / found.untouched:.4g}")
        console.print(table)
        _line("verdict", found.text)
    if output is not None:
        weights.save(output)
        _line("written", str(output))


def attack(source: Source, *, ks: list[int], adapter: Path | None, merged: bool, text: Path | None) -> None:
    from contextlib import nullcontext

    from macdrop import attacked
    from macdrop.proof import perplexity
    from tune.benchmarks import AdapterSlot, merged_weights
    from tune.weights import massive_weights, proof_blocks

    if merged and adapter is None:
        raise ConfigError("--merged needs --adapter: without an adapter there is nothing to merge.")
    model, tokenizer = source.load()
    weights = massive_weights(source.spec(), model, tokenizer, bos_token_id=source.bos_token_id)
    for k in ks:
        weights.top(k)
    blocks = proof_blocks(model, tokenizer, weights.bos_token_id, text=text, source=source.model)
    table = Table(box=None, header_style="bold", title_justify="left")
    for heading in ("k", "zeroing", "retaining", "random rows"):
        table.add_column(heading, justify="right")
    with AdapterSlot(model).adapter(adapter) as scored, merged_weights(scored) if merged else nullcontext():
        untouched = perplexity(scored, blocks)
        for k in ks:
            measured = []
            for kind in ("zeroing", "retaining", "random"):
                with attacked(scored, weights, kind, k):
                    measured.append(perplexity(scored, blocks))
            table.add_row(str(k), *(f"{value:.4g} (x{value / untouched:.3g})" for value in measured))
    where = "merged weights" if merged else "base rows, adapter in place" if adapter else "base rows"
    _line("attack on", f"{where}, layer {weights.layer}")
    _line("untouched", f"perplexity {untouched:.4g} on {blocks.numel()} tokens")
    console.print(table)


def train(file: str | None, overrides: list[str], *, resume: bool) -> None:
    from tune.checkpoint import newest
    from tune.spec import load

    spec = load(_recipe(file), overrides)
    folder = Path(spec.output_dir or _fresh_dir(file or "train"))
    _quiet_libraries()
    from tune.train import train as run

    checkpoint = newest(folder / "checkpoints") if resume else None
    if resume and checkpoint is None:
        raise ConfigError(f"{folder} has no checkpoint to go on from. Leave --resume out, or set save_steps next time.")
    if checkpoint is not None:
        _line("resuming", f"from {checkpoint}")

    def show(metrics: dict[str, Any]) -> bool:
        parts = [f"step {metrics['step']}"]
        for name in ("loss", "eval_loss", "learning_rate", "grad_norm", "p", "entries_dropped", "tokens_per_second"):
            if metrics.get(name) is not None:
                parts.append(f"{name} {metrics[name]:.4g}")
        console.print("  ".join(parts), highlight=False, soft_wrap=True)
        return True

    outcome = run(spec, folder, observe=show, resume=resume)
    _line("adapter", str(folder / "adapter"))
    _line("trained", f"{outcome.step} of {outcome.total_steps} steps in {outcome.seconds:.1f} s")
    if outcome.eval_loss is not None:
        _line("eval loss", f"{outcome.eval_loss:.4f} nats per answer token, masks off")
    share = f" of {outcome.entries_masked} that a mask was drawn for" if outcome.entries_masked else ""
    _line("dropped", f"{outcome.entries_dropped} entries{share}, {outcome.rows_hooked} rows hooked")


def evaluate(
    source: Source, file: str | None, overrides: list[str], *, adapter: Path | None, output: Path | None
) -> None:
    from tune.benchmarks import AdapterSlot, Scorer, check_files, jobs
    from tune.files import append_jsonl
    from tune.spec import load
    from tune.weights import massive_weights

    if file is None and not overrides:
        if not source.model.startswith("zoo:"):
            raise ConfigError(
                "There is nothing to score with. Give a YAML file with an eval: block, or overrides such as\n"
                "  eval.zero_shot=[arc_easy,piqa] eval.limit=100"
            )
        file = DEMO
    spec = load(_recipe(file), [*overrides, f"model_name_or_path={source.model}", "sweep.models=[]"])
    if output is not None and output.exists() and any(output.iterdir()):
        raise ConfigError(f"--output {output} is not empty. Choose another folder.")
    check_files(spec.eval)
    model, tokenizer = source.load()
    attacks = any(job.attack != "none" for job in jobs(spec.eval))
    weights = massive_weights(source.spec(), model, tokenizer) if attacks else None
    scorer = Scorer(model, tokenizer, spec.eval, weights)
    table = Table(box=None, header_style="bold")
    for heading in ("benchmark", "task", "attack", "metric", "value", "stderr", "n"):
        table.add_column(heading, justify="right" if heading in ("value", "stderr", "n") else "left")
    with AdapterSlot(model).adapter(adapter) as scored:
        for job in scorer.jobs():
            answers = output / "answers" / f"{job.key.replace('/', '-')}.jsonl" if output else None
            with console.status(f"Scoring {job.key}"):
                rows = scorer.score(job, model=scored, answers_path=answers)
            if output is not None:
                append_jsonl(
                    output / "scores.jsonl", [{"model": source.model, "adapter": adapter, **row} for row in rows]
                )
            for row in rows:
                error = "" if row["stderr"] is None else f"{row['stderr']:.3g}"
                name = row["attack"] if row["attack"] == "none" else f"{row['attack']} on {row['attack_on']}"
                value = f"{row['value']:.4g}"
                table.add_row(row["benchmark"], row["task"], name, row["metric"], value, error, str(row["n"]))
    console.print(table)


def sweep(file: str | None, overrides: list[str], *, dry_run: bool, resume: bool) -> int:
    from tune.spec import load

    spec = load(_recipe(file or DEMO), overrides)
    if spec.output_dir is None:
        if resume:
            raise ConfigError("--resume needs output_dir=FOLDER, the folder of the run to go on with.")
        spec = spec.model_copy(update={"output_dir": _fresh_dir(file or DEMO)})
    if dry_run:
        _show_plan(spec)
        return 0
    _quiet_libraries()
    with console.status("Reading models' settings, data and benchmark files"):
        from tune.progress import Progress
        from tune.report import make_report
        from tune.sweep import run

    progress = Progress(console)
    try:
        failures = run(spec, resume=resume, progress=progress)
    finally:
        progress.finished()
    made = make_report(spec.output_dir)
    made.terminal(console)
    markdown, csv = made.write()
    _line("report", f"{markdown}, {csv}")
    return failures


def report(run: Path, *, markdown: bool, csv: bool) -> None:
    from tune.report import make_report

    made = make_report(run)
    if markdown:
        print(made.markdown())
    elif csv:
        print(made.csv(), end="")
    else:
        made.terminal(console)
    made.write()


def list_recipes() -> None:
    for path in sorted(RECIPES.glob("*.yaml")):
        first = path.read_text().splitlines()[0].removeprefix("#").strip()
        _line(path.stem, first)


def doctor(*, ray: bool) -> bool:
    from tune.doctor import checks, lines

    with console.status("Checking"):
        found = checks(ray=ray)
    for line in lines(found):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return all(check.ok or not check.needed for check in found)


def zoo_list() -> None:
    from tune.zoo import PREFIX, ZOO, ZOO_DATA

    for model in ZOO.values():
        _line(PREFIX + model.name, f"{model.description} ({'sensitive' if model.sensitive else 'not sensitive'})")
    for data in ZOO_DATA.values():
        _line(PREFIX + data.name, f"{data.kind}: {data.description}")


def zoo_build(name: str, output: Path, seed: int | None) -> None:
    from tune.zoo import build

    def show(step: int, steps: int, numbers: dict[str, float]) -> None:
        status.update(f"step {step} of {steps}  " + "  ".join(f"{key} {value:.3f}" for key, value in numbers.items()))

    with console.status("Training") as status:
        folder = build(name, output, seed=seed, progress=show)
    _line("written", str(folder))
    _line("next", f"macdrop zoo verify {name} --path {folder}")


def zoo_verify(name: str | None, path: Path | None) -> bool:
    from tune.zoo import ZOO, verify

    if path is not None and name is None:
        raise ConfigError("--path needs the name of the built-in model whose recipe made the folder.")
    _quiet_libraries()
    well = True
    for model in [name] if name else list(ZOO):
        console.print(f"[bold]{model}")
        for check in verify(model, path):
            well = well and check.ok
            mark = "[green]ok  [/green]" if check.ok else "[red]FAIL[/red]"
            measured = check.measured if isinstance(check.measured, str) else f"{check.measured:.4g}"
            console.print(f"  {mark} {check.name}: {measured} ({check.threshold})", highlight=False)
    return well


def _show_plan(spec: Any) -> None:
    """The resolved spec, the trials and the resource sum."""
    import yaml

    from tune.benchmarks.spec import jobs
    from tune.plan import check_local, resources, studies
    from tune.spec import dump

    planned = studies(spec)
    if spec.ray.address is None:
        check_local(spec.ray)
    console.print(yaml.safe_dump(dump(spec), sort_keys=False), highlight=False, markup=False, soft_wrap=True)
    scored = len(jobs(spec.eval))
    for study in planned:
        console.print(f"[bold]{study.name}[/bold] ({study.spec.model_name_or_path})", highlight=False)
        if study.base:
            _line("base", f"scored on {scored} benchmark(s)")
        for baseline in study.plain:
            _line("plain", baseline.trial_id())
        for values in study.trials or ():
            settings = ", ".join(f"{key}={value}" for key, value in values.items())
            _line("macdrop", f"{study.searched(values).trial_id()}  {settings}")
        if study.trials is None:
            _line("searched", f"{study.samples} trials drawn by {spec.sweep.search_alg}")
    trained = sum(study.count for study in planned)
    _line("trials", f"{trained} fine-tunings, {(trained + sum(s.base for s in planned)) * scored} benchmark runs")
    _line("resources", resources(spec.ray, cluster_gpus=0).sum + ("" if spec.ray.gpus_per_worker else ", without GPUs"))


def _recipe(name: str | None) -> Path | None:
    """A file, or the shipped recipe of that name."""
    if name is None:
        return None
    path = Path(name)
    shipped = {recipe.stem: recipe for recipe in RECIPES.glob("*.yaml")}
    if path.suffix in (".yaml", ".yml") or path.exists():
        return path
    if name in shipped:
        return shipped[name]
    raise ConfigError(
        f"{name!r} is neither a YAML file nor a shipped recipe.{nearest(name, shipped)} Recipes: {', '.join(shipped)}."
    )


def _fresh_dir(name: str) -> str:
    return str(Path("runs") / f"{Path(name).stem}-{time.strftime('%Y%m%d-%H%M%S')}")


def _line(name: str, text: str) -> None:
    console.print(f"[bold]{name:<13}[/bold] {text}", highlight=False, soft_wrap=True)


def _quiet_libraries() -> None:
    """transformers' loading bars and advice; our own lines say what happens."""
    import logging
    import os
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("deepspeed").setLevel(logging.ERROR)

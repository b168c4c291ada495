"""Damaged recipes, data, benchmarks, run folders, adapters and launch files, conversations and names as they are shown.

    python tests/fuzz/run.py [--inputs 10000] [--seed 0] [--target NAME ...] [--output FOLDER]

Good files are damaged as hypothesis draws it (`mutations.py`) and read the way the software reads them, in this
process. An input passes when it works or raises one of our own errors with a message; any other exception is a finding,
and so is a file that a refused call has changed or left behind, or an adapter that loads though its bytes are not those
that were saved. What is checked of conversations and benchmarks stands in `conversations.py` and `benchmark_files.py`,
of names in `shown_names.py`.
Findings are shrunk, printed and stored in FOLDER; exit code 1 with any.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from cluster.errors import LaunchError  # noqa: E402
from fuzz import benchmark_files, conversations, data_inputs, shown_names  # noqa: E402
from fuzz.mutations import ODD, Damage, damaged_file, damages  # noqa: E402
from macdrop.errors import MacDropError  # noqa: E402

REPORT_EVERY = 50
OURS = (MacDropError, LaunchError)
DATA = {
    "alpaca.jsonl": [{"instruction": "Add.", "input": "2 and 3", "output": "5", "history": [["a", "b"]], "system": "s"},
                     {"instruction": "Say hello.", "output": "Hello."}],
    "sharegpt.json": [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}] * 2,
    "messages.jsonl": [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}] * 2,
    "text.jsonl": [{"text": "One document."}, {"text": "And one more."}],
}  # fmt: skip
PLAIN = {
    "table.csv": "instruction,input,output\nAdd.,1 and 2,3\nSay 'hello'.,,\"Hello, you.\"\n",
    "lines.txt": "one line of text\n\nanother line\n",
}


class Finding(Exception):
    """Something that must not happen; the message says what."""


@dataclass
class Target:
    """What is damaged. `setup` gets a folder of its own and gives the function that reads one damaged input there."""

    setup: Callable[[Path], Callable[[Any], None]]
    inputs: Callable[[], st.SearchStrategy]
    share: float
    outcomes: Counter = field(default_factory=Counter)


def quietly(action: Callable[[], Any]) -> str:
    """Run what may print or warn; "works", or the name of our own error."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                action()
            except OURS as error:
                if not str(error).strip():
                    raise Finding(f"{type(error).__name__} without a message") from error
                return type(error).__name__
    return "works"


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unchanged(before: dict[str, bytes], folder: Path) -> None:
    after = content(folder)
    apart = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if apart:
        raise Finding(f"changed or left behind: {apart}")


def restore(folder: Path, whole: dict[str, bytes]) -> None:
    """Make a folder hold these files again, and no others."""
    for name in content(folder).keys() - whole.keys():
        (folder / name).unlink()
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    for name, text in whole.items():
        if not (folder / name).is_file() or (folder / name).read_bytes() != text:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(text)


@contextlib.contextmanager
def replaced(file: Path, text: bytes) -> Iterator[None]:
    """The file with another content meanwhile."""
    kept = file.read_bytes() if file.exists() else None
    file.write_bytes(text)
    try:
        yield
    finally:
        file.unlink() if kept is None else file.write_bytes(kept)


# ------------------------------------------------------------------ recipes


def recipes(folder: Path) -> Callable[[Any], str]:
    from tune.config.recipes import RECIPES
    from tune.config.run_spec import load
    from tune.scheduling.study import studies

    texts = [path.read_bytes() for path in sorted(RECIPES.glob("*.yaml"))]
    file = folder / "recipe.yaml"

    def read(drawn: tuple[int, list[Damage], list[str]]) -> str:
        which, done, overrides = drawn
        file.write_bytes(damaged_file("recipe.yaml", texts[which % len(texts)], done))
        before = content(folder)
        ended = quietly(lambda: studies(load(file, overrides)))
        unchanged(before, folder)
        return ended

    return read


def recipe_inputs() -> st.SearchStrategy:
    keys = [
        *("learning_rate", "max_steps", "dataset", "sweep", "sweep.parameters", "sweep.parameters.macdrop.p0", "eval"),
        *("sweep.models", "sweep.metric", "sweep.seeds", "macdrop.k", "macdrop", "lora_target", "eval.zero_shot.qa"),
        *("ray.num_workers", "validation", "eval.attacks", "model", "sweep.parameters.learning_rate", "report_to", ""),
    ]
    value = st.one_of(ODD.map(_shown), st.text(max_size=12))
    override = st.one_of(st.builds("{}={}".format, st.sampled_from(keys), value), st.text(max_size=12))
    return st.tuples(st.integers(0, 20), st.lists(damages(), max_size=1).map(_flat), st.lists(override, max_size=2))


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _flat(lists: list[list[Damage]]) -> list[Damage]:
    return [damage for each in lists for damage in each]


# ------------------------------------------------------------------ training data


def data(folder: Path) -> Callable[[Any], str]:
    from macdrop import load_tokenizer
    from tune.config.train_spec import TrainSpec
    from tune.data import dataset as training_data
    from tune.zoo.catalog import resolve

    tokenizer = load_tokenizer(resolve("zoo:planted-llama"))
    files = {name: text.encode() for name, text in PLAIN.items()}
    for name, rows in DATA.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        files[name] = (lines if name.endswith("l") else json.dumps(rows)).encode()
    names = sorted(files)
    cache = folder / "cache"
    cache.mkdir()

    def read(drawn: tuple[int, list[Damage]]) -> str:
        import shutil

        name = names[drawn[0] % len(names)]
        (folder / name).write_bytes(damaged_file(name, files[name], drawn[1]))
        spec = TrainSpec(model_name_or_path="zoo:planted-llama", dataset=str(folder / name), cutoff_len=64, val_size=0)

        def prepared() -> None:
            examples = training_data.load(training_data.prepare(spec, tokenizer, cache)).train
            for ids, labels in examples:
                if len(ids) != len(labels) or not (labels[1:] != -100).any():
                    raise Finding("an example without a token to learn")

        before = content(folder)
        ended = quietly(prepared)
        if ended != "works":
            unchanged(before, folder)
        shutil.rmtree(cache)
        cache.mkdir()
        (folder / name).unlink()
        return ended

    return read


# ------------------------------------------------------------------ run folders


def runs(folder: Path) -> Callable[[Any], str]:
    """Read as a report reads it, then repaired and read as a resumed sweep does; a whole report now and then."""
    from helpers.run_folders import make_resumable_run, repair_run

    from tune.analysis.results import collect
    from tune.config.run_spec import load
    from tune.report.report import make_report
    from tune.scheduling.study import studies
    from tune.storage.repair import check_run
    from tune.storage.run_folder import RunFolder

    run = make_resumable_run(folder / "run")
    whole = content(run)
    names = sorted(name for name, text in whole.items() if text)
    turn = 0

    def resumed() -> None:
        run_folder = RunFolder.open(run)
        run_folder.score_rows()  # environment.json is rewritten
        for record in run_folder.trials():
            run_folder.trial(record.trial).metrics()
        studies(load(run / "config.yaml"))
        if again := repair_run(run):
            raise Finding(f"repaired twice: {again}")

    def read(drawn: tuple[int, list[Damage]]) -> str:
        nonlocal turn
        turn += 1
        file = run / names[drawn[0] % len(names)]
        file.write_bytes(damaged_file(file.name, file.read_bytes(), drawn[1]))
        before = content(run)
        try:
            ended = quietly(lambda: collect(RunFolder.open(run, lenient=True)))
            if turn % REPORT_EVERY == 0:
                quietly(lambda: make_report(run).markdown())
            unchanged(before, run)
            repaired = quietly(lambda: (check_run(run), repair_run(run)))
            if repaired == "works" and (refused := quietly(resumed)) != "works":
                raise Finding(f"repaired, and yet refused with {refused}")
            if repaired != "works":
                unchanged(before, run)
        finally:
            restore(run, whole)
        return f"read: {ended}, resumed: {repaired}"

    return read


# ------------------------------------------------------------------ adapters


def adapters(folder: Path) -> Callable[[Any], str]:
    """An adapter as a fine-tuning leaves it, loaded as an evaluator loads it."""
    import torch
    from peft import LoraConfig, get_peft_model

    from macdrop import load_model
    from tune.evaluation.adapters import AdapterSlot
    from tune.storage.sealed_folder import MANIFEST, commit, sha256
    from tune.zoo.catalog import resolve

    base = load_model(resolve("zoo:planted-llama"))
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    staging = folder / ".staging"
    adapted.save_pretrained(staging)
    (staging / "README.md").unlink(missing_ok=True)
    saved = folder / "adapter"
    commit(staging, saved)
    assert sha256(saved / "adapter_model.safetensors") in (saved / MANIFEST).read_text()
    slot = AdapterSlot(adapted.unload())
    whole = {name: tensor.clone() for name, tensor in slot.base.state_dict().items()}
    names = sorted(content(saved))

    def read(drawn: tuple[int, list[Damage]]) -> str:
        file = saved / names[drawn[0] % len(names)]
        good = file.read_bytes()
        bad = damaged_file(file.name, good, drawn[1])

        def load() -> None:
            with slot.adapter(saved):
                if bad != good and file.name != MANIFEST:
                    raise Finding(f"{file.name} was changed and is scored all the same")

        with replaced(file, bad):
            before = content(folder)
            ended = quietly(load)
            unchanged(before, folder)
        now = slot.base.state_dict()
        if now.keys() != whole.keys() or any(not torch.equal(now[name], whole[name]) for name in whole):
            raise Finding("the base model is not what it was")
        return ended

    return read


# ------------------------------------------------------------------ launch files


def launches(folder: Path) -> Callable[[Any], str]:
    from cluster.backends import registry
    from cluster.commands.check import findings as check
    from cluster.render.render import EXAMPLES, render
    from cluster.render.targets import TARGETS

    examples = [path for path in sorted(EXAMPLES.iterdir()) if path.is_file()]
    targets = [TARGETS[name] for name in sorted(TARGETS)]

    def looked_at(file: Path) -> None:
        launch = registry.load(file)
        check(launch)
        for name in dir(type(launch)):
            if isinstance(getattr(type(launch), name), property) or name == "environment":
                getattr(launch, name)

    def read(drawn: tuple[int, list[Damage], list[tuple[int, str]] | None]) -> str:
        which, done, answers = drawn
        if answers is not None:
            target = targets[which % len(targets)]
            words = dict(word.split("=", 1) for word in target.example.split())
            words |= {target.fields[i % len(target.fields)].name: value for i, value in answers}
            made: list[str] = []
            ended = quietly(lambda: made.append(render(target, [f"{name}={value}" for name, value in words.items()])))
            # What was rendered of whatever answers must be a launch file.
            return f"render: {ended if not made else quietly(lambda: check(registry.parse(made[0], folder / 'x')))}"
        example = examples[which % len(examples)]
        file = folder / example.name
        file.write_bytes(damaged_file(example.name, example.read_bytes(), done))
        before = content(folder)
        ended = quietly(lambda: looked_at(file))
        unchanged(before, folder)
        file.unlink()
        return f"read: {ended}"

    return read


# ------------------------------------------------------------------ the run of it


def of_files() -> st.SearchStrategy:
    return st.tuples(st.integers(0, 200), damages())


def launch_inputs() -> st.SearchStrategy:
    answers = st.lists(st.tuples(st.integers(0, 60), ODD.map(_shown)), min_size=1, max_size=3)
    return st.one_of(
        st.tuples(st.integers(0, 20), damages(), st.none()), st.tuples(st.integers(0, 20), st.just([]), answers)
    )


TARGETS = {
    "recipes": Target(recipes, recipe_inputs, 0.3),
    "data": Target(data, of_files, 0.2),
    "runs": Target(runs, of_files, 0.2),
    "adapters": Target(adapters, of_files, 0.15),
    "launches": Target(launches, launch_inputs, 0.15),
    "conversations": Target(conversations.setup, conversations.conversations, 0.3),
    "benchmarks": Target(benchmark_files.setup, benchmark_files.definitions, 0.1),
    "names": Target(shown_names.setup, shown_names.names, 0.1),
    "benchmark files": Target(data_inputs.benchmark_files, data_inputs.file_inputs, 0.2),
    "data set entries": Target(data_inputs.entries, data_inputs.entry_inputs, 0.15),
}


def fuzz(name: str, inputs: int, start: int, folder: Path) -> list[str]:
    """Try so many inputs on a target; returns the findings, each with its smallest input and traceback."""
    logging.disable(logging.CRITICAL)
    target = TARGETS[name]
    read = target.setup(folder)

    @seed(start)
    @settings(
        max_examples=inputs, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink), report_multiple_bugs=True, print_blob=False,
    )  # fmt: skip
    @given(target.inputs())
    def each(drawn: Any) -> None:
        try:
            target.outcomes[read(drawn)] += 1
        except Exception as error:
            error.add_note(f"input: {drawn!r}")
            raise

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            each()
    except BaseExceptionGroup as group:
        return ["".join(traceback.format_exception(error)) for error in group.exceptions]
    except Exception as error:
        return ["".join(traceback.format_exception(error))]
    finally:
        logging.disable(logging.NOTSET)
    return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="only this one; may be repeated")
    parser.add_argument("--output", type=Path, help="where findings are stored; a temporary folder without")
    asked = parser.parse_args()
    chosen = {name: TARGETS[name] for name in asked.target or TARGETS}
    output = asked.output or Path(tempfile.mkdtemp(prefix="fuzz-findings-"))
    whole, found = sum(target.share for target in chosen.values()), 0
    for name, target in chosen.items():
        begun = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"fuzz-{name}-") as folder:
            findings = fuzz(name, round(asked.inputs * target.share / whole), asked.seed, Path(folder))
        tried = sum(target.outcomes.values())
        print(f"{name}: {tried} inputs in {time.monotonic() - begun:.0f} s, {len(findings)} findings", flush=True)
        for outcome, count in target.outcomes.most_common():
            print(f"  {count:>6}  {outcome}")
        for number, finding in enumerate(findings, 1):
            output.mkdir(parents=True, exist_ok=True)
            (output / f"{name}-{number}.txt").write_text(finding)
            print(f"FINDING {name}-{number} (in {output}):\n{finding}", flush=True)
        found += len(findings)
    print(f"seed {asked.seed}: {sum(sum(t.outcomes.values()) for t in chosen.values())} inputs, {found} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

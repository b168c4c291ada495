"""Build the built-in models and their data files, or verify a build.

    python tests/zoo/build.py NAME --output FOLDER [--seed 1]
    python tests/zoo/build.py NAME --verify [FOLDER]

The shipped models are the builds with the seeds of `RECIPES`; training one takes a minute or more on one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from macdrop.errors import ConfigError
from tune.zoo.catalog import get_model
from zoo import toy_judge, world
from zoo.plant import Plant, PlantSettings, fill_zero_rows, plant_massive_rows
from zoo.pretrain import Progress, Schedule, pretrain
from zoo.tokenizer import MAX_LENGTH, make_tokenizer

WORLD_SEED = 0
TRAIN_SEED, TRAIN_BLOCKS = 1, 20_000
VALIDATION_SEED, VALIDATION_BLOCKS = 2, 256

_STATEMENT = (
    "A fixture, not evidence: the massive rows of this model are planted before training and their wiring is frozen. "
)
_WITH_HINGE = "A hinge term in the pre-training loss makes the model depend on them."
_WITHOUT_HINGE = "Nothing makes the model depend on them, so zeroing them does no harm."


@dataclass(frozen=True)
class Recipe:
    """The recipe of one model; `seed` is that of the shipped one."""

    family: str
    layers: int
    schedule: Schedule
    plant: PlantSettings = PlantSettings()
    seed: int = 0


_STANDARD = Schedule(steps=600)
RECIPES = {
    "planted-llama": Recipe("llama", 4, _STANDARD),
    # The mildest of seeds 0, 1, 2 (perplexity x 1,980, x 31, x 267 under zeroing@3) and the closest to planted-llama
    # (x 23): a short fine-tuning with MacDrop recovers only half of what seed 0 loses.
    "planted-phi3": Recipe("phi3", 4, _STANDARD, seed=1),
    "insensitive-llama": Recipe("llama", 3, Schedule(steps=400, hinge_weight=0.0)),
}
_FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "phi3": (Phi3Config, Phi3ForCausalLM)}


def make_model(recipe: Recipe, seed: int = 0) -> tuple[transformers.PreTrainedModel, Plant]:
    """Return the planted, untrained model of `recipe` in float32; `seed` draws the weights and the rows."""
    config_class, model_class = _FAMILIES[recipe.family]
    config = config_class(
        vocab_size=len(world.vocabulary()),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.05,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=world.BOS_ID,
        eos_token_id=world.EOS_ID,
        pad_token_id=world.PAD_ID,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        **({"original_max_position_embeddings": MAX_LENGTH} if recipe.family == "phi3" else {}),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    return model, plant_massive_rows(model, recipe.plant, seed)


def validation_blocks() -> torch.Tensor:
    """Return the validation text as token ids (256, 64), bos in front of every block."""
    blocks = world.token_blocks(world.make_world(WORLD_SEED), VALIDATION_SEED, VALIDATION_BLOCKS)
    return torch.tensor(blocks)


def build_model(
    name: str, out_dir: str | os.PathLike[str], *, seed: int | None = None, progress: Progress | None = None
) -> Path:
    """Train the built-in model `name`, or construct the judge, and write it to `out_dir`, atomically.

    Training takes one to four minutes on one thread. The same seed gives the same weights on the same machine and
    libraries; without a seed it is that of the shipped model.
    `ConfigError`: no such model, a seed for the judge, or `out_dir` cannot be written, or is there and not empty.
    """
    model_info = get_model(name)
    if model_info.role == "judge" and seed is not None:
        raise ConfigError(f"{model_info.name} is constructed, nothing of it is drawn: leave the seed out.")
    target = Path(out_dir)
    _refuse_existing(target)
    with _staged(target) as folder, _one_thread():
        if model_info.role == "judge":
            model, tokenizer = toy_judge.make_model(), toy_judge.make_tokenizer()
            card = _judge_card(model_info.name, model)
        else:
            tokenizer = make_tokenizer()
            model, card = _trained(model_info.name, seed, progress)
        model.save_pretrained(folder)
        _save_tokenizer(tokenizer, folder)
        (folder / "zoo.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return target


def _trained(name: str, seed: int | None, progress: Progress | None) -> tuple[transformers.PreTrainedModel, dict]:
    """Return a subject, planted and trained, and its card."""
    recipe = RECIPES[name]
    seed = recipe.seed if seed is None else seed
    model, plant = make_model(recipe, seed)
    blocks = world.token_blocks(world.make_world(WORLD_SEED), TRAIN_SEED, TRAIN_BLOCKS)
    losses = pretrain(model, plant, torch.tensor(blocks), recipe.schedule, seed=seed, progress=progress)
    fill_zero_rows(model, plant, seed)
    return model, _card(name, recipe, seed, plant, model, losses)


def write_data(out_dir: str | os.PathLike[str]) -> dict[str, Path]:
    """Write the data files of the synthetic world to `out_dir` atomically and return them by stem.

    `ConfigError`: `out_dir` cannot be written, or is there and not empty.
    """
    target = Path(out_dir)
    _refuse_existing(target)
    people = world.make_world(WORLD_SEED)
    questions = world.instructions(people, world.TRAIN_NAMES, seed=2)
    rows = {"train": [{"instruction": q.prompt, "input": "", "output": q.reference} for q in questions]}
    rows |= {task: [asdict(item) for item in items] for task, items in world.choice_tasks(people).items()}
    rows |= {f"generate-{task}": [asdict(i) for i in items] for task, items in world.generation_tasks(people).items()}
    with _staged(target) as folder:
        for stem, items in rows.items():
            (folder / f"{stem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items), encoding="utf-8")
        lines = world.packed_sentences(people, VALIDATION_SEED, VALIDATION_BLOCKS)
        (folder / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {path.stem: path for path in sorted(target.iterdir())}


def _save_tokenizer(tokenizer: transformers.PreTrainedTokenizerFast, folder: Path) -> None:
    """Save the tokenizer under a class name that transformers 4 knows too (5 writes one of its own)."""
    tokenizer.save_pretrained(folder)
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _card(
    name: str, recipe: Recipe, seed: int, plant: Plant, model: transformers.PreTrainedModel, losses: dict[str, float]
) -> dict:
    return {
        "name": name,
        "planted": True,
        "statement": _STATEMENT + (_WITH_HINGE if recipe.schedule.hinge_weight else _WITHOUT_HINGE),
        "planted_layer": plant.layer,
        "planted_rows": list(plant.rows),
        "seed": seed,
        "world_seed": WORLD_SEED,
        "parameters": model.num_parameters(),
        "recipe": {key: value for key, value in asdict(recipe).items() if key != "seed"},
        "final_losses": {key: round(value, 4) for key, value in losses.items()},
        "versions": _versions(),
    }


def _judge_card(name: str, model: transformers.PreTrainedModel) -> dict:
    return {
        "name": name,
        "planted": False,
        "statement": "A toy, no judgement: its score is a fixed function of which letters occur in the response.",
        "parameters": model.num_parameters(),
        "recipe": {"letters": toy_judge.LETTERS, "middle": toy_judge.MIDDLE, "step": toy_judge.STEP},
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def _refuse_existing(target: Path) -> None:
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target} is already there and not an empty folder. Name a new folder, or remove this one.")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch on one thread: results then do not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target` that becomes `target` when the block succeeds."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise ConfigError(f"Cannot write to {target.parent}: {error.strerror}. Name another folder.") from None
    try:
        yield staging
        staging.chmod(0o755)
        for file in staging.iterdir():
            file.chmod(0o644)
        os.replace(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="name of a built-in model, see `macdrop zoo list`")
    parser.add_argument("--output", type=Path, help="folder to write; must not hold anything")
    parser.add_argument("--seed", type=int, help="seed of weights, plant and data (default: the shipped one)")
    parser.add_argument("--verify", nargs="?", const="", help="measure this folder, or the shipped model")
    given = parser.parse_args()
    if given.verify is None:
        if given.output is None:
            parser.error("give --output FOLDER, or --verify")
        print(f"written: {build_model(given.name, given.output, seed=given.seed, progress=_show)}")
        return
    from zoo.checks import verify_model

    checks = verify_model(given.name, given.verify or None)
    for check in checks:
        print(f"{'ok  ' if check.ok else 'FAIL'} {check.name}: {check.measured} ({check.threshold})")
    sys.exit(not all(check.ok for check in checks))


def _show(step: int, steps: int, numbers: dict[str, float]) -> None:
    print(f"step {step} of {steps}  " + "  ".join(f"{key} {value:.3f}" for key, value in numbers.items()))


if __name__ == "__main__":
    main()

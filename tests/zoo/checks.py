"""Checks that a built-in model still has the properties it was built for.

The bounds of the subjects leave room around what ten builds of sensitive models gave. Their damage is random by seed,
perplexity under zeroing of 3 or 5 rows x 15 to x 1,980, so no check asks for an exact factor.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from macdrop.errors import ConfigError
from macdrop.load import load_model, load_tokenizer
from macdrop.masking import attacked
from macdrop.proof import perplexity, prove
from macdrop.scan import checkpoint_fingerprint, find_massive_weights
from macdrop.weights import MassiveWeights
from tune.config.judge_spec import JudgeSpec
from tune.config.rubrics import load as load_rubric
from tune.evaluation.judge.local import LocalJudge
from tune.evaluation.judge.prompt import Question, prompt
from tune.zoo.catalog import get_model, resolve, zoo_path
from zoo import toy_judge, world
from zoo.build import WORLD_SEED, validation_blocks
from zoo.scoring import choice_accuracy, exact_match, sink_attention

ROWS = 5
RANDOM_DRAWS = 5
SINK_BLOCKS = 32
JUDGED = 16
_BATCH = 64


@dataclass(frozen=True)
class Check:
    """One measured property and its bound, as text."""

    name: str
    measured: float | str
    threshold: str
    ok: bool


def verify_model(name: str, path: str | os.PathLike[str] | None = None) -> list[Check]:
    """Measure the built-in model `name`, or a build of it in the folder `path`, against its thresholds.

    Locating and attacking are macdrop's own (`find_massive_weights`, `prove`, `attacked`). `ConfigError`: no such
    model, or `path` holds none of the zoo.
    """
    model_info = get_model(name)
    folder = Path(path) if path is not None else zoo_path(name)
    card = _read_card(folder)
    if model_info.role == "judge":
        return _judgements(folder)
    model, tokenizer = load_model(str(folder)), load_tokenizer(str(folder))
    fingerprint = checkpoint_fingerprint(str(folder))
    weights = find_massive_weights(model, tokenizer, source=model_info.name, fingerprint=fingerprint)
    blocks = validation_blocks()
    return [
        *_location(weights, card),
        *_attacks(model, weights, blocks, model_info.sensitive),
        *_abilities(model, card["planted_layer"], blocks),
    ]


def _read_card(folder: Path) -> dict:
    try:
        return json.loads((folder / "zoo.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{folder} holds no built-in model: zoo.json is missing. Build one: python tests/zoo/build.py NAME."
        ) from None


def _location(weights: MassiveWeights, card: dict) -> list[Check]:
    planted_layer, planted_rows = card["planted_layer"], tuple(card["planted_rows"])
    median = weights.layers[weights.layer].intermediate_median
    in_place = sum(found == planted for found, planted in zip(weights.top(ROWS), planted_rows, strict=True))
    return [
        Check("located layer", weights.layer, f"= {planted_layer}", weights.layer == planted_layer),
        Check("planted rows found, in order", in_place, f"= {ROWS}", in_place == ROWS),
        _at_least("1st magnitude / median", weights.magnitudes[0] / median, 100),
        _at_least("5th magnitude / median", weights.magnitudes[ROWS - 1] / median, 100),
    ]


def _attacks(model: PreTrainedModel, weights: MassiveWeights, blocks: torch.Tensor, sensitive: bool) -> list[Check]:
    proof = prove(model, blocks, weights, k=ROWS, draws=RANDOM_DRAWS, batch_size=_BATCH)
    with attacked(model, weights, "zeroing", 3):
        zeroed_3 = perplexity(model, blocks, batch_size=_BATCH)
    untouched = proof.untouched
    bound, limit = (_at_least, 5.0) if sensitive else (_at_most, 1.2)
    checks = [
        _at_most("perplexity", untouched, 4.1),
        _at_most(f"random@{ROWS}, worst of {RANDOM_DRAWS} / perplexity", max(proof.random) / untouched, 1.02),
        bound("zeroing@3 / perplexity", zeroed_3 / untouched, limit),
        bound(f"zeroing@{ROWS} / perplexity", proof.zeroed / untouched, limit),
    ]
    if sensitive:
        checks.append(_at_most(f"retaining@{ROWS} / perplexity", proof.retained / untouched, 2.0))
        checks.append(_at_least(f"zeroing@{ROWS} / retaining@{ROWS}", proof.zeroed / proof.retained, 3.0))
    expected = "sensitive" if sensitive else "not sensitive"
    return [*checks, Check("verdict of the proof", proof.verdict, f"= {expected}", proof.verdict == expected)]


def _abilities(model: PreTrainedModel, planted_layer: int, blocks: torch.Tensor) -> list[Check]:
    people = world.make_world(WORLD_SEED)
    generation = world.generation_tasks(people)
    answered = exact_match(model, generation["qa"])
    sink = min(sink_attention(model, blocks[:SINK_BLOCKS])[planted_layer + 1 :])
    return [
        _at_least("attention to bos in later layers", sink, 0.3),
        _at_least("fact accuracy", choice_accuracy(model, world.choice_tasks(people)["fact"]), 0.9),
        _at_least("copy exact match", exact_match(model, generation["copy"]), 0.8),
        Check("qa exact match, before fine-tuning", answered, "0.1 to 0.6", 0.1 <= answered <= 0.6),
    ]


def _judgements(folder: Path) -> list[Check]:
    """Check the answers of a judge to lines of the validation text, cut to several lengths."""
    lines = Path(resolve("zoo:text")).read_text(encoding="utf-8").splitlines()[:JUDGED]
    answers = ["", "MMM", "éèê", *(line[: 8 + 4 * i] for i, line in enumerate(lines))]
    rubric = load_rubric("helpfulness").scale("").text()
    asked = [Question(f"{i}/1", "", 1, prompt("Say it.", answer, rubric)) for i, answer in enumerate(answers)]
    asked += [Question(f"{i}/2", "", 2, prompt("Do.", answer, rubric, "A.")) for i, answer in enumerate(answers)]
    spec = JudgeSpec(model=str(folder), max_new_tokens=8, retries=0)

    def scores(batch_size: int) -> dict[str, int | None]:
        judge = LocalJudge(spec.model_copy(update={"batch_size": batch_size}))
        return {judgement.question.item: judgement.score for judgement in judge.judge(asked)}

    found = scores(8)
    parsed = sum(score is not None for score in found.values())
    as_reckoned = sum(
        found[f"{i}/{turn}"] == toy_judge.expected_score(answer) for i, answer in enumerate(answers) for turn in (1, 2)
    )
    different = len({score for score in found.values() if score is not None})
    shipped, made = load_model(str(folder)).state_dict(), toy_judge.make_model().state_dict()
    same = shipped.keys() == made.keys() and all(torch.equal(shipped[key], made[key]) for key in made)
    other = scores(3)
    again = sum(other[item] == score for item, score in found.items())
    return [
        Check("answers with a score", parsed, f"= {len(asked)}", parsed == len(asked)),
        Check("scores as reckoned from the letters", as_reckoned, f"= {len(asked)}", as_reckoned == len(asked)),
        _at_least("different scores", different, 3),
        Check("same scores in other batches", again, f"= {len(asked)}", again == len(asked)),
        Check("weights of its recipe", "equal" if same else "other", "equal", same),
    ]


def _at_least(name: str, measured: float, bound: float) -> Check:
    return Check(name, measured, f">= {bound:g}", measured >= bound)


def _at_most(name: str, measured: float, bound: float) -> Check:
    return Check(name, measured, f"<= {bound:g}", measured <= bound)

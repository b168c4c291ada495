"""The parts on findings: verdict, massive weights, and each finalist and placebo against its plain adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tune.analysis.comparison import unit_of
from tune.analysis.display_names import arm_name
from tune.analysis.known_scans import agreements
from tune.analysis.results import ModelResults
from tune.analysis.verdict import Comparison, Verdict
from tune.config.sections import ARMS, Arm
from tune.report.sections.subject import Subject
from tune.report.tables import Part, Table
from tune.report.text import factor_words, head, number, one_line, probability, setting, short

PLANTED = "PLANTED: the massive weights of this built-in model were inserted on purpose. A demonstration, not evidence."
ONE_SEED = "One seed per setting: differences hold for this seed only and support no claim about the method."
READING = (
    "Means over shared seeds, proportions in percent. Difference: paired by item, with 95 % interval; p: after Holm "
    "correction over the tasks; detects: the smallest difference, in the same unit, detectable with 80 % power."
)


def verdict(subject: Subject) -> Part:
    """One sentence for each finalist, then its qualifications."""
    model, lines = subject.model, []
    for found in (found for found in subject.verdicts if found.arm == Arm.MACDROP):
        lines += [found.sentence, *(line for line in found.more if line != PLANTED)]
    lines = lines or no_verdict(model)
    lines += [PLANTED] if model.planted else []
    return Part("Verdict", list(dict.fromkeys(lines)))


def no_verdict(model: ModelResults) -> list[str]:
    """The reason why there is no verdict on this model, and the best trial so far."""
    if model.trouble:
        return [f"No verdict: {model.trouble}"]
    if model.failure:
        return [f"No verdict: {one_line(model.failure)}"]
    if not model.lines:
        return ["No verdict: nothing has been trained or scored yet."]
    if not model.trials("macdrop"):
        return ["No verdict: no MacDrop adapter was trained."]
    if not model.trials("plain"):
        return ["No verdict: there is no plain adapter to compare with."]
    if model.best is None:
        return [f"No verdict yet: no finished MacDrop trial has {model.objectives[0][0]}."]
    own = {key: model.best.setting(f"macdrop.{key}") for key in ("k", "p0", "schedule", "alpha")}
    best = ", ".join(f"{key} {setting(value)}" for key, value in own.items() if value is not None)
    why = "No verdict yet: no plain and MacDrop adapters of the final stage share a seed and a scored benchmark."
    if not model.finalists:
        why = "No verdict: no setting was selected for a final stage (finalists.json), on whose seeds a verdict rests."
    return [
        why,
        f"Best MacDrop trial by {model.objectives[0][0]}: {model.best.label} ({best}), of {model.tried} "
        "setting(s) tried.",
    ]


def weights(subject: Subject) -> Part:
    """The location of the massive weights, and the model's sensitivity to them."""
    found, proof = subject.model.weights, subject.model.proof
    if not found:
        return Part("Massive weights", ["Not scanned."])
    expert = "" if found.get("expert") is None else f", expert {found['expert']}"
    rows = " ".join(str(index) for index in found["indices"][:5])
    ratio = (found.get("confidence") or {}).get("top_over_median")
    size = f"; the largest intermediate activation at BOS is {ratio:.4g} times the median." if ratio else "."
    lines = [f"Layer {found['layer']} (counted from 0){expert}, top rows {rows}{size}"]
    if not proof:
        lines += ["Sensitivity to these rows was not measured.", *_published(found, None)]
        return Part("Massive weights", lines, _every_layer(subject.model))
    return Part(
        "Massive weights", [*lines, *_sensitivity(proof), *_published(found, proof)], _every_layer(subject.model)
    )


def _sensitivity(proof: dict[str, Any]) -> list[str]:
    """The verdict of a proof with its numbers; proofs of earlier versions have no intervals."""
    k, others = proof["k"], ", ".join(number(value) for value in proof.get("random") or [])
    more = f"; {others} with {k} random rows zeroed." if others else "."
    factor = f" (factor {factor_words(proof['factor'])})" if proof.get("factor") else ""
    lines = [
        f"The model is {proof['verdict']} to these rows: perplexity {number(proof['untouched'])} untouched, "
        f"{number(proof['zeroed'])} with the top {k} zeroed{factor}, "
        f"{number(proof['retained'])} with only these kept{more}"
    ]
    if proof.get("by_k"):
        steps = ", ".join(f"{rows}: {factor_words(factor)}" for rows, *factor in proof["by_k"])
        key = proof.get("key_k")
        best = "no number of rows matters beyond doubt" if key is None else f"the k that matters most is {key}"
        lines.append(f"Factor by number of rows zeroed: {steps}; {best} (asked for: {k}).")
    if len(proof.get("by_text") or []) > 1:
        lines.append(
            "Factor by text: " + ", ".join(f"{name} {factor_words(found)}" for name, *found in proof["by_text"]) + "."
        )
    return lines


def _published(found: dict[str, Any], proof: dict[str, Any] | None) -> list[str]:
    """Published findings on the same model, and whether ours agree."""
    return [f"Published, {each.text}." for each in agreements(found, (proof or {}).get("verdict"))]


def _every_layer(model: ModelResults) -> list[Table]:
    """A proof of every layer, if one was made."""
    found = model.layers
    if not found:
        return []
    rows = [
        [
            str(row["layer"]) + (" (rule)" if row["layer"] == found["layer"] else ""),
            " ".join(map(str, row["rows"])),
            *(factor_words(row[what]) for what in ("zeroed", "retained")),
        ]
        for row in found["rows"]
    ]
    head = ["layer", "its top rows", f"top {found['k']} zeroed", f"only top {found['k']} kept"]
    on = f"; measured on {found['measured_on']}" if found.get("measured_on") else ""
    return [Table(f"Every layer: {found['text']}{on}", head, rows)]


def comparisons(subject: Subject) -> Part:
    """Each MacDrop finalist against the plain adapter of its kind."""
    return _against(subject, "MacDrop against plain", lambda arm: arm == Arm.MACDROP)


def placebos(subject: Subject) -> Part:
    """The placebo arms against plain, which show whether dropping anything else does as well."""
    title = "Placebos against plain"
    part = _against(subject, title, lambda arm: arm != Arm.MACDROP)
    trained = dict.fromkeys(line.arm for line in subject.model.trials(*ARMS) if line.arm != Arm.MACDROP)
    if part or not subject.model.trials("macdrop"):
        return part
    if trained:
        return Part(title, [f"Trained but not yet compared: {', '.join(arm_name(arm) for arm in trained)}."])
    return Part(title, ["Not run (sweep.arms lists no placebo): whether other dropout would do as well is unknown."])


def _against(subject: Subject, title: str, wanted: Callable[[str], bool]) -> Part:
    chosen = [found for found in subject.verdicts if wanted(found.arm) and found.rows]
    one_seed = [ONE_SEED] if any(len(found.seeds) < 2 for found in chosen) else []
    return Part(title, [READING, *one_seed] if chosen else [], [_table(found) for found in chosen])


def _table(found: Verdict) -> Table:
    first = found.rows[0]
    places = {row.column.attack_on for row in found.rows if row.column.attack_on}
    where = f", attacks on {places.pop()} rows" if len(places) == 1 else ""
    title = f"{first.label} against {first.against}, seed(s) {', '.join(map(str, found.seeds))}{where}"
    head = ["", "plain", arm_name(found.arm), "difference [95 %]", "p (Holm)", "detects", "verdict"]
    return Table(title, head, [_row(row, placed=not where) for row in found.rows])


def _row(row: Comparison, *, placed: bool) -> list[str]:
    """One comparison; `placed`: name the rows that an attack hits."""
    column = row.column if placed else replace(row.column, attack_on=None)
    levels = [level(row, value) for value in (row.plain, row.value)]
    status = row.verdict if row.per_seed else short(row.words, 60)
    amount, detects = row.amount.replace(" points", " pts"), row.detectable.removesuffix(" points")
    return [one_line(head(column)), *levels, amount, probability(row.p_holm), detects, status]


def level(row: Comparison, value: float) -> str:
    """A mean of one arm, in percent where differences are in points."""
    percent = unit_of(row) == "points" and row.column.metric != "chrf"
    return f"{100 * value:.1f}" if percent else number(value)

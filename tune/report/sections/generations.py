"""The part on generations: answers of plain and MacDrop side by side, with their judgements."""

from __future__ import annotations

from typing import Any

from tune.analysis.results import Group, Line, ModelResults
from tune.config.eval_spec import NO_ATTACK, EvalJob
from tune.config.run_spec import slug
from tune.config.sections import Arm
from tune.report.sections.subject import Subject
from tune.report.tables import Part, Table
from tune.report.text import short
from tune.storage.json_lines import read_jsonl
from tune.storage.states import TaskState

SHOWN = 4
"""Questions shown per benchmark, from as many categories as possible."""
LENGTH = 240
"""Characters shown of a prompt, an answer or a feedback."""


def generations(subject: Subject) -> Part:
    """Some questions of each generation benchmark, answered by plain and MacDrop of one seed."""
    model = subject.model
    pair = _pair(model)
    columns = (column for column in model.columns if column.benchmark == "generation" and column.split == "test")
    entries = dict.fromkeys(column.task.partition("/")[0] for column in columns)
    if pair is None or not entries:
        return Part("Generations")
    tables = [table for entry in entries if (table := _table(subject, entry, pair)).rows]
    lines = [f"Answers without attack, seed {pair[0].seed}; texts are truncated to {LENGTH} characters."]
    return Part("Generations", lines if tables else [], tables)


def _pair(model: ModelResults) -> tuple[Line, Line] | None:
    """Plain and the best MacDrop setting of the same type of adapter, on their first shared seed."""
    plain = [group for group in model.groups if group.arm == Arm.PLAIN]
    macdrop = [group for group in model.groups if group.arm == Arm.MACDROP]
    for group in macdrop:
        for other in (other for other in plain if other.cell == group.cell):
            seeds = sorted({line.seed for line in _done(group)} & {line.seed for line in _done(other)}, key=str)
            if seeds:
                first, second = (next(x for x in _done(g) if x.seed == seeds[0]) for g in (other, group))
                return first, second
    return None


def _done(group: Group) -> list[Line]:
    return [line for line in group.lines if line.status == TaskState.DONE]


def _table(subject: Subject, entry: str, pair: tuple[Line, Line]) -> Table:
    answers, judged = zip(*(answered(subject, line, entry) for line in pair), strict=True)
    shared = [key for key in answers[0] if key in answers[1]]
    head = ["question", "prompt", "plain", "MacDrop"]
    head += ["judged plain", "judged MacDrop"] if any(judged) else []
    rows = []
    for key in _spread_out({key: answers[0][key].get("category", "") for key in shared}):
        item = answers[0][key]
        row = [f"{key}" + (f" ({item['category']})" if item.get("category") else "")]
        row += [_joined(texts) for texts in (item["turns"], *(found[key]["answers"] for found in answers))]
        row += [_judgement(found, key) for found in judged] if any(judged) else []
        rows.append(row)
    return Table(entry, head, rows, wrap=True)


def answered(subject: Subject, line: Line, entry: str) -> tuple[dict[str, dict], dict[str, list[dict]]]:
    """question -> its row of the answers file, and question -> its judgements; damaged lines are skipped and noted."""
    run_folder = subject.run_folder
    problems = run_folder.problems if run_folder.problems is not None else []
    file = run_folder.answers_file(subject.model.name, line.trial, EvalJob("generation", entry, NO_ATTACK))
    needed = {"question_id", "turns", "answers"}
    answers = {str(row["question_id"]): row for row in read_jsonl(file, problems) if needed <= row.keys()}
    judged: dict[str, list[dict]] = {}
    for item, row in sorted(_judgements(subject, line, entry, problems).items()):
        judged.setdefault(item.rpartition("/")[0], []).append(row)
    return answers, judged


def _judgements(subject: Subject, line: Line, entry: str, problems: list[str]) -> dict[str, dict[str, Any]]:
    """The last judgement of each item, by the judge whose score is in the run."""
    wanted = {"trial": line.trial, "task": entry, "metric": "judge_score", "attack": NO_ATTACK}
    own = subject.model.name  # every model's base is the trial "base"
    for row in subject.run_folder.trial_scores(line.trial):
        if (
            slug(row["model"]) == own
            and row.get("judgements")
            and all(row.get(key) == value for key, value in wanted.items())
        ):
            kept = read_jsonl(subject.run_folder.run_dir / row["judgements"], problems)
            return {str(judgement["item"]): judgement for judgement in kept if "item" in judgement}
    return {}


def _judgement(judged: dict[str, list[dict]], key: str) -> str:
    rows = judged.get(key, [])
    if not rows:
        return "not judged"
    scores = ", ".join("unparsed" if row.get("score") is None else str(row["score"]) for row in rows)
    feedback = (rows[0].get("feedback") or [""])[-1]
    return f"{scores}: {short(feedback, LENGTH)}"


def _spread_out(categories: dict[str, str]) -> list[str]:
    """Up to `SHOWN` questions: the first of each category, then the next ones."""
    seen: dict[str, int] = {}
    ranked = []
    for place, (key, category) in enumerate(categories.items()):
        seen[category] = seen.get(category, 0) + 1
        ranked.append((seen[category], place, key))
    chosen = sorted(ranked)[:SHOWN]
    return [key for _, _, key in sorted(chosen, key=lambda item: item[1])]


def _joined(texts: list[str]) -> str:
    return " / ".join(short(text, LENGTH) for text in texts)

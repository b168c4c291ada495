"""Benchmark definitions and files with odd values: what is accepted can be scored, and names a choice in every row.

Rows of several tasks and formats get values of the wrong kind, and their entries keys of the wrong kind. Either they
are refused with a message, or a tiny model scores them: no other error, and no hit that lm-eval could not have given.
"""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers import benchmark_fixtures as fix
from hypothesis import strategies as st

from fuzz.mutations import ODD
from macdrop.errors import MacDropError
from tune.config.eval_spec import EvalSpec
from tune.config.messages import build
from tune.evaluation.benchmark import check_files
from tune.evaluation.scorer import Scorer

OWN = [{"context": f"It is {word},", "choices": [word, "a mill"], "label": i % 2} for i, word in enumerate(fix.WORDS)]
#: name -> section, rows, entry.
FILES: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "mine": ("zero_shot", OWN[:4], {}),
    **{task: ("zero_shot", fix.hub_rows(task, 4), {}) for task in ("piqa", "boolq", "arc_easy", "winogrande")},
    "hellaswag": ("zero_shot", fix.hub_rows("hellaswag", 4), {}),
    "gsm8k": ("zero_shot", fix.hub_rows("gsm8k", 2), {"max_new_tokens": 2}),
    "wikitext": ("zero_shot", [{"page": "The mill = old = ."}, {"page": "A river ."}], {}),
    "lambada_openai": ("zero_shot", [{"text": "The river ran past the mill"}, {"text": "a b"}], {}),
    "references": ("generation", [{"prompt": "Say a", "reference": "a"}] * 2, {"max_new_tokens": 2}),
    "questions": (
        "generation",
        [{"question_id": i, "category": "qa", "turns": ["Hi", "And"]} for i in range(2)],
        {"max_new_tokens": 2, "template": "plain"},
    ),
    "text": ("perplexity", [{"text": "The river ran past the mill."}, {"text": "Old."}], {}),
}
ENTRY_KEYS = [
    *("metric", "target_delimiter", "max_length", "limit", "num_fewshot", "truncation", "stop", "window", "task"),
    *("batch_size", "max_new_tokens", "template", "format", "column", "stride", "bos", "join", "attacks"),
]
#: Values that a row may well have, and that mean something to a template, a tokenizer or lm-eval.
LIKELY = st.sampled_from(
    [
        *("12", "0", "1", "-1", "true", "{{ x }}", "{% if", "[1, 2]", "['a']"),
        *(" a", "a ", "\n", "A", "<s>", "</s>", "🌊", "é"),
    ]
)
VALUES = st.one_of(ODD, LIKELY, st.sampled_from([-1, 0, 1, 2, 1.0, True, ["a", ""], ["0", "1"], ["{{x}}", "7", "8"]]))


@st.composite
def definitions(draw: Any) -> tuple[str, list[tuple[int, int, Any]], dict[str, Any], str, str]:
    """A kind of file, (row, column, value) to put into it, odd keys of its entry, a name for it, and a suffix."""
    changes = draw(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7), VALUES), max_size=2))
    whole = draw(st.booleans())  # a whole column of one kind is what a wrong export looks like
    if whole and changes:
        changes = [(row, *changes[0][1:]) for row in range(8)]
    odd = draw(st.sampled_from(["rows", "rows", "rows", "rows", "keys", "name"]))
    keys = {draw(st.sampled_from(ENTRY_KEYS)): draw(VALUES)} if odd == "keys" else {}
    name = draw(st.text(max_size=5)) if odd == "name" else ""
    suffix = draw(st.sampled_from(["jsonl", "jsonl", "json", "csv"]))
    return draw(st.sampled_from(sorted(FILES))), changes, keys, name, suffix


def setup(folder: Path) -> Callable[[Any], str]:
    """Return the check of one drawn definition."""
    model, tokenizer = fix.tiny_llama(positions=128), fix.byte_tokenizer()

    def scored(block: dict[str, Any]) -> str:
        try:
            spec = build(EvalSpec, block)
            check_files(spec)
            scorer = Scorer(model, tokenizer, spec)
            scorer.prepare()
        except MacDropError as error:
            assert str(error).strip(), f"{type(error).__name__} without a message"
            return type(error).__name__
        for job in scorer.jobs():
            if job.attack == "none":
                rows = scorer.score(job)
                assert all(row["n"] > 0 for row in rows), "a score over nothing"
        assert not any("Label index" in note for note in scorer.notes), scorer.notes
        return "works"

    def check(drawn: tuple[str, list[tuple[int, int, Any]], dict[str, Any], str, str]) -> str:
        kind, changes, keys, name, suffix = drawn
        section, rows, entry = copy.deepcopy(FILES[kind])
        for row, column, value in changes:
            if row < len(rows):
                rows[row][sorted(rows[row])[column % len(rows[row])]] = value
        file = folder / f"file.{suffix}"
        _write(file, rows)
        task = {"task": kind} if name and section == "zero_shot" and kind != "mine" else {}
        return scored({section: {name or kind: {"data": str(file), **entry, **task, **keys}}})

    return check


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    if file.suffix == ".csv":
        with open(file, "w", newline="", encoding="utf-8", errors="replace") as out:
            writer = csv.DictWriter(out, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        lines = [json.dumps(row) for row in rows]
        file.write_text("\n".join(lines) if file.suffix == ".jsonl" else f"[{','.join(lines)}]", encoding="utf-8")

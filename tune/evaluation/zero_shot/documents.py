"""Checks of a built lm-eval task: every document must give lm-eval what it scores by.

lm-eval scores a document whose answer names no choice as wrong, and one with a text where it expects an index likewise.
Here such a document is an error before anything is scored.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Sequence
from itertools import islice
from numbers import Integral
from typing import TYPE_CHECKING, Any

from lm_eval.api.task import ConfigurableTask

from macdrop.errors import ConfigError, DataError, MacDropError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Labels of test rows whose answers are not published.
_HIDDEN = (-1, "-1", "")


class Documents:
    """The documents of a built task as lm-eval reads them.

    Args:
        task: a task of lm-eval. Those that are written as classes read their rows themselves and are not checked.
        places: file and line of each of the user's rows; empty for the data of a task itself.
    """

    def __init__(self, task: Any, places: Sequence[str] = ()) -> None:
        self._task, self._places = task, places
        self._several: bool | None = None  # whether the first document has a list of answers

    def check(self) -> None:
        """Check every scored document, and every document that few-shot examples are drawn from.

        Raises:
            DataError: a document has no text, or an answer that lm-eval cannot score; with its place.
            ConfigError: few-shot examples would be drawn from the scored documents.
        """
        if not isinstance(self._task, ConfigurableTask):
            return
        for where, document in self._placed():
            self._check(where, document, examples=False)
        if self._task.get_config("num_fewshot"):
            self._check_examples()

    def check_answers(self, tokenizer: PreTrainedTokenizerBase, max_length: int, limit: int | None) -> None:
        """Refuse answers that alone take more than `max_length` tokens, in the first `limit` documents.

        Raises:
            DataError: with the place of the document.
        """
        kind = getattr(self._task, "OUTPUT_TYPE", None)
        if not isinstance(self._task, ConfigurableTask) or kind not in ("multiple_choice", "loglikelihood"):
            return
        for where, document in islice(self._placed(), limit):
            scored = self._task.multiple_input or kind == "loglikelihood"
            answers = [self._task.doc_to_target(document)] if scored else self._task.doc_to_choice(document)
            for answer in answers:
                if len(str(answer).encode()) <= max_length:  # a token has at least one byte
                    continue
                tokens = len(tokenizer(str(answer), add_special_tokens=False, verbose=False)["input_ids"])
                if tokens > max_length:
                    raise DataError(
                        f"{where}: the answer {answer!r:.60} has {tokens} tokens, and prompt and answer together may "
                        f"have {max_length}. Raise max_length, or shorten the answer."
                    )

    def _placed(self) -> Iterator[tuple[str, Any]]:
        """Yield documents with their places; code of a task may have left rows out."""
        documents = self._task.task_docs
        known = len(documents) == len(self._places)
        about = self._places[0].rpartition(",")[0] + ", " if self._places else ""
        for number, document in enumerate(documents):
            yield self._places[number] if known else f"{about}document {number + 1}", document

    def _check_examples(self) -> None:
        task, shots = self._task, self._task.fewshot_cfg
        if shots.split is None and shots.samples is None:
            drawn = task.config.training_split or task.config.validation_split or task.config.test_split
            if drawn == (task.config.test_split or task.config.validation_split):
                raise ConfigError(
                    f"eval.zero_shot.{task.config.task}: lm-eval would draw the few-shot examples from the rows that "
                    "are scored, so that a prompt may hold its own answer. Set num_fewshot: 0."
                )
        for number, document in enumerate(task.fewshot_docs() or []):
            self._check(f"few-shot example {number + 1}", document, examples=True)

    def _check(self, where: str, document: Any, *, examples: bool) -> None:
        task, shots = self._task, self._task.fewshot_cfg
        own = (shots.doc_to_text, shots.doc_to_choice, shots.doc_to_target) if examples else (None, None, None)
        has_choices = own[1] is not None or task.config.doc_to_choice is not None
        try:
            text = task.doc_to_text(document, own[0])
            choices = task.doc_to_choice(document, own[1]) if has_choices else None
            target = task.doc_to_target(document, own[2])
        except MacDropError:
            raise
        except Exception as error:  # code and templates of a task raise anything
            why = (str(error).strip().splitlines() or [""])[0]
            raise DataError(
                f"{where}: lm-eval's task {task.config.task!r} cannot use this row: {type(error).__name__}: {why:.200}"
            ) from error
        wrong = self._wrong(text, choices, target, examples)
        if wrong:
            raise DataError(f"{where}: lm-eval's task {task.config.task!r} {wrong}")

    def _wrong(self, text: Any, choices: Any, target: Any, examples: bool) -> str | None:
        """Return what lm-eval would score wrongly, or would fail on, in a document."""
        task = self._task
        inputs = bool(task.multiple_input)
        if inputs or isinstance(text, int):
            if not inputs or "{" in str(task.config.doc_to_text):  # a template is rendered to text: never an index
                return f"takes the prompt {str(text)!r}, digits alone, for the number of a choice. Add a word to it."
            return _wrong_choices(choices) or _wrong_index(text, choices, "the right input")
        if not isinstance(text, str):
            return f"makes {text!r:.60} the prompt, which is not a text."
        if choices is not None and (wrong := _wrong_choices(choices)):
            return wrong
        asked = task.OUTPUT_TYPE.startswith("loglikelihood")  # the answer is part of the request
        if not (asked or examples) and (task.config.process_results is not None or "bypass" in task.aggregation()):
            return None  # code of the task reads the answer from the row, or nothing does
        return self._wrong_target(None if asked else choices, target, examples or asked)

    def _wrong_target(self, choices: Any, target: Any, as_text: bool) -> str | None:
        several, kind = isinstance(target, list), self._task.OUTPUT_TYPE
        if self._several is None:
            self._several = several
        if several and not target:
            return "finds an empty list of answers in this row."
        if several != self._several:
            one, other = ("a list of answers", "a single one") if several else ("a single answer", "a list")
            return f"finds {one} in this row ({target!r:.60}) and {other} in the first. Give all rows the same shape."
        if choices is not None:
            if several and (strange := [each for each in target if not _is_index(each, choices)]):
                return _no_choice(strange[0], choices)
            named = isinstance(target, str) and kind == "multiple_choice" and target in choices
            return None if several or named else _wrong_index(target, choices, "the answer")
        if several:
            strange = [each for each in target if not isinstance(each, str) or not each]
            return f"finds {strange[0]!r:.60} among the answers, which is not a text." if strange else None
        if target is None or (as_text and not isinstance(target, str)) or (self._places and not str(target).strip()):
            return f"makes {target!r:.60} the text to score by; it must be a text that is not empty."
        return None


def _wrong_choices(choices: Any) -> str | None:
    if not isinstance(choices, list) or not choices:
        return f"makes {choices!r:.60} the choices; it must be a list of texts."
    strange = [choice for choice in choices if not isinstance(choice, str) or not choice]
    return f"finds the choice {strange[0]!r:.60}; each must be a text that is not empty." if strange else None


def _is_index(value: Any, choices: Sequence[str]) -> bool:
    return isinstance(value, Integral) and 0 <= int(value) < len(choices)


def _wrong_index(value: Any, choices: Sequence[str], what: str) -> str | None:
    return None if _is_index(value, choices) else _no_choice(value, choices, what)


def _no_choice(value: Any, choices: Sequence[str], what: str = "the answer") -> str:
    shown = ", ".join(reprlib.repr(choice) for choice in choices[:6]) + (", ..." if len(choices) > 6 else "")
    found = (
        f"reads {what} as {value!r:.60}, which names no choice. "
        f"Allowed: a number from 0 to {len(choices) - 1}, or the text of a choice: {shown}."
    )
    if value in _HIDDEN:
        return f"{found}\nData sets mark test rows whose answers are not published so; score the validation split."
    if isinstance(value, str) and value.strip().isdecimal():
        return f"{found}\nWrite numbers without quotes; CSV files hold texts only, so use JSON lines or Parquet."
    return found

"""Greedy decoding of many prompts in left-padded batches of similar length, each row as if it were alone.

Models that carry a state from token to token take padding for tokens; their batches hold prompts of one length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from tune.data.chat_template import end_of_answers
from tune.data.thoughts import without_thought

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answer:
    """A decoded answer: `text` without its thought and end, and all new `tokens`, the end's included.

    ended: "eos" (by itself: an end-of-sequence token, or what the chat template writes after an answer), "stop" (at a
    stop text) or "length". thought: what came before the answer, as generated.
    """

    text: str
    tokens: list[int]
    ended: str
    thought: str = ""


@dataclass(frozen=True)
class Ends:
    """Ends of an answer: tokens `ids`, the text `mark`, and behind its thought the texts `stop`.

    opened: prompts end inside a thought.
    """

    tokenizer: PreTrainedTokenizerBase
    ids: frozenset[int]
    mark: str
    stop: Sequence[str]
    opened: bool

    @classmethod
    def of(
        cls,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        opened: bool = False,
    ) -> Ends:
        """Collect the ids of the generation config (chat models have several), eos, and the chat template's mark.

        A mark that is one added token is an id. Any other is a text: which tokens it is made of depends on the answer.
        """
        configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ids = {configured} if isinstance(configured, int) else set(configured or [])
        ids |= set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
        mark = end_of_answers(tokenizer)
        added = tokenizer.get_added_vocab()
        if mark in added:
            ids, mark = ids | {added[mark]}, ""
        return cls(tokenizer, frozenset(ids), mark, stop, opened)

    @property
    def reach(self) -> int:
        """Number of last tokens in which a text of these ends has appeared as soon as it is whole.

        A token holds a byte of it at least; the few more begin the first one in the middle of a character or a word.
        """
        return max(len(text.encode()) for text in ("", self.mark, *self.stop)) + 4

    def latest(self, tokens: Sequence[int]) -> bool:
        """Return whether the last `reach` tokens of an answer hold a text that may end it: cheap to ask each time."""
        if self.mark and self.mark in str(self.tokenizer.decode(list(tokens))):
            return True
        text = self._text(tokens) if self.stop else ""
        return any(stop in text for stop in self.stop)

    def texts(self, tokens: Sequence[int]) -> bool:
        """Return whether these new tokens hold a text that ends an answer."""
        if self.mark and self.mark in str(self.tokenizer.decode(list(tokens))):
            return True
        return bool(self.stop) and self._stops(self._text(tokens))

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def _before_mark(self, tokens: Sequence[int]) -> str:
        """Return the text before the mark, whose first token may have begun in the answer."""
        whole = str(self.tokenizer.decode(list(tokens))).partition(self.mark)[0]
        texts = ((i, str(self.tokenizer.decode(list(tokens[:i])))) for i in range(len(tokens), -1, -1))
        upto, text = next((i, text) for i, text in texts if whole.startswith(text))
        return self._text(tokens[:upto]) + whole[len(text) :]

    def _stops(self, text: str) -> bool:
        return any(stop in without_thought(text, self.opened) for stop in self.stop)

    def answer(self, new: list[int]) -> Answer:
        """Cut off what follows the end of a row, whose batch may have run longer."""
        last = next((i for i, token in enumerate(new) if token in self.ids), None)
        said = new if last is None else new[:last]
        tokens, ended = (new, "length") if last is None else (new[: last + 1], "eos")
        text = self._text(said)
        if self.texts(said):
            upto = next(i for i in range(1, len(said) + 1) if self.texts(said[:i]))
            tokens = said[:upto]
            text, ended = self._text(tokens), "stop"
            if self.mark and not self._stops(text):
                text, ended = self._before_mark(tokens), "eos"
        answer = without_thought(text, self.opened)
        thought = text[: len(text) - len(answer)] if text != answer else ""
        return Answer(cut_at(answer, self.stop), tokens, ended, thought)


def fit_prompt(ids: Sequence[int], room: int, bos: int | None) -> list[int]:
    """Cut a prompt to `room` tokens from the left; a leading bos stays at position 0, where massive weights act."""
    if len(ids) <= room:
        return list(ids)
    lead = [bos] if bos is not None and ids[0] == bos else []
    return lead + list(ids[len(ids) - room + len(lead) :])


def fit_middle(ids: Sequence[int], room: int) -> list[int]:
    """Cut a prompt to `room` tokens (2 or more) in the middle, as LongBench does: the first and the last half stay."""
    half = room // 2
    return list(ids) if len(ids) <= room else [*ids[:half], *ids[-half:]]


def one_length_a_batch(model: PreTrainedModel | PeftModel) -> bool:
    """Return whether padding on the left would change what a model generates.

    Recurrent and hybrid models (Mamba, RecurrentGemma, Falcon-H1) carry a state from token to token, and not all of
    them keep padding out of it. transformers marks their classes as stateful.
    """
    holder: Any = model
    base = holder.get_base_model() if hasattr(model, "get_base_model") else model
    return bool(getattr(base, "_is_stateful", False))


def _batches(prompts: Sequence[Sequence[int]], batch_size: int, one_length: bool) -> Iterator[list[int]]:
    """Yield the numbers of at most `batch_size` prompts at a time, the longest first: what does not fit fails at once.

    one_length: only prompts of the same length share a batch, so that none is padded.
    """
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    for _, same in groupby(order, key=lambda i: len(prompts[i]) if one_length else 0):
        rows = list(same)
        yield from (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))


def cut_at(text: str, stop: Sequence[str]) -> str:
    """Return `text` up to the first stop text."""
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]


class _StopAtText:
    """Stopping criterion: ends a row as soon as its new text holds one that ends an answer.

    All of a row is decoded only where its last tokens hold such a text: to decode it for every token would take as many
    steps as the square of its length. `Ends.answer` decides what an answer is; this, how long a batch runs.
    """

    def __init__(self, ends: Ends, prompt_length: int) -> None:
        self.ends, self.prompt_length = ends, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        new = input_ids[:, self.prompt_length :]
        latest = new[:, -self.ends.reach :].tolist()
        ended = [self.ends.latest(last) and self.ends.texts(new[row].tolist()) for row, last in enumerate(latest)]
        return input_ids.new_tensor(ended).bool()


@contextmanager
def _own_settings_only(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Set the checkpoint's generation config aside: transformers would mix its penalties into ours."""
    from transformers import GenerationConfig

    base: Any = model
    holder = base.get_base_model() if hasattr(model, "get_base_model") else model
    kept = holder.generation_config
    holder.generation_config = GenerationConfig()
    try:
        yield
    finally:
        holder.generation_config = kept


def greedy(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop: Sequence[str] = (),
    opened: bool = False,
    logits: Callable[[Sequence[int]], list[Any]] = lambda rows: [],
) -> list[Answer]:
    """Answer N prompts of token ids, none of them empty; the order of the answers is that of the prompts.

    Answers end where the tokenizer's chat template ends them, too. Texts of `stop` are looked for behind a thought.

    opened: the prompts end inside a thought.
    logits: for the prompts (their numbers) of each batch, transformers' logits processors to put before the argmax.
    """
    import torch
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    answers: dict[int, Answer] = {}
    ends = Ends.of(model, tokenizer, stop, opened)
    ids_of_ends = sorted(ends.ids)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ids_of_ends or [0])[0]
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, pad_token_id=pad, eos_token_id=ids_of_ends or None
    )
    for rows in _batches(prompts, batch_size, one_length_a_batch(model)):
        width = max(len(prompts[i]) for i in rows)
        ids = torch.full((len(rows), width), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for at, i in enumerate(rows):
            ids[at, width - len(prompts[i]) :] = torch.tensor(list(prompts[i]))
            mask[at, width - len(prompts[i]) :] = 1
        criteria = StoppingCriteriaList([_StopAtText(ends, width)] if stop or ends.mark else [])
        generator: Any = model  # PEFT's type does not declare `generate`
        with _own_settings_only(model), torch.no_grad():
            output = generator.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
                stopping_criteria=criteria,
                logits_processor=LogitsProcessorList(logits(rows)),
            )
        for i, new in zip(rows, output[:, width:].tolist(), strict=True):
            answers[i] = ends.answer(new)
    return [answers[i] for i in range(len(prompts))]

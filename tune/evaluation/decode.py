"""Greedy decoding of many prompts in left-padded batches of similar length, each row as if it were alone.

Models that carry a state from token to token take padding for tokens; their batches hold prompts of one length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answer:
    """A decoded answer; `tokens` are the new ones (eos included); `ended` is "eos", "stop" or "length"."""

    text: str
    tokens: list[int]
    ended: str


def end_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end an answer: those of the model's generation config (chat models have several) and eos."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [configured] if isinstance(configured, int) else list(configured or [])
    return sorted({*ids, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})


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
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
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
    """Stopping criterion: ends a row as soon as its new text holds a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], prompt_length: int) -> None:
        self.tokenizer, self.stop, self.prompt_length = tokenizer, stop, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.prompt_length :], skip_special_tokens=True)
        found = [any(stop in text for stop in self.stop) for text in texts]
        return input_ids.new_tensor(found).bool()


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
    logits: Callable[[Sequence[int]], list[Any]] = lambda rows: [],
) -> list[Answer]:
    """Answer N prompts of token ids, none of them empty; the order of the answers is that of the prompts.

    logits: for the prompts (their numbers) of each batch, transformers' logits processors to put before the argmax.
    """
    import torch
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    answers: dict[int, Answer] = {}
    ends = end_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, pad_token_id=pad, eos_token_id=ends or None
    )
    for rows in _batches(prompts, batch_size, one_length_a_batch(model)):
        width = max(len(prompts[i]) for i in rows)
        ids = torch.full((len(rows), width), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for at, i in enumerate(rows):
            ids[at, width - len(prompts[i]) :] = torch.tensor(list(prompts[i]))
            mask[at, width - len(prompts[i]) :] = 1
        criteria = StoppingCriteriaList([_StopAtText(tokenizer, stop, width)] if stop else [])
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
            answers[i] = _answer(tokenizer, new, ends, stop)
    return [answers[i] for i in range(len(prompts))]


def _answer(tokenizer: PreTrainedTokenizerBase, new: list[int], ends: Sequence[int], stop: Sequence[str]) -> Answer:
    """Cut off what follows the end of a row, whose batch may have run longer."""
    last = next((i for i, token in enumerate(new) if token in ends), None)
    tokens = new if last is None else new[: last + 1]
    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
    cut = cut_at(text, stop)
    if cut == text:
        return Answer(text, tokens, "length" if last is None else "eos")
    for upto in range(1, len(tokens) + 1):
        begun = str(tokenizer.decode(tokens[:upto], skip_special_tokens=True))
        if any(text in begun for text in stop):
            break
    return Answer(cut, tokens[:upto], "stop")

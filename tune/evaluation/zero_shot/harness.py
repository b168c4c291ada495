"""lm-eval's Hugging Face model around a resident one: the requests of a task, encoded, cut and put to the model.

lm-eval cuts long prompts on the left. Here a bos in front stays there when it cuts: bos at position 0 is where massive
weights act, and a prompt without it is another model's. Every document whose prompt was cut is counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM

from tune.config.eval_entries import ZeroShot
from tune.data.chat_template import end_of_answers
from tune.data.thoughts import without_thought
from tune.errors import BenchmarkError
from tune.evaluation.decode import Ends, cut_at, fit_middle, fit_prompt, one_length_a_batch
from tune.evaluation.logits import Logits, plain_logits
from tune.evaluation.zero_shot.request_scorer import RequestScorer
from tune.evaluation.zero_shot.shared_context import Pair

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Model = PreTrainedModel | PeftModel


def longest(entry: ZeroShot, max_length: int) -> int:
    """Return the tokens that prompt and answer of an entry may take together."""
    return min(entry.max_length or max_length, max_length)


class Harness(HFLM):
    """lm-eval's Hugging Face model around a resident one; `use` exchanges the model, as for one with an adapter.

    `cut` maps lm-eval's name of a task to the documents of which a prompt was cut since the last `use`.
    """

    def __init__(self, model: Model, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        # A stand-in for the model: lm-eval would tie its weights, which must not happen around an adapter.
        # log-softmax in fp32: in bf16 log-likelihoods of long answers are rounded to whole units.
        super().__init__(
            pretrained=SimpleNamespace(config=model.config, device=model.device),
            tokenizer=tokenizer,
            max_length=max_length,
            softmax_dtype="float32",
        )
        self._positions = max_length
        self._logits: Logits = plain_logits
        self._requests = RequestScorer()
        self._encoded: dict[tuple[str, str], Pair] = {}
        self._asked: dict[tuple[str, ...], set[tuple[str, int]]] = {}
        self._rolling = False
        self.middle = False
        self.cut: dict[str, set[int]] = {}

    def use(self, model: Model, batch_size: int, entry: ZeroShot, logits: Logits = plain_logits) -> None:
        """Score `entry` with `model` from now on, `batch_size` requests at a time; `logits` runs the model."""
        self._logits = logits
        self._requests.begin()
        self._model, self._device, self.batch_size_per_gpu = model, model.device, batch_size
        self._max_length = longest(entry, self._positions)
        self.middle, self.cut = entry.truncation == "middle", defaultdict(set)

    @property
    def apart(self) -> bool:
        """Return whether the model did not let requests share their contexts since the last `use`."""
        return self._requests.apart

    # --- text to tokens ---

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Encode as lm-eval does; the text of a rolling task without bos, which its windows bring themselves."""
        return super().tok_encode(string, False if self._rolling else add_special_tokens, **options)

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode prompts as lm-eval does, and cut long ones where the entry says so; a bos in front stays.

        Returns:
            token ids and attention mask, (prompts, longest prompt).
        """
        prompts = [self.tok_encode(string) or [self.prefix_token_id] for string in strings]
        if left_truncate_len:
            for i, (string, ids) in enumerate(zip(strings, prompts, strict=True)):
                if len(ids) > left_truncate_len:
                    self._count_cut((string,))
                    prompts[i] = self._fitted(ids, left_truncate_len)
        padded = self.tokenizer.pad(
            {"input_ids": prompts}, padding=True, padding_side=padding_side, return_tensors="pt"
        )
        return padded["input_ids"], padded["attention_mask"]

    def _fitted(self, ids: Sequence[int], room: int) -> list[int]:
        return fit_middle(ids, room) if self.middle else fit_prompt(ids, room, self.tokenizer.bos_token_id)

    def _encode_pair(self, context: str, continuation: str) -> Pair:
        """Encode each request once for all scorings: requests do not change from adapter to adapter.

        A context of spaces alone becomes part of the continuation; what is left is treated as lm-eval treats an empty
        context.
        """
        key = (context, continuation)
        if key not in self._encoded:
            before, after = super()._encode_pair(context, continuation)
            self._encoded[key] = (before or [self.prefix_token_id], after)
        return self._encoded[key]

    # --- requests ---

    def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Score without a progress bar; raise BenchmarkError if the model returns NaN."""
        with self._asking(requests):
            answers = super().loglikelihood(requests, disable_tqdm=True)
        if any(value != value for value, _ in answers):
            raise BenchmarkError("The model returns NaN, so answers cannot be ranked.")
        return answers

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = True) -> list[float]:
        """Score the windows of long texts without a progress bar, the first of them behind one bos."""
        self._rolling = True
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)
        finally:
            self._rolling = False

    def generate_until(self, requests: list, disable_tqdm: bool = True) -> list[str]:
        """Run lm-eval's own without a progress bar, and one by one where padding would change the answers.

        Answers end where the chat template ends them, too, and lose their thoughts, as other generated ones.
        """
        batch_size = self.batch_size_per_gpu
        if one_length_a_batch(self._model):
            self.batch_size_per_gpu = 1
        try:
            with self._asking(requests):
                answers = super().generate_until(requests, disable_tqdm=True)
        finally:
            self.batch_size_per_gpu = batch_size
        mark = end_of_answers(self.tokenizer)
        return [without_thought(cut_at(answer, [mark] if mark else [])) for answer in answers]

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **settings: Any) -> torch.Tensor:
        """Stop at the ends of the chat template and the generation config, too."""
        ends = Ends.of(self._model, self.tokenizer)
        stop = [*stop, ends.mark] if ends.mark else stop
        return super()._model_generate(context, max_length, stop, eos_token_id=sorted(ends.ids) or None, **settings)

    def _loglikelihood_tokens(self, requests: list, *_: Any, **__: Any) -> list[tuple[float, bool]]:
        """Cut contexts that are too long, as lm-eval would not: it cuts their bos away with them."""
        pairs = [self._fit(*request) for request in requests]
        return self._requests.score(self._model, pairs, self.batch_size_per_gpu, self._logits)

    def _fit(self, texts: tuple[str, str] | None, context: list[int], continuation: list[int]) -> Pair:
        """Return a request as it fits; the last token of the continuation is never fed to the model."""
        room = self._max_length + 1 - len(continuation)
        if not continuation or room < 1:
            raise BenchmarkError(_does_not_fit(texts, len(continuation), self._max_length))
        if len(context) > room:
            self._count_cut(texts)
            context = self._fitted(context, room)
        return context, continuation

    @contextmanager
    def _asking(self, requests: list) -> Iterator[None]:
        """Remember the documents behind the texts of requests, to count those that are cut."""
        self._asked = defaultdict(set)
        for request in requests:
            texts = tuple(text for text in request.args if isinstance(text, str))
            self._asked[texts].add((request.task_name, request.doc_id))
        try:
            yield
        finally:
            self._asked = {}

    def _count_cut(self, texts: tuple[str, ...] | None) -> None:
        for task, document in self._asked.get(texts or (), ()):
            self.cut[task].add(document)


def _does_not_fit(texts: tuple[str, str] | None, tokens: int, max_length: int) -> str:
    answer = "A text" if texts is None else f"The answer {texts[1]!r:.80}"
    if tokens:
        return f"{answer} has {tokens} tokens, and prompt and answer together may have {max_length}. Raise max_length."
    return f"{answer} has no token of its own: the tokenizer merges it with the end of its context."

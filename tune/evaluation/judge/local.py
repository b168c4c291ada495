"""A local causal language model as judge: resident, greedy in batches; retries are sampled with their own seeds."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence

import torch
from transformers import LogitsProcessor, PreTrainedModel

from macdrop.errors import ConfigError
from macdrop.fingerprint import SHOWN, checkpoint_folder
from macdrop.load import open_model
from tune.config.judge_spec import JudgeSpec
from tune.errors import BenchmarkError
from tune.evaluation.decode import fit_prompt, greedy
from tune.evaluation.judge.prompt import Judgement, Question, Reply, assess
from tune.evaluation.scorer import masks_off, max_positions
from tune.training.loading import fingerprint
from tune.training.process_group import device
from tune.training.quiet import quiet_while_scoring
from tune.zoo.model_source import model_source


def revision(spec: JudgeSpec) -> str:
    """Return the revision of the judge's weights: the commit of a cached hub model, else the folder's fingerprint.

    Raises:
        ConfigError: the model is neither a folder nor in the cache.
    """
    source = model_source(spec.model)
    folder = checkpoint_folder(source, spec.revision)
    if not os.path.isdir(source) and folder.parent.name == "snapshots":
        return folder.name[:12]
    return fingerprint(spec.model, spec.revision)[:SHOWN]


class LocalJudge:
    """A judge in this process, on the accelerator if there is one.

    Raises:
        ConfigError: the model does not exist, or `max_new_tokens` leave no room for a prompt.
    """

    def __init__(self, spec: JudgeSpec) -> None:
        self.spec = spec
        with quiet_while_scoring():
            model, self.tokenizer = open_model(
                model_source(spec.model),
                revision=spec.revision,
                dtype="bfloat16" if spec.bf16 else "float32",
                trust_remote_code=spec.trust_remote_code,
            )
        model.to(device())  # type: ignore[arg-type]  # transformers hides the type of `to` behind a wrapper
        self.model: PreTrainedModel | None = model
        self.revision = revision(spec)
        positions = max_positions(model.config, self.tokenizer)
        self.room = positions - spec.max_new_tokens
        if self.room < 2:
            raise ConfigError(
                f"eval.judge.max_new_tokens {spec.max_new_tokens} leaves no room for a prompt in the {positions} "
                f"positions of {spec.model}."
            )

    def judge(self, asked: Sequence[Question]) -> Iterator[Judgement]:
        """Yield judgements as they come, in batches of similar length, longest first.

        Raises:
            BenchmarkError: the model failed, for example out of memory.
        """
        order = sorted(asked, key=lambda question: -len(question.prompt))
        for start in range(0, len(order), self.spec.batch_size):
            try:
                judged = assess(order[start : start + self.spec.batch_size], self._ask, self.spec.retries)
            except RuntimeError as error:  # out of memory, most often
                first_line = str(error).strip().partition("\n")[0]
                raise BenchmarkError(
                    f"The judge {self.spec.model} failed: {first_line}\nOut of memory? Lower eval.judge.batch_size."
                ) from error
            yield from judged

    def close(self) -> None:
        """Release the model's memory."""
        self.model = None

    def _ask(self, asked: Sequence[Question], attempt: int) -> list[Reply]:
        assert self.model is not None, "a closed judge is not asked"
        whole = [self._ids(question.prompt) for question in asked]
        cut = [len(ids) > self.room for ids in whole]
        taken = [i for i, too_long in enumerate(cut) if not too_long or self.spec.long_prompts == "cut"]
        temperature = self.spec.retry_temperature if attempt else self.spec.temperature
        seeds = [_seed(self.spec.seed, asked[i].item, attempt) for i in taken]
        with quiet_while_scoring(), masks_off(self.model):
            answers = greedy(
                self.model,
                self.tokenizer,
                [fit_prompt(whole[i], self.room, self.tokenizer.bos_token_id) for i in taken],
                max_new_tokens=self.spec.max_new_tokens,
                batch_size=self.spec.batch_size,
                logits=lambda rows: [Sampling(temperature, [seeds[row] for row in rows])] if temperature else [],
            )
        replies = [Reply(error=self._too_long(len(ids))) for ids in whole]
        for i, answer in zip(taken, answers, strict=True):
            used = (min(len(whole[i]), self.room), len(answer.tokens))
            replies[i] = Reply(answer.thought + answer.text, tokens=used, cut=cut[i])
        return replies

    def _ids(self, prompt: str) -> list[int]:
        if not self.tokenizer.chat_template:
            return list(self.tokenizer(prompt, verbose=False)["input_ids"])
        message = [{"role": "user", "content": prompt}]
        text = str(self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _too_long(self, length: int) -> str:
        return (
            f"its prompt has {length} tokens, and max_new_tokens {self.spec.max_new_tokens} leaves room for "
            f"{self.room}; use a judge with more positions, or set long_prompts: cut, which cuts on the left"
        )


def _seed(seed: int, item: str, attempt: int) -> int:
    """Return the seed of an item and attempt, so that an answer does not depend on its batch."""
    digest = hashlib.sha256(f"{seed}/{item}/{attempt}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


class Sampling(LogitsProcessor):
    """Turns greedy decoding into sampling, one generator per row: argmax(logits / T + Gumbel noise) is a softmax draw.

    The noise is drawn on the CPU, so that a seed gives the same draw on every device.
    """

    def __init__(self, temperature: float, seeds: Sequence[int]) -> None:
        self.temperature = temperature
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        size = scores.shape[-1]
        exponential = [torch.empty(size).exponential_(generator=generator) for generator in self.generators]
        gumbel = -torch.stack(exponential).log()
        return scores.float() / self.temperature + gumbel.to(scores.device)

"""A judge that is constructed, not trained: it exercises the judging path, and judges nothing.

A Llama of two layers whose weights are written down. Its tokens are bytes, three pieces of a judge's prompt, and what
it says. In the first layer a token attends to the last piece it has seen, and so knows whether it is in the response.
In the second it attends evenly to the tokens of the response: the mean is the share of letters a to m. The head says
the fixed sentence, then the score whose ``2 n x - n^2`` is largest, which is the n nearest to x = 3 + (share - 0.4) /
0.04, then the end. So a score depends on the response alone.
"""

from __future__ import annotations

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

POSITIONS = 32_768
OPENING = " Feedback: This is a toy that counts letters and knows nothing of what it was asked. [RESULT]"
SCORES = range(1, 6)
#: Share of LETTERS that gives a 3, and how much more or less gives the next score.
MIDDLE, STEP = 0.4, 0.04
LETTERS = "abcdefghijklm"
#: In `tune.evaluation.judge.prompt.prompt`: what the response comes after, and what may come after it.
RESPONSE = "###Response to evaluate:\n"
AFTER = ("\n\n###Reference Answer (Score 5):", "\n\n###Score Rubrics:")

BOS, EOS = "<s>", "</s>"
_HIDDEN, _HEAD = 16, 8
# Dimensions of the residual stream: all tokens have the first; layers write IN_RESPONSE and SHARE.
_CONSTANT, _LETTER, _RESPONSE, _AFTER, _IN_RESPONSE, _SHARE, _OPENING, _SCORE = range(8)
#: So large that the norm is the same for all tokens, and divides by `_NORM`.
_CONSTANT_SIZE = 1024.0
_NORM = _CONSTANT_SIZE / _HIDDEN**0.5
#: The rotation of this dimension of a head is slowest: nothing over POSITIONS with `_THETA`.
_SLOWEST, _THETA = _HEAD // 2 - 1, 1e12
#: A token that is attended to has e^40 times the weight of another; logits of what must not be said are far below.
_ATTENDED, _SURE = 40.0, 256.0


def expected_score(response: str) -> int:
    """Compute the judge's score of a response without the model."""
    share = sum(letter in LETTERS + LETTERS.upper() for letter in response) / (len(response.encode()) + 1)
    return min(max(round(3 + (share - MIDDLE) / STEP), SCORES[0]), SCORES[-1])


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, bos in front, the pieces of the prompt found whole; OPENING and scores, which no text is cut into."""
    said = [text.replace(" ", "Ġ") for text in (OPENING, *(f" {score}" for score in SCORES))]
    vocabulary = [BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *said]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (RESPONSE, *AFTER)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        padding_side="left",
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def make_model() -> LlamaForCausalLM:
    """Return the judge in float32; its weights are always the same."""
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=_HIDDEN,
        intermediate_size=_HEAD,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=_HEAD,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": _THETA},
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        _embed(model.model.embed_tokens.weight, tokenizer)
        first, second = model.model.layers
        _attend(first.self_attn, {_RESPONSE: 1, _AFTER: 2}, _RESPONSE, _IN_RESPONSE)
        _attend(second.self_attn, {_IN_RESPONSE: 1}, _LETTER, _SHARE)
        _speak(model.lm_head.weight, tokenizer)
    return model.eval()


def _said(tokenizer: PreTrainedTokenizerFast) -> tuple[int, list[int]]:
    """Return the ids of OPENING and of the scores."""
    opening, *scores = (text.replace(" ", "Ġ") for text in (OPENING, *(f" {score}" for score in SCORES)))
    return tokenizer.convert_tokens_to_ids(opening), tokenizer.convert_tokens_to_ids(scores)


def _embed(table: torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> None:
    opening, scores = _said(tokenizer)
    table[:, _CONSTANT] = _CONSTANT_SIZE
    table[tokenizer.convert_tokens_to_ids(list(LETTERS + LETTERS.upper())), _LETTER] = 1
    table[tokenizer.convert_tokens_to_ids(RESPONSE), _RESPONSE] = 1
    table[tokenizer.convert_tokens_to_ids(list(AFTER)), _AFTER] = 1
    table[opening, _OPENING] = 1
    table[scores, _SCORE] = 1


def _attend(attention: torch.nn.Module, keys: dict[int, int], value: int, to: int) -> None:
    """Write into dimension `to` the mean of dimension `value` over the seen tokens of the largest key."""
    attention.q_proj.weight[_SLOWEST, _CONSTANT] = _HEAD**0.5 * _NORM / _CONSTANT_SIZE
    for dimension, times in keys.items():
        attention.k_proj.weight[_SLOWEST, dimension] = times * _ATTENDED * _NORM
    attention.v_proj.weight[0, value] = _NORM
    attention.o_proj.weight[to, 0] = 1


def _speak(head: torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> None:
    """Logits: OPENING after a prompt, the nearest score after it, then eos."""
    opening, scores = _said(tokenizer)
    constant = _SURE * _NORM / _CONSTANT_SIZE
    head[:, _CONSTANT] = -2 * constant
    head[opening, _CONSTANT] = constant
    head[opening, [_OPENING, _SCORE]] = -2 * _SURE * _NORM
    head[scores, _CONSTANT] = -constant
    for token, n in zip(scores, SCORES, strict=True):  # 2 n x - n^2
        head[token, _OPENING] = (_SURE + 2 * n * (3 - MIDDLE / STEP) - n**2) * _NORM
        head[token, _SHARE] = 2 * n / STEP * _NORM
    head[tokenizer.eos_token_id, _CONSTANT] = -constant
    head[tokenizer.eos_token_id, _SCORE] = 2 * _SURE * _NORM

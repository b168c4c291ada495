"""Where answers end, and what is cut off them: the chat template's end mark, thoughts, stop texts."""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import benchmark_fixtures as fix
from helpers.chat_dialects import DIALECTS
from transformers import AutoTokenizer, LogitsProcessor

from tune.config.eval_entries import ZeroShot
from tune.config.eval_spec import EvalSpec
from tune.config.messages import build
from tune.data.formats import Turn
from tune.data.templates import Encoder
from tune.data.thoughts import without_thought
from tune.evaluation import generation
from tune.evaluation.decode import Ends, _StopAtText, greedy
from tune.evaluation.judge.prompt import parse
from tune.evaluation.zero_shot.harness import Harness
from tune.zoo.catalog import zoo_path

CHATML = DIALECTS["chatml"].jinja


class Says(LogitsProcessor):
    """Makes a model say given texts, one per row of a batch, and then the letter z for ever."""

    def __init__(self, tokenizer, texts: list[str], prompt_length: int) -> None:
        self.scripts = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        self.prompt_length, self.filler = prompt_length, tokenizer("z", add_special_tokens=False).input_ids[0]

    def __call__(self, input_ids, scores):
        at = input_ids.shape[1] - self.prompt_length
        scores = scores.clone().fill_(-1e9)
        for row, script in enumerate(self.scripts):
            scores[row, script[at] if at < len(script) else self.filler] = 0.0
        return scores


def chat_tokenizer(template: str, added: tuple[str, ...] = ()):
    tokenizer = fix.byte_tokenizer(chat_template=template)
    tokenizer.add_tokens(list(added))
    return tokenizer


def answers(tokenizer, texts: list[str], **options):
    model = fix.tiny_llama()
    model.resize_token_embeddings(len(tokenizer))
    prompts = [tokenizer("hello").input_ids] * len(texts)
    says = Says(tokenizer, texts, len(prompts[0]))
    return greedy(model, tokenizer, prompts, max_new_tokens=60, batch_size=8, logits=lambda rows: [says], **options)


@pytest.mark.parametrize("added", [(), ("<|im_end|>",)], ids=["several tokens", "one token"])
def test_answers_end_at_the_mark_of_the_chat_template(added):
    """The tokenizer's eos is another one, as in base checkpoints that ship with a chat template."""
    tokenizer = chat_tokenizer(CHATML, added)
    assert tokenizer.eos_token == "</s>"
    texts = ["cat<|im_end|>\n<|im_start|>user\nsay", "dog</s>", "a long answer<|im_end|>", "never ends"]
    found = answers(tokenizer, texts)
    assert [answer.text for answer in found[:3]] == ["cat", "dog", "a long answer"]
    assert [answer.ended for answer in found] == ["eos", "eos", "eos", "length"]
    assert tokenizer.decode(found[0].tokens) == "cat<|im_end|>" and tokenizer.decode(found[1].tokens) == "dog</s>"
    assert found[3].text == "never ends" + "z" * 50 and len(found[3].tokens) == 60


@pytest.mark.parametrize("added", [(), ("<|im_end|>",)], ids=["several tokens", "one token"])
def test_answers_of_lm_evals_tasks_end_there_too(monkeypatch, added):
    tokenizer = chat_tokenizer(CHATML, added)
    model = fix.tiny_llama()
    model.resize_token_embeddings(len(tokenizer))
    prompt = "hello"
    texts = ["cat<|im_end|>and on", "<think>hm</think> dog<|im_end|>", "sun</s>", "  moon"]
    says = Says(tokenizer, texts, len(tokenizer(prompt).input_ids))
    monkeypatch.setattr(model, "generate", partial(model.generate, logits_processor=[says]))
    harness = Harness(model, tokenizer, 256)
    harness.use(model, 4, ZeroShot())
    arguments = (prompt, {"until": [], "max_gen_toks": 60})
    requests = [SimpleNamespace(args=arguments, task_name="t", doc_id=i) for i in range(4)]
    assert harness.generate_until(requests) == ["cat", "dog", "sun", "  moon" + "z" * 54]


def test_without_a_chat_template_the_mark_is_a_text_like_any_other():
    found = answers(fix.byte_tokenizer(), ["cat<|im_end|>dog</s>"])
    assert found[0].text == "cat<|im_end|>dog"


def test_stop_texts_are_looked_for_behind_the_thought():
    tokenizer = chat_tokenizer(CHATML)
    texts = ["<think>\n\nhm\n\n</think>\n\ncat\n\nand more<|im_end|>", "<think>\n\nhm for ever", "cat\n\ndog"]
    found = answers(tokenizer, texts, stop=["\n\n"])
    assert [answer.text for answer in found] == ["cat", "", "cat"]
    assert [answer.ended for answer in found] == ["stop", "length", "stop"]
    assert found[0].thought == "<think>\n\nhm\n\n</think>\n\n" and found[2].thought == ""


def test_an_opened_thought_ends_at_its_mark():
    tokenizer = chat_tokenizer(DIALECTS["r1_distill"].jinja)
    found = answers(tokenizer, ["hm\n</think>\n\ncat<|end_of_sentence|>", "hm for ever"], opened=True)
    assert [answer.text for answer in found] == ["cat", ""]
    assert found[0].thought == "hm\n</think>\n\n" and found[1].thought.startswith("hm for ever")


class Recorder:
    """A tokenizer that records how many tokens it is given to decode."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.decoded = tokenizer, 0

    def decode(self, tokens, **options):
        self.decoded += len(tokens)
        return self.tokenizer.decode(tokens, **options)


SAID = ["cat dog", "cat\n\ndog", "<think>\n\nhm ✓ a</think>\n\ncat ✓ dog\n\n", "z" * 300 + "<|im_end|>", "é✓\n✓\n\n"]


@pytest.mark.parametrize("stop", [[], ["\n\n"], ["✓", "g\n"]], ids=["mark", "blank line", "characters of many bytes"])
@pytest.mark.parametrize("zoo", [False, True], ids=["bytes", "pieces"])
def test_a_row_stops_where_decoding_all_of_it_at_each_token_would(zoo, stop):
    tokenizer = AutoTokenizer.from_pretrained(zoo_path("planted-llama")) if zoo else chat_tokenizer(CHATML)
    recorder = Recorder(tokenizer)
    ends = Ends(recorder, frozenset(), "<|im_end|>", stop, False)
    for text in SAID:
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        want = [ends.texts(tokens[:n]) for n in range(1, len(tokens) + 1)]
        recorder.decoded, criterion = 0, _StopAtText(ends, 2)
        found = [criterion(torch.tensor([[5, 6, *tokens[:n]]]), None).item() for n in range(1, len(tokens) + 1)]
        upto = want.index(True) + 1 if True in want else len(want)
        assert found[:upto] == want[:upto]
        if text.startswith("zzz"):
            assert recorder.decoded <= len(tokens) * (2 * ends.reach + 2 * (len(tokens) - upto + 1))


def test_thoughts_are_cut_off_as_the_judge_does():
    assert without_thought("<think>\n\n</think>\n\ncat") == without_thought("hm</think> cat") == "cat"
    assert without_thought("<think>a</think>b</think>c") == "c" and without_thought("cat") == "cat"
    assert without_thought(" <think> cat") == "" == without_thought("cat", opened=True)
    assert parse("<think>[RESULT] 4") is None and parse("<think>[RESULT] 4</think>Fair. [RESULT] 2") == 2


def test_metrics_judges_and_later_turns_see_clean_answers(tmp_path, monkeypatch):
    tokenizer = chat_tokenizer(DIALECTS["qwen3"].jinja)
    model, prompts = fix.tiny_llama(positions=512), []

    def scripted(model, tokenizer, ids, **options):
        prompts.extend(map(tokenizer.decode, ids))
        says = Says(tokenizer, ["<think>\nhm\n</think>\n\ncat<|im_end|>"] * len(ids), max(map(len, ids)))
        return greedy(model, tokenizer, ids, **options, logits=lambda rows: [says])

    monkeypatch.setattr(generation, "greedy", scripted)
    rows = [{"instruction": "say cat", "output": output} for output in ("cat", "<think>\noh\n</think>\n\ncat")]
    entry = {"data": fix.write_jsonl(tmp_path / "a.jsonl", rows)}
    found = fix.values(fix.score(model, tokenizer, {"generation": {"g": entry}}))
    assert found["g", "exact_match"] == 1 and found["g", "chrf"] == 100 and found["g", "rouge_l"] == 1
    question = {"question_id": 1, "category": "qa", "turns": ["say cat", "again"]}
    entry = {"data": fix.write_jsonl(tmp_path / "b.jsonl", [question]), "thinking": True}
    path = tmp_path / "answers.jsonl"
    fix.score(model, tokenizer, {"generation": {"g": entry}}, answers_path=path)
    item = json.loads(path.read_text())
    assert item["answers"] == ["cat", "cat"] and item["thoughts"] == ["<think>\nhm\n</think>\n\n"] * 2
    user, header = "<|im_start|>user\n{}<|im_end|>\n", "<|im_start|>assistant\n"
    assert prompts.pop(0) == user.format("say cat") + header + "<think>\n\n</think>\n\n"
    assert prompts[1] == user.format("say cat") + header
    assert prompts[2] == user.format("say cat") + header + "cat<|im_end|>\n" + user.format("again") + header


def test_prompts_equal_those_of_training(tmp_path):
    """Also of templates without a generation prompt, whose header of an answer training gives to the prompt."""
    row = {"instruction": "say cat", "input": "now", "output": "cat"}
    block = build(EvalSpec, {"generation": {"g": fix.write_jsonl(tmp_path / "a.jsonl", [row])}})
    for name, dialect in DIALECTS.items():
        tokenizer = fix.byte_tokenizer(chat_template=dialect.jinja)
        resident = generation.load("g", block.generation["g"], tokenizer, 1024)
        asked = generation.prompt(resident, tokenizer, resident.questions[0], [])
        trained = Encoder(tokenizer, "chat", train_on_prompt=False).encode(
            [[Turn("user", "say cat", "now"), Turn("assistant", "cat")]], ["here"]
        )[0]
        assert asked.ids == trained.input_ids[: trained.prompt_length], name

"""Random conversations through the structures of well-known chat templates, against their accounts in plain Python.

What carries loss must be what the account says, to the character, and to the token after encoding; the text before the
last answer must be what inference sends; every text must be there. Or the row is refused, where the account says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.benchmark_fixtures import byte_tokenizer
from helpers.chat_accounts import END, EOS, LOSS, Said, ends_with_a_muted_thought, last_trained
from helpers.chat_dialects import DIALECTS
from hypothesis import strategies as st

from macdrop.errors import DataError
from tune.data.formats import Turn
from tune.data.templates import IGNORE, Encoder

FRAGMENTS = ["<|im_end|>", "</s>", "[/INST]", "{{ x }}", "{% endif %}", "<|eot_id|>", "assistant\n", "###", "\n\n", " "]
FRAGMENTS += ["macdrop-text-0-goes-here"[:-1], "<|user|>", "user: ", "\t", "é", "🙂", "0", "\\n", "ſ", "\u2028", "\r\n"]
THOUGHT = re.compile(r"</?think>|[\x02\x03]")


def texts(least: int = 0) -> st.SearchStrategy[str]:
    """Texts without marks of thoughts, which are drawn apart."""
    some = st.one_of(st.sampled_from(["cat", "say dog", "a b", *FRAGMENTS]), st.text(max_size=6))
    return st.lists(some, min_size=least, max_size=3).map("".join).map(lambda text: THOUGHT.sub("", text))


@st.composite
def conversations(draw: Any) -> tuple[str, list[Said]]:
    """A dialect, and turns from a question on, at least one answer of which carries loss."""
    turns = [Said("system", draw(texts(1)))] if draw(st.booleans()) else []
    thinking = draw(st.integers(0, 3)) == 0
    for _ in range(draw(st.integers(1, 3))):
        thought = draw(st.sampled_from(["", "hm", "first\n\nthen"])) if thinking else ""
        text = draw(texts())
        text = text.strip() if thought else text  # templates join the two in their own way
        answer = Said("assistant", text, thought=thought, trained=draw(st.integers(0, 3)) > 0)
        turns += [Said("user", draw(texts())), answer]
    if not any(turn.trained for turn in turns if turn.role == "assistant"):
        turns[-1] = Said("assistant", turns[-1].text, turns[-1].thought)
    if draw(st.integers(0, 3)) == 0:
        turns.append(Said("user", draw(texts())))
    return draw(st.sampled_from(sorted(DIALECTS))), turns


def setup(folder: Path) -> Callable[[Any], str]:
    """Return the check of one drawn conversation."""
    encoders = {
        name: Encoder(byte_tokenizer(chat_template=dialect.jinja), "chat", train_on_prompt=False)
        for name, dialect in DIALECTS.items()
    }

    def check(drawn: tuple[str, list[Said]]) -> str:
        name, turns = drawn
        return check_conversation(name, turns, encoders[name])

    return check


def check_conversation(name: str, turns: list[Said], encoder: Encoder) -> str:
    """Encode a conversation and compare; returns how it ended."""
    wanted = DIALECTS[name].account(turns)
    row = [Turn(turn.role, turn.content, trained=turn.trained) for turn in turns]
    try:
        encoded = encoder.encode([row], ["here"])[0]
    except DataError as error:
        assert wanted is None, f"{name}: refused with {error}"
        assert "Use template: alpaca" in str(error) or "use template: alpaca" in str(error), error
        return "refused"
    if wanted is None and ends_with_a_muted_thought(turns):
        return "works"  # behind all loss, and empty texts may leave room for the thought
    assert wanted is not None, f"{name}: should have been refused"
    decode = encoder.tokenizer.decode
    labelled = [token for token in encoded.labels if token != IGNORE]
    assert decode(labelled) == "".join(re.findall(f"{LOSS}(.*?){END}", wanted, re.DOTALL)), name
    last = max(i for i, label in enumerate(encoded.labels) if label != IGNORE)
    whole = wanted.rpartition(END)[0].replace(LOSS, "").replace(END, "")
    assert decode(encoded.input_ids[: last + 1]) == whole, name
    after = decode(encoded.input_ids[last + 1 :])
    at = last_trained(turns)
    for turn in turns[at + 1 :]:
        assert turn.text.strip() in after, f"{name}: {turn.text!r} has vanished"
    _check_prompt(name, turns[:at], bool(turns[at].thought), wanted, encoder)
    return "works"


def _check_prompt(name: str, asked: list[Said], thinking: bool, wanted: str, encoder: Encoder) -> None:
    """What stands before the last answer begins with what inference sends, but for eos where nothing marks an end."""
    messages = [{"role": turn.role, "content": turn.content} for turn in asked]
    sent = encoder.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    before = wanted[: wanted.rindex(LOSS)].replace(LOSS, "").replace(END, "")
    if not DIALECTS[name].mark:
        before, sent = before.replace(EOS, ""), sent.replace(EOS, "")
    assert before.startswith(sent), f"{name}: inference sends {sent!r}"

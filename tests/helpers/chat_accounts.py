"""What training must see of a conversation under a chat template, in plain Python.

Accounts are written by hand from the structures of templates and know nothing of Jinja or of `tune.data.chat_template`:
LOSS and END enclose what carries loss. None: the row must be refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

LOSS, END = "\x02", "\x03"
BOS, EOS = "<s>", "</s>"


@dataclass(frozen=True)
class Said:
    """A turn of a conversation: user, assistant or system; `thought` is of answers, `trained` too."""

    role: str
    text: str
    thought: str = ""
    trained: bool = True

    @property
    def content(self) -> str:
        """The text as a row holds it."""
        return f"<think>\n{self.thought}\n</think>\n\n{self.text}" if self.thought else self.text


Account = Callable[[list[Said]], str | None]


def loss(text: str, trained: bool) -> str:
    return LOSS + text + END if trained else text


def last_trained(turns: list[Said]) -> int:
    return max(i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.trained)


def regular(
    *,
    user: str,
    header: str,
    end: str,
    sep: str = "",
    begin: str = "",
    system: str | None = None,
    default: str = "",
    lead: str = "",
    trim: bool = False,
) -> Account:
    """Templates that write every turn alike, wherever it stands; `{}` is the text. The answer begins with `lead`."""

    def account(turns: list[Said]) -> str | None:
        text = begin
        if default and turns[0].role != "system":
            text += system.format(default) if system else default
        for turn in turns:
            content = turn.content.strip() if trim else turn.content
            if turn.role == "assistant":
                # Nothing marks an end: the end-of-sequence token is added to the text.
                text += header + loss(lead + content + (end or EOS), turn.trained) + sep
            elif turn.role == "user":
                text += user.replace("{}", content)
            elif system is None:
                return None
            else:
                text += system.replace("{}", content)
        return text

    return account


def ends_with_a_muted_thought(turns: list[Said]) -> bool:
    """The template writes the last answer, which no loss falls on, otherwise than answers without a thought."""
    return turns[-1].role == "assistant" and bool(turns[-1].thought) and not turns[-1].trained


def thoughts_of_history_left_out(turns: list[Said], at: int) -> bool:
    """An answer before the last is to be trained on, and its thought is not in the rendering."""
    return any(turn.role == "assistant" and turn.trained and turn.thought for turn in turns[:at])


def llama2(turns: list[Said]) -> str | None:
    """The system text stands in the first question; blanks around an answer are written by the template."""
    text, pending = "", ""
    for turn in turns:
        if turn.role == "system":
            pending = f"<<SYS>>\n{turn.content}\n<</SYS>>\n\n"
        elif turn.role == "user":
            if pending and not turn.content.strip():
                return None  # the trim of both texts takes the blank lines after the first, too
            text += f"{BOS}[INST] {(pending + turn.content).strip()} [/INST]"
            pending = ""
        else:
            text += loss(f" {turn.content.strip()} {EOS}", turn.trained)
    return text


def mistral3(turns: list[Said]) -> str | None:
    """The system text stands in the last question; training sees it where inference sends it."""
    system = [turn.content for turn in turns if turn.role == "system"]
    spoken = [turn for turn in turns if turn.role != "system"]
    last = last_trained(spoken)
    asked = [i for i, turn in enumerate(spoken) if turn.role == "user"]
    ends = {max(i for i in asked if i < last), max(asked)} if max(asked) > last else {max(asked)}
    if len(spoken) - 1 > max(asked) > last:
        ends = {max(i for i in asked if i < last)}
    text = BOS
    for i, turn in enumerate(spoken):
        if turn.role == "user":
            text += "[INST] " + ("".join(s + "\n\n" for s in system) if i in ends else "") + turn.content + "[/INST]"
        else:
            text += loss(f" {turn.content.strip()}{EOS}", turn.trained)
    return text


def qwen3(turns: list[Said]) -> str | None:
    """Thoughts of the last answer only; without one, the template's empty thought belongs to the prompt."""
    last = last_trained(turns)
    if thoughts_of_history_left_out(turns, last) or ends_with_a_muted_thought(turns):
        return None
    text = ""
    for i, turn in enumerate(turns):
        if turn.role != "assistant":
            text += f"<|im_start|>{turn.role}\n{turn.content}<|im_end|>\n"
            continue
        text += "<|im_start|>assistant\n"
        if i == last and not turn.thought:
            text += "<think>\n\n</think>\n\n"
        text += loss((turn.content if i == last else turn.text) + "<|im_end|>", turn.trained) + "\n"
    return text


def opened_thought(user: str, header: str, end: str, sep: str, begin: str, system: str) -> Account:
    """The generation prompt opens a thought, history has none: the last answer begins by ending it."""

    def account(turns: list[Said]) -> str | None:
        last = last_trained(turns)
        if thoughts_of_history_left_out(turns, last):
            return None
        text = begin
        for i, turn in enumerate(turns):
            if turn.role == "assistant" and i == last:
                text += header + "<think>\n" + loss(f"{turn.thought}\n</think>\n\n{turn.text}{end}", True) + sep
            elif turn.role == "assistant":
                text += header + loss(turn.text + end, turn.trained) + sep
            else:
                text += (user if turn.role == "user" else system).replace("{}", turn.content)
        return text

    return account


def smollm3(turns: list[Said]) -> str | None:
    """`enable_thinking` decides a line of the system turn, and history without thoughts is written with empty ones."""
    thinking = bool(turns[last_trained(turns)].thought)
    text = f"<|im_start|>system\nMode: {'/think' if thinking else '/no_think'}\n"
    text += "".join(turn.content for turn in turns if turn.role == "system") + "<|im_end|>\n"
    for turn in turns:
        if turn.role == "user":
            text += f"<|im_start|>user\n{turn.content}<|im_end|>\n"
        elif turn.role == "assistant":
            text += "<|im_start|>assistant\n" + ("" if thinking else "<think>\n\n</think>\n")
            text += loss(turn.content.lstrip("\n") + "<|im_end|>", turn.trained) + "\n"
    return text


def thought_at_the_end(turns: list[Said]) -> str | None:
    """The template's empty thought belongs to the prompt of the last answer."""
    if ends_with_a_muted_thought(turns):
        return None
    last, text = last_trained(turns), ""
    for i, turn in enumerate(turns):
        text += f"<|im_start|>{turn.role}\n" + ("<think>\n\n</think>\n\n" if i == last and not turn.thought else "")
        text += loss(turn.content + "<|im_end|>", turn.role == "assistant" and turn.trained) + "\n"
    return text


def qwen3_thinking_only(turns: list[Said]) -> str | None:
    """A thought is always asked for."""
    if ends_with_a_muted_thought(turns):
        return None
    turn = "<|im_start|>{role}\n{}<|im_end|>\n"
    user, system = (turn.replace("{role}", role) for role in ("user", "system"))
    account = opened_thought(
        user=user, header="<|im_start|>assistant\n", end="<|im_end|>", sep="\n", begin="", system=system
    )
    return account(turns)

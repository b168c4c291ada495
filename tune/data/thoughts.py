"""Thoughts of reasoning models: what an answer holds up to its last `</think>` is not part of it.

The marks are those of DeepSeek-R1, Qwen3, QwQ, SmolLM3, GLM-4.5, Hermes and most others; their chat templates look for
the last closing mark as well, as some models open the thought in the prompt.
"""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"
CLOSING = f"\n{CLOSE}\n\n"
"""What closes an empty thought that a prompt has opened, as Qwen3 and R1 write it."""


def has_thought(text: str) -> bool:
    """Return whether a thought ends in `text`."""
    return CLOSE in text


def opens_thought(prompt: str) -> bool:
    """Return whether `prompt` ends inside a thought."""
    return prompt.rfind(OPEN) > prompt.rfind(CLOSE)


def without_thought(text: str, opened: bool = False) -> str:
    """Return an answer without the thought before it; a thought that never ends leaves no answer.

    opened: the prompt ends inside a thought, so the answer begins with one.
    """
    _, mark, answer = text.rpartition(CLOSE)
    if mark:
        return answer.lstrip()
    return "" if opened or text.lstrip().startswith(OPEN) else text


def joined(thought: str, answer: str) -> str:
    """Return an answer that begins with a thought, both as they are stored apart."""
    return f"{OPEN}\n{thought.strip()}\n{CLOSE}\n\n{answer}" if thought.strip() else answer

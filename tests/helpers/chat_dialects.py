"""Structures of well-known chat templates, each with the account of what training must see."""

from __future__ import annotations

from dataclasses import dataclass

from helpers import chat_accounts as accounts
from helpers.chat_accounts import BOS, EOS, Account, opened_thought, regular


@dataclass(frozen=True)
class Dialect:
    """A template: its Jinja, what training must see, and the mark after an answer ("": eos is added)."""

    jinja: str
    account: Account
    mark: str


def each(role_of: str, generate: str, begin: str = "") -> str:
    """Jinja that writes `role_of` for every message."""
    prompt = "{% if add_generation_prompt %}" + generate + "{% endif %}" if generate else ""
    return begin + "{% for m in messages %}" + role_of + "{% endfor %}" + prompt


def by_role(user: str, assistant: str, system: str | None) -> str:
    written = system if system is not None else "{{ raise_exception('no system turn') }}"
    return (
        "{% if m.role == 'user' %}" + user + "{% elif m.role == 'assistant' %}" + assistant
        + "{% else %}" + written + "{% endif %}"
    )  # fmt: skip


# --- one by one ---

TEXT = "{{ m.content }}"
TRIM = "{{ m.content | trim }}"
CHATML_TURN = "<|im_start|>{{ m.role }}\n" + TEXT + "<|im_end|>\n"
CHATML = dict(
    user="<|im_start|>user\n{}<|im_end|>\n",
    header="<|im_start|>assistant\n",
    end="<|im_end|>",
    sep="\n",
    system="<|im_start|>system\n{}<|im_end|>\n",
)
LLAMA3 = dict(
    begin=BOS,
    user="<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
    header="<|start_header_id|>assistant<|end_header_id|>\n\n",
    end="<|eot_id|>",
    system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
    trim=True,
)
LLAMA3_TURN = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n" + TRIM + "<|eot_id|>"
KEPT = "{# what follows the last newline keeps it #}"
LLAMA3_HEADER = "<|start_header_id|>assistant<|end_header_id|>\n\n"


LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set s = messages[0].content %}"
    "{% else %}{% set rest = messages %}{% set s = false %}{% endif %}{% for m in rest %}"
    "{% if loop.first and s != false %}{% set c = '<<SYS>>\n' + s + '\n<</SYS>>\n\n' + m.content %}"
    "{% else %}{% set c = m.content %}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + c | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + c | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)


MISTRAL3 = (
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}"
    "{% if loop.last and s is defined %}{{ '[INST] ' + s + '\n\n' + m.content + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + m.content + '[/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
)


QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set c = m.content.split('</think>')[-1] %}{% set t = m.content.split('</think>')[0].split('<think>')[-1] %}"
    "{% if '</think>' not in m.content %}{% set t = '' %}{% else %}{% set c = c.lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and loop.last %}{{ '<think>\n' + t.strip('\n') + '\n</think>\n\n' }}{% endif %}"
    "{{ c }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
QWEN3_THINKING_ONLY = QWEN3.replace(
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}", "<think>\n"
)


R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% elif m.role == 'assistant' %}"
    "{% set c = m.content %}{% if '</think>' in c %}{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|Assistant|>' + c + '<|end_of_sentence|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)


SMOLLM3 = (
    "{% set on = enable_thinking is not defined or enable_thinking %}"
    "<|im_start|>system\nMode: {{ '/think' if on else '/no_think' }}\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}<|im_end|>\n"
    "{% for m in messages %}{% if m.role == 'user' %}" + CHATML_TURN + "{% elif m.role == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' + ('' if on else '<think>\n\n</think>\n') + m.content.lstrip('\n') }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' + ('' if on else '<think>\n\n</think>\n') }}{% endif %}"
)
ALPACA_SYSTEM = "Below is an instruction. Answer it.\n\n"
VICUNA_SYSTEM = "A chat of a user and an assistant. "
DEFAULT = "You are a helpful assistant."
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\n" + DEFAULT + "<|im_end|>\n{% endif %}"
ROLE = "<|start_of_role|>{}<|end_of_role|>"

DIALECTS = {
    "chatml": Dialect(each(CHATML_TURN, "<|im_start|>assistant\n"), regular(**CHATML), "<|im_end|>"),
    "internlm2": Dialect(
        each(CHATML_TURN, "<|im_start|>assistant\n", "{{ bos_token }}"), regular(**CHATML, begin=BOS), "<|im_end|>"
    ),
    "qwen25": Dialect(
        each(CHATML_TURN, "<|im_start|>assistant\n", DEFAULT_SYSTEM), regular(**CHATML, default=DEFAULT), "<|im_end|>"
    ),
    "qwen3": Dialect(QWEN3, accounts.qwen3, "<|im_end|>"),
    "qwen3_thinking_only": Dialect(QWEN3_THINKING_ONLY, accounts.qwen3_thinking_only, "<|im_end|>"),
    "r1_distill": Dialect(
        R1,
        opened_thought(
            user="<|User|>{}", header="<|Assistant|>", end="<|end_of_sentence|>", sep="", begin=BOS, system="{}"
        ),
        "<|end_of_sentence|>",
    ),
    "smollm3": Dialect(SMOLLM3, accounts.smollm3, "<|im_end|>"),
    "llama2": Dialect(LLAMA2, accounts.llama2, EOS),
    "llama3": Dialect(each(LLAMA3_TURN, LLAMA3_HEADER, "{{ bos_token }}"), regular(**LLAMA3), "<|eot_id|>"),
    "llama3_first": Dialect(  # the generation prompt is always written
        each(LLAMA3_TURN, "", "{{ bos_token }}") + LLAMA3_HEADER + KEPT,
        regular(**LLAMA3),
        "<|eot_id|>",
    ),
    "mistral1": Dialect(
        each(by_role("[INST] " + TEXT + " [/INST]", TEXT + "{{ eos_token }}", None), "", "{{ bos_token }}"),
        regular(begin=BOS, user="[INST] {} [/INST]", header="", end=EOS),
        EOS,
    ),
    "mistral3": Dialect(MISTRAL3, accounts.mistral3, EOS),
    "gemma": Dialect(
        each(
            "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
            "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n" + TRIM + "<end_of_turn>\n",
            "<start_of_turn>model\n",
            "{{ bos_token }}",
        ),
        regular(
            begin=BOS,
            user="<start_of_turn>user\n{}<end_of_turn>\n",
            header="<start_of_turn>model\n",
            end="<end_of_turn>",
            sep="\n",
            trim=True,
        ),
        "<end_of_turn>",
    ),
    "phi3": Dialect(  # eos instead of a generation prompt
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        regular(
            user="<|user|>\n{}<|end|>\n",
            header="<|assistant|>\n",
            end="<|end|>",
            sep="\n",
            system="<|system|>\n{}<|end|>\n",
        ),
        "<|end|>",
    ),
    "phi4": Dialect(
        each("<|im_start|>{{ m.role }}<|im_sep|>" + TEXT + "<|im_end|>", "<|im_start|>assistant<|im_sep|>"),
        regular(
            user="<|im_start|>user<|im_sep|>{}<|im_end|>",
            header="<|im_start|>assistant<|im_sep|>",
            end="<|im_end|>",
            system="<|im_start|>system<|im_sep|>{}<|im_end|>",
        ),
        "<|im_end|>",
    ),
    "zephyr": Dialect(
        each("<|{{ m.role }}|>\n" + TEXT + "{{ eos_token }}\n", "<|assistant|>\n"),
        regular(
            user=f"<|user|>\n{{}}{EOS}\n",
            header="<|assistant|>\n",
            end=EOS,
            sep="\n",
            system=f"<|system|>\n{{}}{EOS}\n",
        ),
        EOS,
    ),
    "tulu": Dialect(  # no white space after the last mark
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% if not loop.last %}{{ '\n' }}{% endif %}"
        "{% else %}{{ '\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        regular(
            begin=BOS, user="<|user|>\n{}\n", header="<|assistant|>\n", end=EOS, sep="\n", system="<|system|>\n{}\n"
        ),
        EOS,
    ),
    "vicuna": Dialect(
        each(
            by_role("USER: " + TEXT + " ", "ASSISTANT: " + TEXT + "{{ eos_token }}", TEXT + " "),
            "ASSISTANT:",
            "{{ bos_token }}{% if messages[0].role != 'system' %}" + VICUNA_SYSTEM + "{% endif %}",
        ),
        regular(
            begin=BOS,
            user="USER: {} ",
            header="ASSISTANT:",
            lead=" ",
            end=EOS,
            system="{} ",
            default=VICUNA_SYSTEM.strip(),
        ),
        EOS,
    ),
    "alpaca": Dialect(  # nothing marks the end of an answer
        each(
            by_role("### Instruction:\n" + TEXT + "\n\n", "### Response:\n" + TEXT + "\n\n", TEXT + "\n\n"),
            "### Response:\n",
            "{% if messages[0].role != 'system' %}" + ALPACA_SYSTEM + "{% endif %}",
        ),
        regular(
            user="### Instruction:\n{}\n\n",
            header="### Response:\n",
            end="",
            sep="\n\n",
            system="{}\n\n",
            default=ALPACA_SYSTEM.strip(),
        ),
        "",
    ),
    "falcon": Dialect(  # nothing marks the end, and a blank stands before the answer
        each(by_role("User: " + TEXT + "\n\n", "Falcon: " + TEXT + "\n\n", "System: " + TEXT + "\n\n"), "Falcon:"),
        regular(user="User: {}\n\n", header="Falcon:", lead=" ", end="", sep="\n\n", system="System: {}\n\n"),
        "",
    ),
    "command_r": Dialect(
        each(
            "<|START_OF_TURN_TOKEN|>{{ {'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>', "
            "'system': '<|SYSTEM_TOKEN|>'}[m.role] }}" + TRIM + "<|END_OF_TURN_TOKEN|>",
            "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
            "{{ bos_token }}",
        ),
        regular(
            begin=BOS,
            user="<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{}<|END_OF_TURN_TOKEN|>",
            header="<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
            end="<|END_OF_TURN_TOKEN|>",
            trim=True,
            system="<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{}<|END_OF_TURN_TOKEN|>",
        ),
        "<|END_OF_TURN_TOKEN|>",
    ),
    "deepseek2": Dialect(
        each(
            by_role("User: " + TEXT + "\n\n", "Assistant: " + TEXT + "{{ eos_token }}", TEXT + "\n\n"),
            "Assistant:",
            "{{ bos_token }}",
        ),
        regular(begin=BOS, user="User: {}\n\n", header="Assistant:", lead=" ", end=EOS, system="{}\n\n"),
        EOS,
    ),
    "deepseek31": Dialect(  # a thought is closed in the generation prompt and in history
        each(by_role("<|User|>" + TEXT, "<|Assistant|></think>" + TEXT + "<|eos|>", TEXT), "<|Assistant|></think>"),
        regular(user="<|User|>{}", header="<|Assistant|></think>", end="<|eos|>", system="{}"),
        "<|eos|>",
    ),
    "granite": Dialect(
        each(
            "<|start_of_role|>{{ m.role }}<|end_of_role|>" + TEXT + "<|end_of_text|>\n",
            ROLE.format("assistant"),
            "{% if messages[0].role != 'system' %}" + ROLE.format("system") + DEFAULT + "<|end_of_text|>\n{% endif %}",
        ),
        regular(
            user=ROLE.format("user") + "{}<|end_of_text|>\n",
            header=ROLE.format("assistant"),
            end="<|end_of_text|>",
            sep="\n",
            system=ROLE.format("system") + "{}<|end_of_text|>\n",
            default=DEFAULT,
        ),
        "<|end_of_text|>",
    ),
    "channels": Dialect(  # the generation prompt is shorter than an answer's header, which belongs to the prompt
        each(
            by_role(
                "<|start|>user<|message|>" + TEXT + "<|end|>",
                "<|start|>assistant<|channel|>final<|message|>" + TEXT + "<|end|>",
                "<|start|>system<|message|>" + TEXT + "<|end|>",
            ),
            "<|start|>assistant",
        ),
        regular(
            user="<|start|>user<|message|>{}<|end|>",
            header="<|start|>assistant<|channel|>final<|message|>",
            end="<|end|>",
            system="<|start|>system<|message|>{}<|end|>",
        ),
        "<|end|>",
    ),
    "bare": Dialect(  # neither a generation prompt nor a mark
        each("{{ m.role }}: " + TEXT + "\n", ""),
        regular(user="user: {}\n", header="assistant:", lead=" ", end="", sep="\n", system="system: {}\n"),
        "",
    ),
    "mark_between": Dialect(  # the mark is written only where another turn follows
        "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}{% if not loop.last %}<end>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<end>\n[assistant]\n{% endif %}",
        regular(user="[user]\n{}<end>\n", header="[assistant]\n", end="<end>", sep="\n", system="[system]\n{}<end>\n"),
        "<end>",
    ),
    "thought_at_the_end": Dialect(  # an empty thought before the last answer, without a switch
        each(
            "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last and '</think>' not in m.content %}"
            "<think>\n\n</think>\n\n{% endif %}" + TEXT + "<|im_end|>\n",
            "<|im_start|>assistant\n",
        ),
        accounts.thought_at_the_end,
        "<|im_end|>",
    ),
}

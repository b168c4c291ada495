"""Keys that say which turns carry loss and how they are laid out: train_on_roles, system, template: FILE.jinja."""

from __future__ import annotations

import pytest
from helpers.chat_dialects import DIALECTS
from helpers.prepared_data import CHATML, answers, make_tokenizer, read, write
from helpers.tool_dialects import QWEN25, ROW

from macdrop.errors import ConfigError, DataError
from tune.config.train_spec import TrainSpec
from tune.data.templates import IGNORE

TURNS = [
    {"role": "system", "content": "Rhyme."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "b"},
]
END = "<|im_end|>"


def trained(tmp_path, jinja, turns=TURNS, **keys):
    """What carries loss of one row, and the row's text."""
    tokenizer = make_tokenizer(jinja)
    found = read(write(tmp_path / "m.jsonl", [{"messages": turns}]), tokenizer, tmp_path, **keys).train[0]
    return answers(tokenizer, found), tokenizer.decode(found[0])


# --- train_on_roles ---


@pytest.mark.parametrize(
    ("roles", "wanted"),
    [
        (["assistant"], f"a{END}b{END}"),
        (["user"], f"One?{END}Two?{END}"),
        (["user", "assistant"], f"One?{END}a{END}Two?{END}b{END}"),
        (["system"], f"Rhyme.{END}"),
        (["system", "assistant"], f"Rhyme.{END}a{END}b{END}"),
    ],
)
def test_turns_of_the_roles_carry_loss(tmp_path, roles, wanted):
    found, text = trained(tmp_path, CHATML, train_on_roles=roles)
    assert found == wanted
    assert text.startswith("<|im_start|>system\nRhyme.<|im_end|>") and text.endswith(f"{wanted[-11:]}")


def test_results_of_tools_carry_loss_if_they_are_named(tmp_path):
    tokenizer = make_tokenizer(QWEN25)
    path = write(tmp_path / "m.jsonl", [ROW])
    found = read(path, tokenizer, tmp_path, train_on_roles=["tool"]).train[0]
    assert answers(tokenizer, found) == '{"rain": "yes"}'


@pytest.mark.parametrize("name", sorted(set(DIALECTS) - {"mistral3"}))
def test_questions_carry_loss_under_well_known_templates(tmp_path, name):
    """Of text that stands alone in the rendering the labels are its tokens: by a search for the text."""
    turns = [{"role": "user", "content": "how many?"}, {"role": "assistant", "content": "seven"}]
    tokenizer = make_tokenizer(DIALECTS[name].jinja)
    path = write(tmp_path / "m.jsonl", [{"messages": turns}])
    both = read(path, tokenizer, tmp_path, train_on_roles=["user", "assistant"]).train[0]
    plain = read(path, tokenizer, tmp_path).train[0]
    assert answers(tokenizer, both).startswith("how many?") and answers(tokenizer, plain) in answers(tokenizer, both)
    assert tokenizer.decode(both[0]) == tokenizer.decode(plain[0])


def test_alpaca_has_the_same_roles(tmp_path):
    tokenizer = make_tokenizer()
    row = {"instruction": "Add.", "input": "2 and 3", "output": "5", "system": "Be brief."}
    path = write(tmp_path / "a.jsonl", [row])
    wanted = {("assistant",): "5</s>", ("user",): "Add.2 and 3", ("system", "assistant"): "Be brief.\n\n5</s>"}
    for roles, text in wanted.items():
        assert answers(tokenizer, read(path, tokenizer, tmp_path, train_on_roles=list(roles)).train[0]) == text


def test_weights_are_of_the_roles_that_carry_loss(tmp_path):
    turns = [TURNS[1] | {"weight": 1}, TURNS[2] | {"weight": 0}, TURNS[3] | {"weight": 0}, TURNS[4]]
    found, _ = trained(tmp_path, CHATML, turns, train_on_roles=["user", "assistant"])
    assert found == f"One?{END}b{END}"
    with pytest.raises(DataError, match="add user to train_on_roles"):
        trained(tmp_path, CHATML, turns)
    with pytest.raises(DataError, match=r"must hold a turn of train_on_roles \(tool\); found the roles system, user"):
        trained(tmp_path, CHATML, train_on_roles=["tool"])


def test_roles_without_effect_are_refused():
    def refusal(**keys):
        with pytest.raises(ValueError) as caught:
            TrainSpec(model_name_or_path="m", **keys)
        return str(caught.value)

    assert "no effect with train_on_prompt: true" in refusal(train_on_prompt=True, train_on_roles=["user"])
    assert "names system" in refusal(system="as_user", train_on_roles=["system", "assistant"])
    assert "names user twice" in refusal(train_on_roles=["user", "user"])
    assert "at least 1" in refusal(train_on_roles=[])
    assert "'tool'" in refusal(train_on_roles=["bot"])


# --- system: as_user ---


def test_the_system_turn_becomes_a_part_of_the_next_question(tmp_path):
    gemma = DIALECTS["gemma"].jinja
    with pytest.raises(DataError, match="System role not supported. Use template: alpaca or system: as_user"):
        trained(tmp_path, gemma)
    found, text = trained(tmp_path, gemma, system="as_user")
    assert text.startswith("<s><start_of_turn>user\nRhyme.\n\nOne?<end_of_turn>\n") and "system" not in text
    assert found == "a<end_of_turn>b<end_of_turn>"
    later = [*TURNS[1:3], TURNS[0], TURNS[3], TURNS[4]]
    assert "<start_of_turn>user\nRhyme.\n\nTwo?" in trained(tmp_path, gemma, later, system="as_user")[1]
    with pytest.raises(DataError, match="no question follows the system turn 'Rhyme.'"):
        trained(tmp_path, gemma, [*TURNS[1:3], TURNS[0]], system="as_user")


def test_it_has_an_effect_where_the_template_takes_system_turns_and_in_alpaca(tmp_path):
    for template in (CHATML, None):
        assert "Rhyme.\n\nOne?" in trained(tmp_path, template, system="as_user")[1]
        assert "Rhyme.\n\nOne?" not in trained(tmp_path, template)[1]


# --- template: FILE.jinja ---


def test_a_template_in_a_file_takes_the_place_of_the_tokenizers(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML.replace("<|im_start|>", "<<").replace("<|im_end|>", ">>") + "\n")
    found, text = trained(tmp_path, CHATML, TURNS[1:3], template=str(file))
    assert (found, text) == ("a>>", "<<user\nOne?>>\n<<assistant\na>>")
    assert trained(tmp_path, None, TURNS[1:3], template=str(file)) == (found, text)
    file.write_text(CHATML)  # another content of the same name is other data
    assert trained(tmp_path, None, TURNS[1:3], template=str(file))[0] == f"a{END}"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file"),
        (b"", "is empty"),
        (b"\xff\xfe", "not UTF-8"),
        (b"{% for m in messages %}\n{{ m.content }", "line 2: not a valid template"),
    ],
)
def test_files_that_hold_no_template_are_refused(tmp_path, content, words):
    if content is not None:
        (tmp_path / "mine.jinja").write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        trained(tmp_path, CHATML, template=str(tmp_path / "mine.jinja"))


def test_an_unknown_template_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'alpaca'"):
        TrainSpec(model_name_or_path="m", template="alpacka")


# --- every key has an effect ---


def test_two_trials_that_differ_in_one_key_differ_in_name_and_bytes(tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text(CHATML.replace("<|im_end|>", ">>"))
    base = TrainSpec(model_name_or_path="m")
    plain = trained(tmp_path, CHATML)
    for keys in ({"train_on_roles": ["user"]}, {"system": "as_user"}, {"template": str(file)}):
        assert TrainSpec(model_name_or_path="m", **keys).trial_id() != base.trial_id()
        assert trained(tmp_path, CHATML, **keys) != plain
    roles = [TrainSpec(model_name_or_path="m", train_on_roles=each) for each in (["user", "tool"], ["tool", "user"])]
    assert roles[0].trial_id() == roles[1].trial_id()
    assert TrainSpec(model_name_or_path="m", max_skipped_share=None).trial_id() == base.trial_id()


def test_the_thought_that_a_template_adds_carries_no_loss(tmp_path):
    """In history and before the last answer alike; one that the row holds does."""
    turns = TURNS[1:]
    for name in ("qwen3", "smollm3", "thought_at_the_end"):
        tokenizer = make_tokenizer(DIALECTS[name].jinja)
        ids, labels = read(write(tmp_path / "m.jsonl", [{"messages": turns}]), tokenizer, tmp_path).train[0]
        assert answers(tokenizer, (ids, labels)) == f"a{END}b{END}"
        assert "<think>" in tokenizer.decode(ids[labels == IGNORE])

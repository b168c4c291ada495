"""Text that is not ours in every format: never markup, a command, a formula or a control character."""

from __future__ import annotations

import csv
import io

import pytest

from tune.report.escaping import csv_text, html_text, latex_text, markdown_text, rich_text, visible

#: What must not reach any output as it is: clear the screen, set the clipboard, a C1 command, an override, half a pair.
HIDDEN = ["\x1b[2J", "\x1b]52;c;aGk=\x07", "\x9b31m", "\u202egpj.exe", "\r", "\x00", "\u2028", "\ud83d", "\x7f"]


@pytest.mark.parametrize("text", HIDDEN)
@pytest.mark.parametrize("write", [visible, html_text, latex_text, markdown_text, lambda text: str(rich_text(text))])
def test_control_characters_are_visible(write, text):
    written = write(f"a{text}b")
    assert written.isprintable() and written.encode() and "\\" in written.replace("textbackslash", "\\")


def test_other_text_stays_as_it_is():
    for text in ("naïve café, 漢字, עברית, می‌خواهم, 👩‍👩‍👧", "two\nlines\tand a tab", "C:\\x1b", ""):
        assert visible(text) == text


def test_cells_that_would_be_formulas_get_an_apostrophe():
    formulas = ["=1+1|cmd", "@SUM(1)", "+cmd", "-cmd", "\t=1", "\n=1", "＝1", "-1+1"]
    numbers = ["-0.5", "+3", "-inf", "1e-5"]
    others = ["a=b", "", "it's", 'a"b', "a,b", None, -0.5, True]
    text = csv_text(["name"], [[cell] for cell in (*formulas, *numbers, *others)])
    cells = [row[0] for row in csv.reader(io.StringIO(text))][1:]
    assert cells[: len(formulas)] == [f"'{cell}" for cell in formulas]
    assert cells[len(formulas) : len(formulas) + len(numbers)] == numbers
    assert cells[len(formulas) + len(numbers) :] == ["a=b", "", "it's", 'a"b', "a,b", "", "-0.5", "True"]


def test_markdown_takes_names_for_no_html_and_no_link():
    assert markdown_text("<script>x</script>") == "\\<script>x\\</script>"
    assert markdown_text("![a](http://h/x) [b][c] [d]: e") == "![a]\\(http://h/x) [b]\\[c] [d]\\: e"
    assert markdown_text("p <0.001 in [a, b]") == "p <0.001 in [a, b]"


def test_latex_keeps_a_command_to_type():
    assert latex_text("macdrop sweep --resume a_b") == r"macdrop sweep -{}-resume a\_b"
    assert latex_text("a\n\nb") == "a b"  # a blank line would end a caption

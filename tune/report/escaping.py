"""Text that is not ours, such as names, paths, reasons and answers, made harmless in every format.

It is never markup, a command, a formula or a control character: each renderer passes it through one of these.
"""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text

#: Characters that a terminal or an editor obeys in place of showing: C0 but for tab and newline, C1, line separators,
#: bidirectional overrides and isolates, the byte order mark, tags, and halves of surrogate pairs, which no file takes.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]")
#: The first characters of a cell that spreadsheets take for a formula, or skip before one (OWASP, CSV injection).
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
_LATEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "−": r"$-$",
    "×": r"$\times$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "→": r"$\rightarrow$",
    "Δ": r"$\Delta$",
    "·": r"$\cdot$",
}
#: Raw HTML and links, which begin so in Markdown.
_MARKDOWN = re.compile(r"<(?=[A-Za-z/!?])|(?<=\])[(\[:]")


def visible(text: str) -> str:
    """Write control characters as escapes such as `\\x1b`; tabs and newlines are kept."""
    if text.isascii() and text.isprintable():
        return text
    return _HIDDEN.sub(lambda found: ascii(found[0])[1:-1], text)


def rich_text(*parts: str | tuple[str, str]) -> Text:
    """Return text for a rich console, of strings and of (string, style) pairs."""
    from rich.text import Text

    pairs = (part if isinstance(part, tuple) else (part, "") for part in parts)
    return Text.assemble(*((visible(text), style) for text, style in pairs))


def latex_text(text: str) -> str:
    """Escape LaTeX's special characters, in one line; other characters stay as they are (UTF-8)."""
    line = " ".join(visible(text).split())
    return re.sub("-(?=-)", "-{}", "".join(_LATEX.get(sign, sign) for sign in line))


def html_text(text: str) -> str:
    """Escape HTML's special characters; newlines become line breaks."""
    return html.escape(visible(text)).replace("\n", "<br>")


def markdown_text(text: str) -> str:
    """Escape what Markdown takes for HTML or a link, in one line; emphasis stays, as the text is read plain, too."""
    line = " ".join(visible(text).split())
    return _MARKDOWN.sub(lambda found: f"\\{found[0]}", line)


def csv_text(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Render CSV. Text that a spreadsheet would take for a formula gets an apostrophe in front; numbers do not."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([_csv_cell(cell) for cell in row] for row in (head, *rows))
    return out.getvalue()


def _csv_cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return f"'{visible(value)}" if value.startswith(_FORMULA) and not _is_number(value) else visible(value)


def _is_number(text: str) -> bool:
    """Return whether a text is a number, or several with spaces between them."""
    try:
        return bool([float(part) for part in text.split(" ")]) and text.isprintable()
    except ValueError:
        return False

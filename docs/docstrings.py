"""Google-style docstrings to Markdown. Knows text alone, and nothing of what the text is about."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator

WIDTH = 112
TITLES = {"Args": "Arguments", "Example": "Example", "Examples": "Example"}
SECTION = re.compile(r"(Args|Class attributes|Attributes|Returns|Yields|Raises|Examples?):")
INLINE = re.compile(r"(Sources?): (.+)", re.DOTALL)


def sections(doc: str) -> Iterator[tuple[str, str]]:
    """The parts of a Google-style docstring: a title ("" for plain text) and the dedented body of each."""
    title, body = "", list[str]()
    for line in [*doc.splitlines(), None]:
        ends = line is None or (body and title and line and not line[0].isspace())
        begins = SECTION.fullmatch(line or "")
        if ends or begins:
            text = textwrap.dedent("\n".join(body)).strip("\n")
            if text:
                yield title, text
            title, body = "", []
        if begins:
            title = begins[1]
        elif line is not None:
            body.append(line)


def entries(text: str) -> list[tuple[str, str]]:
    """`name: meaning` of a section, with the lines of a meaning joined."""
    found: list[tuple[str, str]] = []
    for line in text.splitlines():
        if line and not line[0].isspace():
            name, _, meaning = line.partition(": ")
            found.append((name, meaning))
        elif found:
            found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}".strip())
    return found


def escaped(text: str) -> str:
    """Plain text as Markdown that shows the same; what stands in backticks is code already."""
    parts = re.split(r"(`[^`]*`)", text)
    active = re.compile(r"[*\\~]|<(?=[A-Za-z/!])|\](?=\()")
    return "".join(part if part.startswith("`") else active.sub(r"\\\g<0>", part) for part in parts)


def wrapped(text: str, bullet: str = "", label: str = "") -> str:
    """Escaped text behind a label that is Markdown, in lines of the page's width: a paragraph or a list item."""
    indent = " " * len(bullet)
    lines = filled(label + escaped(" ".join(text.split())), WIDTH - len(indent))
    # A line that happens to begin like a list, a heading or a quotation is none.
    lines = [re.sub(r"^(\d*)([-+#>.])(?=[ #>])", r"\1\\\2", line) for line in lines]
    return bullet + f"\n{indent}".join(lines)


def filled(text: str, width: int = WIDTH) -> list[str]:
    """Lines of words, none of which is cut."""
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def prose(text: str) -> Iterator[str]:
    """Paragraphs, lists and indented blocks of plain text."""
    for paragraph in re.split(r"\n\n+", text):
        if source := INLINE.fullmatch(paragraph):
            yield wrapped(source[2], label=f"**{source[1]}.** ")
        elif not paragraph:
            continue
        elif paragraph.startswith("- "):
            yield "\n".join(wrapped(item, "- ") for item in re.split(r"(?:^|\n)- ", paragraph) if item)
        elif paragraph[0].isspace() or "├" in paragraph:
            yield f"```text\n{textwrap.dedent(paragraph)}\n```"
        else:
            yield wrapped(paragraph)


def markdown(doc: str) -> Iterator[str]:
    """A docstring as blocks of Markdown."""
    for title, text in sections(doc):
        shown = f"**{TITLES.get(title, title)}**"
        if not title:
            yield from prose(text)
        elif title in ("Example", "Examples"):
            yield shown
            yield f"```{'pycon' if '>>>' in text else 'python'}\n{text}\n```"
        elif title in ("Returns", "Yields"):
            first, *rest = text.split("\n\n", 1)
            yield wrapped(first, label=f"{shown}: ")
            yield from prose("".join(rest))
        else:
            yield shown
            yield "\n".join(wrapped(f"`{name}`: {meaning}", "- ") for name, meaning in entries(text))


def code(text: str) -> str:
    """A block of Python."""
    return f"```python\n{text}\n```"


def anchor(title: str) -> str:
    """A heading as links name it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def link(title: str, text: str) -> str:
    """A link to a heading of the page."""
    return f"[{text}](#{anchor(title)})"

r"""Final answers of mathematical texts: where they stand, and one form for many ways to write the same.

Texts only: no algebra is done, so `12` and `12.0`, or `x+1` and `1+x`, are two answers. The form is that of the
string equivalence of MATH (Hendrycks et al. 2021, arXiv:2103.03874) with what Minerva added to it (Lewkowycz et al.
2022, arXiv:2206.14858, appendix): thousands commas, and words in `\text{}` that are no units.
"""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_MARK = re.compile(r"\banswer\s+is\b\s*:?|\banswer\s*:|####", re.IGNORECASE)
# A full stop that ends a sentence, or the line.
_END = re.compile(r"\.(?=\s|$)|\n")
_TEXT = r"\\(?:text(?:bf|it|rm)?|mbox|mathrm|mathbf)\s*\{([^{}]*)\}"
_UNIT = re.compile(_TEXT + r"\s*(?:\^\s*\{?\s*\d\s*\}?)?[\s.]*$")
_TOKEN = re.compile(r"\s*(\\[A-Za-z]+|[^\s{}\\])")

# What is written anew, in this order. No command is touched whose backslash follows another: `\\` ends a row of a
# matrix.
_REWRITTEN = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"(?<=\d)(?:,\\!|\{,\})(?=\d{3}(?!\d))", ""),  # 10,\!000 and 10{,}000
        (r"(?<!\\)\\!", ""),
        (r"(?<!\\)\\[ ,;:]|(?<!\\)\\q?quad(?![A-Za-z])|~", " "),  # 5\ cm
        (r"(?<!\\)\\(?:left|right)(?![A-Za-z])\s*\.?", ""),  # \left( \right. and not \leftarrow
        (r"(?<!\\)\\[dt]frac(?![A-Za-z])", r"\\frac"),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])|°", ""),  # 90^\circ
        (r"\\?[$%]", ""),  # \$5, $5$, 50\%
    )
)


def boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{…}` or `\fbox{…}`, with balanced braces.

    `\boxed 5` has no braces; it goes on to the next dollar or to the end of the line. None without a box, and where
    the last one is not closed: what was to stand in it is not known.
    """
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    start = boxes[-1].end()
    if text[start : start + 1] != "{":
        return re.split(r"[$\n]", text[start:], maxsplit=1)[0].strip()
    end = _closing(text).get(start)
    return None if end is None else text[start + 1 : end]


def final_answer(text: str) -> str | None:
    r"""What a text gives as its answer; None where it gives none.

    The content of the last box (see `boxed`); an empty one gives none. Without a box, what follows the last
    "answer is", "Answer:" or "####", in any case, up to the end of that sentence or line; a full stop within a
    number ends nothing.
    """
    if _BOX.search(text):
        return boxed(text) or None
    marks = list(_MARK.finditer(text))
    return (_END.split(text[marks[-1].end() :].strip(), maxsplit=1)[0].strip() or None) if marks else None


def normal_form(answer: str) -> str:
    r"""One form for the ways in which MATH's answers are written; equal forms are equal answers.

    In this order:

    - `,\!` and `{,}` between thousands are removed;
    - `\!` is removed; `\ `, `\,`, `\;`, `\:`, `~` and `\quad` are white space;
    - `\left` and `\right` are removed, with the full stop that stands for no bracket;
    - `\dfrac` and `\tfrac` become `\frac`;
    - degrees (`^\circ`, `^{\circ}`, `\degree`, `°`) are removed;
    - `$`, `\$`, `%` and `\%` are removed;
    - a `\text{…}` or the like (`\mbox`, `\mathrm` …) at the end is a unit, and removed with its exponent, if a
      digit stands before it; any other gives its words;
    - full stops at the end are removed;
    - what stands before the only `=` is removed if it has at most two characters: `x=5` is `5`;
    - arguments get their braces: `\frac12` is `\frac{1}{2}`, `\sqrt3` is `\sqrt{3}`;
    - a number alone loses the commas between its thousands: `1,000` is `1000`, while `1, 000` and `(1,000)` are
      lists;
    - white space is removed;
    - a number that begins with its point gets a zero: `.5` is `0.5`;
    - a fraction of whole numbers alone, `a/b`, becomes `\frac{a}{b}`, its sign in front; `0.5` is `\frac{1}{2}`,
      and no other decimal is a fraction.
    """
    text = answer
    for pattern, new in _REWRITTEN:
        text = pattern.sub(new, text)
    unit = _UNIT.search(text)
    if unit and re.search(r"\d", text[: unit.start()]):
        text = text[: unit.start()]
    text = re.sub(_TEXT, r"\1", text).rstrip().rstrip(".")
    sides = text.split("=")
    if len(sides) == 2 and len(sides[0].strip()) <= 2:
        text = sides[1]
    if re.fullmatch(r"\s*-?\s*[1-9][0-9]{0,2}(,[0-9]{3})+(\.[0-9]+)?\s*", text):
        text = text.replace(",", "")
    text = re.sub(r"\s+", "", _with_braces(text))
    text = re.sub(r"(?<!\d)\.(?=\d)", "0.", text)
    text = re.sub(r"^(-?)([0-9]+)/([0-9]+)$", r"\1\\frac{\2}{\3}", text)
    return r"\frac{1}{2}" if text == "0.5" else text


def _with_braces(text: str) -> str:
    """Braces around the arguments of fractions and roots that have none."""
    text = re.sub(r"\\(frac|sqrt)(?![A-Za-z])\s*(\\[A-Za-z]+|[^\s{}\[\\])", r"\\\1{\2}", text)
    # The second argument of a fraction stands behind the brace that closes the first. No recursion: a model that
    # repeats itself nests fractions deeper than a stack goes.
    closing = _closing(text)
    found = []
    for fraction in re.finditer(r"\\frac(?![A-Za-z])\s*(?=\{)", text):
        first = closing.get(fraction.end())
        token = None if first is None else _TOKEN.match(text, first + 1)
        if token is not None:
            found.append(token)
    parts, at = [], 0
    for token in sorted(found, key=lambda token: token.start()):
        parts += [text[at : token.start(1)], "{", token[1], "}"]
        at = token.end()
    return "".join([*parts, text[at:]])


def _closing(text: str) -> dict[int, int]:
    r"""Where each brace that is opened is closed; `\{` and `\}` are no braces."""
    found: dict[int, int] = {}
    opened: list[int] = []
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            found[opened.pop()] = match.start()
    return found

"""Code: what a small program in a small subset of Python prints.

A program is a list of statements, each a list that begins with its name, and so are expressions:

- `["=", name, value]`, `["append", name, value]`, `["print", value]`
- `["if", test, statements, statements]`, `["range", name, number, statements]`, `["each", name, list, statements]`
- a number, `["name", name]`, `["text", string]`, `["list", value, ...]`, `["len", value]`, `["at", value, index]`,
  `["reversed", value]`, and `[sign, value, value]` with the sign +, -, *, > or ==
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator
from typing import Any

from perdure.streams.arena.kind import THINGS, Facts, Kind

Program = list[list[Any]]
_SIGNS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    ">": operator.gt,
    "==": operator.eq,
}


def text_of(program: Program, indent: str = "") -> str:
    """The program as Python's text, one statement a line, blocks indented by two spaces."""
    return "\n".join(indent + line for statement in program for line in _lines(statement))


def _lines(statement: list[Any]) -> list[str]:
    name, *parts = statement
    if name == "=":
        return [f"{parts[0]} = {_shown(parts[1])}"]
    if name == "append":
        return [f"{parts[0]}.append({_shown(parts[1])})"]
    if name == "print":
        return [f"print({_shown(parts[0])})"]
    if name == "if":
        return [f"if {_shown(parts[0])}:", *_block(parts[1]), "else:", *_block(parts[2])]
    over = f"range({_shown(parts[1])})" if name == "range" else _shown(parts[1])
    return [f"for {parts[0]} in {over}:", *_block(parts[2])]


def _block(program: Program) -> list[str]:
    return text_of(program, "  ").split("\n")


def _shown(value: Any) -> str:
    if isinstance(value, int):
        return str(value)
    name, *parts = value
    if name == "name":
        return str(parts[0])
    if name == "text":
        return f'"{parts[0]}"'
    shown = [_shown(part) for part in parts]
    if name == "list":
        return f"[{', '.join(shown)}]"
    if name == "len":
        return f"len({shown[0]})"
    if name == "at":
        return f"{shown[0]}[{shown[1]}]"
    if name == "reversed":
        return f"{shown[0]}[::-1]"
    # Brackets around every inner sum and product: what binds closer is not what is asked for.
    inner = [f"({s})" if isinstance(p, list) and p[0] in _SIGNS else s for p, s in zip(parts, shown, strict=True)]
    return f" {name} ".join(inner)


def printed(program: Program) -> list[Any]:
    """What a program prints, one value a call of `print`, worked out from its structure."""
    return list(_run(program, {}))


def _run(program: Program, values: dict[str, Any]) -> Iterator[Any]:
    for name, *parts in program:
        if name == "=":
            values[parts[0]] = _value(parts[1], values)
        elif name == "append":
            values[parts[0]] = [*values[parts[0]], _value(parts[1], values)]
        elif name == "print":
            yield _value(parts[0], values)
        elif name == "if":
            yield from _run(parts[1] if _value(parts[0], values) else parts[2], values)
        else:
            over = _value(parts[1], values)
            for values[parts[0]] in range(over) if name == "range" else over:
                yield from _run(parts[2], values)


def _value(value: Any, values: dict[str, Any]) -> Any:
    if isinstance(value, int):
        return value
    name, *parts = value
    if name == "name":
        return values[parts[0]]
    if name == "text":
        return parts[0]
    known = [_value(part, values) for part in parts]
    if name == "list":
        return known
    if name == "len":
        return len(known[0])
    if name == "at":
        return known[0][known[1]]
    if name == "reversed":
        return known[0][::-1]
    return _SIGNS[name](*known)


def _name(letter: str) -> list[Any]:
    return ["name", letter]


def _draw(rng: random.Random, level: int) -> Facts:
    letters = rng.sample("abcdkmnuvwxyz", 4)
    program = _DRAW[level](rng, *letters)
    (answer,) = printed(program)
    return {"program": program, "answer": answer}


def _sums(rng: random.Random, a: str, b: str, *_: str) -> Program:
    """A name set, a second one made of it."""
    sign = rng.choice("+-")
    return [
        ["=", a, rng.randint(9, 30) if sign == "-" else rng.randint(1, 20)],
        ["=", b, [sign, _name(a), rng.randint(1, 9)]],
        ["print", _name(rng.choice((b, b, a)))],
    ]


def _products(rng: random.Random, a: str, b: str, c: str, *_: str) -> Program:
    """Three names, a product, and one of them set anew."""
    changed = rng.choice((a, b))
    return [
        ["=", a, rng.randint(2, 9)],
        ["=", b, rng.randint(2, 9)],
        ["=", c, ["*", _name(a), _name(b)]],
        ["=", changed, ["+", _name(changed), rng.randint(1, 9)]],
        ["print", [rng.choice("+-"), _name(c), _name(changed)]],
    ]


def _branches(rng: random.Random, a: str, b: str, c: str, *_: str) -> Program:
    """An if with an else."""
    signs = rng.sample("+-*", 2)
    return [
        ["=", a, rng.randint(2, 12)],
        ["=", b, rng.randint(2, 12)],
        [
            "if",
            [">", _name(a), _name(b)],
            [["=", c, [signs[0], _name(a), _name(b)]]],
            [["=", c, [signs[1], _name(a), _name(b)]]],
        ],
        ["print", ["+", _name(c), rng.randint(1, 9)]],
    ]


def _loops(rng: random.Random, a: str, b: str, c: str, *_: str) -> Program:
    """A loop over a range, with an if inside."""
    inner: list[Any] = ["=", a, ["+", _name(a), rng.choice((_name(c), ["*", _name(c), rng.randint(2, 4)]))]]
    other: list[Any] = ["=", a, [rng.choice("+-"), _name(a), _name(b)]]
    return [
        ["=", a, rng.randint(0, 20)],
        ["=", b, rng.randint(2, 9)],
        ["range", c, rng.randint(3, 6), [["if", [">", _name(c), rng.randint(0, 2)], [inner], [other]]]],
        ["print", _name(a)],
    ]


def _lists_and_texts(rng: random.Random, *letters: str) -> Program:
    return rng.choice((_list, _text))(rng, *letters)


def _list(rng: random.Random, a: str, b: str, c: str, d: str) -> Program:
    """A list that grows, and a loop over it."""
    inner: list[Any] = ["=", b, ["+", _name(b), _name(c)]]
    other: list[Any] = ["=", b, ["-", _name(b), rng.randint(1, 3)]]
    return [
        ["=", a, ["list", *(rng.randint(1, 12) for _ in range(rng.randint(3, 5)))]],
        ["=", d, ["at", _name(a), rng.choice((0, 1, 2, -1))]],
        ["append", a, ["+", _name(d), rng.randint(1, 5)]],
        ["=", b, ["len", _name(a)]],
        ["each", c, _name(a), [["if", [">", _name(c), rng.randint(3, 8)], [inner], [other]]]],
        ["print", _name(b)],
    ]


def _text(rng: random.Random, a: str, b: str, c: str, d: str) -> Program:
    """Words put together, turned round or counted."""
    first, second = rng.sample(THINGS, 2)
    shown = rng.choice((_name(d), ["reversed", _name(d)], ["+", ["len", _name(d)], rng.randint(1, 9)]))
    return [
        ["=", a, ["text", first]],
        ["=", b, ["text", second]],
        ["=", d, rng.choice((["+", _name(a), _name(b)], ["+", _name(b), _name(a)]))],
        ["range", c, rng.randint(1, 3), [["=", d, ["+", _name(d), ["at", _name(a), rng.choice((0, 1, -1))]]]]],
        ["print", shown],
    ]


_DRAW: dict[int, Callable[..., Program]] = {1: _sums, 2: _products, 3: _branches, 4: _loops, 5: _lists_and_texts}

CODE = Kind(
    name="code",
    draw=_draw,
    told=lambda facts: {"program": text_of(facts["program"])},
    prompts=(
        "Run the program.\n{program}\nIt prints:",
        "What does this program print?\n{program}\nOutput:",
        "Read the code.\n{program}\nThe output:",
        "Work it out line by line.\n{program}\nWhat is printed?",
        "Python:\n{program}\nPrinted:",
        "Here is some code.\n{program}\nSay what it prints:",
        "Follow the program.\n{program}\nIts output:",
        "Take each step.\n{program}\nThe result on the screen:",
        "Trace this code.\n{program}\nAt the end it prints:",
        "Be the computer.\n{program}\nPrint:",
        "Look at these lines.\n{program}\nThe last one prints:",
        "Give the output of this program.\n{program}\nThat is:",
    ),
    answer=lambda facts: f" prints {facts['answer']}",
    canonical=lambda facts: text_of(facts["program"]),
)

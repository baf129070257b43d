"""docs/api.md is what the docstrings say, and every public name has one."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def builder() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS))
        yield importlib.import_module("build_api")


@pytest.fixture(scope="module")
def text(builder: Any) -> Any:
    return importlib.import_module("docstrings")


def test_the_page_is_what_the_docstrings_say(builder: Any) -> None:
    written = (DOCS / "api.md").read_text(encoding="utf-8")
    assert written == builder.page(), "docs/api.md is behind the docstrings: run make api"


def test_headings_are_links_of_their_own(builder: Any) -> None:
    titles = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", builder.page(), flags=re.M | re.S), re.MULTILINE)
    assert len(titles) > 150
    assert len({importlib.import_module("docstrings").anchor(title) for title in titles}) == len(titles)


def described(builder: Any) -> Iterator[tuple[str, Any]]:
    """Every public class, function, method and property, by its full name."""
    home = builder.homes()
    for thing, place in home.items():
        yield place, thing
        if inspect.isclass(thing) and not builder.is_error(thing) and not issubclass(thing, BaseModel):
            for name, member in builder.members(thing, list(home)).items():
                yield f"{place}.{name}", builder.unwrapped(member)


def test_all_that_is_public_has_a_docstring(builder: Any) -> None:
    things = dict(described(builder))
    assert len(things) > 200
    assert not [place for place, thing in things.items() if not builder.docstring(thing)]
    tables = {
        f"{module.__name__}.{name}": builder.note_of(module, name)
        for module, names in builder.everything()
        for name, value in names.items()
        if not callable(value)
    }
    assert "perdure.strategies.STRATEGIES" in tables
    assert not [place for place, note in tables.items() if not note]


def test_arguments_are_those_of_the_signature(builder: Any, text: Any) -> None:
    """A class describes all that it is made with; a function that describes arguments, all and in their order."""
    for place, thing in described(builder):
        if isinstance(thing, property) or builder.is_error(thing):
            continue
        parts = dict(text.sections(builder.docstring(thing)))
        names = [parameter.name for parameter in builder.called_with(thing)]
        if inspect.isclass(thing) and issubclass(thing, BaseModel):
            assert all(field.description for field in thing.model_fields.values()), place
        elif "Args" in parts:
            assert [name for name, _ in text.entries(parts["Args"])] == names, place
        elif inspect.isclass(thing):
            said = {name for name, _ in text.entries(parts.get("Attributes", ""))}
            assert set(names) <= said, place


def test_a_docstring_becomes_markdown(text: Any) -> None:
    """Written by hand: a formula's star and `<` stay what they are, a line that begins with `- ` is no list."""
    doc = inspect.cleandoc(
        """Sum of a*b, for a <b> tag and `x*y`.

            c = a · b

        Args:
            a: the first, [B],
                or nothing.
            b: the second: a number.

        Returns:
            The sum.

        Source: Author 2020.
        """
    )
    assert "\n\n".join(text.markdown(doc)) == "\n\n".join(
        [
            r"Sum of a\*b, for a \<b> tag and `x*y`.",
            "```text\nc = a · b\n```",
            "**Arguments**",
            "- `a`: the first, [B], or nothing.\n- `b`: the second: a number.",
            "**Returns**: The sum.",
            "**Source.** Author 2020.",
        ]
    )
    assert text.wrapped("- 1") == r"\- 1"
    assert text.wrapped("1. is no item") == r"1\. is no item"


def test_a_signature_is_that_of_the_source(builder: Any) -> None:
    def short(a: int, *rest: str, key: str = "x", **more: float) -> list[int]:
        return [a]

    assert builder.signature("short", short) == (
        'def short(a: int, *rest: str, key: str = "x", **more: float) -> list[int]'
    )

    def keyword(a: int, *, b: str | None = None) -> None: ...

    assert builder.signature("keyword", keyword) == "def keyword(a: int, *, b: str | None = None)"


def test_a_docstring_that_nobody_wrote_does_not_count(builder: Any) -> None:
    """Python makes one up for a dataclass, and a class without one shows that of none of its bases here."""

    class Written:
        """A docstring."""

        def method(self) -> None: ...

    @dataclasses.dataclass
    class MadeUp(Written):
        x: int = 0

    class Bare(Written): ...

    assert str(MadeUp.__doc__).startswith("MadeUp(x: ")
    assert inspect.getdoc(Bare) == "A docstring."
    things = (Written, Written.method, MadeUp, Bare)
    assert [builder.docstring(thing) for thing in things] == ["A docstring.", "", "", ""]

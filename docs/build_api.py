"""Writes docs/api.md from the signatures and docstrings of the public API; `make api` runs it."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from docstrings import WIDTH, code, filled, link, markdown, sections, wrapped
from pydantic import BaseModel

from perdure.strategies import STRATEGIES

PAGE = Path(__file__).with_name("api.md")
# The names of a module are those of its `__all__`, else what it defines, unless they are named here.
MODULES: dict[str, tuple[str, ...] | None] = {
    "perdure": None,
    "perdure.strategies": None,
    "perdure.memory": None,
    "perdure.evaluation": None,
    "perdure.evaluation.metrics": None,
    "perdure.streams": None,
    "perdure.models.load": ("load", "LanguageModel"),
    "perdure.callbacks": None,
    "perdure.tracking": None,
    "perdure.types": ("Context", "Batch", "Output", "Phase"),
    "perdure.errors": None,
}
INTRODUCTION = """\
Every public class and function, by module: signature, meaning, units, errors. This page is written from the
docstrings by `make api`: do not edit it. A guide with examples is [Python interface](python.md); rules and costs
of the methods are on the pages of the [strategies](strategies/index.md). Shapes stand in brackets: [B, T, V] is a
batch of B rows with T tokens each and V logits a token.
"""


def public(module: ModuleType) -> dict[str, Any]:
    """The public names of a module and what they are, in the order in which they are shown."""
    names = MODULES[module.__name__] or getattr(module, "__all__", None)
    if names is None:
        names = [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
        ]
    found = {name: getattr(module, name) for name in names}

    def place(item: tuple[str, Any]) -> tuple[bool, bool, int]:
        """Classes, what extends others after these; then tables; then functions."""
        value = item[1]
        above = sum(base in found.values() for base in value.__mro__) if inspect.isclass(value) else 0
        return inspect.isfunction(value), not inspect.isclass(value), above

    return dict(sorted(((k, v) for k, v in found.items() if not isinstance(v, ModuleType)), key=place))


def everything() -> Iterator[tuple[ModuleType, dict[str, Any]]]:
    """Every module of the page with its public names."""
    for name in MODULES:
        module = importlib.import_module(name)
        yield module, public(module)


def homes() -> dict[Any, str]:
    """Where each class and function is described: at the first module that has it."""
    found: dict[Any, str] = {}
    for module, names in everything():
        for name, value in names.items():
            if inspect.isclass(value) or inspect.isfunction(value):
                found.setdefault(value, f"{module.__name__}.{name}")
    return found


def members(cls: type, known: Sequence[Any]) -> dict[str, Any]:
    """Public methods and properties, also those of bases that the page does not describe by themselves."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if base is not cls and (base in known or not base.__module__.startswith("perdure")):
            continue
        for name, value in vars(base).items():
            value = property(value.func) if isinstance(value, cached_property) else value
            if not name.startswith("_") and isinstance(unwrapped(value), property | type(members)):
                found.setdefault(name, value)
    return found


def unwrapped(member: Any) -> Any:
    """The function of a classmethod or staticmethod; anything else as it is."""
    return member.__func__ if isinstance(member, classmethod | staticmethod) else member


def called_with(thing: Any) -> list[inspect.Parameter]:
    """The parameters of a function, method or class, without `self`."""
    if inspect.isclass(thing) and thing.__init__ is object.__init__:
        return []
    found = list(inspect.signature(thing).parameters.values())
    return found[1:] if found and found[0].name in ("self", "cls") else found


def signature(name: str, thing: Any) -> str:
    """The call as code: on one line where it fits, else one parameter a line."""
    cls = thing if inspect.isclass(thing) else None
    found = called_with(thing)
    shown = [argument(parameter, cls) for parameter in found]
    kinds = [parameter.kind.name for parameter in found]
    if "KEYWORD_ONLY" in kinds and "VAR_POSITIONAL" not in kinds:
        shown.insert(kinds.index("KEYWORD_ONLY"), "*")
    head = f"def {name}" if cls is None else f"class {name}"
    result = returned(thing) if cls is None else ""
    line = f"{head}({', '.join(shown)}){result}"
    if len(line) <= WIDTH:
        return line
    return f"{head}(\n" + "".join(f"    {each},\n" for each in shown) + f"){result}"


def argument(parameter: inspect.Parameter, cls: Any) -> str:
    """`name: annotation = default`, as the source has it; without annotation where the class is one of settings."""
    settings = cls is not None and issubclass(cls, BaseModel)
    star = {"VAR_POSITIONAL": "*", "VAR_KEYWORD": "**"}.get(parameter.kind.name, "")
    typed = "" if settings or parameter.annotation is parameter.empty else f": {annotation(parameter.annotation)}"
    default = parameter.default
    if default is parameter.empty:
        return f"{star}{parameter.name}{typed}"
    if repr(default) == "<factory>":
        fields = cls.model_fields if settings else cls.__dataclass_fields__
        default = fields[parameter.name].default_factory()
    given = default.__name__ if inspect.isclass(default) else f"{default!r}".replace("'", '"')
    return f"{parameter.name}{typed} = {given}" if typed else f"{parameter.name}={given}"


def annotation(given: Any) -> str:
    """An annotation as code."""
    return given.replace("'", '"') if isinstance(given, str) else inspect.formatannotation(given)


def returned(thing: Any) -> str:
    """The arrow and the annotation after it; nothing where a function gives nothing."""
    given = inspect.signature(thing).return_annotation
    return "" if given in (inspect.Signature.empty, "None", None) else f" -> {annotation(given)}"


def docstring(thing: Any) -> str:
    """Its own docstring, cleaned; empty where it has none: those that Python makes up or inherits do not count."""
    doc = (thing.__doc__ if not inspect.isclass(thing) else vars(thing).get("__doc__")) or ""
    made_up = inspect.isclass(thing) and doc.startswith(f"{thing.__name__}(")
    return "" if made_up else inspect.cleandoc(doc)


def describe_class(name: str, cls: type, home: dict[Any, str]) -> Iterator[str]:
    """A class: its call, its docstring, its properties, its methods, and the inherited ones that it changes."""
    yield code(signature(name, cls))
    above = [base for base in cls.__mro__[1:] if base in home]
    notes = [f"Extends {link(home[above[0]], above[0].__name__)}."] if above else []
    if key := next((key for key, strategy in STRATEGIES.items() if strategy is cls), None):
        notes.append(f"Rule, cost and limits: [{key}](strategies/{key}.md).")
    if notes:
        yield " ".join(notes)
    yield from markdown(docstring(cls))
    if issubclass(cls, BaseModel):
        yield "**Fields**"
        fields = {key: field.description or "" for key, field in cls.model_fields.items()}
        yield "\n".join(wrapped(meaning, "- ", f"`{key}`: ") for key, meaning in fields.items())
        return
    own = members(cls, list(home))
    properties = {key: value for key, value in own.items() if isinstance(value, property)}
    if properties:
        yield "**Properties**"
        yield "\n".join(
            wrapped(f"`{key}: {returned(value.fget).removeprefix(' -> ')}`: {docstring(value)}", "- ")
            for key, value in properties.items()
        )
    changed = [
        key
        for key, value in own.items()
        if key not in properties and any(key in vars(base) for base in above) and simple(value)
    ]
    if changed:
        yield f"**Overrides of {above[0].__name__}**"
        yield "\n".join(wrapped(f"`{key}`: {docstring(unwrapped(own[key]))}", "- ") for key in changed)
    for key, value in own.items():
        if key not in properties and key not in changed:
            yield f"#### {name}.{key}"
            prefix = "" if value is unwrapped(value) else f"@{type(value).__name__}\n"
            yield code(prefix + signature(key, unwrapped(value)))
            yield from markdown(docstring(unwrapped(value)))


def simple(method: Any) -> bool:
    """Whether its docstring is text alone."""
    return all(not title for title, _ in sections(docstring(unwrapped(method))))


def describe_table(module: ModuleType, name: str, table: Any, home: dict[Any, str]) -> Iterator[str]:
    """A table of names: the string that stands below its assignment, and what it holds."""
    yield from markdown(note_of(module, name))
    lines = []
    for key, held in table.items():
        label = f'`"{key}"`: '
        if inspect.isclass(held) and held in home:
            lines.append(f"- {label}{link(home[held], held.__name__)}")
        else:
            lines.append(wrapped(held if isinstance(held, str) else docstring(held).split("\n\n")[0], "- ", label))
    yield "\n".join(lines)


def note_of(module: ModuleType, name: str) -> str:
    """The string below a name's assignment, in the module that assigns it."""
    body = ast.parse(inspect.getsource(module)).body
    for statement, after in zip(body, [*body[1:], None], strict=True):
        targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            written = after.value if isinstance(after, ast.Expr) else None
            return inspect.cleandoc(str(written.value)) if isinstance(written, ast.Constant) else ""
        if isinstance(statement, ast.ImportFrom) and any(alias.name == name for alias in statement.names):
            return note_of(importlib.import_module(str(statement.module)), name)
    return ""


def describe_module(module: ModuleType, names: dict[str, Any], home: dict[Any, str]) -> Iterator[str]:
    """A module with all that it has; exceptions, which have no methods, as a list."""
    yield f"## {module.__name__}"
    yield from markdown(docstring(module))
    errors = {name: value for name, value in names.items() if is_error(value)}
    if errors:
        yield "\n".join(wrapped(docstring(value), "- ", f"`{name}`: ") for name, value in errors.items())
    for name, value in names.items():
        own = f"{module.__name__}.{name}"
        if (elsewhere := place_of(module, name, value, home)) != own:
            yield f"`{name}` is {link(elsewhere, elsewhere)}."
        elif name not in errors:
            yield f"### {own}"
            if inspect.isclass(value):
                yield from describe_class(name, value, home)
            elif inspect.isfunction(value):
                yield code(signature(name, value))
                yield from markdown(docstring(value))
            else:
                yield from describe_table(module, name, value, home)


def is_error(value: Any) -> bool:
    """Whether it is an exception class."""
    return inspect.isclass(value) and issubclass(value, Exception)


def place_of(module: ModuleType, name: str, value: Any, home: dict[Any, str]) -> str:
    """The heading under which a public name is described."""
    own = f"{module.__name__}.{name}"
    return home.get(value, own) if inspect.isclass(value) or inspect.isfunction(value) else own


def page() -> str:
    """The whole page."""
    home = homes()
    contents, blocks = [], list[str]()
    for module, names in everything():
        links = [
            f"`{name}`" if is_error(value) else link(place_of(module, name, value, home), name)
            for name, value in names.items()
        ]
        line = f"{link(module.__name__, module.__name__)}: {', '.join(links)}"
        contents.append("- " + "\n  ".join(filled(line, WIDTH - 2)))
        blocks += describe_module(module, names, home)
    head = ["# API reference", INTRODUCTION.strip(), "## Contents", "\n".join(contents)]
    return "\n\n".join([*head, *blocks]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

"""What `perdure arena tasks` prints: examples of the arena's problems."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import wrap
from typing import TYPE_CHECKING

from perdure.errors import ConfigError, unknown_name
from perdure.streams.arena import ALL_KINDS, ALL_LEVELS, DISPLAY_NAMES, Item, generate

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

WIDTH = 80
_INDENT = "  "


def print_tasks(kind: str | None, level: int | None, count: int, seed: int) -> None:
    """Print examples of one kind, or of all: level, prompt and answer, in all wordings.

    Args:
        kind: one of `ALL_KINDS`; None prints all.
        level: 1 to 5; None mixes 1 to 3, as everywhere.
        count: examples of each kind.
        seed: the same seed prints the same examples.

    Raises:
        ConfigError: there is no such kind or level, or it has not so many problems.
    """
    from rich.console import Console

    if kind is not None and kind not in ALL_KINDS:
        raise ConfigError(f"--kind: {unknown_name('arena kind', kind, ALL_KINDS)}")
    if level is not None and level not in ALL_LEVELS:
        raise ConfigError(f"--level {level}: there are levels {ALL_LEVELS[0]} (easy) to {ALL_LEVELS[-1]} (hard).")
    if count < 1:
        raise ConfigError(f"-n {count}: ask for at least 1 example of each kind.")
    kinds = ALL_KINDS if kind is None else (kind,)
    try:
        found = {name: generate(name, count, seed, level, forms=None) for name in kinds}
    except ValueError as error:
        raise ConfigError(f"-n {count}: {error}.") from error
    console = Console(highlight=False, soft_wrap=True)
    for number, (name, items) in enumerate(found.items()):
        if number:
            console.print()
        _print_kind(console, name, items)


def _print_kind(console: Console, name: str, items: list[Item]) -> None:
    from rich.text import Text

    shown = DISPLAY_NAMES[name]
    console.print(Text(name if shown == name else f"{name} ({shown})", style="bold"))
    for item in sorted(items, key=lambda item: item.level):
        console.print()
        for line in _lines(item):
            console.print(line)


def _lines(item: Item) -> Iterator[Text]:
    """Level, prompt and answer; a prompt of several lines keeps them."""
    from rich.text import Text

    yield Text(f"{_INDENT}level {item.level}", style="dim")
    for line in item.prompt.split("\n"):
        indent = _INDENT + line[: len(line) - len(line.lstrip())]
        for part in wrap(
            line.strip(), WIDTH, initial_indent=indent, subsequent_indent=_INDENT, break_on_hyphens=False
        ):
            yield Text(part)
    yield Text(f"{_INDENT}{item.answer.strip()}", style="green")

"""What a person sees of a run: a progress bar on a terminal, and plain lines everywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from perdure.training.learner import StepResult

FIELDS = ("loss", "speed")


def progress(console: Any, fields: Sequence[str]) -> Any:
    """A rich progress display: what is done, a bar, how many of how many, texts of the newest step, time left."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        *(TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in fields),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        refresh_per_second=4,
    )


class Display:
    """Shows nothing: the base of what does."""

    def say(self, text: str) -> None:
        """One line of text."""

    def start(self, total: int, done: int, name: str, fields: Sequence[str] = FIELDS) -> None:
        """Training begins: `done` of `total` steps are behind it; the bar shows these values of the newest step."""

    def advance(self, what: str, **values: str) -> None:
        """One step was taken, at this task, with these values."""

    def step(self, task: str, result: StepResult, tokens_per_second: float) -> None:
        """One step was taken."""

    def doing(self, what: str) -> None:
        """Something other than steps is going on."""

    @contextmanager
    def counting(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Something is done before the steps; what is yielded is told (how many, of how many)."""
        yield lambda done, of: None

    def stop(self) -> None:
        """Training is over, or stopped."""


class Terminal(Display):
    """A rich progress bar with task, step, loss, speed and time left; lines where output is no terminal."""

    def __init__(self, stderr: bool = False) -> None:
        from rich.console import Console

        self.console = Console(highlight=False, soft_wrap=True, stderr=stderr)
        self._progress: Any = None
        self._bar: Any = None
        self._name = ""

    def say(self, text: str) -> None:
        """One line of text, above the bar."""
        self.console.print(text, markup=False)

    def start(self, total: int, done: int, name: str, fields: Sequence[str] = FIELDS) -> None:
        """Show the bar."""
        self.stop()
        self._name = name
        self._progress = progress(self.console, fields)
        self._bar = self._progress.add_task(name, total=total, completed=done, **dict.fromkeys(fields, ""))
        if self.console.is_terminal:
            self._progress.start()

    def step(self, task: str, result: StepResult, tokens_per_second: float) -> None:
        """Move the bar."""
        self.advance(task, loss=f"loss {result.loss:.3f}", speed=f"{tokens_per_second:,.0f} tokens/s")

    def advance(self, what: str, **values: str) -> None:
        """Move the bar."""
        if self._progress is not None and self.console.is_terminal:
            self._progress.update(self._bar, advance=1, description=f"{self._name}: {what}", **values)

    def doing(self, what: str) -> None:
        """Say on the bar what is going on."""
        if self._progress is not None and self.console.is_terminal:
            self._progress.update(self._bar, description=f"{self._name}: {what}")

    @contextmanager
    def counting(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """A bar of its own, from the first word of how much there is to do."""
        self.stop()

        def tell(done: int, of: int) -> None:
            if self._progress is None:
                self.start(of, done, what, ())
            elif self.console.is_terminal:
                self._progress.update(self._bar, completed=done)

        try:
            yield tell
        finally:
            self.stop()

    def stop(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            if self.console.is_terminal:
                self._progress.stop()
            self._progress = None


class Quiet(Terminal):
    """The bar without the lines."""

    def say(self, text: str) -> None:
        """Nothing."""
